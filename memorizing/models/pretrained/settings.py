"""The settings of a checkpoint's configuration, each asked for with its type and its range."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from memorizing.errors import MOST, Range, UserError, is_number

SIZE = Range(1, 2**24)
LAYERS = Range(1, 10_000)
HEADS = Range(1, 2**16)
LENGTH = Range(1, MOST)
POSITIVE = Range(1e-30, 1e30)


class Settings:
    """The settings of a configuration, as read from JSON.

    Every method raises UserError in one line, with the setting's name, where it is not what it has to be.
    """

    def __init__(self, values: Any, given: str) -> None:
        """
        Args:
          values: what the JSON text says.
          given: names the file, for messages.
        """
        self.given = given
        if not isinstance(values, Mapping):
            raise UserError(f"{given} is no object of JSON")
        self._values = values

    @property
    def names(self) -> Collection[str]:
        """Of the settings that are there, null or not."""
        return self._values.keys()

    def get(self, name: str) -> Any:
        """A setting as it is; None where it is not there."""
        return self._values.get(name)

    def part(self, name: str) -> Settings | None:
        """The settings within a setting; None where it is not there."""
        value = self.get(name)
        return None if value is None else Settings(value, f"{self.given}, {name}")

    def whole(self, name: str, allowed: Range, default: int | None = None) -> int:
        """A whole number."""
        value = self._or_default(name, default)
        if not is_number(value) or value not in allowed or value != int(value):
            raise self.wrong(name, f"a whole number {allowed}")
        return int(value)

    def number(self, name: str, allowed: Range, default: float | None = None) -> float:
        """A number."""
        value = self._or_default(name, default)
        if not is_number(value) or value not in allowed:
            raise self.wrong(name, f"a number {allowed}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._or_default(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def word(self, name: str, allowed: Collection[str], default: str | None = None) -> str:
        """One of some words."""
        value = self._or_default(name, default)
        if not isinstance(value, str) or value not in allowed:
            raise self.wrong(name, " or ".join(map(repr, allowed)))
        return value

    def listed(self, name: str, length: int, allowed: Collection[Any]) -> list[Any] | None:
        """A value for each layer; None where the setting is not there."""
        values = self.get(name)
        if values is None:
            return None
        if not isinstance(values, list) or len(values) != length or any(value not in allowed for value in values):
            raise self.wrong(name, f"a list of {length}, one for each layer, of {' or '.join(map(repr, allowed))}")
        return values

    def wrong(self, name: str, expected: str) -> UserError:
        """What to raise where a setting is not what was expected."""
        shown = repr(self.get(name))
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        return UserError(f"{self.given}: {name} = {shown}: only {expected} can be read")

    def _or_default(self, name: str, default: Any) -> Any:
        value = self.get(name)
        return default if value is None else value
