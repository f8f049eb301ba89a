"""What the pages of an inspection share: a template that is filled in, and arrays and texts as JSON holds them."""

from __future__ import annotations

import base64
import codecs
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_PACKAGE = "memorizing.evaluation.inspection"


def filled_in(template_name: str, parts: Mapping[str, str]) -> str:
    """The template, with a text in each of its places."""
    template = importlib.resources.files(_PACKAGE).joinpath(template_name).read_text(encoding="utf-8")
    # In one pass, part after part: what is filled in may itself look like a place to fill.
    page, *pieces = template.split("{{")
    for piece in pieces:
        name, _, text = piece.partition("}}")
        page += parts[name] + text
    return page


def as_script(data: Mapping[str, Any]) -> str:
    """Data as JSON within a script element."""
    as_json = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # `<` must not end the script that holds the data.
    return as_json.replace("<", "\\u003c")


def texts(pieces: Sequence[bytes]) -> dict[str, Any]:
    """Each token's text as an index into a table. A character that lies in several tokens belongs to its last."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoded = [decoder.decode(piece) for piece in pieces]
    decoded[-1] += decoder.decode(b"", final=True)
    table = {text: index for index, text in enumerate(dict.fromkeys(decoded))}
    indices = np.array([table[text] for text in decoded])
    return {"table": list(table), "tokens": packed(indices, "<u4")}


def packed(array: np.ndarray, dtype: str | np.dtype) -> str:
    """An array's bytes, as text."""
    content = np.ascontiguousarray(array, dtype).tobytes()
    return base64.b64encode(content).decode()
