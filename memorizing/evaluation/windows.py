"""Evaluation in windows: what a model that carries no context does on long documents, by chunking or overlapping."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import numpy as np

from memorizing.batch import Batch, BatchIterator, DataSource, EvaluationBatch, TextSource, text_of, with_documents
from memorizing.errors import Range, UserError


@dataclasses.dataclass(frozen=True)
class OtherSegments:
    """A data source whose held-out documents are read in other segments; what there is to know of them is the source's.

    Attributes:
      source: where the documents come from.
    """

    source: DataSource

    @property
    def vocab_size(self) -> int:
        return self.source.vocab_size

    @property
    def start_id(self) -> int:
        return self.source.start_id

    @property
    def num_eval_documents(self) -> int:
        return self.source.num_eval_documents

    @property
    def document_bytes(self) -> np.ndarray | None:
        return self.source.document_bytes


@dataclasses.dataclass(frozen=True)
class Windows(OtherSegments):
    """A data source whose held-out documents are read in windows.

    Each window begins with an empty context, and each token is scored once. A window of `width` tokens scores its last
    `stride`; the tokens before them are context. Every token is thus predicted with at least `width - stride` earlier
    tokens in view (or all there are), at `width / stride` times the compute. With stride = width the document is cut
    into chunks that know nothing of each other. Training is on chunks.

    Attributes:
      source: see `OtherSegments`.
      width: tokens of a window; the segment length of the run.
      stride: tokens that a window scores; at most the width.
    """

    width: Annotated[int, Range(1, 2**24)] = 512
    stride: Annotated[int, Range(1, 2**24)] = 256

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.width:
            raise UserError(f"Windows.stride = {self.stride}: at least 1 and at most Windows.width = {self.width}")

    @property
    def identity(self) -> str:
        return f"Windows({self.source.identity}, width={self.width})"

    @property
    def text(self) -> TextSource | None:
        return text_of(self.source)

    def with_documents(self, documents: str, tell: Callable[[str], None]) -> DataSource | None:
        """The user's own documents in such windows; see `memorizing.batch.with_documents`."""
        source = with_documents(self.source, documents, tell)
        return None if source is None else dataclasses.replace(self, source=source)

    def train_batches(self, num_rows: int, rows: range, num_segments: int, segment_length: int, seed: int) -> _Chunks:
        self._check(segment_length)
        return _Chunks(self.source.train_batches(num_rows, rows, num_segments, segment_length, seed))

    def evaluation_batches(
        self, num_rows: int, segment_length: int, rows: range | None = None
    ) -> Iterator[EvaluationBatch]:
        self._check(segment_length)
        num_rows_here = num_rows if rows is None else len(rows)
        num_before = self.width - self.stride
        # Of the tokens before those that a window scores: inputs, targets, and whether they are real.
        before = np.zeros((3, num_rows_here, num_before), np.int32)
        no_weights = np.zeros((num_rows_here, 1, num_before), np.float32)
        for batch, document, offset in self.source.evaluation_batches(num_rows, self.stride, rows):
            before[:, batch.start_of_document[:, 0]] = 0
            new = np.stack([batch.tokens[:, 0], batch.targets[:, 0], batch.is_real[:, 0]])  # [3, B, stride]
            window = np.concatenate([before, new], axis=2)  # [3, B, width]
            before = window[:, :, self.stride :].copy()
            tokens, targets, is_real = window[:, :, None]  # each [B, 1, width]
            windows = Batch(
                tokens=tokens,
                targets=targets,
                loss_weights=np.concatenate([no_weights, batch.loss_weights], axis=2),
                is_real=is_real.astype(bool),
                start_of_document=np.ones((num_rows_here, 1), bool),
            )
            yield EvaluationBatch(windows, document, offset)

    def _check(self, segment_length: int) -> None:
        if segment_length != self.width:
            raise UserError(
                f"Windows.width = {self.width} has to be BatchConfig.segment_length, which is {segment_length}"
            )


class _Chunks:
    """A training stream in which every segment begins a document."""

    def __init__(self, stream: BatchIterator) -> None:
        self._stream = stream

    def __next__(self) -> Batch:
        batch = next(self._stream)
        return batch._replace(start_of_document=np.ones_like(batch.start_of_document))

    def get_state(self) -> dict[str, Any]:
        return self._stream.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._stream.set_state(state)
