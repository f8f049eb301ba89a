"""Which documents are held out: the corpus says it, the user says it in a file, or the hash of the key decides.

In each case the split of a document depends on nothing but its key and what the cache records.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from memorizing.data.errors import DataError

TRAIN = "train"
VALIDATION = "validation"
TEST = "test"
# Splits by number.
NAMES = (TRAIN, VALIDATION, TEST)
# The number of no split.
NONE = -1

OFFICIAL = "official"
HASH = "hash"


class SplitRule(Protocol):
    """A rule that divides documents. Rules can be pickled."""

    def numbers(self, keys: Iterable[str], hashes: np.ndarray, official: np.ndarray) -> np.ndarray:
        """Splits of some documents, int8 [n], by their number in `NAMES`.

        Args:
          keys: n keys, iterated over only where they are needed.
          hashes: uint64 [n], `key_hash` of each.
          official: int8 [n], the split that the corpus names, or `NONE`.

        Raises:
          DataError: a document has no split.
        """
        ...

    def described(self) -> dict[str, Any]:
        """The rule as a cache records it, JSON-able."""
        ...


def key_hash(key: str) -> int:
    """The first eight bytes of the SHA-256 of a key, as a number: in the order of the whole hashes."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def number(name: Any, key: str) -> int:
    """The number of the split that the metadata of a document names, or `NONE` where it names none.

    Raises:
      DataError: there is no such split.
    """
    if name is None:
        return NONE
    if name not in NAMES:
        raise DataError(f"document {key!r} is in the split {name!r}: the splits are {', '.join(NAMES)}")
    return NAMES.index(name)


@dataclasses.dataclass(frozen=True)
class OfficialSplits:
    """What the corpus says."""

    def numbers(self, keys: Iterable[str], hashes: np.ndarray, official: np.ndarray) -> np.ndarray:
        without = np.flatnonzero(official == NONE)
        if len(without):
            raise DataError(
                f"{_listed([list(keys)[index] for index in without[:3]], len(without))} of no official split; "
                "give --splits=hash, or a file of your own"
            )
        return official

    def described(self) -> dict[str, Any]:
        return {"by": OFFICIAL}


@dataclasses.dataclass(frozen=True)
class HashSplits:
    """The documents with the lowest hashes are held out.

    Attributes:
      threshold: hashes below it.
    """

    threshold: int

    def numbers(self, keys: Iterable[str], hashes: np.ndarray, official: np.ndarray) -> np.ndarray:
        return (hashes < np.uint64(self.threshold)).astype(np.int8) * np.int8(NAMES.index(VALIDATION))

    def described(self) -> dict[str, Any]:
        return {"by": HASH, "threshold": self.threshold}


@dataclasses.dataclass(frozen=True)
class FileSplits:
    """What the user's file says.

    Attributes:
      by_key: split number of each key.
      default: split number of every other key, or `NONE`: there must be no other.
      digest: of the file.
    """

    by_key: Mapping[str, int] = dataclasses.field(repr=False)
    default: int
    digest: str

    def numbers(self, keys: Iterable[str], hashes: np.ndarray, official: np.ndarray) -> np.ndarray:
        keys = list(keys)
        found = np.asarray([self.by_key.get(key, self.default) for key in keys], np.int8)
        without = np.flatnonzero(found == NONE)
        if len(without):
            raise DataError(
                f"{_listed([keys[index] for index in without[:3]], len(without))} not in the file of splits; "
                "add them, or name a split for all such documents with --default_split"
            )
        return found

    def without_document(self, hashes: np.ndarray) -> list[str]:
        """The keys that are those of no document, those first whose documents were to be held out.

        Args:
          hashes: uint64 [n], `key_hash` of all documents.
        """
        named = np.asarray([key_hash(key) for key in self.by_key], np.uint64)
        missing = [key for key, is_there in zip(self.by_key, np.isin(named, hashes), strict=True) if not is_there]
        return sorted(missing, key=lambda key: self.by_key[key] == NAMES.index(TRAIN))

    def described(self) -> dict[str, Any]:
        return {"by": "file", "digest": self.digest, "default": None if self.default == NONE else NAMES[self.default]}


def by_rank(hashes: np.ndarray, validation_fraction: float) -> HashSplits:
    """The rule that holds out a share of some documents: as many as it says, at least one, and not all.

    A threshold chosen beforehand could leave a split of a small corpus empty; a rank cannot.

    Args:
      hashes: uint64 [n] of all documents of the corpus, in any order, each once.
      validation_fraction: the share.

    Raises:
      DataError: there are fewer than two documents, or the fraction is not between 0 and 1.
    """
    check_fraction(validation_fraction)
    if len(hashes) < 2:
        raise DataError(f"the corpus has {len(hashes)} document(s): at least 2 are needed, one of them to be held out")
    num_held_out = min(max(round(len(hashes) * validation_fraction), 1), len(hashes) - 1)
    return HashSplits(int(np.partition(hashes, num_held_out)[num_held_out]))


def check_fraction(validation_fraction: float) -> None:
    """Raises DataError unless a share is between 0 and 1."""
    if not 0 < validation_fraction < 1:
        raise DataError(f"validation_fraction={validation_fraction}: give a share between 0 and 1, such as 0.05")


def from_file(path: str, default: str | None) -> FileSplits:
    """Reads a file of lines `KEY<tab>SPLIT`.

    Args:
      path: of the file, UTF-8.
      default: split of the documents that it does not name; None: it has to name all.

    Raises:
      DataError: the file cannot be read, or a line is not right.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
        # A text file may begin with a byte-order mark.
        lines = content.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--splits={path}: cannot be read ({error}); give official, hash, or a file") from None
    by_key: dict[str, int] = {}
    for index, line in enumerate(lines, 1):
        if not line.strip():
            continue
        key, _, name = line.rstrip("\r").rpartition("\t")
        if not key or name not in NAMES:
            raise DataError(f"{path}, line {index}: expected KEY<tab>SPLIT, the splits being {', '.join(NAMES)}")
        if by_key.setdefault(key, NAMES.index(name)) != NAMES.index(name):
            raise DataError(f"{path}, line {index}: {key!r} is in two splits")
    return FileSplits(
        by_key, NONE if default is None else number(default, "--default_split"), hashlib.sha256(content).hexdigest()
    )


def check_none_empty(counts: Mapping[str, int], skipped: Mapping[str, int]) -> None:
    """Raises DataError where nothing is left to train on, or nothing to evaluate on.

    Args:
      counts: documents of each split.
      skipped: what was left out, by reason.
    """
    empty = [name for name in (TRAIN, VALIDATION) if not counts.get(name)]
    if empty:
        left_out = ", ".join(f"{reason}: {count:,}" for reason, count in skipped.items()) or "nothing"
        raise DataError(
            f"no document is in the split {' or '.join(map(repr, empty))} (left out: {left_out}); "
            "add the archives it is in, or divide the documents with --splits=hash or --splits=FILE"
        )


def count(numbers: Iterable[np.ndarray]) -> Counter[str]:
    """Documents of each split, over arrays of split numbers; those of `NONE` are left out."""
    totals = sum(
        (np.bincount(part[part != NONE], minlength=len(NAMES)) for part in numbers), np.zeros(len(NAMES), np.int64)
    )
    return Counter(dict(zip(NAMES, totals.tolist(), strict=True)))


def _listed(keys: Sequence[str], number: int) -> str:
    more = f", ... ({number:,} in all)" if number > len(keys) else ""
    return f"{', '.join(map(repr, keys))}{more} {'is' if number == 1 else 'are'}"
