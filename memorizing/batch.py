"""What the data side hands to the training side: the only types both know.

A *segment* is one T-long slice of a document, one forward pass of the model. A row reads one document until the
document ends, and then the next one; a segment never holds tokens of two documents. A batch has U consecutive segments
of each of its B rows.

The model predicts `targets` from `tokens`, which are the same tokens one position earlier: `tokens[t]` is the token
before `targets[t]`. The first input of a segment is therefore the last target of the row's previous segment (`start_id`
at the start of a document), so that the first token of every segment is scored too.

No token id means "nothing": `Batch.is_real` says which positions hold a token of a document, and the ids in the other
positions have no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class Batch(NamedTuple):
    """U segments for each of B rows, as numpy (from the data side) or JAX arrays (inside a step).

    Attributes:
      tokens: int32 [B, U, T], the model's input.
      targets: int32 [B, U, T], what it has to predict.
      loss_weights: float32 [B, U, T], weight of each prediction in the loss; 0 where a position is not real.
      is_real: bool [B, U, T], whether there is a token to predict; false after the end of a document, where tokens and
        targets may be any ids.
      start_of_document: bool [B, U], true where a segment begins a new document: the row's context is reset before it.
    """

    tokens: Any
    targets: Any
    loss_weights: Any
    is_real: Any
    start_of_document: Any


class EvaluationBatch(NamedTuple):
    """One segment a row (U = 1) of held-out documents, with what is needed to account for each document.

    Attributes:
      batch: the segments; in rows that have run out of documents no position is real.
      document: int32 [B], index of the row's document in the split; -1 for a row that has run out.
      offset: int64 [B], position of the segment's first target in its document, in tokens.
    """

    batch: Batch
    document: np.ndarray
    offset: np.ndarray


class BatchIterator(Protocol):
    """An endless stream of batches whose position can be saved and restored exactly."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]:
        """Position of every row (of all hosts) as a JSON-able dict: the next batch is a function of it."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position that `get_state` returned. Raises ValueError if it belongs to another stream."""
        ...


class Vocabulary(Protocol):
    """Turns text into token ids and back.

    Attributes:
      name: "bytes", or "spm" or "hf" and the number of ids.
      size: number of ids, special ones included.
      digest: equal digests mean equal ids.
      start_id: the id that stands before a document's first token, as the model's input; it may be a word, or one of
        `unused_ids`.
      end_id: the id that ends a document.
      unused_ids: ids that no text has, which are never generated.
    """

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def digest(self) -> str: ...

    @property
    def start_id(self) -> int: ...

    @property
    def end_id(self) -> int: ...

    @property
    def unused_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 [length], without `end_id`."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text; ids that stand for no text are left out, bytes that are no UTF-8 become U+FFFD."""
        ...

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        """What each id adds to the text, in UTF-8: joined they are its bytes.

        Empty for ids that stand for no text, and where a character is not complete before the next id.
        """
        ...


class TextSource(Protocol):
    """The texts behind a data source whose tokens are text.

    Attributes:
      vocabulary: turns text into tokens and back.
      document_words: int64 [number of held-out documents], words of each between white space, or None where texts are
        not made of words.
    """

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def document_words(self) -> np.ndarray | None: ...

    def document_keys(self) -> Sequence[str]:
        """Names of the held-out documents in their corpus."""
        ...

    def document_tokens(self, index: int) -> np.ndarray:
        """All tokens of a held-out document, int32 [length]."""
        ...


def text_of(source: DataSource) -> TextSource | None:
    """The property `text` of a data source, or None if it has none because its tokens are not text."""
    return getattr(source, "text", None)


def with_documents(source: DataSource, documents: str, tell: Callable[[str], None]) -> DataSource | None:
    """A source whose held-out documents are the user's own, with the vocabulary of another one, whose method it is.

    Args:
      source: the other one.
      documents: where they lie.
      tell: is told in a line what was read.

    Returns:
      The source; None where the other one cannot read documents, because its tokens are not text.

    Raises:
      UserError: they cannot be read.
    """
    method = getattr(source, "with_documents", None)
    return method(documents, tell) if method else None


class DataSource(Protocol):
    """A corpus ready for training: a frozen dataclass that gin builds.

    A source whose tokens are text also has a property `text`, see `text_of`, and one that reads documents in files a
    method `with_documents`, see the function of that name.

    Attributes:
      vocab_size: number of token ids.
      start_id: the id that stands before a document's first token.
      identity: what makes two sources the same experiment (a short string).
      num_eval_documents: number of held-out documents.
      document_bytes: int64 [number of held-out documents], UTF-8 bytes of each, or None where text has no bytes.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def start_id(self) -> int: ...

    @property
    def identity(self) -> str: ...

    @property
    def num_eval_documents(self) -> int: ...

    @property
    def document_bytes(self) -> np.ndarray | None: ...

    def train_batches(
        self, num_rows: int, rows: range, num_segments: int, segment_length: int, seed: int
    ) -> BatchIterator:
        """The training stream.

        A batch holds only `rows` (this host's share of `range(num_rows)`); the state covers all rows.
        """
        ...

    def evaluation_batches(
        self, num_rows: int, segment_length: int, rows: range | None = None
    ) -> Iterator[EvaluationBatch]:
        """Every held-out document once, whole, from its start; longest first.

        A batch holds only `rows` (this host's share of `range(num_rows)`; None for all), in their order. Every host
        gets the same number of batches.
        """
        ...
