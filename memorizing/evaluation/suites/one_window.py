"""Samples that are read whole: each is one segment, so that nothing has to be carried."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from memorizing.batch import Batch, EvaluationBatch
from memorizing.evaluation.suites.answers import RecallTask
from memorizing.evaluation.windows import OtherSegments


@dataclasses.dataclass(frozen=True)
class OneWindow(OtherSegments):
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
    def identity(self) -> str:
        return f"OneWindow({self.source.identity})"

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
