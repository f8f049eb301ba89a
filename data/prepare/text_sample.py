"""A sample of the text of a corpus, to train a vocabulary on, taken while the corpus is read once.

Which documents will be held out is not known while they are read. So every part of the corpus keeps more blocks of text
than will be needed: those with the lowest hash of document and place. Later, blocks of training documents are taken
from each part in proportion to its size. The sample depends on nothing but the training documents, and so not on how
many processes read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from memorizing.data.streams.order import mix

# Characters of a block: long enough to be cheap, short enough that a sample comes from everywhere.
_BLOCK = 4096
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_NO_LIMIT = 1 << 64


class TextSample(NamedTuple):
    """Blocks of the text of one part, in ascending order of their hashes.

    Attributes:
      document: int64 [blocks], number of each block's document in its part.
      lengths: int64 [blocks], UTF-8 bytes.
      text: uint8 [sum of lengths].
    """

    document: np.ndarray
    lengths: np.ndarray
    text: np.ndarray


class TextSampler:
    """Collects the blocks of one part."""

    def __init__(self, max_bytes: int) -> None:
        """Keeps at most `max_bytes` of text, and about half of that or more where the part has as much."""
        self._max_bytes, self._limit, self._num_bytes = max_bytes, _NO_LIMIT, 0
        self._kept: list[tuple[int, int, bytes]] = []

    def add(self, document: int, key_hash: int, text: str) -> None:
        """Adds those blocks of a document, the `document`-th of its part, whose hashes are low enough."""
        blocks = np.arange(-(-len(text) // _BLOCK), dtype=np.uint64)
        priorities = mix(mix(blocks * _GOLDEN) ^ np.uint64(key_hash))
        chosen = np.flatnonzero(priorities < np.uint64(min(self._limit, _NO_LIMIT - 1)))
        for block, priority in zip(chosen.tolist(), priorities[chosen].tolist(), strict=True):
            if priority < self._limit:
                content = text[block * _BLOCK : (block + 1) * _BLOCK].encode()
                self._kept.append((priority, document, content))
                self._num_bytes += len(content)
                while self._num_bytes > self._max_bytes:
                    self._lower()

    def result(self) -> TextSample:
        self._kept.sort()
        return TextSample(
            np.asarray([document for _, document, _ in self._kept], np.int64),
            np.asarray([len(content) for *_, content in self._kept], np.int64),
            np.frombuffer(b"".join(content for *_, content in self._kept), np.uint8),
        )

    def _lower(self) -> None:
        self._limit //= 2
        self._kept = [block for block in self._kept if block[0] < self._limit]
        self._num_bytes = sum(len(content) for *_, content in self._kept)


def lines(samples: Iterator[tuple[TextSample, np.ndarray, int]]) -> Iterator[str]:
    """The lines of the chosen blocks.

    Args:
      samples: for each part, in order: its blocks; bool [documents], the documents they may come from; bytes to take.
    """
    for sample, may_take, max_bytes in samples:
        ends = np.cumsum(sample.lengths)
        taken = np.flatnonzero(may_take[sample.document])
        # The first block is always taken, so that every part is represented.
        before = np.cumsum(sample.lengths[taken]) - sample.lengths[taken]
        for block in taken[before < max_bytes]:
            text = sample.text[ends[block] - sample.lengths[block] : ends[block]].tobytes().decode()
            yield from filter(None, text.split("\n"))


def max_bytes_of_part(max_bytes: int, num_parts: int) -> int:
    """Bytes that each part has to keep, so that a sample of `max_bytes` can be taken where parts differ in size."""
    return max(8 * max_bytes // num_parts, 4 << 20)


def shares(sizes: Sequence[int], max_bytes: int) -> list[int]:
    """Bytes to take of each part, in proportion to the bytes of its training documents."""
    total = max(sum(sizes), 1)
    return [-(-size * max_bytes // total) if total > max_bytes else size for size in sizes]
