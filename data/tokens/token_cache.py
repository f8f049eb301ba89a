"""The token cache: tokenised documents on disk, read from anywhere in them and in any order.

A cache is a folder that needs nothing else:

    cache.json                     what it is: Task, vocabulary, source, splits, counts
    vocabulary.model               where the vocabulary is a SentencePiece model; tokenizer.json, where it is such a one
    SPLIT.index.npz                of each document its tokens, bytes and key; of each shard its first document
    SPLIT-00000.array_record ...   a document as one record, or, of more than `PIECE` tokens, as consecutive records of
                                   so many: its ids as little-endian uint16, or uint32 where there are more than 65536

`cache.json` is written last: a folder without it is no cache. It has a digest of itself and of every array of the
indices; array_record has checksums of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from memorizing.batch import Vocabulary
from memorizing.data.errors import DataError
from memorizing.data.tokens import paths, vocabulary_files
from memorizing.errors import first_line

METADATA_FILE = "cache.json"
FORMAT = 3
# Of 0.1.0: without digests.
_OLDER_FORMAT = 2
_DIGEST = "sha256"
# Tokens of a record: what is read and checked at once, also of a document of millions of tokens.
PIECE = 1 << 16
_OPEN_SHARDS = 256


class Split:
    """The documents of one split, by number.

    Attributes:
      num_tokens: int64 [documents].
      start_id: the id that stands before the first token of a document.
    """

    def __init__(
        self, directory: str, name: str, dtype: np.dtype, start_id: int, digests: Mapping[str, str] | None
    ) -> None:
        """
        Args:
          directory: of the cache.
          name: of the split.
          dtype: of the ids in a record.
          start_id: the id that stands before the first token of a document.
          digests: of the arrays of the index; None where the cache has none.

        Raises:
          DataError: the index is damaged.
        """
        self._directory = directory
        self._name = name
        self._dtype = dtype
        self._digests = digests
        self.start_id = start_id
        # Numbers of the shards, and the first document of each.
        self.num_tokens, self._shards, self._shard_starts = self._read_index("num_tokens", "shards", "shard_starts")
        # Of each document, the records before it, in all shards.
        num_pieces = -(-self.num_tokens // PIECE)
        self._pieces_before = np.cumsum(num_pieces) - num_pieces
        # Not more of them, so that the files of a large cache can be open at the same time.
        self._reader = functools.lru_cache(_OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return len(self.num_tokens)

    @functools.cached_property
    def num_bytes(self) -> np.ndarray:
        """UTF-8 bytes of the text of each document, int64 [documents]."""
        (num_bytes,) = self._read_index("num_bytes")
        return num_bytes

    def key(self, index: int) -> str:
        """The key of a document in its corpus."""
        keys, ends = self._keys
        start = ends[index - 1] if index else 0
        return keys[start : ends[index]].tobytes().decode()

    def tokens(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens of a document from `start` to below `stop`, or to its end: uint16 or uint32 [length].

        Raises:
          DataError: the shard is damaged.
        """
        stop = int(self.num_tokens[index]) if stop is None else stop
        first = start // PIECE
        end = -(-stop // PIECE)
        if first >= end:
            return np.zeros(0, self._dtype)
        tokens = np.concatenate([self._piece(index, piece) for piece in range(first, end)])
        return tokens[start - first * PIECE : stop - first * PIECE]

    def _piece(self, index: int, piece: int) -> np.ndarray:
        """The `piece`-th record of a document."""
        place = int(np.searchsorted(self._shard_starts, index, side="right")) - 1
        shard = int(self._shards[place])
        first_of_shard = self._pieces_before[self._shard_starts[place]]
        number = int(self._pieces_before[index] - first_of_shard) + piece
        try:
            (record,) = self._reader(shard).read([number])
        except (RuntimeError, IndexError) as error:
            raise _damaged(self._shard_path(shard), str(error)) from None
        tokens = np.frombuffer(record, self._dtype)
        expected = min(PIECE, int(self.num_tokens[index]) - piece * PIECE)
        if len(tokens) != expected:
            reason = f"document {index} has {len(tokens)} tokens where the index says {expected}"
            raise _damaged(self._shard_path(shard), reason)
        return tokens

    @functools.cached_property
    def _keys(self) -> tuple[np.ndarray, np.ndarray]:
        """All keys as one text, uint8, and where each ends in it; training needs none of them."""
        keys, ends = self._read_index("keys", "key_ends")
        return keys, ends

    def _read_index(self, *names: str) -> list[np.ndarray]:
        """Arrays of the index.

        Raises:
          DataError: they are not what was written.
        """
        path = os.path.join(self._directory, index_file(self._name))
        try:
            with np.load(path, allow_pickle=False) as index:
                arrays = [index[name] for name in names]
        # NumPy reads a zip archive with headers that are Python literals: a changed bit ends in one of a dozen errors.
        except Exception as error:
            raise _damaged(path, first_line(error)) from None
        for name, array in zip(names, arrays, strict=True):
            wanted = np.uint8 if name == "keys" else np.int64
            if array.dtype != wanted or array.ndim != 1:
                raise _damaged(path, f"{name} is {array.dtype}{list(array.shape)}")
            if self._digests is not None and self._digests.get(name) != array_digest(array):
                raise _damaged(path, f"{name} is not as it was written")
        return arrays

    def _open(self, shard: int) -> ArrayRecordReader:
        # Documents are read in random order: reading ahead would only read too much.
        return ArrayRecordReader(self._shard_path(shard), "readahead_buffer_size:0")

    def _shard_path(self, shard: int) -> str:
        return os.path.join(self._directory, shard_file(self._name, shard))


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

    @property
    def start_id(self) -> int:
        """The id that stands before the first token of a document; caches that were made before it was noted have 0."""
        return self.metadata["vocabulary"].get("start_id", 0)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary that the cache was made with.

        Raises:
          DataError: the model in the folder is another one.
        """
        return vocabulary_files.read(self.path, self.metadata["vocabulary"])

    def split(self, name: str) -> Split:
        """Opens a split.

        Raises:
          DataError: there is no such split.
        """
        if name not in self.metadata["splits"]:
            raise DataError(f"{self.path} has no split {name!r}, only {', '.join(self.metadata['splits'])}")
        digests = self.metadata.get("indices")
        of_split = None if digests is None else digests[name]
        return Split(self.path, name, dtype_of(self.vocab_size), self.start_id, of_split)


def exists(path: str) -> bool:
    """Whether a folder is a finished cache."""
    return (epath.Path(path) / METADATA_FILE).exists()


def read_metadata(path: str, task: str | None = None) -> dict[str, Any]:
    """Reads what a cache is; see `open_cache`."""
    if not exists(path):
        raise DataError(f"no token cache in {path!r}; make it with: memorizing prepare --output={path}")
    metadata = _unsealed(epath.Path(path) / METADATA_FILE)
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


def sealed(metadata: Mapping[str, Any]) -> str:
    """The text of `cache.json`, with a digest of all that it says."""
    # Once through JSON, so that it is what will be read.
    content = json.loads(json.dumps({"format": FORMAT, **metadata}))
    return json.dumps({**content, _DIGEST: _digest_of(content)}, indent=2) + "\n"


def array_digest(array: np.ndarray) -> str:
    """The digest of an array of an index."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _unsealed(path: epath.Path) -> dict[str, Any]:
    """What `sealed` was given, or what 0.1.0 wrote, which had no digests.

    Raises:
      DataError: it is damaged, or of another version.
    """
    try:
        metadata = json.loads(path.read_text())
    except (ValueError, RecursionError, OSError) as error:
        raise _damaged(str(path), first_line(error)) from None
    digest = metadata.pop(_DIGEST, None) if isinstance(metadata, dict) else None
    if digest is None and isinstance(metadata, dict) and metadata.get("format") != FORMAT:
        if metadata.get("format") != _OLDER_FORMAT:
            raise DataError(
                f"{str(path.parent)!r} is of another version of memorizing; delete the folder and prepare it again"
            )
        _check_parts(metadata, path)
    elif digest is None or digest != _digest_of(metadata):
        raise _damaged(str(path), "it is not as it was written")
    return metadata


def _check_parts(metadata: Mapping[str, Any], path: epath.Path) -> None:
    """Raises DataError where what has no digest lacks what is read of it."""
    parts = {"task": str, "fingerprint": str, "vocabulary": dict, "splits": dict}
    for name, kind in parts.items():
        if not isinstance(metadata.get(name), kind):
            raise _damaged(str(path), f"its {name} is missing, or no {kind.__name__}")
    described = metadata["vocabulary"]
    for name, kind in {"name": str, "size": int, "digest": str}.items():
        if not isinstance(described.get(name), kind):
            raise _damaged(str(path), f"the {name} of its vocabulary is missing, or no {kind.__name__}")


def _digest_of(metadata: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _damaged(path: str, reason: str) -> DataError:
    return DataError(f"the token cache is damaged: {path}: {reason}; delete the folder and prepare it again")


def dtype_of(vocab_size: int) -> np.dtype:
    """Type of the ids in a record."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def index_file(split: str) -> str:
    return f"{split}.index.npz"


def shard_file(split: str, shard: int) -> str:
    return f"{split}-{shard:05d}.array_record"
