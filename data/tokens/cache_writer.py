"""Writing a token cache, part by part; its layout is told in `token_cache`.

Parts are written by as many processes as there are, each into files of its own, and then joined: nothing depends on how
many processes there were. A part is done when its index is there, which is written last.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from memorizing.batch import Vocabulary
from memorizing.data.errors import DataError
from memorizing.data.tokens import staging, token_cache, vocabulary_files

# Why a document is left out that its tokens would not give back.
CANNOT_BE_WRITTEN = "characters that the vocabulary lacks"

_COLUMNS = ("num_tokens", "num_bytes", "key_lengths")


class TokenisedDocument(NamedTuple):
    """A document as a Task gives it.

    Attributes:
      key: names it in its corpus.
      num_bytes: of its text in UTF-8.
      tokens: integers [length], its end included.
    """

    key: str
    num_bytes: int
    tokens: np.ndarray


@dataclasses.dataclass
class _Columns:
    """What is known of the documents of a split: columns, since there may be tens of millions of them."""

    num_tokens: array.array = dataclasses.field(default_factory=lambda: array.array("q"))
    num_bytes: array.array = dataclasses.field(default_factory=lambda: array.array("q"))
    key_lengths: array.array = dataclasses.field(default_factory=lambda: array.array("q"))
    keys: bytearray = dataclasses.field(default_factory=bytearray)
    digest: Any = dataclasses.field(default_factory=hashlib.sha256)

    def add(self, document: TokenisedDocument, tokens: bytes) -> None:
        key = document.key.encode()
        self.num_tokens.append(len(document.tokens))
        self.num_bytes.append(document.num_bytes)
        self.key_lengths.append(len(key))
        self.keys += key
        self.digest.update(hashlib.sha256(key).digest())
        self.digest.update(hashlib.sha256(tokens).digest())

    def arrays(self) -> dict[str, np.ndarray]:
        numbers = {name: np.asarray(getattr(self, name), np.int64) for name in _COLUMNS}
        return numbers | {
            "keys": np.frombuffer(bytes(self.keys), np.uint8),
            "digest": np.frombuffer(self.digest.digest(), np.uint8),
        }


def write_part(
    directory: epath.PathLike,
    index_path: epath.PathLike,
    number: int,
    vocab_size: int,
    documents: Iterable[tuple[str, TokenisedDocument]],
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes the documents of one part.

    Args:
      directory: of the cache, local or remote.
      index_path: of the part's index, a file for `join`.
      number: of the part, from 0; parts are in the order of their numbers.
      vocab_size: number of ids.
      documents: pairs of a split and a document, in order.
      notes: what else the index keeps, JSON-able; read by the time all documents were.

    Raises:
      DataError: a document would be misread.
    """
    dtype = token_cache.dtype_of(vocab_size)
    columns: dict[str, _Columns] = {}
    writers: dict[str, ArrayRecordWriter] = {}
    with staging.private_folder(index_path) as private:
        for split, document in documents:
            _check(document, vocab_size)
            if split not in writers:
                # One record a group: reading a piece decompresses no other.
                path = os.fspath(private / token_cache.shard_file(split, number))
                writers[split] = ArrayRecordWriter(path, "group_size:1")
                columns[split] = _Columns()
            tokens = document.tokens.astype(dtype)
            for start in range(0, len(tokens), token_cache.PIECE):
                writers[split].write(tokens[start : start + token_cache.PIECE].tobytes())
            columns[split].add(document, tokens.tobytes())
        for split, writer in writers.items():
            writer.close()
            name = token_cache.shard_file(split, number)
            staging.publish(private / name, epath.Path(directory) / name)
        content: dict[str, np.ndarray] = {}
        for split, of_split in columns.items():
            content |= {f"{split}/{name}": values for name, values in of_split.arrays().items()}
        content["notes"] = np.frombuffer(json.dumps(notes or {}).encode(), np.uint8)
        staging.save_arrays(index_path, content)


def join(
    directory: epath.PathLike,
    index_paths: Sequence[epath.PathLike],
    splits: Sequence[str],
    task: str,
    used: Vocabulary,
    described: Mapping[str, Any],
) -> dict[str, Any]:
    """Makes a cache of parts. Returns what its `cache.json` holds, which is written last.

    Args:
      directory: of the cache.
      index_paths: of the indices of all parts, in order.
      splits: names, in order.
      task: name of the Task.
      used: the vocabulary.
      described: what else to keep of where the documents came from; JSON-able.
    """
    directory = epath.Path(directory)
    vocabulary_files.save(used, directory)
    counts = {}
    digests = {}
    for split in splits:
        counts[split], digests[split] = _join_split(directory, split, index_paths)
    described_vocabulary = vocabulary_files.described(used)
    identity = {name: described_vocabulary[name] for name in ("name", "size", "digest")}
    content = json.dumps([identity, counts], sort_keys=True).encode()
    metadata = {
        "task": task,
        "fingerprint": hashlib.sha256(content).hexdigest(),
        # The ids of start and end are not in the fingerprint: they are part of what the digest stands for.
        "vocabulary": described_vocabulary,
        "splits": counts,
        "indices": digests,
        **described,
    }
    (directory / token_cache.METADATA_FILE).write_text(token_cache.sealed(metadata))
    return metadata


def notes(index_path: epath.PathLike) -> dict[str, Any]:
    """What `write_part` was told to keep."""
    return json.loads(staging.load_arrays(index_path, ["notes"])["notes"].tobytes())


def _join_split(
    directory: epath.Path, split: str, index_paths: Sequence[epath.PathLike]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Joins the indices of a split. Returns its counts, and the digests of the arrays of its index."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*_COLUMNS, "keys")}
    shards: list[int] = []
    shard_starts: list[int] = []
    num_documents = 0
    digest = hashlib.sha256()
    for number, path in enumerate(index_paths):
        part = staging.load_arrays(path, [f"{split}/{name}" for name in (*columns, "digest")])
        if not part:
            continue
        for name, of_parts in columns.items():
            of_parts.append(part[f"{split}/{name}"])
        shards.append(number)
        shard_starts.append(num_documents)
        num_documents += len(columns["num_tokens"][-1])
        digest.update(part[f"{split}/digest"].tobytes())
    types = dict.fromkeys(_COLUMNS, np.int64) | {"keys": np.uint8}
    # A split may be in no part at all.
    joined = {name: np.concatenate([np.zeros(0, types[name]), *of_parts]) for name, of_parts in columns.items()}
    index = {
        "num_tokens": joined["num_tokens"],
        "num_bytes": joined["num_bytes"],
        "key_ends": np.cumsum(joined["key_lengths"]),
        "keys": joined["keys"],
        "shards": np.asarray(shards, np.int64),
        "shard_starts": np.asarray(shard_starts, np.int64),
    }
    staging.save_arrays(directory / token_cache.index_file(split), index)
    counts = {
        "documents": num_documents,
        "tokens": int(joined["num_tokens"].sum()),
        "bytes": int(joined["num_bytes"].sum()),
        "digest": digest.hexdigest(),
    }
    return counts, {name: token_cache.array_digest(array) for name, array in index.items()}


def _check(document: TokenisedDocument, vocab_size: int) -> None:
    """An id out of range would be stored as another one."""
    tokens = document.tokens
    if not len(tokens) or tokens.min() < 0 or tokens.max() >= vocab_size:
        raise DataError(f"document {document.key!r} has no tokens, or ids outside of 0 to {vocab_size - 1}")
