"""Which answers of held-out samples a model gives, and how far back each was told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from memorizing.batch import DataSource
from memorizing.evaluation.evaluator import ReadSegment


class Text(Protocol):
    """A sample as a text, see `memorizing.synthetic.task.Text`."""

    @property
    def ids(self) -> np.ndarray: ...

    @property
    def is_answer(self) -> np.ndarray: ...

    @property
    def told_at(self) -> np.ndarray | None: ...


class RecallTask(DataSource, Protocol):
    """Held-out samples that are one document each, all of as many segments.

    Attributes:
      eval_segments: U.
    """

    @property
    def eval_segments(self) -> int: ...

    @property
    def chance(self) -> float: ...

    def held_out_text(self, index: int, segment_length: int) -> Text: ...


class Exercise(Protocol):
    """One task at one length, see `memorizing.synthetic.recall.catalogue.Exercise`."""

    @property
    def suite(self) -> str: ...

    @property
    def task(self) -> str: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...

    @property
    def source(self) -> RecallTask: ...


class Spans(NamedTuple):
    """The answers of samples, in the order of the samples and of the text.

    Attributes:
      sample: int64 [answers].
      start, end: int64 [answers], the positions of their tokens.
      distance: int64 [answers], segments between the answer and the fact: 0 where both are in the same one.
      depth: float64 [answers], where the fact stands before the answer: 0 at the start of the text, 1 just before.
    """

    sample: np.ndarray
    start: np.ndarray
    end: np.ndarray
    distance: np.ndarray
    depth: np.ndarray


def spans_of(source: RecallTask, segment_length: int) -> Spans:
    """All answers of the held-out samples."""
    parts = []
    for sample in range(source.num_eval_documents):
        text = source.held_out_text(sample, segment_length)
        told_at = text.told_at
        assert told_at is not None
        # Another answer begins where no answer was before, and where another fact is asked for.
        fact = np.where(text.is_answer, told_at, -1)
        changes = np.flatnonzero(np.diff(fact, prepend=-1, append=-1))
        starts = changes[:-1][fact[changes[:-1]] >= 0]
        ends = changes[np.searchsorted(changes, starts, side="right")]
        told = told_at[starts]
        distance = starts // segment_length - told // segment_length
        parts.append((np.full(len(starts), sample), starts, ends, distance, told / np.maximum(starts, 1)))
    return Spans(*(np.concatenate(part) for part in zip(*parts, strict=True)))


class Answers(NamedTuple):
    """What a model makes of answers, given all tokens before each.

    Attributes:
      right: bool [answers], whether all tokens of an answer are the most likely ones: greedy decoding gives it.
      nats: float64 [answers], -log p of the answer.
    """

    right: np.ndarray
    nats: np.ndarray


def answers_of(spans: Spans, segments: Iterable[ReadSegment], length: int) -> Answers:
    """Collects the answers.

    Args:
      spans: of the same samples.
      segments: as `Evaluator.read` yields them.
      length: tokens of a sample, the room behind its end included.
    """
    num_samples = int(spans.sample.max()) + 1
    is_right = np.zeros((num_samples, length), bool)
    nats = np.zeros((num_samples, length))
    for segment in segments:
        of_segment, right_of_segment = map(np.asarray, segment.scores)
        for row in np.flatnonzero((segment.document >= 0) & (segment.document < num_samples)):
            first = int(segment.offset[row])
            place = (int(segment.document[row]), slice(first, first + of_segment.shape[1]))
            nats[place] = of_segment[row]
            is_right[place] = right_of_segment[row]
    pairs = list(zip(spans.sample.tolist(), spans.start.tolist(), spans.end.tolist(), strict=True))
    return Answers(
        right=np.array([is_right[sample, start:end].all() for sample, start, end in pairs], bool),
        nats=np.array([nats[sample, start:end].sum() for sample, start, end in pairs]),
    )
