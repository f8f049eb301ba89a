"""Where facts stand in a text: functions `(rng, lengths, segment_length, num_segments, end) -> starts`.

`lengths` are the tokens of the facts in the order of the text, `end` is the position of the question. No fact overlaps
another one or the question.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def at_the_start(
    rng: np.random.Generator, lengths: Sequence[int], segment_length: int, num_segments: int, end: int
) -> list[int]:
    """One after the other, from the first token of the text."""
    return np.cumsum([0, *lengths[:-1]]).tolist()


def at_segment_starts(
    rng: np.random.Generator, lengths: Sequence[int], segment_length: int, num_segments: int, end: int
) -> list[int]:
    """Each at the start of a random segment, all equally likely (the RMT report's released code).

    Facts of the same segment come one after the other.
    """
    # Tokens of the facts that stand in each segment already.
    used = np.zeros(num_segments, int)
    starts = []
    segments = rng.integers(0, num_segments, len(lengths))
    for segment, length in zip(segments, lengths, strict=True):
        starts.append(int(segment * segment_length + used[segment]))
        used[segment] += length
    return starts


def anywhere(
    rng: np.random.Generator, lengths: Sequence[int], segment_length: int, num_segments: int, end: int
) -> list[int]:
    """At any token, all equally likely, across the border of two segments too."""
    free = end - sum(lengths)
    # How much noise stands before each fact; the facts before it come on top.
    noise_before = np.sort(rng.integers(0, free + 1, len(lengths)))
    facts_before = np.cumsum([0, *lengths[:-1]])
    return (noise_before + facts_before).tolist()
