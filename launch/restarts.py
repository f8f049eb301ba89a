"""The contract of exit codes, and the loop that starts a job again. JobSet applies the same contract in GKE."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence

# What a program says by its exit code.
DONE = 0
FAILED = 1
MISTAKE = 2
START_AGAIN = 42


class Outcome(enum.Enum):
    """How one attempt to run a job ended."""

    DONE = "done"
    # It saved because it was asked to stop, or its machines were taken away. Neither is a failure: it is started again
    # however often.
    START_AGAIN = "saved, starts again"
    MACHINES_LOST = "machines lost"
    # A bug, a loss that is no number, a killed process, a broken machine: started again as often as the job allows.
    FAILED = "failed"
    # Something given is wrong: starting again cannot help.
    MISTAKE = "something given is wrong"


def outcome(codes: Sequence[int]) -> Outcome:
    """The outcome of an attempt from the exit codes of its processes; a signal is a negative code, or 128 and more.

    One process that reports a mistake is enough. A failure outweighs a save: when one process crashes, the others only
    see that it is lost, and save what they have.
    """
    if MISTAKE in codes:
        return Outcome.MISTAKE
    if FAILED in codes:
        return Outcome.FAILED
    if START_AGAIN in codes:
        return Outcome.START_AGAIN
    return Outcome.DONE if all(code == DONE for code in codes) else Outcome.FAILED


def run_with_restarts(
    attempt: Callable[[int], Outcome], restarts: int, report: Callable[..., None], pause_s: float = 0.0
) -> int:
    """Runs attempts 1, 2, ... until one is done, a mistake, or one failure more than `restarts`.

    Args:
      attempt: runs one attempt, given its number.
      restarts: failures that are started again; saves and lost machines do not count.
      report: called as `report(event, **facts)`.
      pause_s: seconds to wait before starting again.

    Returns:
      The exit code of the whole job.
    """
    failures = 0
    number = 0
    while True:
        number += 1
        ended = attempt(number)
        report("ended", attempt=number, outcome=ended.value)
        if ended is Outcome.DONE:
            return DONE
        if ended is Outcome.MISTAKE:
            return MISTAKE
        failures += ended is Outcome.FAILED
        if failures > restarts:
            report("gave up", failures=failures, restarts=restarts)
            return FAILED
        time.sleep(pause_s)
