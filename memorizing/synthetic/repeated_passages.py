"""Documents that repeat a passage: the smallest text that only a memory can predict."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np

from memorizing.batch import Batch, EvaluationBatch
from memorizing.errors import Range, UserError


@dataclasses.dataclass(frozen=True)
class RepeatedPassages:
    """Documents that repeat a passage of random tokens again and again.

    What comes next is known to a model that remembers one passage back. The first passage is unpredictable (log V nats
    a token), every later one is a copy of it.

    Attributes:
      vocab_size: V; id 0 stands before a document and in none.
      passage_length: tokens; longer than a segment, so that only what is carried between segments helps.
      num_passages: passages a document.
      num_documents: held-out documents.
    """

    vocab_size: Annotated[int, Range(3, 2**24)] = 64
    passage_length: Annotated[int, Range(1, 2**24)] = 48
    num_passages: Annotated[int, Range(1, 2**20)] = 8
    num_documents: Annotated[int, Range(1, 2**20)] = 4
    document_bytes: None = dataclasses.field(default=None, init=False, repr=False)
    start_id: int = dataclasses.field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.vocab_size < 3 or min(self.passage_length, self.num_passages, self.num_documents) < 1:
            raise UserError(f"{self}: vocab_size has to be at least 3, the others at least 1")

    @property
    def num_eval_documents(self) -> int:
        return self.num_documents

    @property
    def identity(self) -> str:
        return repr(self)

    @property
    def document_length(self) -> int:
        """Tokens of every document."""
        return self.passage_length * self.num_passages

    def document(self, split: str, index: int) -> np.ndarray:
        """Tokens of one document, int32 [document_length]: a pure function of its arguments."""
        split_number = {"train": 0, "validation": 1}[split]
        rng = np.random.default_rng([index, split_number])
        passage = rng.integers(1, self.vocab_size, self.passage_length, np.int32)
        return np.tile(passage, self.num_passages)

    def train_batches(
        self, num_rows: int, rows: range, num_segments: int, segment_length: int, seed: int
    ) -> RepeatedPassagesStream:
        return RepeatedPassagesStream(self, num_rows, rows, num_segments, segment_length, seed)

    def evaluation_batches(
        self, num_rows: int, segment_length: int, rows: range | None = None
    ) -> Iterator[EvaluationBatch]:
        own_rows = np.asarray(range(num_rows) if rows is None else rows, np.int64)
        for first in range(0, self.num_documents, num_rows):
            index = first + own_rows  # [B]
            is_present = index < self.num_documents
            documents = [self.document("validation", i) if i < self.num_documents else None for i in index]
            for start in range(0, self.document_length, segment_length):
                offset = np.full(len(index), start, np.int64)
                batch = _segments(documents, offset, segment_length)
                yield EvaluationBatch(batch, np.where(is_present, index, -1), offset)


class RepeatedPassagesStream:
    """Row r of R reads the documents r, r + R, r + 2R, ..."""

    def __init__(
        self, source: RepeatedPassages, num_rows: int, rows: range, num_segments: int, segment_length: int, seed: int
    ) -> None:
        self._source = source
        self._num_rows = num_rows
        self._rows = rows
        self._num_segments = num_segments
        self._segment_length = segment_length
        self._seed = seed
        # Segments of a row that were handed out.
        self._segment = 0

    def __next__(self) -> Batch:
        segments = [self._next_segment() for _ in range(self._num_segments)]
        return Batch(*(np.concatenate(field, axis=1) for field in zip(*segments, strict=True)))

    def get_state(self) -> dict[str, Any]:
        return {"segment": self._segment}

    def set_state(self, state: dict[str, Any]) -> None:
        self._segment = state["segment"]

    def _next_segment(self) -> Batch:
        per_document = -(-self._source.document_length // self._segment_length)
        turn, segment = divmod(self._segment, per_document)
        first = self._seed * 1_000_003 + turn * self._num_rows
        documents = [self._source.document("train", first + row) for row in self._rows]
        self._segment += 1
        offsets = np.full(len(documents), segment * self._segment_length)
        return _segments(documents, offsets, self._segment_length)


def _segments(documents: Sequence[np.ndarray | None], offsets: np.ndarray, length: int) -> Batch:
    """One segment a row, [B, 1, T], from the given offsets.

    No position is real where there is no document or no more of it.
    """
    shape = (len(documents), 1, length)
    tokens = np.zeros(shape, np.int32)
    targets = np.zeros(shape, np.int32)
    is_real = np.zeros(shape, bool)
    for row, (document, offset) in enumerate(zip(documents, offsets, strict=True)):
        if document is None:
            continue
        previous = np.concatenate([[RepeatedPassages.start_id], document[:-1]])
        part = document[offset : offset + length]
        targets[row, 0, : len(part)] = part
        tokens[row, 0, : len(part)] = previous[offset : offset + length]
        is_real[row, 0, : len(part)] = True
    return Batch(
        tokens=tokens,
        targets=targets,
        loss_weights=is_real.astype(np.float32),
        is_real=is_real,
        start_of_document=offsets[:, None] == 0,
    )
