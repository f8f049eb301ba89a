"""Files of JSON objects, one a line, that grow while a run lives and are readable whenever it is killed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from memorizing.errors import UserError

Line = dict[str, Any]


def read_lines(path: epath.Path, names: Sequence[str] = ()) -> list[Line]:
    """The lines of a file but for a last one that a killed process left unfinished; none if there is no file.

    Args:
      path: of the file.
      names: what every line has.

    Raises:
      UserError: a line is damaged: to leave out what follows would lose it.
    """
    if not path.exists():
        return []
    *texts, _ = path.read_bytes().split(b"\n")
    lines: list[Line] = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not line.keys() >= {*names}:
            raise UserError(f"{path} is damaged in line {number}: restore the file, or delete the line")
        lines.append(line)
    return lines


class JsonLines:
    """Appends to a file.

    Attributes:
      lines: that were there before.
    """

    def __init__(
        self, path: epath.Path, names: Sequence[str] = (), keep: Callable[[Line], bool] = lambda _: True
    ) -> None:
        """
        Args:
          path: of the file; created if missing.
          names: what every line has.
          keep: whether a line that is there already stays.

        Raises:
          UserError: a line that is there is damaged.
        """
        self._path = path
        self.lines = [line for line in read_lines(path, names) if keep(line)]
        self._rewrite(self.lines)
        # Appending needs a local file; other file systems get the whole file again.
        self._is_remote = is_remote(path)
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


def is_remote(path: epath.Path) -> bool:
    """Whether a path is in an object store (gs://...), where nothing can be appended."""
    return "://" in str(path)


def replace_text(path: epath.Path, text: str) -> None:
    """Writes a file atomically: whenever the process is killed, the old or the new text is there as a whole."""
    replace_bytes(path, text.encode())


def replace_bytes(path: epath.Path, content: bytes) -> None:
    """Writes a file atomically; where there is no room for it, nothing of it stays."""
    if is_remote(path):
        # An object is there as a whole or not at all, and to rename one is to copy it.
        path.write_bytes(content)
        return
    unfinished = path.parent / f".{path.name}.unfinished"
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
