"""The corpus that a run trains on, as a configuration: a token cache and how to make it where it is missing."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Iterable, Iterator

import numpy as np

from memorizing.batch import EvaluationBatch, Vocabulary

from . import paths, splits, streams, task_name, token_cache
from .corpora import CORPORA, STANDARD_LIBRARY
from .errors import DataError
from .order import Line
from .read_ahead import ReadAhead
from .streams import DocumentStream
from .token_cache import Split, TokenCache


@dataclasses.dataclass(frozen=True)
class CachedCorpus:
    """A tokenised corpus; a `memorizing.batch.DataSource`.

    Attributes:
      task: name of the seqio Task of the cache: corpus and vocabulary, such as github_bytes or github_spm2048.
      source: folder of the raw corpus, or "stdlib", the standard library of this Python, to make a missing cache from.
        None is "stdlib" where no path is named either; otherwise the cache must be there.
      path: folder of the cache, local or gs://; None: a folder of its own in the user's cache.
    """

    task: str = "github_spm2048"
    source: str | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        """Raises DataError where a setting cannot be used."""
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, str) and (value is not None or name == "task"):
                raise DataError(f"CachedCorpus.{name}={value!r}: give a string")
        try:
            task_name.parse(self.task)
        except DataError as error:
            raise DataError(f"CachedCorpus.{error}") from None

    @property
    def cache_path(self) -> str:
        """Folder of the cache, whether or not it is there."""
        return self.path or paths.default_cache_path(self.task, self.source or STANDARD_LIBRARY)

    @property
    def vocab_size(self) -> int:
        return self._cache.vocab_size

    @property
    def identity(self) -> str:
        return f"{self.task}-{self._cache.fingerprint}"

    @property
    def num_eval_documents(self) -> int:
        return len(self._validation.num_bytes)

    @property
    def document_bytes(self) -> np.ndarray:
        return self._validation.num_bytes

    def prepare(self) -> None:
        """Makes the cache where it is missing, in a process of its own: this one never imports TensorFlow.

        Raises:
          DataError: it cannot be made.
        """
        if token_cache.exists(self.cache_path):
            return
        if self.path and not self.source:
            raise DataError(
                f"CachedCorpus.path={self.path!r} holds no token cache: name a folder that does, "
                "or a CachedCorpus.source to make one from"
            )
        source = self.source or STANDARD_LIBRARY
        flags = [f"--task={self.task}", f"--source={source}", f"--output={self.cache_path}"]
        # Its progress goes to this process's standard output, after what was printed here.
        sys.stdout.flush()
        ended = subprocess.run(
            [sys.executable, "-m", "memorizing.data.prepare", *flags], stderr=subprocess.PIPE, text=True
        )
        if ended.returncode:
            last_line = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
            raise DataError(
                f"the corpus of {self.task} could not be prepared: {last_line.removeprefix('memorizing: ')}"
            )

    def train_batches(self, num_rows: int, rows: range, num_segments: int, segment_length: int, seed: int) -> ReadAhead:
        """See `DataSource`."""
        documents = self._cache.split(splits.TRAIN)
        line = Line([len(documents)], seed)
        fingerprint = self._cache.fingerprint
        return ReadAhead(DocumentStream(documents, fingerprint, line, num_rows, rows, num_segments, segment_length))

    def evaluation_batches(
        self, num_rows: int, segment_length: int, rows: range | None = None
    ) -> Iterator[EvaluationBatch]:
        """See `DataSource`."""
        return streams.evaluation_batches(self._validation, num_rows, segment_length, rows)

    @property
    def text(self) -> CachedCorpus:
        """See `memorizing.batch.TextSource`."""
        return self

    @property
    def vocabulary(self) -> Vocabulary:
        return self._cache.vocabulary

    @functools.cached_property
    def document_words(self) -> np.ndarray | None:
        """Words of each held-out document of a corpus of prose, int64: as in the PG-19 statistics, what stands between white space; None for other corpora."""
        if not CORPORA[task_name.parse(self.task).corpus].is_prose:
            return None
        documents = (self.decode(self._validation.tokens(index)) for index in range(self.num_eval_documents))
        return np.fromiter((len(document.split()) for document in documents), np.int64)

    def document_keys(self) -> list[str]:
        """Names of the held-out documents in their corpus."""
        return [self.document_key(index) for index in range(self.num_eval_documents)]

    def document_tokens(self, index: int) -> np.ndarray:
        """All tokens of a held-out document, int32 [length]."""
        return self._validation.tokens(index).astype(np.int32)

    def document_key(self, index: int) -> str:
        """Name of a held-out document in its corpus."""
        return self._validation.key(index)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 [length], without an end."""
        return self._cache.vocabulary.encode(text)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of some ids; padding and ends are left out."""
        return self._cache.vocabulary.decode(tokens)

    # Opened at first use, so that a configuration can be built and printed where there is no data.
    @functools.cached_property
    def _cache(self) -> TokenCache:
        self.prepare()
        return token_cache.open_cache(self.cache_path, self.task)

    @functools.cached_property
    def _validation(self) -> Split:
        return self._cache.split(splits.VALIDATION)
