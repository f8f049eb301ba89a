"""Documents as segments: the training stream, whose position is saved exactly, and the pass over held-out documents.

Training documents stand in an endless line: a permutation of all of them, then another one, an epoch each. Of R rows,
row r takes the documents at the positions r, r + R, r + 2R, ... of that line and cuts each into segments. So the
position of a row is two integers, rows do not wait for each other, and no number of hosts is part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from memorizing.batch import PADDING, Batch, EvaluationBatch

from .errors import DataError
from .token_cache import Split


class DocumentStream:
    """Segments of training documents for some of R rows; a `memorizing.batch.BatchIterator`.

    Every host knows the position of all R rows, since that takes only the lengths of the documents, and loads the
    tokens of its own rows.
    """

    def __init__(
        self,
        documents: Split,
        fingerprint: str,
        num_rows: int,
        rows: range,
        num_segments: int,
        segment_length: int,
        seed: int,
    ) -> None:
        """Starts every row at its first document.

        Args:
          documents: to read, over and over.
          fingerprint: of the cache they are in; a state of another cache is refused.
          num_rows: R, rows of all hosts.
          rows: this host's share of `range(num_rows)`.
          num_segments: U, segments of a row in a batch.
          segment_length: T.
          seed: of the permutations.

        Raises:
          DataError: there are no documents, or a number is not positive, or `rows` lie outside.
        """
        if not len(documents):
            raise DataError("the split has no documents: there is nothing to stream")
        if min(num_rows, num_segments, segment_length) < 1 or not set(rows) <= set(range(num_rows)):
            raise DataError(
                f"cannot stream {rows} of {num_rows} rows in {num_segments} segments of {segment_length} tokens"
            )
        self._documents = documents
        self._permutations = _Permutations(len(documents), seed)
        self._identity = {"cache": fingerprint, "seed": seed, "num_rows": num_rows}
        self._rows = np.asarray(rows, np.int64)
        self._num_segments, self._segment_length = num_segments, segment_length
        self._move_to(np.arange(num_rows, dtype=np.int64), np.zeros(num_rows, np.int64))

    def __iter__(self) -> DocumentStream:
        return self

    def __next__(self) -> Batch:
        shape = (len(self._rows), self._num_segments, self._segment_length)
        targets = np.full(shape, PADDING, np.int32)
        previous = np.full(shape[:2], PADDING, np.int32)
        start_of_document = np.zeros(shape[:2], bool)
        for segment in range(self._num_segments):
            start_of_document[:, segment] = self._offset[self._rows] == 0
            for index, row in enumerate(self._rows):
                previous[index, segment] = _fill(targets[index, segment], self._tokens(index), int(self._offset[row]))
            self._advance()
        return _make_batch(targets, previous, start_of_document)

    def get_state(self) -> dict[str, Any]:
        """See `BatchIterator`: for each row, where its document stands in the line, and its next token in that."""
        return self._identity | {"position": self._position.tolist(), "offset": self._offset.tolist()}

    def set_state(self, state: dict[str, Any]) -> None:
        """See `BatchIterator`.

        Raises:
          DataError: the state is of another cache, seed or number of rows, or no state of a stream at all.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise DataError(
                    f"this position belongs to another stream: its {name} is {state.get(name)!r}, here it is {value!r}"
                )
        num_rows = self._identity["num_rows"]
        position, offset = (np.asarray(state.get(name, ()), np.int64) for name in ("position", "offset"))
        if position.shape != (num_rows,) or offset.shape != (num_rows,):
            raise DataError(
                f"this is no position of {num_rows} rows: it has {position.shape} positions and {offset.shape} offsets"
            )
        lengths = self._lengths_at(position) if np.all(position >= 0) else 0
        if np.any(position % num_rows != np.arange(num_rows)) or np.any(offset < 0) or np.any(offset >= lengths):
            raise DataError(
                "this is no position of this stream: a row is on another row's document, or past the end of one"
            )
        self._move_to(position, offset)

    def _move_to(self, position: np.ndarray, offset: np.ndarray) -> None:
        # int64 [R]: of all hosts' rows, the document in the line, its next token, its length.
        self._position, self._offset = position.copy(), offset.copy()
        self._length = self._lengths_at(position)
        # This host's rows: the current document's position and tokens.
        self._loaded: list[tuple[int, np.ndarray] | None] = [None] * len(self._rows)

    def _advance(self) -> None:
        """Moves every row by one segment; a row at the end of its document goes to its next one."""
        self._offset += self._segment_length
        (finished,) = np.nonzero(self._offset >= self._length)
        if len(finished):
            self._position[finished] += len(self._position)
            self._offset[finished] = 0
            self._length[finished] = self._lengths_at(self._position[finished])
            self._permutations.forget_before(int(self._position.min()))

    def _lengths_at(self, positions: np.ndarray) -> np.ndarray:
        documents = np.fromiter(map(self._permutations.document_at, positions.tolist()), np.int64, len(positions))
        return self._documents.num_tokens[documents]

    def _tokens(self, index: int) -> np.ndarray:
        """The current document of one of this host's rows, read when the row comes to it."""
        position = int(self._position[self._rows[index]])
        loaded = self._loaded[index]
        if loaded is None or loaded[0] != position:
            loaded = position, self._documents.tokens(self._permutations.document_at(position))
            self._loaded[index] = loaded
        return loaded[1]


