"""Dictionary look-up (Tworkowski et al. 2023, "Focused Transformer", appendix): definitions `<k> k1..k4 <v> v1..v4`, and later queries `<q> k1..k4 <v> v1..v4`.

Every segment mixes definitions with queries about its own definitions (short look-ups) or those of an earlier segment (long look-ups). Short ones are part of the training because
stored keys and values get no gradient: what makes them useful far away is that they are useful nearby. For the same reason records stand in random order with random gaps: where the
place of a definition could be guessed from that of the query, nothing would have to be looked up by its key.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Self

import numpy as np

from memorizing.errors import UserError
from memorizing.synthetic.task import Split, SyntheticTask, Text


class Queries(NamedTuple):
    """What the queries of a sample are about.

    Attributes:
      entry: int [U, queries a segment], index of the definition.
      is_scored: bool of the same shape.
    """

    entry: np.ndarray
    is_scored: np.ndarray


@dataclasses.dataclass(frozen=True)
class DictionaryLookup(SyntheticTask):
    """Words 1 ... n, then the marks `<k>`, `<v>`, `<q>` and a filler. Only the values that queries ask for are scored.

    No key is defined twice in a sample, and a definition is asked for at most once from its own segment and once from a later one, so the distance of a look-up is exact.

    Attributes:
      num_words: n, words that keys and values are made of, independent and equally often.
      key_length, value_length: words.
      short_fraction: share of the queries that ask about their own segment, in training.
      distances: least and greatest distance of the others in training, in segments; where the sample has not yet got that far, a query is a short one.
      eval_distance: distance of the scored queries of held-out samples, in segments; 0 for the own segment. Segments before that have short queries, which are not scored.
    """

    num_segments: int = 60
    num_eval_samples: int = 32
    eval_segments: int = 60
    num_words: int = 64
    key_length: int = 4
    value_length: int = 4
    short_fraction: float = 0.5
    distances: tuple[int, int] = (1, 50)
    eval_distance: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_words", "key_length", "value_length"):
            self.expect(getattr(self, name) >= 1, name, "at least 1")
        self.expect(0 <= self.short_fraction <= 1, "short_fraction", "a share from 0 to 1")
        least, greatest = self.distances
        self.expect(1 <= least <= greatest, "distances", "a least distance, at least 1 segment, and a greatest one")
        self.expect(
            not self.num_segments or least < self.num_segments,
            "distances",
            f"the least has to be below DictionaryLookup.num_segments = {self.num_segments}",
        )
        self.expect(
            0 <= self.eval_distance < self.eval_segments,
            "eval_distance",
            f"from 0 to below DictionaryLookup.eval_segments = {self.eval_segments}",
        )

    @property
    def vocab_size(self) -> int:
        return self.num_words + 5

    @property
    def chance(self) -> float:
        """Of one word of a value."""
        return 1 / self.num_words

    @property
    def record_length(self) -> int:
        """Tokens of a definition or a query with its value."""
        return 2 + self.key_length + self.value_length

    def reaching(self, num_segments: int) -> Self:
        """See `SyntheticTask`: definitions lie exactly so far back; as many segments are scored as before."""
        num_scored = self.eval_segments - self.eval_distance
        return dataclasses.replace(self, eval_distance=num_segments, eval_segments=num_segments + num_scored)

    def write(self, rng: np.random.Generator, split: Split, num_segments: int, segment_length: int) -> Text:
        num_definitions, num_queries = self._records_of_a_segment(segment_length)
        keys, values = self._entries(rng, num_segments, num_definitions)
        asked, is_scored = self._queries(rng, split, num_segments, num_definitions, num_queries)
        defined = np.arange(len(keys)).reshape(num_segments, num_definitions)
        # [U, records a segment], definitions first; then in the order of the text.
        order = np.argsort(_times(rng, asked, defined), axis=1)
        entry = np.take_along_axis(np.concatenate([defined, asked], axis=1), order, axis=1)
        is_query = order >= num_definitions
        is_scored = np.take_along_axis(np.pad(is_scored, ((0, 0), (num_definitions, 0))), order, axis=1)
        key_mark, value_mark, query_mark, filler = range(self.num_words + 1, self.num_words + 5)
        marks = np.where(is_query, query_mark, key_mark)[..., None]
        records = np.concatenate([marks, keys[entry], np.full_like(marks, value_mark), values[entry]], axis=2)
        place = self._places(rng, *entry.shape, segment_length)
        ids = np.full((num_segments, segment_length), filler)
        is_answer = np.zeros(ids.shape, bool)
        rows = np.arange(num_segments)[:, None, None]
        ids[rows, place] = records
        is_value = np.arange(self.record_length) >= 2 + self.key_length
        is_answer[rows, place] = is_scored[..., None] & is_value
        return Text(ids.ravel(), is_answer.ravel())

    def _places(self, rng: np.random.Generator, num_segments: int, num_records: int, segment_length: int) -> np.ndarray:
        """Position of every token of every record, int [U, records, record length]: one after the other, the filler of the segment spread over the gaps, one at the end."""
        num_filler = segment_length - num_records * self.record_length - 1
        gaps = rng.multinomial(num_filler, np.full(num_records + 1, 1 / (num_records + 1)), num_segments)[:, :-1]
        starts = np.cumsum(gaps, axis=1) + np.arange(num_records) * self.record_length
        return starts[..., None] + np.arange(self.record_length)

    def _records_of_a_segment(self, segment_length: int) -> tuple[int, int]:
        """Number of definitions and of queries.

        At least one filler ends a segment: the last word of a value is read one position after it is predicted, and should be read in the same segment.
        """
        records = (segment_length - 1) // self.record_length
        if records < 2:
            raise UserError(
                f"BatchConfig.segment_length = {segment_length}: a definition and a query of DictionaryLookup take {2 * self.record_length + 1} tokens"
            )
        return records - records // 2, records // 2

    def _entries(
        self, rng: np.random.Generator, num_segments: int, num_definitions: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Different keys and any values, int [U * definitions, words]."""
        number, num_keys = num_segments * num_definitions, self.num_words**self.key_length
        if number > num_keys:
            raise UserError(
                f"DictionaryLookup.num_words = {self.num_words}: {num_keys} keys of {self.key_length} words are not enough for the {number} definitions of a sample"
            )
        keys = rng.choice(num_keys, number, replace=False)[:, None] // self.num_words ** np.arange(self.key_length)
        return 1 + keys % self.num_words, 1 + rng.integers(0, self.num_words, (number, self.value_length))

    def _queries(
        self, rng: np.random.Generator, split: Split, num_segments: int, num_definitions: int, num_queries: int
    ) -> Queries:
        shape = (num_segments, num_definitions)
        entries = np.arange(num_segments * num_definitions).reshape(shape)
        # In which order the definitions of each segment are asked for, from near and from far: each at most once.
        near, far = ([rng.permutation(row).tolist() for row in entries] for _ in range(2))
        entry = np.zeros((num_segments, num_queries), int)
        distance = self._distances(rng, split, num_segments, num_queries)
        for segment, query in np.ndindex(entry.shape):
            if distance[segment, query] and not far[segment - distance[segment, query]]:
                distance[segment, query] = 0
            source = segment - distance[segment, query]
            entry[segment, query] = (far if source < segment else near)[source].pop()
        return Queries(entry, np.full(entry.shape, True) if split == "train" else distance == self.eval_distance)

    def _distances(self, rng: np.random.Generator, split: Split, num_segments: int, num_queries: int) -> np.ndarray:
        """Segments between each query and its definition, int [U, queries a segment]; 0 where the sample has not got that far."""
        segment = np.arange(num_segments)[:, None]
        shape = (num_segments, num_queries)
        if split == "validation":
            return np.where(segment >= self.eval_distance, self.eval_distance, np.zeros(shape, int))
        least, greatest = self.distances
        reach = np.minimum(segment, greatest)
        drawn = rng.integers(least, np.maximum(reach, least) + 1, shape)
        is_long = (rng.random(shape) >= self.short_fraction) & (reach >= least)
        return np.where(is_long, drawn, 0)


def _times(rng: np.random.Generator, asked: np.ndarray, defined: np.ndarray) -> np.ndarray:
    """When each definition and each query of a segment comes, float [U, definitions + queries]: at random, but no query before its definition.

    Args:
      asked, defined: int [U, records], indices of definitions.
    """
    times = rng.random(defined.shape)
    is_own = asked >= defined[:, :1]
    not_before = np.where(is_own, times.ravel()[asked], 0.0)
    return np.concatenate([times, not_before + (1 - not_before) * rng.random(asked.shape)], axis=1)
