"""The token cache: tokenised documents on disk, one a record, read in any order.

A cache is a folder that needs nothing else:

    cache.json                     what it is: Task, vocabulary, source, splits, counts
    vocabulary.model               where the vocabulary is a SentencePiece model
    SPLIT.index.npz                of each document its tokens, bytes and key; of each shard its first document
    SPLIT-00000.array_record ...   one document a record: its ids as little-endian uint16, or uint32 where there are
                                   more than 65536 of them

`cache.json` is written last: a folder without it is no cache.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from . import paths, vocabulary
from .errors import DataError
from .vocabulary import Vocabulary

METADATA_FILE = "cache.json"
FORMAT = 1


class Split:
    """The documents of one split, by index.

    Attributes:
      num_tokens: int64 [documents].
      num_bytes: int64 [documents], of the text in UTF-8.
    """

    def __init__(self, directory: str, name: str, dtype: np.dtype) -> None:
        self._directory, self._name, self._dtype = directory, name, dtype
        with np.load(os.path.join(directory, index_file(name)), allow_pickle=False) as index:
            self.num_tokens: np.ndarray = index["num_tokens"]
            self.num_bytes: np.ndarray = index["num_bytes"]
            self._keys, self._key_ends = index["keys"], index["key_ends"]
            self._shard_starts = index["shard_starts"]
        self._readers: dict[int, ArrayRecordReader] = {}

    def __len__(self) -> int:
        return len(self.num_tokens)

    def key(self, index: int) -> str:
        """The key of a document in its corpus."""
        start = self._key_ends[index - 1] if index else 0
        return self._keys[start : self._key_ends[index]].tobytes().decode()

    def tokens(self, index: int) -> np.ndarray:
        """All tokens of a document, uint16 or uint32 [length].

        Raises:
          DataError: the shard is damaged.
        """
        shard = int(np.searchsorted(self._shard_starts, index, side="right")) - 1
        try:
            (record,) = self._reader(shard).read([index - int(self._shard_starts[shard])])
        except RuntimeError as error:
            raise self._damaged(shard, str(error)) from None
        tokens = np.frombuffer(record, self._dtype)
        if len(tokens) != self.num_tokens[index]:
            raise self._damaged(
                shard, f"document {index} has {len(tokens)} tokens, the index says {self.num_tokens[index]}"
            )
        return tokens

    def _reader(self, shard: int) -> ArrayRecordReader:
        if shard not in self._readers:
            path = os.path.join(self._directory, shard_file(self._name, shard))
            # Documents are read in random order: reading ahead would only read too much.
            self._readers[shard] = ArrayRecordReader(path, "readahead_buffer_size:0")
        return self._readers[shard]

    def _damaged(self, shard: int, reason: str) -> DataError:
        path = os.path.join(self._directory, shard_file(self._name, shard))
        return DataError(f"the token cache is damaged: {path}: {reason}; delete the folder and prepare it again")


@dataclasses.dataclass(frozen=True, eq=False)
class TokenCache:
    """An opened cache.

    Attributes:
      path: of its folder, on a local file system.
      metadata: what `cache.json` holds.
    """

    path: str
    metadata: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Hash of all tokens, keys and the vocabulary: equal for equal caches, wherever they lie."""
        return self.metadata["fingerprint"]

    @property
    def vocab_size(self) -> int:
        return self.metadata["vocabulary"]["size"]

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary that the cache was made with.

        Raises:
          DataError: the model in the folder is another one.
        """
        described = self.metadata["vocabulary"]
        if described["name"] == vocabulary.ByteVocabulary().name:
            return vocabulary.ByteVocabulary()
        with open(os.path.join(self.path, vocabulary.MODEL_FILE), "rb") as file:
            loaded = vocabulary.SentencePieceVocabulary(file.read())
        if loaded.digest != described["digest"]:
            raise DataError(
                f"{self.path} holds another vocabulary than it was made with; delete the folder and prepare it again"
            )
        return loaded

    def split(self, name: str) -> Split:
        """Opens a split.

        Raises:
          DataError: there is no such split.
        """
        if name not in self.metadata["splits"]:
            raise DataError(f"{self.path} has no split {name!r}, only {', '.join(self.metadata['splits'])}")
        return Split(self.path, name, dtype_of(self.vocab_size))


def exists(path: str) -> bool:
    """Whether a folder is a finished cache."""
    return (epath.Path(path) / METADATA_FILE).exists()


def read_metadata(path: str, task: str | None = None) -> dict[str, Any]:
    """Reads what a cache is; see `open_cache`."""
    if not exists(path):
        raise DataError(f"no token cache in {path!r}; make it with: memorizing prepare --output={path}")
    metadata = json.loads((epath.Path(path) / METADATA_FILE).read_text())
    if metadata.get("format") != FORMAT:
        raise DataError(f"{path!r} is of another version of memorizing; delete the folder and prepare it again")
    if task is not None and metadata["task"] != task:
        raise DataError(f"{path!r} is a token cache of {metadata['task']}, not of {task}; name another folder or task")
    return metadata


def open_cache(path: str, task: str | None = None) -> TokenCache:
    """Opens a cache; one in an object store is copied to this machine first.

    Args:
      path: of its folder.
      task: name of the Task that it must be of; None for any.

    Raises:
      DataError: there is no finished cache, or one of another Task (and so of another corpus or vocabulary) or format.
    """
    metadata = read_metadata(path, task)
    if paths.is_remote(path):
        path = paths.local_copy(path, METADATA_FILE, metadata["fingerprint"])
    return TokenCache(path, metadata)


def dtype_of(vocab_size: int) -> np.dtype:
    """Type of the ids in a record."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def index_file(split: str) -> str:
    return f"{split}.index.npz"


def shard_file(split: str, shard: int) -> str:
    return f"{split}-{shard:05d}.array_record"
