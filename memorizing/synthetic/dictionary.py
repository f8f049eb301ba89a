"""Dictionary look-up (Tworkowski et al. 2023, "Focused Transformer", appendix).

There are definitions `<k> k1..k4 <v> v1..v4`, and later queries `<q> k1..k4 <v> v1..v4`. Every segment mixes
definitions with queries about its own definitions (short look-ups) or those of an earlier segment (long look-ups).
Short ones are part of the training because stored keys and values get no gradient: what makes them useful far away is
that they are useful nearby. For the same reason records stand in random order with random gaps: where the place of a
definition could be guessed from that of the query, nothing would have to be looked up by its key.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, NamedTuple, Self

import numpy as np

from memorizing.errors import Count, CountOrNone, Range, Share, UserError
from memorizing.synthetic.task import Split, SyntheticTask, Text


class Entries(NamedTuple):
    """The dictionary of a sample.

    Attributes:
      keys: int [U * definitions a segment, key length], no two of them equal.
      values: int [U * definitions a segment, value length].
    """

    keys: np.ndarray
    values: np.ndarray


class Queries(NamedTuple):
    """What the queries of a sample are about.

    Attributes:
      entry: int [U, queries a segment], index of the definition.
      is_scored: bool [U, queries a segment].
    """

    entry: np.ndarray
    is_scored: np.ndarray


class Records(NamedTuple):
    """Definitions and queries, in the order of the text.

    Attributes:
      entry: int [U, records a segment], index of the definition that it is, or asks about.
      is_query: bool [U, records a segment].
      is_scored: bool [U, records a segment].
    """

    entry: np.ndarray
    is_query: np.ndarray
    is_scored: np.ndarray


@dataclasses.dataclass(frozen=True)
class DictionaryLookup(SyntheticTask):
    """Words 1 ... n, then the marks `<k>`, `<v>`, `<q>` and a filler. Only the values that queries ask for are scored.

    No key is defined twice in a sample, and a definition is asked for at most once from its own segment and once from a
    later one, so the distance of a look-up is exact.

    Attributes:
      num_words: n, words that keys and values are made of, independent and equally often.
      key_length, value_length: words.
      short_fraction: share of the queries that ask about their own segment, in training.
      distances: least and greatest distance of the others in training, in segments; where the sample has not yet got
        that far, a query is a short one.
      eval_distance: distance of the scored queries of held-out samples, in segments; 0 for the own segment. Segments
        before that have short queries, which are not scored.
    """

    num_segments: CountOrNone = 60
    num_eval_samples: Annotated[int, Range(1, 2**20)] = 32
    eval_segments: Count = 60
    num_words: Annotated[int, Range(1, 2**20)] = 64
    key_length: Annotated[int, Range(1, 2**16)] = 4
    value_length: Annotated[int, Range(1, 2**16)] = 4
    short_fraction: Share = 0.5
    distances: tuple[Count, Count] = (1, 50)
    eval_distance: CountOrNone = 50

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
        entries = self._entries(rng, num_segments, num_definitions)
        queries = self._queries(rng, split, num_segments, num_definitions, num_queries)
        records = _in_order(rng, queries, num_definitions)
        num_records = num_definitions + num_queries
        position = self._positions(rng, num_segments, num_records, segment_length)  # [U, records, record length]
        segment = np.arange(num_segments)[:, None, None]
        filler = self.num_words + 4
        ids = np.full((num_segments, segment_length), filler)  # [U, T]
        ids[segment, position] = self._tokens(entries, records)
        is_value = np.arange(self.record_length) >= 2 + self.key_length
        is_answer = np.zeros((num_segments, segment_length), bool)  # [U, T]
        is_answer[segment, position] = records.is_scored[..., None] & is_value
        told_at = np.where(is_answer, self._definitions_at(records, position, segment_length), -1)
        return Text(ids.ravel(), is_answer.ravel(), told_at.ravel())

    def _definitions_at(self, records: Records, position: np.ndarray, segment_length: int) -> np.ndarray:
        """Where the definition ends that each token belongs to, int [U, T]; 0 at fillers."""
        num_segments = len(position)
        segment = np.arange(num_segments)[:, None, None]
        ends = segment[..., 0] * segment_length + position[..., -1]  # [U, records]
        is_definition = ~records.is_query
        end_of_entry = np.zeros(int(is_definition.sum()), int)
        end_of_entry[records.entry[is_definition]] = ends[is_definition]
        found = np.zeros((num_segments, segment_length), int)
        found[segment, position] = end_of_entry[records.entry][..., None]
        return found

    def _tokens(self, entries: Entries, records: Records) -> np.ndarray:
        """Ids of every record, int [U, records a segment, record length]."""
        key_mark = self.num_words + 1
        value_mark = self.num_words + 2
        query_mark = self.num_words + 3
        first = np.where(records.is_query, query_mark, key_mark)[..., None]
        between = np.full_like(first, value_mark)
        keys = entries.keys[records.entry]
        values = entries.values[records.entry]
        return np.concatenate([first, keys, between, values], axis=2)

    def _positions(
        self, rng: np.random.Generator, num_segments: int, num_records: int, segment_length: int
    ) -> np.ndarray:
        """Position of every token of every record in its segment, int [U, records, record length].

        Records follow each other. The filler of the segment is spread over the gaps, with at least one at the end.
        """
        num_filler = segment_length - num_records * self.record_length - 1
        equal_shares = np.full(num_records + 1, 1 / (num_records + 1))
        gaps = rng.multinomial(num_filler, equal_shares, num_segments)  # [U, records + 1], the last one at the end
        filler_before = np.cumsum(gaps[:, :-1], axis=1)
        starts = filler_before + np.arange(num_records) * self.record_length  # [U, records]
        return starts[..., None] + np.arange(self.record_length)

    def _records_of_a_segment(self, segment_length: int) -> tuple[int, int]:
        """Number of definitions and of queries.

        At least one filler ends a segment: the last word of a value is read one position after it is predicted, and
        should be read in the same segment.
        """
        records = (segment_length - 1) // self.record_length
        if records < 2:
            needed = 2 * self.record_length + 1
            raise UserError(
                f"BatchConfig.segment_length = {segment_length}: "
                f"a definition and a query of DictionaryLookup take {needed} tokens"
            )
        num_queries = records // 2
        return records - num_queries, num_queries

    def _entries(self, rng: np.random.Generator, num_segments: int, num_definitions: int) -> Entries:
        """Different keys, and any values."""
        number = num_segments * num_definitions
        num_keys = self.num_words**self.key_length
        if number > num_keys:
            raise UserError(
                f"DictionaryLookup.num_words = {self.num_words}: {num_keys} keys of {self.key_length} words "
                f"are not enough for the {number} definitions of a sample"
            )
        # The words of a key are the digits of its number.
        numbers = rng.choice(num_keys, number, replace=False)[:, None]
        digits = numbers // self.num_words ** np.arange(self.key_length) % self.num_words
        values = rng.integers(0, self.num_words, (number, self.value_length))
        return Entries(1 + digits, 1 + values)

    def _queries(
        self, rng: np.random.Generator, split: Split, num_segments: int, num_definitions: int, num_queries: int
    ) -> Queries:
        definitions = np.arange(num_segments * num_definitions).reshape(num_segments, num_definitions)
        # In which order the definitions of each segment are asked for, from near and from far: each at most once.
        near = [rng.permutation(row).tolist() for row in definitions]
        far = [rng.permutation(row).tolist() for row in definitions]
        entry = np.zeros((num_segments, num_queries), int)
        distance = self._distances(rng, split, num_segments, num_queries)
        for segment, query in np.ndindex(num_segments, num_queries):
            source = segment - distance[segment, query]
            if source < segment and far[source]:
                entry[segment, query] = far[source].pop()
            else:
                # All of that segment were asked for: a short look-up.
                distance[segment, query] = 0
                entry[segment, query] = near[segment].pop()
        if split == "train":
            return Queries(entry, np.full(entry.shape, True))
        return Queries(entry, distance == self.eval_distance)

    def _distances(self, rng: np.random.Generator, split: Split, num_segments: int, num_queries: int) -> np.ndarray:
        """Segments between each query and its definition, int [U, queries a segment].

        0 where the sample has not got that far.
        """
        segment = np.arange(num_segments)[:, None]  # [U, 1]
        shape = (num_segments, num_queries)
        if split == "validation":
            return np.where(segment >= self.eval_distance, self.eval_distance, np.zeros(shape, int))
        least, greatest = self.distances
        reach = np.minimum(segment, greatest)
        drawn = rng.integers(least, np.maximum(reach, least) + 1, shape)
        is_long = rng.random(shape) >= self.short_fraction
        return np.where(is_long & (reach >= least), drawn, 0)


def _in_order(rng: np.random.Generator, queries: Queries, num_definitions: int) -> Records:
    """Puts the definitions and queries of every segment into a random order, in which definitions come first."""
    num_segments = len(queries.entry)
    defined = np.arange(num_segments * num_definitions).reshape(num_segments, num_definitions)
    order = np.argsort(_times(rng, queries.entry, defined), axis=1)  # [U, records]
    entry = np.concatenate([defined, queries.entry], axis=1)
    # No definition is scored.
    is_scored = np.pad(queries.is_scored, ((0, 0), (num_definitions, 0)))
    return Records(
        entry=np.take_along_axis(entry, order, axis=1),
        is_query=order >= num_definitions,
        is_scored=np.take_along_axis(is_scored, order, axis=1),
    )


def _times(rng: np.random.Generator, asked: np.ndarray, defined: np.ndarray) -> np.ndarray:
    """When each definition and each query of a segment comes, float [U, definitions + queries].

    At random, but no query before its definition.

    Args:
      asked: int [U, queries], indices of definitions.
      defined: int [U, definitions], the same.
    """
    times = rng.random(defined.shape)
    is_own = asked >= defined[:, :1]
    not_before = np.where(is_own, times.ravel()[asked], 0.0)
    times_of_queries = not_before + (1 - not_before) * rng.random(asked.shape)
    return np.concatenate([times, times_of_queries], axis=1)
