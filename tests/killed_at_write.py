"""Runs a command over tiny texts, as a process that is killed before one of the changes it makes to files.

python killed_at_write.py PLACE FOLDER COMMAND [FLAG ...]

Changes are counted from 0: a file of FOLDER opened for writing, renamed or removed. If there are no more than PLACE the
command ends by itself.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import tiny_texts  # noqa: F401  (its data are registered under the name that the run's configuration has)

from memorizing import main

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def kill_before_change(place: int, folder: str) -> None:
    """Has Python tell every change in the folder, and kills the process before that of this number."""
    changes = 0

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if event == "open":
            path, _, flags = arguments
            is_change = bool(flags & WRITES)
        elif event in ("os.rename", "os.remove"):
            path, is_change = arguments[0], True
        else:
            return
        if not is_change or not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(folder):
            return
        if changes == place:
            os.kill(os.getpid(), signal.SIGKILL)
        changes += 1

    sys.addaudithook(see)


if __name__ == "__main__":
    place, folder, *command = sys.argv[1:]
    kill_before_change(int(place), folder)
    sys.exit(main._run(command))
