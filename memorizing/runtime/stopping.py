"""Stopping in time: a signal to any process stops all of them at the same step."""

from __future__ import annotations

import itertools
import signal
import threading

import jax

from memorizing.runtime import distributed

# How often a process looks whether another one got a signal.
_POLL_SECONDS = 0.5

_runs = itertools.count()


class StopSignal:
    """Remembers SIGTERM and the first Ctrl-C instead of ending the process, so that the loop can save.

    Processes agree on where to stop by counting calls of `reached`: at the same place of the program, every process has
    called it equally often. Once one of them gets a signal, every process posts its count, and waits in its next call
    until all have posted. All stop at the call after the largest count. The counts are posted by a thread, because a
    process that waits for the others in a step cannot post. Steps themselves exchange nothing.
    """

    # Not JAX's reached_preemption_sync_point: it does nothing in a single process, does not know Ctrl-C, and wants one
    # growing step number, but this is also asked inside evaluations, and Orbax asks it with numbers of its own.

    def __init__(self) -> None:
        self._has_signal = False
        self._posts = f"stop/{next(_runs)}"
        # Calls of `reached` so far, and the call at which to stop.
        self._num_calls = 0
        self._stop_at: int | None = None
        # Held while the processes agree: no process gets further in the meantime.
        self._agreeing = threading.Lock()
        self._closing = threading.Event()

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._tell) for number in (signal.SIGTERM, signal.SIGINT)}
        if jax.process_count() > 1:
            threading.Thread(target=self._agree, name="stop", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def reached(self) -> bool:
        """Whether to stop here. Every process has to ask at the same places: once a step."""
        if jax.process_count() == 1:
            return self._has_signal
        with self._agreeing:
            self._num_calls += 1
            return self._stop_at is not None and self._num_calls >= self._stop_at

    def _tell(self, number: int, _: object) -> None:
        self._has_signal = True
        # A second Ctrl-C ends the process.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _agree(self) -> None:
        while not self._has_signal and not distributed.posted(self._posts):
            if self._closing.wait(_POLL_SECONDS):
                return
        with self._agreeing:
            distributed.post(f"{self._posts}/{jax.process_index()}", str(self._num_calls))
            counts = distributed.posted(self._posts)
            while len(counts) < jax.process_count():
                if self._closing.wait(0.05):
                    return
                counts = distributed.posted(self._posts)
            self._stop_at = 1 + max(map(int, counts.values()))
