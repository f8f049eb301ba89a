"""Pages that are made from a template."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources.abc import Traversable


def filled_in(template: Traversable, parts: Mapping[str, str]) -> str:
    """A template, with a text in each of its places.

    Args:
      template: a file in which places are written `{{NAME}}`.
      parts: what comes there, by name, as HTML.
    """
    # In one pass, part after part: what is filled in may itself look like a place to fill.
    page, *pieces = template.read_text(encoding="utf-8").split("{{")
    for piece in pieces:
        name, _, text = piece.partition("}}")
        page += parts[name] + text
    return page
