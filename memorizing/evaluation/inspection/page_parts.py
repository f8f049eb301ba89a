"""What the pages of an inspection share: arrays and texts as JSON holds them."""

from __future__ import annotations

import base64
import codecs
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


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
