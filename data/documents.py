"""What every corpus reader yields, and what has to be known of a corpus before anything is written."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from .errors import DataError


class Document(NamedTuple):
    """One whole document.

    Attributes:
      key: names the document in its corpus; unique and stable.
      text: all of it.
      metadata: what the corpus tells about it; not seen by any model.
    """

    key: str
    text: str
    metadata: Mapping[str, Any]


class Reader(Protocol):
    """A corpus in its raw form. Readers are frozen dataclasses: plain Python, no TensorFlow."""

    def documents(
        self, wanted: Container[str] | None = None, skipped: Counter[str] | None = None
    ) -> Iterator[Document]:
        """Yields the documents, in an order that depends on nothing but the corpus.

        Args:
          wanted: keys of the documents to yield; None for all. Others are passed over unread.
          skipped: counts what was left out, by reason.

        Raises:
          DataError: the source is missing or not what the reader expects.
        """


class Survey(NamedTuple):
    """One reading of a corpus.

    Attributes:
      num_bytes: UTF-8 bytes of each document by key, in the reader's order.
      skipped: number of files that were left out, by reason.
      fingerprint: hash of all keys and texts.
    """

    num_bytes: dict[str, int]
    skipped: dict[str, int]
    fingerprint: str


def survey(reader: Reader, advance: Callable[[], None] = lambda: None) -> Survey:
    """Reads a corpus once, keeping no text.

    Args:
      reader: the corpus.
      advance: called after each document.

    Raises:
      DataError: a key occurs twice.
    """
    num_bytes: dict[str, int] = {}
    skipped: Counter[str] = Counter()
    digest = hashlib.sha256()
    for document in reader.documents(skipped=skipped):
        if document.key in num_bytes:
            raise DataError(f"two documents have the key {document.key!r}; keys must be unique")
        text = document.text.encode()
        num_bytes[document.key] = len(text)
        digest.update(hashlib.sha256(document.key.encode()).digest() + hashlib.sha256(text).digest())
        advance()
    return Survey(num_bytes, dict(sorted(skipped.items())), digest.hexdigest())
