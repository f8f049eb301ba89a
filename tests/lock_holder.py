"""Processes that want a folder at random moments, write into it while they hold it, and are killed at random moments.

A program of its own: without JAX and its threads, processes are made by `fork`, which takes a millisecond.

Whoever holds writes its number into `holder`; finding there the number of another process that lives is a violation.
"""

from __future__ import annotations

import os
import pathlib
import random
import signal
import sys
import time

from etils import epath

from memorizing.errors import EXIT_USER_ERROR, UserError
from memorizing.runtime.workdir_lock import held


def main(folder: pathlib.Path, rounds: int) -> None:
    """Exits with 1 and says what happened if two processes held the folder together, or nobody did."""
    rng = random.Random(rounds)
    for _ in range(rounds):
        children = []
        for _ in range(rng.randint(2, 4)):
            children.append(start(folder, rng.uniform(0, 0.05)))
            time.sleep(rng.choice([0, rng.uniform(0, 0.05)]))
        killed = rng.sample(children, rng.randint(0, 2))
        for child in killed:
            time.sleep(rng.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
        codes = {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
        assert codes <= {0, EXIT_USER_ERROR, -signal.SIGKILL}, codes
        assert killed or 0 in codes, "nobody held the folder"
    violations = folder / "violations"
    assert not violations.exists(), violations.read_text()
    with held(epath.Path(folder), print):
        assert len(list(folder.glob(".lock-*"))) == 1


def start(folder: pathlib.Path, seconds: float) -> int:
    """A process that wants the folder for so long; its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = hold(folder, seconds)
    finally:
        os._exit(code)


def hold(folder: pathlib.Path, seconds: float) -> int:
    holder = folder / "holder"
    number = str(os.getpid())
    try:
        with held(epath.Path(folder), print) as check:
            end = time.monotonic() + seconds
            before = holder.read_text() if holder.exists() else ""
            if before and is_alive(int(before)):
                violate(folder, f"{number} found {before}")
            replace(holder, number)
            while time.monotonic() < end:
                check()
                if holder.read_text() != number:
                    violate(folder, f"{number} was displaced")
                time.sleep(0.001)
            replace(holder, "")
    except UserError:
        return EXIT_USER_ERROR
    return 0


def is_alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def replace(path: pathlib.Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)


def violate(folder: pathlib.Path, what: str) -> None:
    with open(folder / "violations", "a") as file:
        file.write(what + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
