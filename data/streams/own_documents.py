"""Documents of the user's own, tokenised as they are read: what a finished run is evaluated on, without a cache."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from memorizing.batch import BatchIterator, EvaluationBatch, Vocabulary
from memorizing.data import documents
from memorizing.data.corpora.text import WHOLE, TextReader
from memorizing.data.errors import DataError
from memorizing.data.streams import segments
from memorizing.data.tokens import cache_writer, token_cache, vocabulary_files


class OwnDocuments:
    """Held-out documents and no others; a `memorizing.batch.DataSource`, whose tokens are in memory."""

    def __init__(self, source: str, vocabulary: Vocabulary, has_words: bool, tell: Callable[[str], None]) -> None:
        """Reads all of them.

        Args:
          source: folders, files, patterns or URLs, with commas between.
          vocabulary: what they are tokenised with.
          has_words: whether their words are counted.
          tell: is told in a line what was read, and what was left out.

        Raises:
          DataError: there is nothing to read.
        """
        self.vocabulary = vocabulary
        self.vocab_size = vocabulary.size
        self.start_id = vocabulary.start_id
        self._keys: list[str] = []
        self._tokens: list[np.ndarray] = []
        sizes = []
        words = []
        digest = hashlib.sha256(vocabulary.digest.encode())
        skipped: Counter[str] = Counter()
        for document in TextReader(source).documents(WHOLE, skipped):
            if not vocabulary_files.can_write(vocabulary, document.text):
                skipped[cache_writer.CANNOT_BE_WRITTEN] += 1
                continue
            tokens = np.append(vocabulary.encode(document.text), vocabulary.end_id)
            text = document.text.encode()
            self._keys.append(document.key)
            self._tokens.append(tokens.astype(token_cache.dtype_of(vocabulary.size)))
            sizes.append(len(text))
            words.append(len(document.text.split()))
            digest.update(hashlib.sha256(document.key.encode()).digest() + hashlib.sha256(text).digest())
        left_out = ", ".join(f"{reason}: {count:,}" for reason, count in documents.reasons(skipped).items())
        if not sizes:
            raise DataError(f"{source!r} has no document; left out: {left_out or 'nothing'}")
        self.document_bytes = np.asarray(sizes, np.int64)
        self.document_words = np.asarray(words, np.int64) if has_words else None
        self.num_tokens = np.asarray([len(tokens) for tokens in self._tokens], np.int64)
        self.identity = f"documents-{digest.hexdigest()[:16]}"
        tell(f"{source}: {len(sizes):,} documents, {self.num_tokens.sum():,} tokens; left out: {left_out or 'nothing'}")

    def __len__(self) -> int:
        return len(self._tokens)

    def tokens(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `segments.Documents`."""
        return self._tokens[index][start:stop]

    @property
    def num_eval_documents(self) -> int:
        return len(self)

    @property
    def text(self) -> OwnDocuments:
        """See `memorizing.batch.TextSource`."""
        return self

    def document_keys(self) -> list[str]:
        """Names of the documents: those of their files."""
        return self._keys

    def document_tokens(self, index: int) -> np.ndarray:
        """All tokens of a document, int32 [length]."""
        return self._tokens[index].astype(np.int32)

    def train_batches(
        self, num_rows: int, rows: range, num_segments: int, segment_length: int, seed: int
    ) -> BatchIterator:
        """Raises DataError: nothing is trained on what is only to be evaluated."""
        raise DataError("these documents are for evaluation: prepare a token cache of them to train on it")

    def evaluation_batches(
        self, num_rows: int, segment_length: int, rows: range | None = None
    ) -> Iterator[EvaluationBatch]:
        """See `DataSource`."""
        return segments.evaluation_batches(self, num_rows, segment_length, rows)
