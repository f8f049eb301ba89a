"""The command `report`: a run as one page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from memorizing.commands.watching.status import add_workdir
from memorizing.errors import UserError
from memorizing.evaluation.run_page.page import FILE, make_page
from memorizing.runtime.json_lines import replace_text
from memorizing.runtime.watching.records import read_run
from memorizing.runtime.watching.status import status_of
from memorizing.runtime.workdir import resolve

DESCRIPTION = """\
Writes a run as one HTML page, WORKDIR/report.html: losses, evaluations by position, gates, hits and fill of the memories, where the time went, the configuration, and links to what memorizing inspect has written. Nothing else is needed to read it: no network, no script. It reads what the run has left so far and may be made while the run trains.

  memorizing report                       the demo's run
  memorizing report runs/first
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.description = DESCRIPTION
    add_workdir(parser)


def run(options: argparse.Namespace, bindings: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    if bindings:
        raise UserError("report: shows a run as it is, and takes no --gin.NAME=VALUE")
    records = read_run(resolve(options.workdir))
    page = make_page(records.workdir.name, records, status_of(records))
    path = records.workdir / FILE
    try:
        replace_text(path, page)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from error
    for what in records.damage:
        print(f"damaged: {what}")
    print(f"written: {path}")
    return 0
