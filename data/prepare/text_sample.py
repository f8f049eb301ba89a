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
        self._max_bytes = max_bytes
        # Blocks with a lower hash are chosen: (hash, document, text).
        self._limit = _NO_LIMIT
        self._chosen: list[tuple[int, int, bytes]] = []
        self._num_bytes = 0

    def add(self, document: int, key_hash: int, text: str) -> None:
        """Adds those blocks of a document, the `document`-th of its part, whose hashes are low enough."""
        blocks = np.arange(-(-len(text) // _BLOCK), dtype=np.uint64)
        priorities = mix(mix(blocks * _GOLDEN) ^ np.uint64(key_hash))
        candidates = np.flatnonzero(priorities < np.uint64(min(self._limit, _NO_LIMIT - 1)))
        for block, priority in zip(candidates.tolist(), priorities[candidates].tolist(), strict=True):
            # The limit may have been lowered for a block before.
            if priority >= self._limit:
                continue
            content = text[block * _BLOCK : (block + 1) * _BLOCK].encode()
            self._chosen.append((priority, document, content))
            self._num_bytes += len(content)
            while self._num_bytes > self._max_bytes:
                self._lower_limit()

    def result(self) -> TextSample:
        self._chosen.sort()
        contents = [content for _, _, content in self._chosen]
        return TextSample(
            document=np.asarray([document for _, document, _ in self._chosen], np.int64),
            lengths=np.asarray([len(content) for content in contents], np.int64),
            text=np.frombuffer(b"".join(contents), np.uint8),
        )

    def _lower_limit(self) -> None:
        self._limit //= 2
        self._chosen = [block for block in self._chosen if block[0] < self._limit]
        self._num_bytes = sum(len(content) for _, _, content in self._chosen)


def lines(samples: Iterator[tuple[TextSample, np.ndarray, int]]) -> Iterator[str]:
    """The lines of the chosen blocks.

    Args:
      samples: for each part, in order: its blocks; bool [documents], the documents they may come from; bytes to take.
    """
    for sample, may_take, max_bytes in samples:
        ends = np.cumsum(sample.lengths)
        starts = ends - sample.lengths
        allowed = np.flatnonzero(may_take[sample.document])
        # The first block is always taken, so that every part is represented.
        bytes_before = np.cumsum(sample.lengths[allowed]) - sample.lengths[allowed]
        for block in allowed[bytes_before < max_bytes]:
            text = sample.text[starts[block] : ends[block]].tobytes().decode()
            yield from filter(None, text.split("\n"))


def max_bytes_of_part(max_bytes: int, num_parts: int) -> int:
    """Bytes that each part has to keep, so that a sample of `max_bytes` can be taken where parts differ in size."""
    return max(8 * max_bytes // num_parts, 4 << 20)


def shares(sizes: Sequence[int], max_bytes: int) -> list[int]:
    """Bytes to take of each part, in proportion to the bytes of its training documents."""
    total = sum(sizes)
    if total <= max_bytes:
        return list(sizes)
    return [-(-size * max_bytes // total) for size in sizes]
