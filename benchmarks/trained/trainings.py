"""Trainings in processes of their own: what was stopped goes on, what has ended is not done again."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO

from memorizing.errors import EXIT_START_AGAIN

# What `memorizing train` leaves in a run's folder at its end.
RESULT = "evaluation.json"


class Failed(Exception):
    """A command ended with an exit code that does not ask for another start."""


class NoTimeLeft(Exception):
    """A command was stopped, or not begun."""


def train(
    flags: Sequence[str],
    workdir: pathlib.Path,
    steps: int,
    environment: Mapping[str, str],
    times: pathlib.Path,
    log: IO[str] | None = None,
    end: float | None = None,
) -> None:
    """Trains and evaluates a run, unless that was done before.

    Args:
      flags: of `memorizing train`, but for the workdir.
      workdir: of the run.
      steps: of the whole training.
      environment: beside that of this process, which counts where both have a variable.
      times: a file of JSON lines to which the seconds that it took are added.
      log: where what it prints goes; None for where this process prints.
      end: by `time.monotonic()`, when it is asked to stop; it goes on another time.

    Raises:
      Failed: it ended otherwise than done, or asking to be started again.
      NoTimeLeft: it is not done at the end.
    """
    command_line = ["train", *flags, f"--workdir={workdir}"]
    while finished_step(workdir) != steps:
        start = time.monotonic()
        code = command(command_line, environment, log, end)
        seconds = round(time.monotonic() - start, 1)
        with times.open("a") as file:
            file.write(json.dumps({"run": workdir.name, "seconds": seconds, "code": code}) + "\n")
        if code not in (0, EXIT_START_AGAIN):
            raise Failed(f"{workdir.name}: memorizing train ended with exit code {code}")


def evaluate(
    workdir: pathlib.Path,
    flags: Sequence[str],
    environment: Mapping[str, str],
    log: IO[str] | None = None,
    end: float | None = None,
) -> None:
    """Evaluates a finished run; arguments as of `train`.

    Raises:
      Failed: it ended otherwise than done.
      NoTimeLeft: it is not done at the end.
    """
    code = command(["evaluate", f"--workdir={workdir}", *flags], environment, log, end)
    if code != 0:
        raise Failed(f"{workdir.name}: memorizing evaluate ended with exit code {code}")


def command(
    command_line: Sequence[str],
    environment: Mapping[str, str],
    log: IO[str] | None = None,
    end: float | None = None,
) -> int:
    """Runs `memorizing` with these arguments; returns its exit code. Arguments and errors as of `train`."""
    if end is not None and time.monotonic() >= end:
        raise NoTimeLeft
    print("$ memorizing " + " ".join(command_line), file=log, flush=True)
    arguments = [sys.executable, "-m", "memorizing", *command_line]
    with subprocess.Popen(arguments, env={**environment, **os.environ}, stdout=log, stderr=log) as process:
        try:
            return process.wait(None if end is None else end - time.monotonic())
        except subprocess.TimeoutExpired:
            # A training saves where it is.
            process.terminate()
            raise NoTimeLeft from None


def finished_step(workdir: pathlib.Path) -> int | None:
    """The step of a run's result; None if there is none yet."""
    result = workdir / RESULT
    if not result.exists():
        return None
    return json.loads(result.read_text())["step"]
