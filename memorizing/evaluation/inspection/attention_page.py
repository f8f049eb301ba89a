"""What the tokens of a document attended to, as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memorizing.evaluation.inspection.attention import NONE, AttentionReading, HeadsAttention
from memorizing.evaluation.inspection.page_parts import packed, text_page, texts

# Bytes before they are written as text, which makes them a third longer: the page stays under 20 MB.
BUDGET = 11_000_000
# Weights are stored as bytes.
WEIGHT_UNIT = 1 / 255


def make_attention_page(
    title: str,
    reading: AttentionReading,
    pieces: Sequence[bytes],
    segment_length: int,
    facts: Mapping[str, str],
    budget: int = BUDGET,
) -> str:
    """The page.

    Args:
      title: name of the document.
      reading: of it.
      pieces: the UTF-8 of each of its tokens.
      segment_length: T.
      facts: what to say about it, by label.
      budget: bytes that attention may take: it is kept for as many tokens, from the first one on.
    """
    kept = num_kept(reading, budget)
    data = {
        **texts(pieces),
        "segmentLength": segment_length,
        "nats": packed(reading.nats, "<f4"),
        "kept": kept,
        "none": NONE,
        "weightUnit": WEIGHT_UNIT,
        "layers": [_of_heads(each, kept) for each in reading.attention],
    }
    return text_page("attention.html", title, facts, data)


def num_kept(reading: AttentionReading, budget: int) -> int:
    """Of so many tokens, from the first one on, attention fits into the budget."""
    bytes_a_token = sum(3 * each.distances[0].size + 4 * each.groups[0].size for each in reading.attention)
    return min(len(reading.nats), max(budget // max(bytes_a_token, 1), 1))


def _of_heads(attention: HeadsAttention, kept: int) -> dict[str, Any]:
    return {
        "name": attention.layer,
        "heads": list(attention.heads),
        "numShown": attention.distances.shape[-1],
        "groupNames": list(attention.group_names),
        "distances": packed(attention.distances[:kept], "<u2"),
        "weights": packed(np.round(attention.weights[:kept] / WEIGHT_UNIT), "u1"),
        "groups": packed(attention.groups[:kept], "<i4"),
    }
