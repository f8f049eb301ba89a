"""Documents as segments: the training stream, whose position is saved exactly, and the pass over held-out documents.

Training documents stand in an endless line (`order`). Of R rows, row r takes the documents at the positions r, r + R,
r + 2R, ... of that line and cuts each into segments. So the position of a row is two integers, rows do not wait for
each other, and no number of hosts is part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from memorizing.batch import Batch, EvaluationBatch
from memorizing.data.errors import DataError
from memorizing.data.streams.order import Line

# Tokens that a row reads at a time; the token cache keeps documents in pieces of as many.
WINDOW = 1 << 16


class Documents(Protocol):
    """Tokenised documents by number.

    Attributes:
      num_tokens: int64 [documents].
      start_id: the id that stands before the first token of a document.
    """

    num_tokens: np.ndarray
    start_id: int

    def __len__(self) -> int: ...

    def tokens(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens of a document from `start` to below `stop`, or to its end, integers [length]."""
        ...


class Joined:
    """The documents of several splits, numbered through; a `Documents`."""

    def __init__(self, parts: Sequence[Documents]) -> None:
        self._parts = parts
        self.start_id = parts[0].start_id
        self.num_tokens = np.concatenate([part.num_tokens for part in parts])
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return len(self.num_tokens)

    def place(self, index: int) -> tuple[int, int]:
        """Which split a document is in, and its number there."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - int(self._ends[part]) + len(self._parts[part])

    def tokens(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        part, index = self.place(index)
        return self._parts[part].tokens(index, start, stop)


class DocumentStream:
    """Segments of training documents for some of R rows; a `memorizing.batch.BatchIterator`.

    Every host knows the position of all R rows, since that takes only the lengths of the documents, and loads the
    tokens of its own rows.
    """

    def __init__(
        self,
        documents: Documents,
        fingerprint: str,
        line: Line,
        num_rows: int,
        rows: range,
        num_segments: int,
        segment_length: int,
    ) -> None:
        """Starts every row at its first document.

        Args:
          documents: to read, over and over.
          fingerprint: of the caches they are in; a state of others is refused.
          line: their order.
          num_rows: R, rows of all hosts.
          rows: this host's share of `range(num_rows)`.
          num_segments: U, segments of a row in a batch.
          segment_length: T.

        Raises:
          DataError: a number is not positive, or `rows` lie outside.
        """
        if min(num_rows, num_segments, segment_length) < 1 or not set(rows) <= set(range(num_rows)):
            raise DataError(
                f"cannot stream {rows} of {num_rows} rows in {num_segments} segments of {segment_length} tokens"
            )
        self._documents = documents
        self._line = line
        self._identity = {"cache": fingerprint, **line.identity, "num_rows": num_rows}
        self._rows = np.asarray(rows, np.int64)
        self._windows = [_Window(documents) for _ in rows]
        self._num_segments = num_segments
        self._segment_length = segment_length
        self._move_to(np.arange(num_rows, dtype=np.int64), np.zeros(num_rows, np.int64))

    def __iter__(self) -> DocumentStream:
        return self

    def __next__(self) -> Batch:
        segments = []
        for _ in range(self._num_segments):
            document = self._document[self._rows]
            offset = self._offset[self._rows]
            length = self._length[self._rows]
            segments.append(_read_segment(self._windows, document, offset, length, self._segment_length))
            self._advance()
        # [B, T] of each segment -> [B, U, T]
        return Batch(*(np.stack(field, axis=1) for field in zip(*segments, strict=True)))

    def get_state(self) -> dict[str, Any]:
        """See `BatchIterator`: for each row, where its document stands in the line, and its next token in that."""
        return self._identity | {"position": self._position.tolist(), "offset": self._offset.tolist()}

    def set_state(self, state: dict[str, Any]) -> None:
        """See `BatchIterator`.

        Raises:
          DataError: the state is of another cache, order, seed or number of rows, or no state of a stream at all.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise DataError(
                    f"this position belongs to another stream: its {name} is {state.get(name)!r}, here it is {value!r}"
                )
        num_rows = self._identity["num_rows"]
        position = np.asarray(state.get("position", ()), np.int64)
        offset = np.asarray(state.get("offset", ()), np.int64)
        if position.shape != (num_rows,) or offset.shape != (num_rows,):
            raise DataError(
                f"this is no position of {num_rows} rows: it has {position.shape} positions and {offset.shape} offsets"
            )
        if np.any(position < 0) or np.any(position % num_rows != np.arange(num_rows)):
            raise DataError("this is no position of this stream: a row is on another row's document")
        if np.any(offset < 0) or np.any(offset >= self._documents.num_tokens[self._line.documents_at(position)]):
            raise DataError("this is no position of this stream: a row is past the end of its document")
        self._move_to(position, offset)

    def _move_to(self, position: np.ndarray, offset: np.ndarray) -> None:
        # int64 [R], for the rows of all hosts: the place of the row's document in the line, its next token in that
        # document, the document, and how many tokens it has.
        self._position = position.copy()
        self._offset = offset.copy()
        self._document = self._line.documents_at(position)
        self._length = self._documents.num_tokens[self._document]

    def _advance(self) -> None:
        """Moves every row by one segment; a row at the end of its document goes to its next one."""
        self._offset += self._segment_length
        (finished,) = np.nonzero(self._offset >= self._length)
        if len(finished):
            self._position[finished] += len(self._position)
            self._offset[finished] = 0
            self._document[finished] = self._line.documents_at(self._position[finished])
            self._length[finished] = self._documents.num_tokens[self._document[finished]]


