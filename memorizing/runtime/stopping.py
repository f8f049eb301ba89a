"""Stopping in time: a signal to any process stops all of them at the same step."""

from __future__ import annotations

import itertools
import signal
import threading

import jax

from memorizing.runtime import distributed

# How often a process looks whether another one was told to stop.
_POLL_SECONDS = 0.5

_runs = itertools.count()


class StopSignal:
    """Remembers SIGTERM and the first Ctrl-C instead of dying of them, so that the loop can save.

    Processes agree on where to stop by how often each has asked, which is the same at the same place of the program.
    Once one of them is told, every process says how far it has come and holds its next question until all have said so;
    the question after the furthest is where all stop. What they say is said by a thread: a process that waits for the
    others' part of a step cannot ask. Nothing is exchanged in a step.
    """

    # Not JAX's reached_preemption_sync_point: it does nothing in a single process, does not know Ctrl-C, and wants one
    # growing step number, but this is also asked inside evaluations, and Orbax asks it with numbers of its own.

    def __init__(self) -> None:
        self._told = False
        self._posts = f"stop/{next(_runs)}"
        self._asked = 0
        self._stop_at: int | None = None
        # Held while the processes agree: nobody gets further meanwhile.
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
            return self._told
        with self._agreeing:
            self._asked += 1
            return self._stop_at is not None and self._asked >= self._stop_at

    def _tell(self, number: int, _: object) -> None:
        self._told = True
        # A second Ctrl-C means it.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _agree(self) -> None:
        while not self._told and not distributed.posted(self._posts):
            if self._closing.wait(_POLL_SECONDS):
                return
        with self._agreeing:
            distributed.post(f"{self._posts}/{jax.process_index()}", str(self._asked))
            while len(said := distributed.posted(self._posts)) < jax.process_count():
                if self._closing.wait(0.05):
                    return
            self._stop_at = 1 + max(map(int, said.values()))
