"""The command `gin`: lists the gin files that come with the package, and shows one."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

from memorizing.config.files import GIN_FOLDER, find_file, shipped_files
from memorizing.errors import UserError

# Columns of a line.
_WIDTH = 120

DESCRIPTION = """\
Lists the gin files that come with the package: runs, and the models, tasks and meshes that they are made of. With a name, shows that file.

  memorizing gin
  memorizing gin demo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.description = DESCRIPTION
    parser.add_argument("name", nargs="?", metavar="FILE", help="what to show: a path or the name of a shipped file")


def run(options: argparse.Namespace, bindings: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    if bindings:
        raise UserError("gin: shows files as they are, and takes no --gin.NAME=VALUE")
    print(find_file(options.name).read_text(encoding="utf-8-sig").rstrip() if options.name else _listing())
    return 0


def _listing() -> str:
    """A line for each file, by folder."""
    lines = []
    for folder, names in itertools.groupby(shipped_files(), key=lambda name: name.partition("/")[0]):
        lines += ["", f"{folder}:"] if lines else [f"{folder}:"]
        lines += [_line(name) for name in names]
    return "\n".join(lines)


def _line(name: str) -> str:
    """The name of a file, and the first line of the comment that it begins with."""
    first = (GIN_FOLDER / name).read_text().partition("\n")[0].lstrip("# ")
    line = f"  {name.removesuffix('.gin'):<48}{first}"
    return line if len(line) <= _WIDTH else line[: _WIDTH - 4].rpartition(" ")[0] + " ..."
