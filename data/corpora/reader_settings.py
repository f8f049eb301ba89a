"""Settings of a reader that a user may give as text: `--reader.NAME=VALUE` of `memorizing prepare`."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from memorizing.data.errors import DataError

_MEANING = "meaning"
_BOOLEANS = {"true": True, "false": False}


def setting(default: Any, meaning: str) -> Any:
    """Makes a field of a reader, which is a dataclass, a setting.

    Args:
      default: its value where the user gives none.
      meaning: what it does, for readers of the code and of the command line's help.
    """
    return dataclasses.field(default=default, metadata={_MEANING: meaning})


def meanings(reader_type: type) -> dict[str, str]:
    """What the settings of a reader do, by their names."""
    return {
        field.name: field.metadata[_MEANING] for field in dataclasses.fields(reader_type) if _MEANING in field.metadata
    }


def converted(reader_type: type, name: str, text: str) -> Any:
    """The value of a setting, from text.

    Args:
      reader_type: the dataclass of the reader.
      name: of the setting. Its type is bool, int, float, str or tuple[str, ...].
      text: a number, true or false, a word, or words with commas between.

    Raises:
      DataError: the text is no value of the setting's type.
    """
    kind = typing.get_type_hints(reader_type)[name]
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise DataError(f"--reader.{name}={text}: give true or false")
        return _BOOLEANS[text.lower()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise DataError(f"--reader.{name}={text}: give a {'whole ' if kind is int else ''}number") from None
    words = map(str.strip, text.split(","))
    return tuple(filter(None, words))
