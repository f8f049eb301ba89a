"""Multi-query associative recall: keys with values are told, and then asked for.

As published: Arora et al. 2023, "Zoology", and the code that came with it; the variant with keys that get a new value
too. *Segmented* is a form for memories: whatever is asked was told in an earlier segment, so that without anything
carried between segments the answers are at chance.

Ids 1 ... V/2 - 1 are keys, V/2 ... V - 1 are values; 0 is reserved. A slot is two tokens, a key and its value.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np

from memorizing.errors import Count, CountOrNone, FactorAboveZero, Range, UserError
from memorizing.synthetic.task import Split, SyntheticTask, Text

Fillers = Literal["fresh", "any", "zero"]


class Pairs(NamedTuple):
    """What a sample tells.

    Attributes:
      keys: int [pairs + new values], the last ones are those of the first pairs again.
      values: int [pairs + new values], no two of them equal.
    """

    keys: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class AssociativeRecall(SyntheticTask):
    """What both forms have in common.

    Attributes:
      num_ids: V, even.
      num_pairs: keys of a sample.
      num_new_values: keys that are told once more, later, with another value; the newest one is the answer.
      fillers: ids between the pairs and the questions: 'fresh', none of the sample's keys and values; 'any', uniform
        over all ids, as published: such an id may be a key, which then seems to have another value; 'zero'.
    """

    num_ids: Annotated[int, Range(8, 2**24)] = 8192
    num_pairs: Annotated[int, Range(1, 2**20)] = 4
    num_new_values: CountOrNone = 0
    fillers: Fillers = "fresh"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(self.num_ids % 2 == 0, "num_ids", "an even number")
        self.expect(self.num_new_values <= self.num_pairs, "num_new_values", "at most as many as there are pairs")
        num_keys = self.num_ids // 2 - 1
        self.expect(
            self.num_pairs + self.num_new_values < num_keys,
            "num_pairs",
            f"with its new values fewer than the {num_keys} keys of num_ids = {self.num_ids}",
        )

    @property
    def vocab_size(self) -> int:
        return self.num_ids

    @property
    def chance(self) -> float:
        return 1 / (self.num_ids - self.num_ids // 2)

    @abc.abstractmethod
    def with_pairs(self, num_pairs: int) -> Self:
        """The same with other numbers of pairs, and of questions and new values in proportion."""

    def draw_pairs(self, rng: np.random.Generator) -> Pairs:
        """Keys and values, drawn without replacement."""
        half = self.num_ids // 2
        keys = 1 + rng.choice(half - 1, self.num_pairs, replace=False)
        values = half + rng.choice(self.num_ids - half, self.num_pairs + self.num_new_values, replace=False)
        return Pairs(np.concatenate([keys, keys[: self.num_new_values]]), values)

    def draw_fillers(self, rng: np.random.Generator, pairs: Pairs, length: int) -> np.ndarray:
        """Ids of a text without pairs, int [length]."""
        if self.fillers == "zero":
            return np.zeros(length, int)
        if self.fillers == "any":
            return rng.integers(0, self.num_ids, length)
        is_free = np.ones(self.num_ids, bool)
        is_free[0] = False
        is_free[pairs.keys] = False
        is_free[pairs.values] = False
        return rng.choice(np.flatnonzero(is_free), length)

    def ask(self, rng: np.random.Generator, pairs: Pairs, told: np.ndarray, asked: np.ndarray, ids: np.ndarray) -> Text:
        """Writes pairs and questions over the fillers.

        Args:
          rng: which keys are asked for.
          pairs: what is told.
          told: int [pairs + new values], position of each key.
          asked: int [questions], position of each question's key; as many as pairs, or fewer.
          ids: int [length], the fillers.
        """
        ids[told] = pairs.keys
        ids[told + 1] = pairs.values
        # Of each key, its newest value: the pair that comes later in the list overwrites the earlier one.
        newest = np.arange(self.num_pairs)
        newest[: self.num_new_values] = self.num_pairs + np.arange(self.num_new_values)
        key = rng.permutation(self.num_pairs)[: len(asked)]
        ids[asked] = pairs.keys[key]
        ids[asked + 1] = pairs.values[newest[key]]
        is_answer = np.zeros(len(ids), bool)
        is_answer[asked + 1] = True
        told_at = np.full(len(ids), -1)
        told_at[asked + 1] = told[newest[key]] + 1
        return Text(ids.astype(np.int32), is_answer, told_at)


@dataclasses.dataclass(frozen=True)
class MQAR(AssociativeRecall):
    """As published: all pairs first, then a question for each key, near ones likelier.

    A key that is asked for stands in the text, and its value is to be predicted from there; what is read next is no
    answer but a filler. Only the start of the document, which every text has, is ours.

    Attributes:
      power: a; slot j after the pairs, counted from 1, is drawn with a probability in proportion to j^(a - 1).
    """

    power: FactorAboveZero = 0.01

    def with_pairs(self, num_pairs: int) -> Self:
        """See `AssociativeRecall`."""
        num_new_values = self.num_new_values * num_pairs // self.num_pairs
        return dataclasses.replace(self, num_pairs=num_pairs, num_new_values=num_new_values)

    def write(self, rng: np.random.Generator, split: Split, num_segments: int, segment_length: int) -> Text:
        length = num_segments * segment_length
        num_told = self.num_pairs + self.num_new_values
        num_slots = length // 2 - num_told
        if num_slots < self.num_pairs:
            needed = 2 * (num_told + self.num_pairs)
            raise UserError(
                f"BatchConfig.segment_length = {segment_length}: {self.num_pairs} pairs of MQAR and a question for each "
                f"take {needed} tokens, a sample of {num_segments} segments has {length}"
            )
        pairs = self.draw_pairs(rng)
        ids = self.draw_fillers(rng, pairs, length)
        weights = np.arange(1, num_slots + 1) ** (self.power - 1)
        slots = rng.choice(num_slots, self.num_pairs, replace=False, p=weights / weights.sum())
        told = 2 * np.arange(num_told)
        after_answers = self.draw_fillers(rng, pairs, self.num_pairs)
        text = self.ask(rng, pairs, told, 2 * (num_told + slots), ids)
        read = text.ids.copy()
        read[text.is_answer] = after_answers
        return text._replace(read=read)


@dataclasses.dataclass(frozen=True)
class SegmentedMQAR(AssociativeRecall):
    """Pairs in the first segments, then a gap of fillers, then questions: never in a segment that tells an answer.

    After a question stands its answer, so that the label is the ordinary next token. The last slot of a segment is
    filler: the value of a pair is read in the same segment as its key.

    Attributes:
      num_queries: questions of a sample, each about another key; 0 for all keys.
      pair_segments, query_segments: in which pairs and questions stand, at random slots.
      gaps: least and greatest number of segments between them in training; a sample begins with fillers where it is
        longer than that.
      eval_gap: of held-out samples.
    """

    # Held-out samples are as long as their gap makes them.
    eval_segments: Count = dataclasses.field(default=2, init=False)
    num_queries: CountOrNone = 0
    pair_segments: Count = 1
    query_segments: Count = 1
    gaps: tuple[CountOrNone, CountOrNone] = (0, 2)
    eval_gap: CountOrNone = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "eval_segments", self._sides + self.eval_gap)
        super().__post_init__()
        self.expect(self.num_queries <= self.num_pairs, "num_queries", "at most as many as there are pairs")
        least, greatest = self.gaps
        self.expect(0 <= least <= greatest, "gaps", "a least number of segments and a greatest one")
        needed = self._sides + least
        self.expect(
            not self.num_segments or self.num_segments >= needed,
            "num_segments",
            f"at least {needed}: those of pairs and questions, and the least gap; or 0 for the segments of a step",
        )

    @property
    def _sides(self) -> int:
        return self.pair_segments + self.query_segments

    def with_pairs(self, num_pairs: int) -> Self:
        """See `AssociativeRecall`."""
        share = num_pairs / self.num_pairs
        return dataclasses.replace(
            self,
            num_pairs=num_pairs,
            num_new_values=int(self.num_new_values * share),
            num_queries=self.num_queries and max(int(self.num_queries * share), 1),
        )

    def reaching(self, num_segments: int) -> Self:
        """See `SyntheticTask`: the farthest answers may lie so far back."""
        gap = num_segments - self._sides + 1
        if gap < 0:
            raise UserError(
                f"SegmentedMQAR with {self.pair_segments} segments of pairs and {self.query_segments} of questions: "
                f"answers lie up to {self._sides - 1} segments back or more, not {num_segments}"
            )
        return dataclasses.replace(self, eval_gap=gap)

    def most_pairs(self, segment_length: int) -> int:
        """How many pairs fit, each asked for once and none with a new value."""
        return (segment_length // 2 - 1) * min(self.pair_segments, self.query_segments)

    def write(self, rng: np.random.Generator, split: Split, num_segments: int, segment_length: int) -> Text:
        gap = self.eval_gap
        if split == "train":
            least, greatest = self.gaps
            room = num_segments - self._sides
            if room < least:
                raise UserError(
                    f"BatchConfig.num_segments = {num_segments}: SegmentedMQAR needs {self._sides + least} segments"
                )
            gap = int(rng.integers(least, min(greatest, room) + 1))
        first_query_segment = num_segments - self.query_segments
        first_pair_segment = first_query_segment - gap - self.pair_segments
        num_told = self.num_pairs + self.num_new_values
        num_queries = self.num_queries or self.num_pairs
        pairs = self.draw_pairs(rng)
        ids = self.draw_fillers(rng, pairs, num_segments * segment_length)
        told = self._slots(rng, num_told, first_pair_segment, self.pair_segments, segment_length)
        asked = self._slots(rng, num_queries, first_query_segment, self.query_segments, segment_length)
        return self.ask(rng, pairs, self._old_before_new(told), asked, ids)

    def _old_before_new(self, told: np.ndarray) -> np.ndarray:
        """The same positions, a key's old value always before its new one."""
        old, new = told[: self.num_new_values], told[self.num_pairs :]
        in_order = np.sort([old, new], axis=0)
        told = told.copy()
        told[: self.num_new_values], told[self.num_pairs :] = in_order
        return told

    def _slots(
        self, rng: np.random.Generator, number: int, first_segment: int, num_segments: int, segment_length: int
    ) -> np.ndarray:
        """Positions of different slots in some segments, in random order, int [number]."""
        in_a_segment = segment_length // 2 - 1
        if number > in_a_segment * num_segments:
            needed = 2 * (-(-number // num_segments) + 1)
            raise UserError(
                f"BatchConfig.segment_length = {segment_length}: {number} pairs or questions of SegmentedMQAR in "
                f"{num_segments} segments take segments of {needed} tokens"
            )
        segment, slot = divmod(rng.choice(in_a_segment * num_segments, number, replace=False), in_a_segment)
        return (first_segment + segment) * segment_length + 2 * slot
