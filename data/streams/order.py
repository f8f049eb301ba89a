"""The endless line of documents that training reads: which document stands at which position.

The document at a position is computed, not looked up, so that ten million documents cost no memory and any position can
be asked for at once. For each corpus the line holds a permutation of all its documents, an epoch, then another one, and
so on. Several corpora are mixed in blocks of positions: a block has a fixed number of places for each corpus, in a
random order, and the places of a corpus are filled from its own line.

All of it is integer arithmetic that no version of NumPy can change: a stored position always means the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from memorizing.data.errors import DataError

# Part of a stream's identity: positions of another order are refused.
ORDER = "feistel-1"
# Positions in a block of a mixture. Rates are rounded to one part in this many.
_BLOCK = 1 << 16
_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 [...] that spreads every bit over all: the end of SplitMix64 (Steele et al. 2014)."""
    values = (values ^ (values >> 30)) * 0xBF58476D1CE4E5B9
    values = (values ^ (values >> 27)) * 0x94D049BB133111EB
    return values ^ (values >> 31)


def permuted(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Where each index goes in a pseudo-random permutation of its range.

    A Feistel network over pairs of digits (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): an index
    is `left * b + right` with left < a, right < b and a * b only just above the size. An index that leaves the range is
    permuted again until it is inside.

    Args:
      index: int64 [n], each from 0 to below its `size`.
      size: int64 [n], of the range.
      key: uint64 [n]; each names a permutation.

    Returns:
      int64 [n], from 0 to below `size`.
    """
    size = size.astype(np.uint64)
    # Any `a` would be right; near the root few values are outside the range.
    a = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    b = (size + a - 1) // a
    result = index.astype(np.uint64)
    # Places of the values that are not inside their range yet.
    pending = np.arange(len(index))
    while len(pending):
        result[pending] = _permuted_once(result[pending], a[pending], b[pending], key[pending])
        is_outside = result[pending] >= size[pending]
        pending = pending[is_outside]
    return result.astype(np.int64)


def _permuted_once(values: np.ndarray, a: np.ndarray, b: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The Feistel network, a permutation of 0 to below a * b; all uint64 [n]."""
    left, right = np.divmod(values, b)
    for turn in range(0, _ROUNDS, 2):
        left_key = mix(key + np.uint64(turn))
        left = (left + mix(left_key ^ right) % a) % a
        right_key = mix(key + np.uint64(turn + 1))
        right = (right + mix(right_key ^ left) % b) % b
    return left * b + right


class Line:
    """The documents of one or several corpora, in an order without end.

    Documents are numbered consecutively: those of the first corpus, then those of the second one, and so on.
    """

    def __init__(self, sizes: Sequence[int], seed: int, weights: Sequence[float] | None = None) -> None:
        """
        Args:
          sizes: number of documents of each corpus, each at least 1.
          seed: of the permutations.
          weights: share of the places that each corpus gets; only their ratios matter. None for one corpus.

        Raises:
          DataError: a corpus has no documents.
        """
        if min(sizes) < 1:
            raise DataError("there are no documents to train on")
        self._sizes = np.asarray(sizes, np.int64)
        self._first = np.cumsum(self._sizes) - self._sizes
        # Places of each corpus in a block.
        self._places = np.ones(1, np.int64) if weights is None else _apportioned(np.asarray(weights, np.float64))
        self._place_ends = np.cumsum(self._places)
        self._block_key = _key(seed, "blocks")
        self._corpus_keys = np.asarray([_key(seed, f"corpus {index}") for index in range(len(sizes))], np.uint64)
        self.identity: dict[str, Any] = {"order": ORDER, "seed": seed, "places": self._places.tolist()}

    def documents_at(self, positions: np.ndarray) -> np.ndarray:
        """The documents at some positions, int64 [n] -> int64 [n]."""
        block_size = int(self._place_ends[-1])
        block, slot = np.divmod(positions, block_size)
        if block_size > 1:
            slot = permuted(slot, np.full_like(slot, block_size), _keyed(self._block_key, block))
        corpus = np.searchsorted(self._place_ends, slot, side="right")
        places = self._places[corpus]
        first_slot = self._place_ends[corpus] - places
        # Where in the line of its own corpus.
        place = block * places + slot - first_slot
        num_documents = self._sizes[corpus]
        epoch, index = np.divmod(place, num_documents)
        key = _keyed(self._corpus_keys[corpus], epoch)
        return self._first[corpus] + permuted(index, num_documents, key)


def _apportioned(weights: np.ndarray) -> np.ndarray:
    """Places of each corpus in a block, int64 [corpora]: by the largest remainders, at least one each."""
    exact = weights / weights.sum() * _BLOCK
    places = np.maximum(np.floor(exact).astype(np.int64), 1)
    missing = _BLOCK - int(places.sum())
    if missing < 0:
        places[np.argmax(places)] += missing
    else:
        by_remainder = np.argsort(places - exact, kind="stable")
        places[by_remainder[:missing]] += 1
    return places // math.gcd(*places.tolist())


def _key(seed: int, use: str) -> np.uint64:
    digest = hashlib.sha256(f"{seed}/{use}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def _keyed(key: np.ndarray | np.uint64, number: np.ndarray) -> np.ndarray:
    """A key for each of some numbers, uint64 [n]."""
    return mix(number.astype(np.uint64) * np.uint64(_GOLDEN) + key)
