"""Ends a run that hangs: otherwise a lost device or a deadlock would hold the machines for ever, in silence."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable

_POLL_SECONDS = 1.0


class HangDetector:
    """Calls a function when nothing has been finished for too long."""

    def __init__(self, limit_seconds: float, on_hang: Callable[[str], None]) -> None:
        """
        Args:
          limit_seconds: time without a `beat` after which the run is taken to hang; 0 for no limit.
          on_hang: called once, from a thread of its own, with a line that says so, after the stacks of all threads were
            written to stderr. Expected to end the process.
        """
        self._limit = limit_seconds
        self._on_hang = on_hang
        self._silent_seconds = 0.0
        self._closing = threading.Event()

    def __enter__(self) -> HangDetector:
        if self._limit:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()

    def beat(self) -> None:
        """Something was finished."""
        self._silent_seconds = 0.0

    def _watch(self) -> None:
        poll = min(_POLL_SECONDS, self._limit / 4)
        last = time.monotonic()
        while not self._closing.wait(poll):
            now = time.monotonic()
            # A process that was itself stopped (Ctrl-Z, a suspended laptop) does not hang.
            self._silent_seconds += min(now - last, 2 * poll)
            last = now
            if self._silent_seconds > self._limit:
                reason = f"no step was finished in {self._limit:g} seconds"
                print(f"\nmemorizing: {reason}; the threads are at:", file=sys.stderr)
                faulthandler.dump_traceback()
                self._on_hang(reason)
                return