def evaluation_batches(
    documents: Documents, num_rows: int, segment_length: int, rows: range | None = None
) -> Iterator[EvaluationBatch]:
    """Every document once, whole, from its start.

    The longest documents go first, each onto the row that is free first, so that rows end at about the same time.

    Args:
      documents: to read.
      num_rows: B, rows of all hosts.
      segment_length: T.
      rows: this host's share of `range(num_rows)`; None for all.

    Yields:
      One segment of each of this host's rows; in rows that have run out no position is real.
    """
    own_rows = np.asarray(range(num_rows) if rows is None else rows, np.int64)
    windows = [_Window(documents) for _ in own_rows]
    waiting = iter(np.argsort(-documents.num_tokens, kind="stable"))
    # [B], for the rows of all hosts: the document, the next token in it, and how many tokens it has.
    document = np.full(num_rows, -1, np.int32)
    offset = np.zeros(num_rows, np.int64)
    length = np.zeros(num_rows, np.int64)
    while True:
        for row in np.flatnonzero(offset >= length):
            document[row] = next(waiting, -1)
            offset[row] = 0
            length[row] = documents.num_tokens[document[row]] if document[row] >= 0 else 0
        if np.all(document < 0):
            return
        segment = _read_segment(windows, document[own_rows], offset[own_rows], length[own_rows], segment_length)
        # [B, T] -> [B, 1, T]
        batch = Batch(*(field[:, None] for field in segment))
        yield EvaluationBatch(batch, document[own_rows], offset[own_rows])
        offset += segment_length


def _read_segment(
    windows: Sequence[_Window], document: np.ndarray, offset: np.ndarray, length: np.ndarray, segment_length: int
) -> Batch:
    """The next segment of every row: a batch whose fields are [B, T], or [B].

    Args:
      windows: one for each row.
      document: int [B], the document that the row is on; -1 for none.
      offset: int [B], where the segment begins in it.
      length: int [B], tokens of the whole document.
      segment_length: T.
    """
    targets = np.zeros((len(windows), segment_length), np.int32)  # [B, T]
    # The token before each segment.
    previous = np.zeros(len(windows), np.int32)  # [B]
    for row, window in enumerate(windows):
        if document[row] >= 0:
            previous[row] = window.read(int(document[row]), int(offset[row]), targets[row])
    # In a row without a document nothing is real: its length is 0.
    num_real = length - offset  # [B]
    is_real = np.arange(segment_length) < num_real[:, None]  # [B, T]
    return Batch(
        tokens=np.concatenate([previous[:, None], targets[:, :-1]], axis=1),
        targets=targets,
        loss_weights=is_real.astype(np.float32),
        is_real=is_real,
        start_of_document=(offset == 0) & (document >= 0),
    )


class _Window:
    """The part of a row's document that is in memory: no document is held whole, and no part of it is read twice."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self._document = -1
        # The tokens of that document from `_start` on.
        self._start = 0
        self._tokens = np.zeros(0, np.uint16)

    def read(self, document: int, offset: int, targets: np.ndarray) -> int:
        """Copies a segment of a document, and moves the window where it does not hold the segment yet.

        Args:
          document: which.
          offset: where the segment begins in it.
          targets: int32 [T], receives the segment; what is behind the end of the document stays as it is.

        Returns:
          The token before the segment; at the start of the document its `start_id`.
        """
        num_tokens = int(self._documents.num_tokens[document])
        before = max(offset - 1, 0)
        stop = min(offset + len(targets), num_tokens)
        if not self._holds(document, before, stop):
            self._move_to(document, before, offset, stop)
        targets[: stop - offset] = self._tokens[offset - self._start : stop - self._start]
        if offset == 0:
            return self._documents.start_id
        return int(self._tokens[before - self._start])

    def _move_to(self, document: int, before: int, offset: int, stop: int) -> None:
        """Makes the window begin at `before`, the token ahead of `offset` or that itself, and hold all below `stop`."""
        if offset == 0:
            first = self._tokens[:0]
        elif self._holds(document, before, offset):
            first = self._tokens[before - self._start : offset - self._start]
        else:
            first = self._documents.tokens(document, before, offset)
        # To the end of a piece of the cache, so that the next window begins with one.
        end_of_piece = -(-stop // WINDOW) * WINDOW
        rest = self._documents.tokens(document, offset, min(end_of_piece, int(self._documents.num_tokens[document])))
        self._tokens = np.concatenate([first, rest])
        self._document = document
        self._start = before

    def _holds(self, document: int, start: int, stop: int) -> bool:
        end = self._start + len(self._tokens)
        return document == self._document and self._start <= start and stop <= end