class _Permutations:
    """The endless line of documents: which one is at a position."""

    def __init__(self, num_documents: int, seed: int) -> None:
        self._num_documents, self._seed = num_documents, seed
        self._by_epoch: dict[int, np.ndarray] = {}

    def document_at(self, position: int) -> int:
        epoch, index = divmod(position, self._num_documents)
        if epoch not in self._by_epoch:
            # RandomState and SeedSequence promise the same numbers from every future NumPy; Generator does not, and a
            # resumed run would go astray.
            bits = np.random.MT19937(np.random.SeedSequence([self._seed, epoch]))
            self._by_epoch[epoch] = np.random.RandomState(bits).permutation(self._num_documents)
        return int(self._by_epoch[epoch][index])

    def forget_before(self, position: int) -> None:
        """Drops the epochs that no row will come to again."""
        first = position // self._num_documents
        if min(self._by_epoch) < first:
            self._by_epoch = {epoch: order for epoch, order in self._by_epoch.items() if epoch >= first}


def evaluation_batches(documents: Split, num_rows: int, segment_length: int) -> Iterator[EvaluationBatch]:
    """Every document once, whole, from its start.

    The longest documents go first, each onto the row that is free first, so that rows end at about the same time.

    Args:
      documents: to read.
      num_rows: B.
      segment_length: T.

    Yields:
      One segment a row; rows that have run out hold padding.
    """
    waiting = iter(np.argsort(-documents.num_tokens, kind="stable"))
    document = np.full(num_rows, -1, np.int32)
    offset = np.zeros(num_rows, np.int64)
    tokens = [np.zeros(0, np.uint16)] * num_rows
    while True:
        for row in range(num_rows):
            if offset[row] >= len(tokens[row]):
                document[row], offset[row] = next(waiting, -1), 0
                tokens[row] = documents.tokens(int(document[row])) if document[row] >= 0 else tokens[row][:0]
        if np.all(document < 0):
            return
        targets = np.full((num_rows, 1, segment_length), PADDING, np.int32)
        previous = [[_fill(targets[row, 0], tokens[row], int(offset[row]))] for row in range(num_rows)]
        start_of_document = ((offset == 0) & (document >= 0))[:, None]
        yield EvaluationBatch(
            _make_batch(targets, np.asarray(previous, np.int32), start_of_document), document.copy(), offset.copy()
        )
        offset += segment_length


def _fill(targets: np.ndarray, tokens: np.ndarray, offset: int) -> int:
    """Puts the segment of a document that begins at `offset` into `targets`, int32 [T]. Returns the token before it,
    `PADDING` at the start.
    """
    segment = tokens[offset : offset + len(targets)]
    targets[: len(segment)] = segment
    return int(tokens[offset - 1]) if offset else PADDING


def _make_batch(targets: np.ndarray, previous: np.ndarray, start_of_document: np.ndarray) -> Batch:
    """The batch that predicts `targets`.

    Args:
      targets: int32 [B, U, T].
      previous: int32 [B, U], the token before each segment.
      start_of_document: bool [B, U].
    """
    return Batch(
        tokens=np.concatenate([previous[..., None], targets[..., :-1]], axis=-1),
        targets=targets,
        loss_weights=(targets != PADDING).astype(np.float32),
        start_of_document=start_of_document,
    )
