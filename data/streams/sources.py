"""The corpora that a run trains on, as configurations: token caches, and how to make those that are missing."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from memorizing.batch import EvaluationBatch, Vocabulary
from memorizing.data.corpora.catalogue import CORPORA, STANDARD_LIBRARY
from memorizing.data.errors import DataError
from memorizing.data.streams import segments
from memorizing.data.streams.order import Line
from memorizing.data.streams.own_documents import OwnDocuments
from memorizing.data.streams.read_ahead import ReadAhead
from memorizing.data.streams.segments import DocumentStream, Joined
from memorizing.data.tasks import splits, task_name
from memorizing.data.tasks.task_name import TaskName
from memorizing.data.tokens import paths, token_cache, vocabulary_files
from memorizing.data.tokens.token_cache import Split, TokenCache
from memorizing.errors import FactorAboveZero


@dataclasses.dataclass(frozen=True)
class CachedCorpus:
    """A tokenised corpus; a `memorizing.batch.DataSource`.

    Attributes:
      task: name of the Task of the cache: corpus and vocabulary, such as github_bytes or github_spm2048; or a
        vocabulary alone, such as spm2048: then the standard library is read as github, and any other source as text.
      source: what to make a missing cache from: the folder of the raw corpus, or "stdlib", the standard library of this
        Python. None means "stdlib" where no path is given either; with a path the cache must exist.
      path: folder of the cache, local or gs://; None: a folder of its own in the user's cache.
      vocabulary_file: what to make a missing cache with: a SentencePiece model, or a Hugging Face tokenizer.json; None:
        the bytes, or a SentencePiece model that is trained.
    """

    task: str = "github_spm2048"
    source: str | None = None
    path: str | None = None
    vocabulary_file: str | None = None

    def __post_init__(self) -> None:
        """Raises DataError where a setting cannot be used."""
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, str) and (value is not None or name == "task"):
                raise DataError(f"CachedCorpus.{name}={value!r}: give a string")
        try:
            _ = self.task_name
        except DataError as error:
            raise DataError(f"CachedCorpus.{error}") from None

    @property
    def task_name(self) -> TaskName:
        """The Task with its corpus."""
        return task_name.parse(self.task, self.source)

    @property
    def cache_path(self) -> str:
        """Folder of the cache, whether or not it is there."""
        source = self.source or STANDARD_LIBRARY
        return self.path or paths.default_cache_path(str(self.task_name), source, self.vocabulary_file)

    @property
    def vocab_size(self) -> int:
        return self.cache.vocab_size if self._has_cache else self.vocabulary.size

    @property
    def start_id(self) -> int:
        return self.cache.start_id if self._has_cache else self.vocabulary.start_id

    @property
    def identity(self) -> str:
        return f"{self.task_name}-{self.cache.fingerprint}"

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
        flags = [f"--task={self.task_name}", f"--source={source}", f"--output={self.cache_path}"]
        if self.vocabulary_file:
            flags.append(f"--vocabulary={self.vocabulary_file}")
        # Its progress goes to this process's standard output, after what was printed here.
        sys.stdout.flush()
        ended = subprocess.run(
            [sys.executable, "-m", "memorizing.data.prepare", *flags], stderr=subprocess.PIPE, text=True
        )
        if ended.returncode:
            last_line = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
            raise DataError(
                f"the corpus of {self.task_name} could not be prepared: {last_line.removeprefix('memorizing: ')}"
            )

    def train_batches(self, num_rows: int, rows: range, num_segments: int, segment_length: int, seed: int) -> ReadAhead:
        """See `DataSource`."""
        documents = self.cache.split(splits.TRAIN)
        line = Line([len(documents)], seed)
        fingerprint = self.cache.fingerprint
        return ReadAhead(DocumentStream(documents, fingerprint, line, num_rows, rows, num_segments, segment_length))

    def evaluation_batches(
        self, num_rows: int, segment_length: int, rows: range | None = None
    ) -> Iterator[EvaluationBatch]:
        """See `DataSource`."""
        return segments.evaluation_batches(self._validation, num_rows, segment_length, rows)

    @property
    def text(self) -> CachedCorpus:
        """See `memorizing.batch.TextSource`."""
        return self

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        if self._has_cache:
            return self.cache.vocabulary
        return vocabulary_files.load(str(self.vocabulary_file))

    @property
    def _has_cache(self) -> bool:
        """Whether there is a cache, or has to be: where only the vocabulary is asked for, its file will do."""
        return self.vocabulary_file is None or token_cache.exists(self.cache_path)

    @functools.cached_property
    def document_words(self) -> np.ndarray | None:
        """Words of each held-out document, int64; None unless the corpus is prose.

        As in the statistics of PG-19, a word is what stands between white space.
        """
        if not self.is_prose:
            return None
        documents = (self.decode(self._validation.tokens(index)) for index in range(self.num_eval_documents))
        return np.fromiter((len(document.split()) for document in documents), np.int64)

    def with_documents(self, documents: str, tell: Callable[[str], None]) -> OwnDocuments:
        """See `memorizing.batch.with_documents`."""
        return OwnDocuments(documents, self.vocabulary, self.is_prose, tell)

    @property
    def is_prose(self) -> bool:
        """Whether its texts are made of words between white space."""
        return CORPORA[self.task_name.corpus].is_prose

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
        return self.cache.vocabulary.encode(text)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of some ids; padding and ends are left out."""
        return self.cache.vocabulary.decode(tokens)

    # Opened when it is first used, so that a configuration can be built and printed where there is no data.
    @functools.cached_property
    def cache(self) -> TokenCache:
        """The opened cache, made where it is missing."""
        self.prepare()
        return token_cache.open_cache(self.cache_path, str(self.task_name))

    @functools.cached_property
    def _validation(self) -> Split:
        return self.cache.split(splits.VALIDATION)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several corpora with one vocabulary, mixed document by document; a `memorizing.batch.DataSource`.

    Attributes:
      corpora: to mix; held-out documents of all of them are evaluated.
      rates: share of the training tokens that comes from each; only their ratios matter.
    """

    corpora: tuple[CachedCorpus, ...]
    rates: tuple[FactorAboveZero, ...]

    def __post_init__(self) -> None:
        """Raises DataError where a setting cannot be used."""
        if len(self.corpora) < 1 or len(set(self.corpora)) < len(self.corpora):
            raise DataError(f"Mixture.corpora={self.corpora}: give one or more different corpora")
        if len(self.rates) != len(self.corpora) or min(self.rates) <= 0:
            raise DataError(
                f"Mixture.rates={self.rates}: give a positive number for each of the {len(self.corpora)} corpora"
            )

    @property
    def vocab_size(self) -> int:
        return self.corpora[0].vocab_size

    @property
    def start_id(self) -> int:
        return self.corpora[0].start_id

    @property
    def identity(self) -> str:
        members = zip(self.corpora, self.rates, strict=True)
        return "+".join(f"{rate:g}*{corpus.identity}" for corpus, rate in members)

    @property
    def num_eval_documents(self) -> int:
        return len(self._validation)

    @property
    def document_bytes(self) -> np.ndarray:
        return np.concatenate([corpus.document_bytes for corpus in self.corpora])

    def train_batches(self, num_rows: int, rows: range, num_segments: int, segment_length: int, seed: int) -> ReadAhead:
        """See `DataSource`."""
        members = [cache.split(splits.TRAIN) for cache in self._caches]
        sizes = [len(member) for member in members]
        # For the same share of tokens, a corpus of short documents needs more of them.
        weights = [rate / max(member.num_tokens.mean(), 1) for rate, member in zip(self.rates, members, strict=True)]
        fingerprint = "+".join(cache.fingerprint for cache in self._caches)
        line = Line(sizes, seed, weights)
        return ReadAhead(
            DocumentStream(Joined(members), fingerprint, line, num_rows, rows, num_segments, segment_length)
        )

    def evaluation_batches(
        self, num_rows: int, segment_length: int, rows: range | None = None
    ) -> Iterator[EvaluationBatch]:
        """See `DataSource`."""
        return segments.evaluation_batches(self._validation, num_rows, segment_length, rows)

    @property
    def text(self) -> Mixture:
        """See `memorizing.batch.TextSource`."""
        return self

    @property
    def vocabulary(self) -> Vocabulary:
        return self._caches[0].vocabulary

    @property
    def document_words(self) -> np.ndarray | None:
        """Words of each held-out document, int64; None unless all corpora are prose."""
        words = []
        for corpus in self.corpora:
            counts = corpus.document_words
            if counts is None:
                return None
            words.append(counts)
        return np.concatenate(words)

    def with_documents(self, documents: str, tell: Callable[[str], None]) -> OwnDocuments:
        """See `memorizing.batch.with_documents`."""
        return OwnDocuments(documents, self.vocabulary, all(corpus.is_prose for corpus in self.corpora), tell)

    def document_keys(self) -> list[str]:
        """Names of the held-out documents, with their corpus."""
        return [f"{corpus.task_name.corpus}: {key}" for corpus in self.corpora for key in corpus.document_keys()]

    def document_tokens(self, index: int) -> np.ndarray:
        """All tokens of a held-out document, int32 [length]."""
        return self._validation.tokens(index).astype(np.int32)

    @functools.cached_property
    def _caches(self) -> list[TokenCache]:
        """Raises DataError where the corpora have different vocabularies."""
        opened = [corpus.cache for corpus in self.corpora]
        for corpus, cache in zip(self.corpora, opened, strict=True):
            if cache.metadata["vocabulary"]["digest"] != opened[0].metadata["vocabulary"]["digest"]:
                raise DataError(
                    f"Mixture.corpora: {corpus.cache_path} and {self.corpora[0].cache_path} have different "
                    "vocabularies; prepare both with the same --vocabulary=FILE"
                )
        return opened

    @functools.cached_property
    def _validation(self) -> Joined:
        return Joined([cache.split(splits.VALIDATION) for cache in self._caches])
