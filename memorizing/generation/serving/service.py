"""A model and its sessions, for many at once: reads texts into sessions, and writes on from them.

A session changes as a whole or not at all. Whoever changes it has it alone; whoever only asks goes on from what it was
when the question came, and neither waits nor is waited for.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from memorizing.generation.programs import TextState
from memorizing.generation.serving.requests import BadRequest, Completion
from memorizing.generation.serving.scheduler import Job, Outcome, Scheduler
from memorizing.generation.serving.session_store import CannotBeWritten, SessionStore, UnknownSession
from memorizing.generation.stopping_text import StoppingText
from memorizing.generation.text_model import Score, TextModel, TextStream


class Written(NamedTuple):
    """A text that was written.

    Attributes:
      text: the text.
      num_read, num_written: tokens of the prompt, and of the text.
      reason: why it ended: 'length' or 'stop'.
    """

    text: str
    num_read: int
    num_written: int
    reason: str


class Service:
    """What clients can ask of a model. Coroutines of one event loop.

    Attributes:
      name: of the model.
      model: the model.
      sessions: those that are kept.
    """

    def __init__(self, model: TextModel, sessions: SessionStore, num_places: int) -> None:
        """
        Args:
          model: that reads and writes.
          sessions: of that model.
          num_places: requests that are worked on at once.
        """
        self.name = model.run.workdir.name
        self.model, self.sessions = model, sessions
        self._scheduler = Scheduler(model, num_places)
        # Of every session that somebody is changing.
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def warm_up(self) -> None:
        """Compiles what requests need."""
        tokens = np.zeros(self.model.run.experiment.batch.segment_length + 1, np.int32)
        # The second one is put beside the first.
        jobs = [Job(self.model.start(), tokens, num_tokens=1) for _ in range(2)]
        for outcome in [self._scheduler.submit(job) for job in jobs]:
            outcome.result()

    def close(self) -> list[CannotBeWritten]:
        """Ends what is being worked on, and writes all sessions to files; returns what could not be written."""
        self._scheduler.close()
        return self.sessions.save_all()

    async def read(self, name: str, text: str) -> dict[str, Any]:
        """Reads a text into a session, a new one if there is none of this name."""
        tokens = await asyncio.to_thread(self.model.vocabulary.encode, text)
        async with self._changing(name):
            try:
                state = await asyncio.to_thread(self.sessions.get, name)
            except UnknownSession:
                state = self.model.start()
            outcome = await self._run(Job(state, tokens, keep=True))
            num_tokens = await self._keep(name, outcome)
        score = Score(tokens, outcome.nats, (), len(text.encode()))
        how_well = {"perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}
        return {"id": name, "tokens": num_tokens, "read": {"tokens": len(tokens), **how_well}}

    async def write(self, asked: Completion, on_text: Callable[[str], None] = lambda _: None) -> Written:
        """Reads the prompt, and writes on.

        Args:
          asked: the request.
          on_text: told parts of the text as they come, in the event loop.
        """
        if asked.session is not None and asked.remember:
            async with self._changing(asked.session):
                state = await asyncio.to_thread(self.sessions.get, asked.session)
                written, outcome = await self._write_on(state, asked, on_text)
                await self._keep(asked.session, outcome)
            return written
        state = self.model.start()
        if asked.session is not None:
            state = await asyncio.to_thread(self.sessions.get, asked.session)
        written, _ = await self._write_on(state, asked, on_text)
        return written

    async def save(self, name: str, other: str | None) -> dict[str, Any]:
        """Writes a session to its file; or, as it is, under another name that nobody has."""
        async with self._changing(name):
            if other is None:
                await asyncio.to_thread(self.sessions.save, name)
                return await self.describe(name)
            state = await asyncio.to_thread(self.sessions.get, name)
        async with self._changing(other):
            try:
                await asyncio.to_thread(self.sessions.get, other)
            except UnknownSession:
                await asyncio.to_thread(self.sessions.put, other, state)
                await asyncio.to_thread(self.sessions.save, other)
                return await self.describe(other)
        raise BadRequest(f"there is a session {other!r} already: delete it first, or choose another name", "as")

    async def describe(self, name: str) -> dict[str, Any]:
        """What is known of a session."""
        return await asyncio.to_thread(self.sessions.describe_one, name)

    async def delete(self, name: str) -> None:
        """Forgets a session, and deletes its file."""
        async with self._changing(name):
            await asyncio.to_thread(self.sessions.delete, name)

    def _changing(self, name: str) -> asyncio.Lock:
        """To be held by whoever changes a session."""
        return self._locks.setdefault(name, asyncio.Lock())

    async def _keep(self, name: str, outcome: Outcome) -> int:
        """Makes an outcome what a session is; returns its tokens."""
        assert outcome.state is not None, "asked for"
        keeping = asyncio.ensure_future(asyncio.to_thread(self.sessions.put, name, outcome.state))
        try:
            await asyncio.shield(keeping)
        except asyncio.CancelledError:
            # Nothing stops a thread: until it has ended, nobody else may change the session.
            await asyncio.wait([keeping])
            raise
        return outcome.state.num_tokens

    async def _run(self, job: Job) -> Outcome:
        """Waits for a job; who stops waiting cancels it."""
        return await asyncio.wrap_future(self._scheduler.submit(job))

    async def _write_on(
        self, state: TextState, asked: Completion, on_text: Callable[[str], None]
    ) -> tuple[Written, Outcome]:
        vocabulary, loop = self.model.vocabulary, asyncio.get_running_loop()
        tokens = np.zeros(0, np.int32)
        if asked.prompt is not None:
            tokens = await asyncio.to_thread(vocabulary.encode, asked.prompt)
        stream, text, parts = TextStream(vocabulary), StoppingText(asked.stop), []

        def tell(part: str) -> None:
            parts.append(part)
            on_text(part)

        def on_token(token: int) -> bool:
            loop.call_soon_threadsafe(tell, text.add(stream.add(token)))
            return text.has_stopped

        outcome = await self._run(
            Job(state, tokens, asked.max_tokens, asked.sampling, asked.seed, on_token, asked.remember)
        )
        tell(text.add(stream.end()) + text.end())
        return Written("".join(parts), len(tokens), outcome.num_written, outcome.reason), outcome
