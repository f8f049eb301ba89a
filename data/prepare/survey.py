"""The first reading of a corpus: what documents there are, and a sample of their text; no text is kept otherwise.

The parts of the corpus are read by any number of processes. What was found in a part is written to a file of its own
once the whole part has been read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from memorizing.data.documents import CorpusReader, Document
from memorizing.data.errors import DataError
from memorizing.data.prepare import text_sample
from memorizing.data.prepare.text_sample import TextSample, TextSampler
from memorizing.data.tasks import splits
from memorizing.data.tasks.splits import SplitRule
from memorizing.data.tokens import staging


@dataclasses.dataclass(frozen=True)
class Part:
    """What one process reads at once.

    Attributes:
      number: from 0.
      shards: names of the reader's shards, in order.
    """

    number: int
    shards: tuple[str, ...]


def parts(shards: Sequence[str], max_parts: int) -> list[Part]:
    """Divides shards into at most `max_parts` parts, which have about the same number of consecutive shards."""
    count = min(len(shards), max_parts)
    bounds = [len(shards) * index // count for index in range(count + 1)] if count else [0]
    return [Part(index, tuple(shards[bounds[index] : bounds[index + 1]])) for index in range(count)]


@dataclasses.dataclass(frozen=True)
class Surveying:
    """The work on a part; can be pickled.

    Attributes:
      reader: of the corpus.
      folder: of the files.
      sample_bytes: bytes of text that each part keeps for the sample; 0 where no sample is needed.
    """

    reader: CorpusReader
    folder: str
    sample_bytes: int

    def path(self, part: Part) -> epath.Path:
        return epath.Path(self.folder) / f"survey-{part.number:05d}.npz"

    def __call__(self, part: Part, advance: Callable[[], None]) -> None:
        """Reads a part and writes its file.

        Args:
          part: to read.
          advance: called after each document.
        """
        # Of every document.
        hashes = []
        num_bytes = []
        official = []
        texts = []
        keys = []
        # Of every shard.
        digests = []
        shard_bytes = []
        shard_documents = []
        skipped: Counter[str] = Counter()
        sampler = TextSampler(self.sample_bytes)
        for shard in part.shards:
            digest = ShardDigest()
            first = len(hashes)
            for document in self.reader.documents(shard, skipped):
                hashes.append(splits.key_hash(document.key))
                official.append(splits.number(document.metadata.get("split"), document.key))
                size, text = digest.add(document)
                num_bytes.append(size)
                texts.append(text)
                keys.append(document.key)
                if self.sample_bytes:
                    sampler.add(len(hashes) - 1, hashes[-1], document.text)
                advance()
            digests.append(digest.value())
            shard_bytes.append(sum(num_bytes[first:]))
            shard_documents.append(len(hashes) - first)
        content = {
            "hashes": np.asarray(hashes, np.uint64),
            "num_bytes": np.asarray(num_bytes, np.int64),
            "official": np.asarray(official, np.int8),
            "texts": np.asarray(texts, np.uint64),
            "keys": np.frombuffer("\n".join(map(json.dumps, keys)).encode(), np.uint8),
            "skipped": np.frombuffer(json.dumps(skipped).encode(), np.uint8),
            "digests": np.asarray(digests, "S64"),
            "shard_bytes": np.asarray(shard_bytes, np.int64),
            "shard_documents": np.asarray(shard_documents, np.int64),
        }
        sample = {f"sample_{name}": values for name, values in sampler.result()._asdict().items()}
        staging.save_arrays(self.path(part), content | sample)


class ShardDigest:
    """Hash of the keys and texts of a shard. It shows whether a second reading found the same documents."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, document: Document) -> tuple[int, int]:
        """Adds a document and returns the UTF-8 bytes of its text, and 64 bits of that text's hash."""
        text = document.text.encode()
        text_digest = hashlib.sha256(text).digest()
        self._digest.update(hashlib.sha256(document.key.encode()).digest() + text_digest)
        return len(text), int.from_bytes(text_digest[:8], "big")

    def value(self) -> bytes:
        return self._digest.hexdigest().encode()


