"""A finished run for the LM Evaluation Harness (EleutherAI), which brings tasks and prompts and keeps the score.

A prompt of any length is read into the memory, segment by segment: nothing is cut off, and no window is chosen.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from tqdm import tqdm  # pyright: ignore[reportMissingModuleSource]

from memorizing.errors import UserError
from memorizing.generation.stopping_text import StoppingText
from memorizing.generation.text_model import Session, TextModel

# What a task may ask of generation, beside `until` and `max_gen_toks`.
SAMPLING = ("temperature", "top_k", "top_p")
DEFAULT_GENERATED = 256


class Request(Protocol):
    """See `lm_eval.api.instance.Instance`."""

    @property
    def args(self) -> tuple: ...


class HarnessModel(TemplateLM):
    """Scores continuations and whole texts, and writes on: the three kinds of requests that the harness has.

    Attributes:
      model: that answers.
    """

    def __init__(self, model: TextModel) -> None:
        super().__init__()
        self.model = model

    @property
    def eot_token_id(self) -> int:
        """What stands before a text: the harness gives it as the context of a text without one."""
        return self.model.vocabulary.start_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text. None is special: the token before a text stands before its session."""
        return self.model.vocabulary.encode(string).tolist()

    def loglikelihood_rolling(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[float]:
        """log p of each text, in nats; of an empty one 0."""
        texts = [request.args[0] for request in requests]
        return [self._log_probability(text) for text in tqdm(texts, "reading", disable=disable_tqdm)]

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of the texts at which a task wants to stop.

        Raises:
          UserError: a task asks for a setting that is not known, or out of range.
        """
        prompts = [request.args for request in requests]
        return [self._written(*prompt) for prompt in tqdm(prompts, "writing", disable=disable_tqdm)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """log p of continuations, and whether each of their tokens was the most likely one.

        A context is read once for all its continuations, such as the answers of a multiple choice.
        """
        of_context: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
        for number, (_text, context, _continuation) in enumerate(requests):
            of_context[tuple(context)].append(number)
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="reading", disable=disable_tqdm) as progress:
            for context, numbers in of_context.items():
                session = self._session(context)
                for number in numbers:
                    continuation = np.array(requests[number][2], np.int32)
                    scores = session.copy().read_tokens(continuation)
                    nats = np.sum(scores.nats, dtype=np.float64)
                    answers[number] = (-float(nats), bool(np.all(scores.is_likeliest)))
                    progress.update()
        return [answers[number] for number in range(len(requests))]

    def _session(self, context: Iterable[int]) -> Session:
        """A session that has read a context."""
        tokens = np.array(list(context), np.int32)
        session = self.model.session()
        # The token before a text is there already.
        if tokens.tolist() != [self.eot_token_id]:
            session.read_tokens(tokens)
        return session

    def _log_probability(self, text: str) -> float:
        tokens = self.model.vocabulary.encode(text)
        nats = self.model.session().read_tokens(tokens).nats
        return -float(np.sum(nats, dtype=np.float64))

    def _written(self, context: str, asked: Mapping[str, Any]) -> str:
        settings = dict(asked)
        until = settings.pop("until", None) or []
        number = int(settings.pop("max_gen_toks", DEFAULT_GENERATED))
        sampling: dict[str, Any] = {name: settings.pop(name) for name in SAMPLING if name in settings}
        is_drawn = settings.pop("do_sample", sampling.get("temperature", 0) > 0)
        if settings:
            known = ", ".join(("until", "max_gen_toks", "do_sample", *SAMPLING))
            raise UserError(f"a task asks to generate with {settings}: known are {known}")
        if not is_drawn:
            sampling = {"temperature": 0.0}
        session = self.model.session()
        session.read_tokens(self.model.vocabulary.encode(context))
        ends = [until] if isinstance(until, str) else until
        text, written = StoppingText([end for end in ends if end]), ""
        for texts in session.write(number, **sampling):
            written += text.add(texts[0])
            if text.has_stopped:
                break
        return written + text.end()
