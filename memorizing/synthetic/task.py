"""What all tasks made of independent samples share.

A sample is one document, and a pure function of the split, the seed and its index.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np

from memorizing.batch import Batch, EvaluationBatch
from memorizing.errors import Count, CountOrNone, Range, UserError
from memorizing.synthetic.stream import SampleStream

Split = Literal["train", "validation"]
_SPLIT_NUMBERS = {"train": 0, "validation": 1}
# Held-out samples are the same whatever a run's seed is.
_EVALUATION_SEED = 0


class Text(NamedTuple):
    """The tokens of a sample before they are cut into segments.

    Attributes:
      ids: int32 [length], at most U * T.
      is_answer: bool [length], the tokens that the loss and the accuracy count.
      told_at: int64 [length], where the text tells what each token of an answer is: the position of the last token of
        the earliest fact that it takes; -1 at all other tokens. None where nobody asks.
      read: int32 [length], what the model reads, where it does not read its own answers; None for `ids`.
    """

    ids: np.ndarray
    is_answer: np.ndarray
    told_at: np.ndarray | None = None
    read: np.ndarray | None = None


class Sample(NamedTuple):
    """One document in segments.

    Attributes:
      tokens, targets: int32 [U, T], as in `Batch`.
      loss_weights: float32 [U, T], 1 at answers and 0 elsewhere.
      is_real: bool [U, T], false after the end of the document.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    is_real: np.ndarray


@dataclasses.dataclass(frozen=True)
class SyntheticTask(abc.ABC):
    """A `memorizing.batch.DataSource` of samples that `write` makes.

    Attributes:
      num_segments: segments of a training sample, which may stream through steps of fewer (or more) segments a row;
        0: a sample fills exactly the U segments of a step, so that a curriculum over U lengthens the samples.
      num_eval_samples: held-out samples.
      eval_segments: segments of a held-out sample.
    """

    num_segments: CountOrNone = 0
    num_eval_samples: Annotated[int, Range(1, 2**20)] = 256
    eval_segments: Count = 4
    document_bytes: None = dataclasses.field(default=None, init=False, repr=False)
    # No word of a task: words begin at 1.
    start_id: int = dataclasses.field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self.expect(self.num_segments >= 0, "num_segments", "a number of segments, or 0 for all the segments of a step")
        self.expect(self.num_eval_samples >= 1, "num_eval_samples", "at least 1 sample")
        self.expect(self.eval_segments >= 1, "eval_segments", "at least 1 segment")

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """V."""

    @property
    @abc.abstractmethod
    def chance(self) -> float:
        """Accuracy, on answers, of the best guess that uses nothing but the question."""

    @abc.abstractmethod
    def write(self, rng: np.random.Generator, split: Split, num_segments: int, segment_length: int) -> Text:
        """Makes one sample of U segments of T tokens.

        Raises:
          UserError: the task does not fit into segments of this length.
        """

    def reaching(self, num_segments: int) -> Self:
        """The same task with held-out samples of so many segments: their answers lie up to so far back."""
        return dataclasses.replace(self, eval_segments=num_segments)

    @property
    def num_eval_documents(self) -> int:
        """See `DataSource`: the held-out samples."""
        return self.num_eval_samples

    @property
    def identity(self) -> str:
        """Names the task and its settings, less those of evaluation.

        So a run can be continued with another evaluation.
        """
        names = [field.name for field in dataclasses.fields(self) if field.init and "eval_" not in field.name]
        settings = [f"{name}={getattr(self, name)!r}" for name in names]
        return f"{type(self).__name__}({', '.join(settings)})"

    def text_of_sample(self, split: Split, seed: int, index: int, num_segments: int, segment_length: int) -> Text:
        """One sample as a text, a pure function of its arguments."""
        return self.write(_generator(split, seed, index), split, num_segments, segment_length)

    def held_out_rng(self, index: int) -> np.random.Generator:
        """What a held-out sample is made with."""
        return _generator("validation", _EVALUATION_SEED, index)

    def held_out_text(self, index: int, segment_length: int) -> Text:
        """A held-out sample as a text."""
        return self.text_of_sample("validation", _EVALUATION_SEED, index, self.eval_segments, segment_length)

    def sample(self, split: Split, seed: int, index: int, num_segments: int, segment_length: int) -> Sample:
        """One sample, a pure function of its arguments."""
        text = self.text_of_sample(split, seed, index, num_segments, segment_length)
        ids = text.ids
        size = num_segments * segment_length

        def in_segments(values: np.ndarray, dtype: type) -> np.ndarray:
            # int32 throughout, and no copy where there is one already: a sample may have millions of tokens.
            if len(values) < size:
                values = np.pad(values, (0, size - len(values)))
            return values.astype(dtype, copy=False).reshape(num_segments, segment_length)

        read = ids if text.read is None else text.read
        previous = np.concatenate([[self.start_id], read[:-1]], dtype=np.int32, casting="unsafe")
        return Sample(
            tokens=in_segments(previous, np.int32),
            targets=in_segments(ids, np.int32),
            loss_weights=in_segments(text.is_answer, np.float32),
            is_real=in_segments(np.ones(len(ids), bool), bool),
        )

    def train_batches(
        self, num_rows: int, rows: range, num_segments: int, segment_length: int, seed: int
    ) -> SampleStream:
        """See `DataSource`."""
        sample_segments = self.num_segments or num_segments

        def load(index: int) -> Sample:
            return self.sample("train", seed, index, sample_segments, segment_length)

        stream_identity = {"task": self.identity, "seed": seed}
        return SampleStream(load, stream_identity, sample_segments, num_rows, rows, num_segments, segment_length)

    def evaluation_batches(
        self, num_rows: int, segment_length: int, rows: range | None = None
    ) -> Iterator[EvaluationBatch]:
        """See `DataSource`: the held-out samples, `num_rows` at a time."""
        own_rows = np.asarray(range(num_rows) if rows is None else rows, np.int64)
        for first in range(0, self.num_eval_samples, num_rows):
            index = first + own_rows  # [B]
            is_present = index < self.num_eval_samples
            document = np.where(is_present, index, -1).astype(np.int32)
            samples = [self._held_out_sample(i, segment_length) for i in index]
            for segment in range(self.eval_segments):
                own = slice(segment, segment + 1)
                parts = [np.stack([values[own] for values in field]) for field in zip(*samples, strict=True)]
                # Each [B, 1, T].
                batch = Batch(*parts, start_of_document=np.full((len(index), 1), segment == 0))
                offset = np.full(len(index), segment * segment_length, np.int64)
                yield EvaluationBatch(batch, document, offset)

    def _held_out_sample(self, index: int, segment_length: int) -> Sample:
        """A sample by its index; behind the last one an empty one, in which no position is real."""
        if index >= self.num_eval_samples:
            return _empty_sample(self.eval_segments, segment_length)
        return self.sample("validation", _EVALUATION_SEED, index, self.eval_segments, segment_length)

    def expect(self, is_right: bool, field: str, expected: str) -> None:
        """Raises UserError that names a field and what it has to be, unless it is right."""
        if not is_right:
            raise UserError(f"{type(self).__name__}.{field} = {getattr(self, field)!r}: {expected}")


def _generator(split: Split, seed: int, index: int) -> np.random.Generator:
    return np.random.default_rng([_SPLIT_NUMBERS[split], seed, index])


def _empty_sample(num_segments: int, segment_length: int) -> Sample:
    shape = (num_segments, segment_length)
    ids = np.zeros(shape, np.int32)
    return Sample(ids, ids, np.zeros(shape, np.float32), np.zeros(shape, bool))
