"""What the pages of an inspection share: a text shown token by token, and arrays and texts as JSON holds them."""

from __future__ import annotations

import base64
import codecs
import html
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memorizing.evaluation.run_page.template import filled_in

_FILES = importlib.resources.files("memorizing.evaluation.inspection")


def text_page(template: str, title: str, facts: Mapping[str, str], data: Mapping[str, Any], **parts: str) -> str:
    """A page that shows a text token by token, as HTML that needs nothing else: no network, no other file.

    Args:
      template: name of a file in this folder.
      title: of the page.
      facts: what to say about it, by label.
      data: what its script reads.
      parts: what else the template has places for.
    """
    listed = [f"<dt>{html.escape(label)}</dt><dd>{html.escape(value)}</dd>" for label, value in facts.items()]
    shared = {
        "TITLE": html.escape(title),
        "FACTS": "".join(listed),
        "STYLE": _FILES.joinpath("text_page.css").read_text(encoding="utf-8"),
        "SCRIPT": _FILES.joinpath("text_page.js").read_text(encoding="utf-8"),
        "DATA": as_script(data),
    }
    return filled_in(_FILES.joinpath(template), shared | parts)


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
