"""What tasks with prompts share: a context that tells something, a question, and answers that are scored."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from memorizing.errors import UserError
from memorizing.synthetic.recall.language import Language, PlainWords
from memorizing.synthetic.task import Split, SyntheticTask, Text

# From this length in tokens on a prompt is fitted as published: room for all tokens to generate, and in steps.
PUBLISHED_LENGTH = 4096


class Prompt(NamedTuple):
    """One sample.

    Attributes:
      text: the prompt and its answers; what stands before the first answer is the prompt.
      references: right answers, as text.
      question: as text.
      num_generated: tokens that a model is asked for.
    """

    text: Text
    references: tuple[str, ...]
    question: str
    num_generated: int


class Draft:
    """A prompt that is being written: pieces one after the other."""

    def __init__(self) -> None:
        self._pieces: list[np.ndarray] = []
        # Of each answer, its place and where it was told.
        self._answers: list[tuple[slice, int]] = []
        self.length = 0

    def add(self, ids: np.ndarray) -> int:
        """Adds a piece; returns the position of its last token."""
        self._pieces.append(ids)
        self.length += len(ids)
        return self.length - 1

    def answer(self, ids: np.ndarray, told_at: int) -> None:
        """Adds an answer that was told at a position."""
        self._answers.append((slice(self.length, self.length + len(ids)), told_at))
        self.add(ids)

    def text(self) -> Text:
        """Everything."""
        is_answer = np.zeros(self.length, bool)
        told_at = np.full(self.length, -1)
        for place, told in self._answers:
            is_answer[place] = True
            told_at[place] = told
        return Text(np.concatenate(self._pieces).astype(np.int32), is_answer, told_at)


@dataclasses.dataclass(frozen=True)
class PromptTask(SyntheticTask):
    """A task whose samples are prompts, as long as the segments allow.

    Attributes:
      language: what they are written in.
    """

    language: Language = PlainWords()

    @property
    def vocab_size(self) -> int:
        return self.language.vocab_size

    @abc.abstractmethod
    def prompt(self, rng: np.random.Generator, length: int) -> Prompt:
        """A sample of at most so many tokens.

        Raises:
          TooShort: they are too few.
        """

    def training_text(self, rng: np.random.Generator, length: int) -> Text:
        """What a model is trained on: a sample, unless a task has more to teach. Raises TooShort, see `prompt`."""
        return self.prompt(rng, length).text

    @abc.abstractmethod
    def score(self, prediction: str, prompt: Prompt) -> float:
        """What the benchmark gives for a generated text, from 0 to 1."""

    def write(self, rng: np.random.Generator, split: Split, num_segments: int, segment_length: int) -> Text:
        length = num_segments * segment_length
        try:
            return self.training_text(rng, length) if split == "train" else self.prompt(rng, length).text
        except TooShort as error:
            raise UserError(
                f"BatchConfig.segment_length = {segment_length}: a sample of {type(self).__name__} takes "
                f"{error.needed} tokens or more, {num_segments} segments have {length}"
            ) from None

    def held_out_prompt(self, index: int, segment_length: int) -> Prompt:
        """A held-out sample, as `held_out_text` has it."""
        return self.prompt(self.held_out_rng(index), self.eval_segments * segment_length)


class TooShort(ValueError):
    """A prompt does not fit.

    Attributes:
      needed: tokens that it takes at least.
    """

    def __init__(self, needed: int) -> None:
        super().__init__(f"a prompt takes {needed} tokens")
        self.needed = needed


def fitted(lengths: np.ndarray, room: int, length: int, step: int) -> int:
    """How many units of a haystack fit.

    As published, this is a multiple of a step, unless that would leave more than a twentieth of the haystack away:
    steps are made for the subwords of large models. Where prompts are short, any number will do.

    Args:
      lengths: int [units], tokens of each.
      room: tokens that are left for them.
      length: of the whole prompt.
      step: as published, in units.
    """
    number = int(np.searchsorted(np.cumsum(lengths), room, side="right"))
    step = 1 if length < PUBLISHED_LENGTH else min(step, max(number // 20, 1))
    return number // step * step


def room_for_answer(answers: int, published: int, length: int) -> int:
    """Tokens that are kept free behind a prompt: those of the answer, and as many as published where it is long."""
    return max(answers, published) if length >= PUBLISHED_LENGTH else answers


def units_from(sentences: Sequence[np.ndarray], rng: np.random.Generator, room: int) -> list[np.ndarray]:
    """Sentences of prose in order, from a random one on, at least as many tokens as there is room for."""
    place = int(rng.integers(len(sentences)))
    units: list[np.ndarray] = []
    total = 0
    while total <= room:
        units.append(sentences[place % len(sentences)])
        total += len(units[-1])
        place += 1
    return units
