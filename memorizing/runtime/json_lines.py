"""Files of JSON objects, one a line, that grow while a run lives and are readable whenever it is killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from etils import epath

Line = dict[str, Any]


def read_lines(path: epath.Path) -> list[Line]:
    """The lines of a file up to one that a killed process left unfinished; none if there is no file."""
    if not path.exists():
        return []
    lines: list[Line] = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class JsonLines:
    """Appends to a file.

    Attributes:
      lines: that were there before.
    """

    def __init__(self, path: epath.Path, keep: Callable[[Line], bool] = lambda _: True) -> None:
        """
        Args:
          path: of the file; created if missing.
          keep: whether a line that is there already stays.
        """
        self._path = path
        self.lines = [line for line in read_lines(path) if keep(line)]
        self._rewrite(self.lines)
        # Appending needs a local file; other file systems get the whole file again.
        self._is_remote = "://" in str(path)
        self._all = list(self.lines)

    def append(self, line: Line) -> None:
        """Adds a line; it is in the file when this returns."""
        if self._is_remote:
            self._all.append(line)
            self._rewrite(self._all)
        else:
            with open(self._path, "a") as file:
                file.write(json.dumps(line) + "\n")

    def _rewrite(self, lines: list[Line]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        replace_text(self._path, text)


def replace_text(path: epath.Path, text: str) -> None:
    """Writes a file atomically: whenever the process is killed, the old or the new text is there as a whole."""
    unfinished = path.parent / f".{path.name}.unfinished"
    unfinished.write_text(text)
    unfinished.replace(path)
