"""Which answers of held-out samples a model gives, and how far back each was told."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from memorizing.batch import Batch, DataSource, EvaluationBatch
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


@dataclasses.dataclass(frozen=True)
class OneWindow:
    """The same samples, each as one segment: a model that reads it has all of the sample in its window.

    Attributes:
      source: the samples.
      segment_length: of the run, T: the samples depend on it.
    """

    source: RecallTask
    segment_length: int

    @property
    def length(self) -> int:
        """Tokens of the window."""
        return self.source.eval_segments * self.segment_length

    @property
    def vocab_size(self) -> int:
        return self.source.vocab_size

    @property
    def start_id(self) -> int:
        return self.source.start_id

    @property
    def identity(self) -> str:
        return f"OneWindow({self.source.identity})"

    @property
    def num_eval_documents(self) -> int:
        return self.source.num_eval_documents

    @property
    def document_bytes(self) -> None:
        return None

    def train_batches(self, num_rows: int, rows: range, num_segments: int, segment_length: int, seed: int) -> Any:
        """See `DataSource`: those of the source."""
        return self.source.train_batches(num_rows, rows, num_segments, segment_length, seed)

    def evaluation_batches(
        self, num_rows: int, segment_length: int, rows: range | None = None
    ) -> Iterator[EvaluationBatch]:
        """See `DataSource`; the segment length is that of the window."""
        batches: list[EvaluationBatch] = []
        for segment in self.source.evaluation_batches(num_rows, self.segment_length, rows):
            batches.append(segment)
            if len(batches) == self.source.eval_segments:
                first = batches[0]
                names = ("tokens", "targets", "loss_weights", "is_real")
                fields = [np.concatenate([getattr(each.batch, name) for each in batches], axis=2) for name in names]
                joined = Batch(*fields, start_of_document=first.batch.start_of_document)
                yield EvaluationBatch(joined, first.document, first.offset)
                batches = []
