"""An inspection as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memorizing.evaluation.inspection.lookups import Inspection, Lookups, recall_of
from memorizing.evaluation.inspection.page_parts import packed, text_page, texts

# Bytes that the neighbours may take before they are written as text, which makes them a third longer: the page stays
# under 20 MB.
NEIGHBOUR_BUDGET = 11_000_000
# Scores lie in [-1, 1] up to rounding and are stored as int16 in this unit.
NO_NEIGHBOUR = -32768
_SCORE_TYPE = "<i2"
_LARGEST_SCORE = 32767


def make_page(
    title: str,
    inspection: Inspection,
    pieces: Sequence[bytes],
    facts: Mapping[str, str],
    pictures: Mapping[str, tuple[bytes, str]],
) -> str:
    """The page.

    Args:
      title: name of the document.
      inspection: of it.
      pieces: the UTF-8 of each of its tokens.
      facts: what to say about it, by label.
      pictures: PNG and alternative text by caption.
    """
    kept = kept_positions(inspection)
    data = {
        **texts(pieces),
        "memorySizes": list(inspection.memory_sizes),
        "segmentLength": inspection.segment_length,
        "numEqual": inspection.num_equal,
        "nats": [packed(nats, "<f4") for nats in inspection.nats],
        "kept": packed(kept, "<u4"),
        "noNeighbour": NO_NEIGHBOUR,
        "layers": [_layer(lookups, kept) | _recall(inspection, lookups) for lookups in inspection.lookups],
    }
    figures = [_figure(caption, png, alternative) for caption, (png, alternative) in pictures.items()]
    return text_page("inspection.html", title, facts, data, FIGURES="".join(figures))


def _figure(caption: str, png: bytes, alternative: str) -> str:
    encoded = base64.b64encode(png).decode()
    return (
        f'<figure><img src="data:image/png;base64,{encoded}" alt="{html.escape(alternative)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def kept_positions(inspection: Inspection, budget: int = NEIGHBOUR_BUDGET) -> np.ndarray:
    """Positions whose neighbours the page shows, int64, ascending.

    All that have any, if they fit. Else half of what fits are those with the largest |Delta|, and half lie at equal
    distances.
    """
    # The best neighbour comes first: where it is missing, there is none.
    has_neighbours = [(each.distances[..., 0] > 0).any(axis=-1) for each in inspection.lookups]
    candidates = np.flatnonzero(np.any(has_neighbours, axis=0))
    bytes_a_position = sum(
        lookups.distances[0].size * (_distance_type(lookups).itemsize + np.dtype(_SCORE_TYPE).itemsize)
        for lookups in inspection.lookups
    )
    room = max(budget // bytes_a_position, 1)
    if len(candidates) <= room:
        return candidates
    order = np.argsort(-np.abs(inspection.gain[candidates]), kind="stable")
    by_gain = candidates[order][: room // 2]
    rest = np.setdiff1d(candidates, by_gain)
    places = np.linspace(0, len(rest) - 1, room - len(by_gain)).astype(np.int64)
    return np.union1d(by_gain, rest[places])


def _layer(lookups: Lookups, kept: np.ndarray) -> dict[str, Any]:
    scores = lookups.scores[kept]
    exists = scores > -np.inf
    finite = np.where(exists, scores, 0)
    # Of models whose keys have any length as fine as of those whose keys have length 1.
    unit = max(float(np.abs(finite).max(initial=0)), 1.0) / _LARGEST_SCORE
    stored = np.where(exists, np.round(finite / unit), NO_NEIGHBOUR)
    distance_type = _distance_type(lookups)
    return {
        "name": lookups.layer,
        "gate": [float(gate) for gate in lookups.gate],
        "scale": [float(scale) for scale in lookups.scale],
        "logitCap": lookups.logit_cap,
        "scoreUnit": unit,
        "numNeighbours": lookups.distances.shape[-1],
        "distanceBytes": distance_type.itemsize,
        "distances": packed(lookups.distances[kept], distance_type),
        "scores": packed(stored, _SCORE_TYPE),
    }


def _recall(inspection: Inspection, lookups: Lookups) -> dict[str, Any]:
    recall = recall_of(lookups, inspection.tokens, inspection.memory_sizes[1], inspection.segment_length)
    return {
        "hitShare": recall.hit_share.tolist(),
        "hitWeight": recall.hit_weight.tolist(),
        "entropy": recall.weight_entropy.tolist(),
        "hitChance": recall.hit_chance,
    }


def _distance_type(lookups: Lookups) -> np.dtype:
    is_short = lookups.distances.max(initial=0) < 1 << 16
    return np.dtype("<u2" if is_short else "<u4")
