"""Facts hidden in noise, and a question at the end: Memorize, Detect & memorize and Reasoning.

The tasks of Bulatov et al. 2023, "Scaling Transformer to 1M tokens and beyond with RMT", section 4. A sample is noise;
one or two facts replace some of it, and the last tokens of the last segment are a question and its answer, one of six
places. Only the answer is scored.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import numpy as np

from memorizing.errors import UserError
from memorizing.synthetic import babi, placement
from memorizing.synthetic.noise import NoiseSource, SyntheticWords
from memorizing.synthetic.task import Split, SyntheticTask, Text

_PLACEMENTS = {"segment_start": placement.at_segment_starts, "any_offset": placement.anywhere}


@dataclasses.dataclass(frozen=True)
class FactTask(SyntheticTask):
    """A story told in noise.

    Attributes:
      noise: the text around the facts, and the vocabulary.
    """

    noise: NoiseSource = SyntheticWords()

    @abc.abstractmethod
    def story(self, rng: np.random.Generator) -> babi.Story:
        """Facts, question and answer of a sample."""

    @property
    @abc.abstractmethod
    def place_facts(self) -> Callable[..., list[int]]:
        """A function of `placement`."""

    @property
    def vocab_size(self) -> int:
        return self.noise.vocab_size

    @property
    def chance(self) -> float:
        return 1 / len(babi.PLACES)

    def write(self, rng: np.random.Generator, split: Split, num_segments: int, segment_length: int) -> Text:
        story = self.story(rng)
        facts = [self.noise.encode(fact) for fact in story.facts]
        question = self.noise.encode(story.question)
        answer = self.noise.encode(story.answer)
        fact_lengths = [len(fact) for fact in facts]
        self._check_fit(sum(fact_lengths), len(question), num_segments, segment_length)
        length = num_segments * segment_length
        # The room for the answer does not depend on it: where the question ends would tell it otherwise.
        end_of_question = length - self._answer_room
        start_of_question = end_of_question - len(question)
        starts = self.place_facts(rng, fact_lengths, segment_length, num_segments, start_of_question)
        ids = self.noise.sample(rng, length).astype(np.int32)
        starts = [*starts, start_of_question, end_of_question]
        pieces = [*facts, question, answer]
        for start, piece in zip(starts, pieces, strict=True):
            ids[start : start + len(piece)] = piece
        end_of_answer = end_of_question + len(answer)
        is_answer = np.arange(end_of_answer) >= end_of_question
        # The fact that names the place: of two, the other one only tells the direction of another place.
        told = next(i for i, fact in enumerate(story.facts) if story.answer.strip() in fact)
        end_of_fact = starts[told] + fact_lengths[told]
        return Text(ids[:end_of_answer], is_answer, np.where(is_answer, end_of_fact - 1, -1))

    @functools.cached_property
    def _answer_room(self) -> int:
        """Tokens of the longest answer."""
        return max(len(self.noise.encode(f" {place}")) for place in babi.PLACES)

    def _check_fit(self, facts: int, question: int, num_segments: int, segment_length: int) -> None:
        """Raises UserError if the text is too short for its facts, or the last segment for what it may have to hold."""
        question += self._answer_room
        # Facts at the starts of segments may all have chosen the last one.
        in_last = question + facts if self.place_facts is placement.at_segment_starts else question
        in_each = -(-(facts + question) // num_segments)
        needed = max(in_last, in_each)
        if needed > segment_length:
            raise UserError(
                f"BatchConfig.segment_length = {segment_length}: a sample of {type(self).__name__} has {facts} tokens "
                f"of facts and {question} of a question with its answer; "
                f"in {num_segments} segments that takes segments of {needed} tokens or more"
            )


@dataclasses.dataclass(frozen=True)
class Memorize(FactTask):
    """One fact at the very start of the text: it has to be kept."""

    @property
    def place_facts(self) -> Callable[..., list[int]]:
        return placement.at_the_start

    def story(self, rng: np.random.Generator) -> babi.Story:
        return babi.whereabouts(rng)


@dataclasses.dataclass(frozen=True)
class HiddenFactTask(FactTask):
    """The facts are somewhere in the text.

    Attributes:
      position: 'segment_start', each at the start of a random segment as in the report's released code, or
        'any_offset', stricter, at any token.
    """

    position: Literal["segment_start", "any_offset"] = "segment_start"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(self.position in _PLACEMENTS, "position", " or ".join(map(repr, _PLACEMENTS)))

    @property
    def place_facts(self) -> Callable[..., list[int]]:
        return _PLACEMENTS[self.position]


@dataclasses.dataclass(frozen=True)
class DetectAndMemorize(HiddenFactTask):
    """One fact somewhere in the text: it has to be found and kept."""

    def story(self, rng: np.random.Generator) -> babi.Story:
        return babi.whereabouts(rng)


@dataclasses.dataclass(frozen=True)
class Reasoning(HiddenFactTask):
    """Two facts somewhere in the text; the question is about the place that both name.

    Only the direction tells which fact answers it.
    """

    @property
    def chance(self) -> float:
        # The question names one of the places, which is never the answer.
        return 1 / (len(babi.PLACES) - 1)

    def story(self, rng: np.random.Generator) -> babi.Story:
        return babi.directions(rng)
