"""What a command reads: a file of text, or the longest held-out document."""

from __future__ import annotations

import numpy as np
from etils import epath

from memorizing.batch import DataSource
from memorizing.errors import UserError


def read_text(path: epath.Path, named: str, not_utf8: str, not_text: str) -> str:
    """The text of a file.

    Args:
      path: of the file.
      named: the flag and what the user gave it, with which every message begins.
      not_utf8: how the message goes on where the file is not UTF-8; `{place}` is the first wrong byte's place in the
        file, `{byte}` its value.
      not_text: how it goes on where the file has a zero byte, as binary files do; `{place}` is the place of that.

    Raises:
      UserError: the file cannot be read, or is no text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{named}: cannot be read ({error.strerror or error})") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = not_utf8.format(place=error.start, byte=content[error.start])
        raise UserError(f"{named} {reason}") from error
    if "\0" in text:
        reason = not_text.format(place=content.index(0))
        raise UserError(f"{named} {reason}")
    return text


def longest_document(data: DataSource) -> int:
    """Index of the held-out document with the most bytes; the first one, where documents have none."""
    if data.document_bytes is None:
        return 0
    return int(np.argmax(data.document_bytes))