class Survey:
    """What was found in all parts.

    For each document it holds only a hash, a size and a small number in memory.

    Attributes:
      parts: what was read.
      skipped: number of files that were left out, by reason.
      hashes: uint64 [documents], of the keys.
      fingerprint: of the corpus: all keys and texts.
    """

    def __init__(self, work: Surveying, parts: Sequence[Part]) -> None:
        """Reads the files of all parts.

        Raises:
          DataError: there are no documents, or a key occurs twice.
        """
        self._work = work
        self.parts = parts
        self._by_part: list[dict[str, np.ndarray]] = []
        skipped: Counter[str] = Counter()
        digest = hashlib.sha256()
        for part in parts:
            names = ("hashes", "num_bytes", "official", "shard_bytes", "shard_documents", "digests")
            found = self._load(part.number, *names, "skipped")
            skipped.update(json.loads(found.pop("skipped").tobytes()))
            digest.update(b"".join(found["digests"].tolist()))
            self._by_part.append(found)
        self.skipped = dict(sorted(skipped.items()))
        self.fingerprint = digest.hexdigest()
        self.hashes = np.concatenate([np.zeros(0, np.uint64), *(found["hashes"] for found in self._by_part)])
        self._check_unique()

    @property
    def num_documents(self) -> int:
        return len(self.hashes)

    @property
    def num_bytes(self) -> int:
        return sum(int(found["num_bytes"].sum()) for found in self._by_part)

    @property
    def has_official_splits(self) -> bool:
        return any(np.any(found["official"] != splits.NONE) for found in self._by_part)

    def part_bytes(self, number: int) -> int:
        return int(self._by_part[number]["num_bytes"].sum())

    def keys(self, number: int) -> list[str]:
        """Keys of the documents of a part."""
        content = self._load(number, "keys")["keys"].tobytes().decode()
        return list(map(json.loads, content.split("\n"))) if content else []

    def split_numbers(self, rule: SplitRule) -> list[np.ndarray]:
        """The splits of the documents of each part, int8 [documents]."""
        return [
            rule.numbers(_Lazily(lambda number=number: self.keys(number)), found["hashes"], found["official"])
            for number, found in enumerate(self._by_part)
        ]

    def repeated(self) -> list[np.ndarray]:
        """Of each part, which documents have the text of an earlier one, bool [documents]."""
        of_parts = [self._load(number, "texts")["texts"] for number in range(len(self.parts))]
        texts = np.concatenate([np.zeros(0, np.uint64), *of_parts])
        _, first = np.unique(texts, return_index=True)
        is_repeated = np.ones(len(texts), bool)
        is_repeated[first] = False
        return np.split(is_repeated, np.cumsum([len(part) for part in of_parts])[:-1])

    def shard_documents(self, number: int) -> np.ndarray:
        """Number of documents of each shard of a part, int64 [shards]."""
        return self._by_part[number]["shard_documents"]

    def shard_digests(self, number: int) -> list[bytes]:
        """`ShardDigest.value` of each shard of a part."""
        return self._by_part[number]["digests"].tolist()

    def sample_lines(self, split_numbers: Sequence[np.ndarray], max_bytes: int) -> Iterator[str]:
        """Lines of training documents, about `max_bytes` in all, from each part in proportion to its size."""
        is_train = [numbers == splits.NAMES.index(splits.TRAIN) for numbers in split_numbers]
        sizes = [int(found["num_bytes"][chosen].sum()) for found, chosen in zip(self._by_part, is_train, strict=True)]
        names = [f"sample_{name}" for name in TextSample._fields]
        return text_sample.lines(
            (TextSample(*self._load(number, *names).values()), is_train[number], share)
            for number, share in enumerate(text_sample.shares(sizes, max_bytes))
            if share
        )

    def _load(self, number: int, *names: str) -> dict[str, np.ndarray]:
        return staging.load_arrays(self._work.path(self.parts[number]), names)

    def _check_unique(self) -> None:
        hashes, counts = np.unique(self.hashes, return_counts=True)
        repeated = set(hashes[counts > 1].tolist())
        if not repeated:
            return
        seen: set[str] = set()
        for number in range(len(self.parts)):
            for key in self.keys(number):
                if key in seen:
                    raise DataError(f"two documents have the key {key!r}; keys must be unique")
                if splits.key_hash(key) in repeated:
                    seen.add(key)


class _Lazily:
    """An iterable whose items are made when it is iterated over."""

    def __init__(self, make: Callable[[], list[Any]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        return iter(self._make())
