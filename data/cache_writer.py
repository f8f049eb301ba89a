"""Writing a token cache; its layout is told in `token_cache`."""

from __future__ import annotations

import array
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from . import token_cache, vocabulary
from .errors import DataError
from .vocabulary import Vocabulary

_SHARD_BYTES = 256 << 20


class TokenisedDocument(NamedTuple):
    """A document as a Task gives it.

    Attributes:
      key: names it in its corpus.
      num_bytes: of its text in UTF-8.
      tokens: int32 [length], its end included.
    """

    key: str
    num_bytes: int
    tokens: np.ndarray


class CacheWriter:
    """Writes a cache into a folder that exists and is empty; `paths.written_whole` gives one."""

    def __init__(self, directory: str | os.PathLike[str], used: Vocabulary, shard_bytes: int = _SHARD_BYTES) -> None:
        """Writes the vocabulary; a shard will be closed when it holds at least `shard_bytes` of tokens."""
        self._directory, self._vocabulary, self._shard_bytes = os.fspath(directory), used, shard_bytes
        self._splits: dict[str, dict[str, Any]] = {}
        if isinstance(used, vocabulary.SentencePieceVocabulary):
            with open(self.model_path, "wb") as file:
                file.write(used.model)

    @property
    def model_path(self) -> str:
        """Where a SentencePiece model lies."""
        return os.path.join(self._directory, vocabulary.MODEL_FILE)

    def write_split(self, name: str, documents: Iterable[TokenisedDocument]) -> None:
        """Writes all documents of a split, in the order given."""
        # Columns, not lists of objects: there may be tens of millions of documents.
        num_tokens, num_bytes, key_ends, keys = array.array("q"), array.array("q"), array.array("q"), bytearray()
        digest = hashlib.sha256()
        shards = _ShardWriter(self._directory, name, self._shard_bytes)
        dtype = token_cache.dtype_of(self._vocabulary.size)
        for document in documents:
            _check(document, self._vocabulary.size)
            key, record = document.key.encode(), document.tokens.astype(dtype).tobytes()
            shards.write(record)
            keys += key
            key_ends.append(len(keys))
            num_tokens.append(len(document.tokens))
            num_bytes.append(document.num_bytes)
            digest.update(hashlib.sha256(key).digest() + hashlib.sha256(record).digest())
        np.savez(
            os.path.join(self._directory, token_cache.index_file(name)),
            num_tokens=np.asarray(num_tokens, np.int64),
            num_bytes=np.asarray(num_bytes, np.int64),
            key_ends=np.asarray(key_ends, np.int64),
            keys=np.frombuffer(keys, np.uint8),
            shard_starts=np.asarray(shards.close(), np.int64),
        )
        counts = {"documents": len(num_tokens), "tokens": sum(num_tokens), "bytes": sum(num_bytes)}
        self._splits[name] = counts | {"digest": digest.hexdigest()}

    def finish(self, task: str, described: Mapping[str, Any]) -> dict[str, Any]:
        """Writes `cache.json` and returns what is in it.

        Args:
          task: name of the Task.
          described: what else to keep of where the documents came from; JSON-able.
        """
        used = {"name": self._vocabulary.name, "size": self._vocabulary.size, "digest": self._vocabulary.digest}
        content = json.dumps([used, self._splits], sort_keys=True).encode()
        metadata = {
            "format": token_cache.FORMAT,
            "task": task,
            "fingerprint": hashlib.sha256(content).hexdigest(),
            "vocabulary": used,
            "splits": self._splits,
            **described,
        }
        with open(os.path.join(self._directory, token_cache.METADATA_FILE), "w") as file:
            file.write(json.dumps(metadata, indent=2) + "\n")
        return metadata


class _ShardWriter:
    """Records into shards of a bounded size."""

    def __init__(self, directory: str, split: str, shard_bytes: int) -> None:
        self._directory, self._split, self._shard_bytes = directory, split, shard_bytes
        self._starts: list[int] = []
        self._writer: ArrayRecordWriter | None = None
        self._num_records = self._num_bytes = 0

    def write(self, record: bytes) -> None:
        if self._writer is None:
            path = os.path.join(self._directory, token_cache.shard_file(self._split, len(self._starts)))
            # One record a group: reading a document decompresses no other.
            self._writer = ArrayRecordWriter(path, "group_size:1")
            self._starts.append(self._num_records)
        self._writer.write(record)
        self._num_records += 1
        self._num_bytes += len(record)
        if self._num_bytes >= self._shard_bytes:
            self.close()

    def close(self) -> list[int]:
        """Ends the current shard. Returns the index of the first record of every shard."""
        if self._writer is not None:
            self._writer.close()
            self._writer, self._num_bytes = None, 0
        return self._starts


def _check(document: TokenisedDocument, vocab_size: int) -> None:
    """Padding inside a document would be taken for its end, and an id out of range for another one."""
    tokens = document.tokens
    if not len(tokens) or tokens.min() <= vocabulary.PAD_ID or tokens.max() >= vocab_size:
        raise DataError(f"document {document.key!r} has no tokens, or ids outside of 1 to {vocab_size - 1}")
