"""Who reads and who writes: jobs share the device, one thread drives it.

A job reads a text into what is known of another, and writes on. So many as there are places run at once, the others
wait in the order in which they came. In a round every job that reads passes one segment, and every job that writes gets
a token, of one decode step for all: a long text keeps nobody from writing. While nobody reads, it gets several tokens.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal, NamedTuple

import jax
import numpy as np

from memorizing.generation.decoding import TextDecoder
from memorizing.generation.programs import MOST_TOKENS, TextState
from memorizing.generation.sampling import Sampling, SamplingArrays
from memorizing.generation.side_by_side import Writer
from memorizing.generation.text_model import TextModel


class Outcome(NamedTuple):
    """What a job leads to.

    Attributes:
      state: of the text, on the host, with all that was read and written; None unless it was asked for.
      nats: float32 [length], -log p of each token that was read.
      num_written: tokens.
      reason: why writing ended: at so many tokens as were asked for ('length'), or because the model ended the document
        or `Job.on_token` said so ('stop').
    """

    state: TextState | None
    nats: np.ndarray
    num_written: int
    reason: Literal["length", "stop"]


@dataclasses.dataclass(eq=False)
class Job:
    """Reads on, then writes on.

    Attributes:
      state: where it begins; it stays as it is.
      tokens: int32 [length], to read; perhaps none.
      num_tokens: to write, at most; perhaps none.
      sampling: how they are drawn.
      seed: of the random numbers.
      on_token: told every token as it is drawn, by the scheduler's thread; whether to stop after it.
      keep: whether the outcome has the state.
      outcome: may be waited for, and cancelled.
    """

    state: TextState
    tokens: np.ndarray
    num_tokens: int = 0
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    on_token: Callable[[int], bool] = lambda _: False
    keep: bool = False
    outcome: Future[Outcome] = dataclasses.field(default_factory=Future)


class Scheduler:
    """Runs jobs, until it is closed."""

    def __init__(self, model: TextModel, num_places: int) -> None:
        """
        Args:
          model: that reads and writes.
          num_places: jobs that run at once.
        """
        self._model, self._num_places = model, num_places
        self._side_by_side = model.side_by_side(num_places)
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: dict[int, _Running] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Future[Outcome]:
        """Has a job run; returns its outcome. Raises RuntimeError after `close`."""
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the scheduler is closed")
            self._waiting.append(job)
            self._changed.notify()
        return job.outcome

    def close(self) -> None:
        """Cancels what has not ended, and ends the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        for job in [*self._waiting, *(running.job for running in self._running.values())]:
            job.outcome.cancel()

    def _run(self) -> None:
        while self._next_jobs():
            try:
                self._round()
            except Exception as error:
                # Such as too little memory. What was on the devices may be lost; the next job begins anew.
                for running in self._running.values():
                    _fail(running.job, error)
                self._running = {}
                self._side_by_side = self._model.side_by_side(self._num_places)

    def _next_jobs(self) -> bool:
        """Waits until there is a job, and gives jobs their places; False when the scheduler is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._waiting or self._running)
            if self._is_closed:
                return False
            free = [place for place in range(self._num_places) if place not in self._running]
            while free and self._waiting:
                job = self._waiting.popleft()
                if not job.outcome.cancelled():
                    self._running[free.pop(0)] = _Running(job, self._model)
            return True

    def _round(self) -> None:
        """A segment for every job that reads, a token or a few for every one that writes."""
        is_read = False
        for place, running in [*self._running.items()]:
            if running.job.outcome.cancelled():
                del self._running[place]
            elif running.has_more_to_read:
                running.read()
                is_read = True
        writers = {
            place: running.writer
            for place, running in self._running.items()
            if not running.has_more_to_read and not running.is_done
        }
        if writers:
            drawn = self._side_by_side.draw(writers, 1 if is_read else MOST_TOKENS)
            for place, tokens in drawn.items():
                self._running[place].take(tokens)
        for place, running in [*self._running.items()]:
            if running.is_done:
                # Before the outcome is told, so that whoever waits for it finds a free place.
                del self._running[place]
                running.end()


class _Running:
    """A job that has a place."""

    def __init__(self, job: Job, model: TextModel) -> None:
        self.job = job
        self._model = model
        self._num_read = 0
        self._nats: list[np.ndarray] = []
        self._num_written = 0
        self._has_stopped = False

    @functools.cached_property
    def _text(self) -> TextDecoder:
        return self._model.reader(self.job.state)

    @functools.cached_property
    def _sampling(self) -> SamplingArrays:
        return self.job.sampling.arrays(self._model.allowed, self.job.seed)

    @property
    def writer(self) -> Writer:
        return Writer(self._text, self._sampling, self.job.num_tokens - self._num_written)

    @property
    def has_more_to_read(self) -> bool:
        return self._num_read < len(self.job.tokens)

    @property
    def is_done(self) -> bool:
        return not self.has_more_to_read and (self._has_stopped or self._num_written == self.job.num_tokens)

    def read(self) -> None:
        """Reads to the end of the open segment."""
        length = self._model.run.experiment.batch.segment_length
        # A segment that was written may be full, and not closed yet.
        size = length - self._text.num_open or length
        tokens = self.job.tokens[self._num_read : self._num_read + size]
        self._nats.append(self._text.read(tokens[None]).nats[0])
        self._num_read += len(tokens)

    def take(self, tokens: np.ndarray) -> None:
        """Goes on with tokens that were drawn, int32 [tokens, 1]: up to the last that is wanted, if there is one.

        The end of the document is not written.
        """
        for token in tokens:
            if token[0] == self._model.vocabulary.end_id:
                self._has_stopped = True
                return
            self._text.accept(token)
            self._num_written += 1
            self._has_stopped = self.job.on_token(int(token[0]))
            if self._has_stopped:
                return

    def end(self) -> None:
        """Tells the outcome."""
        state = None
        if self.job.keep:
            known = self._text.state
            state = known._replace(context=jax.device_get(known.context))
        nats = np.concatenate([np.zeros(0, np.float32), *self._nats])
        reason = "stop" if self._has_stopped else "length"
        if self.job.outcome.set_running_or_notify_cancel():
            self.job.outcome.set_result(Outcome(state, nats, self._num_written, reason))


def _fail(job: Job, error: Exception) -> None:
    if job.outcome.set_running_or_notify_cancel():
        job.outcome.set_exception(error)
