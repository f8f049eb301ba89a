"""An inspection as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import codecs
import html
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memorizing.evaluation.inspection.lookups import Inspection, Lookups

# Bytes that the neighbours may take before they are written as text, which makes them a third longer: the page stays under 20 MB.
NEIGHBOUR_BUDGET = 11_000_000
# Scores lie in [-1, 1] up to rounding and are stored in this unit; NO_NEIGHBOUR stands for no neighbour.
SCORE_UNIT, NO_NEIGHBOUR = 1 / 16384, -32768
_TEMPLATE = "inspection.html"


def make(
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
        **_text(pieces),
        "memorySizes": list(inspection.memory_sizes),
        "segmentLength": inspection.segment_length,
        "numEqual": inspection.num_equal,
        "nats": [_packed(nats, "<f4") for nats in inspection.nats],
        "kept": _packed(kept, "<u4"),
        "scoreUnit": SCORE_UNIT,
        "noNeighbour": NO_NEIGHBOUR,
        "layers": [_layer(lookups, kept) for lookups in inspection.lookups],
    }
    figures = "".join(
        f'<figure><img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{html.escape(alternative)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, (png, alternative) in pictures.items()
    )
    listed = "".join(f"<dt>{html.escape(label)}</dt><dd>{html.escape(value)}</dd>" for label, value in facts.items())
    parts = {
        "TITLE": html.escape(title),
        "FACTS": listed,
        "FIGURES": figures,
        # `<` must not end the script that holds the data.
        "DATA": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = importlib.resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    # The template once, part after part: what is filled in may itself look like a place to fill.
    head, *rest = page.split("{{")
    return head + "".join(parts[name] + text for name, _, text in (piece.partition("}}") for piece in rest))


def kept_positions(inspection: Inspection, budget: int = NEIGHBOUR_BUDGET) -> np.ndarray:
    """Positions whose neighbours the page keeps, int64, ascending: all that have any if they fit, else half of what fits by |Delta| and half at equal distances."""
    something = np.flatnonzero(
        np.any([(each.distances[..., 0] > 0).any(axis=-1) for each in inspection.lookups], axis=0)
    )
    size = sum(each.distances[0].size * (_distance_type(each).itemsize + 2) for each in inspection.lookups)
    room = max(budget // size, 1)
    if len(something) <= room:
        return something
    by_gain = something[np.argsort(-np.abs(inspection.gain[something]), kind="stable")][: room // 2]
    rest = np.setdiff1d(something, by_gain)
    spread = rest[np.linspace(0, len(rest) - 1, room - len(by_gain)).astype(np.int64)]
    return np.union1d(by_gain, spread)


def _text(pieces: Sequence[bytes]) -> dict[str, Any]:
    """Each token's text as an index into a table. A character that lies in several tokens belongs to its last."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(piece) for piece in pieces]
    texts[-1] += decoder.decode(b"", final=True)
    table = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    return {"table": list(table), "tokens": _packed(np.array([table[text] for text in texts]), "<u4")}


def _layer(lookups: Lookups, kept: np.ndarray) -> dict[str, Any]:
    scores = lookups.scores[kept]
    exists = scores > -np.inf
    stored = np.where(exists, np.clip(np.round(np.where(exists, scores, 0) / SCORE_UNIT), -32767, 32767), NO_NEIGHBOUR)
    distance_type = _distance_type(lookups)
    return {
        "name": lookups.layer,
        "gate": [float(gate) for gate in lookups.gate],
        "scale": [float(scale) for scale in lookups.scale],
        "numNeighbours": lookups.distances.shape[-1],
        "distanceBytes": distance_type.itemsize,
        "distances": _packed(lookups.distances[kept], distance_type),
        "scores": _packed(stored, "<i2"),
    }


def _distance_type(lookups: Lookups) -> np.dtype:
    return np.dtype("<u2" if lookups.distances.max(initial=0) < 1 << 16 else "<u4")


def _packed(array: np.ndarray, dtype: str | np.dtype) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode()
