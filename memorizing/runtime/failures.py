"""What a failed process does: it ends at once, and so do the other processes of the run.

Its exit code says whether starting again helps. Without this, a process that fails waits for the others in JAX's
shutdown, they wait for it in a collective, and minutes later all are aborted alike.

  1    a bug, or a run that failed: starting again would end the same way
  2    something the user gave is wrong
  42   stopped and saved, or something below the program failed (a process, a device, the network): starting again helps
  134  and more: the process was killed, or aborted by JAX because another one had vanished: starting again helps
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

import jax

from memorizing.errors import EXIT_FAILED, EXIT_START_AGAIN, EXIT_USER_ERROR, UserError, causes, first_line
from memorizing.runtime import distributed

# Statuses of JAX's runtime that mean a lost machine, device or connection.
_LOST = ("UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "DATA_LOSS")
# Statuses that may mean that, or a bug.
_UNCLEAR = ("INTERNAL", "UNKNOWN", "FAILED_PRECONDITION")

_FAILURES = "failures"
_POLL_SECONDS = 0.5
_EXIT_INTERRUPTED = 130
# Characters of an error that the other processes are told.
_MAX_REASON_LENGTH = 300


class Interrupted(Exception):
    """Something below the program failed; the same command goes on from the newest checkpoint."""


class MachineFailed(Exception):
    """The machine lacks room, memory or permission: starting again does not help before somebody has mended it."""


def find_lost_infrastructure(error: BaseException, has_progressed: bool) -> BaseException | None:
    """The error, or one that caused it, that says that something below the program was lost.

    None if the program itself seems to be wrong.

    Args:
      error: the error that ended the run.
      has_progressed: whether the process finished a step before. If not, an error that may be a bug is taken for one,
        so that nothing is started again for ever.
    """
    for cause in causes(error):
        if isinstance(cause, ConnectionError | TimeoutError):
            return cause
        if isinstance(cause, jax.errors.JaxRuntimeError):
            status = str(cause).partition(":")[0].strip()
            if status in _LOST or (status in _UNCLEAR and has_progressed and _can_lose_something()):
                return cause
    return None


def end_together(run: Callable[[], int]) -> int:
    """Joins the other processes if there are any, runs, and makes all processes end with the same code.

    Args:
      run: returns the exit code.

    Returns:
      The exit code of a process that is alone, or of one of several that ended well or saved. One of several that
      failed does not return.

    Raises:
      UserError, and any error that is a bug, if the process is alone.
    """
    try:
        distributed.initialize()
        if not jax.distributed.is_initialized():
            return run()
        with _Watch():
            code = run()
    except BaseException as error:
        code = _code(error)
        reason = first_line(error)[:_MAX_REASON_LENGTH]
        if code == EXIT_START_AGAIN:
            print(f"memorizing: {reason}", file=sys.stderr, flush=True)
        if not jax.distributed.is_initialized():
            if code == EXIT_START_AGAIN:
                return code
            raise
        if code == EXIT_USER_ERROR:
            print(f"memorizing: {error}", file=sys.stderr)
        elif code != EXIT_START_AGAIN:
            traceback.print_exc()
        fail(code, reason)
    if code not in (0, EXIT_START_AGAIN):
        fail(code, "the run failed")
    distributed.shutdown()
    return code


def fail(code: int, reason: str) -> None:
    """Ends this process at once, and soon all others; if another one failed first, with its code. Does not return."""
    for said in distributed.posted(_FAILURES).values():
        code = int(said.partition(" ")[0])
    # The coordinator may be what is lost.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        distributed.post(f"{_FAILURES}/{distributed.process_id()}", f"{code} {reason}")
    _exit(code)


class _Watch:
    """Ends this process soon after another one has failed, wherever it is waiting."""

    def __enter__(self) -> None:
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="failures", daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(_POLL_SECONDS):
            for process, said in distributed.posted(_FAILURES).items():
                code, _, reason = said.partition(" ")
                print(f"memorizing: process {process} failed: {reason}", file=sys.stderr, flush=True)
                if code == str(EXIT_START_AGAIN):
                    # Where this one was when the other was lost, or hung.
                    faulthandler.dump_traceback()
                _exit(int(code))


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized() and distributed.process_id() == 0:
        # The posts lie in this process: the others read them first.
        time.sleep(4 * _POLL_SECONDS)
    # Neither JAX's shutdown, which waits for processes that wait for this one, nor threads that wait for them.
    os._exit(code)


def _code(error: BaseException) -> int:
    """The exit code for an error."""
    if isinstance(error, UserError):
        return EXIT_USER_ERROR
    if isinstance(error, KeyboardInterrupt):
        return _EXIT_INTERRUPTED
    if isinstance(error, Interrupted) or find_lost_infrastructure(error, has_progressed=False):
        return EXIT_START_AGAIN
    return EXIT_FAILED


def _can_lose_something() -> bool:
    return jax.distributed.is_initialized() or jax.default_backend() != "cpu"
