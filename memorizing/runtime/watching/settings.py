"""The settings of runs, from their configurations as gin text, and what differs in them.

Text is compared with text: nothing that a configuration names is imported or built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

# `scope/Class.parameter = value`, or `MACRO = value`.
_BINDING = re.compile(r"([\w./]+) = ?(.*)")

Settings = dict[str, str]


def settings_of(text: str) -> Settings:
    """The values of a resolved configuration as gin text, by name; `@Class()` and `%MACRO` stay what they are."""
    settings: Settings = {}
    name = None
    for line in text.splitlines():
        if begins := _BINDING.fullmatch(line):
            name = begins[1]
            settings[name] = _without_mark(begins[2])
        elif line.startswith(" ") and name is not None:
            # A long value goes on.
            settings[name] = f"{settings[name]} {_without_mark(line)}".strip()
        else:
            name = None
    return settings


def _without_mark(text: str) -> str:
    """A line without the mark that it goes on."""
    return text.removesuffix("\\").strip()


def value_of(settings: Mapping[str, str], name: str) -> str | None:
    """The value of a setting, through macros; None if it is not set."""
    value = settings.get(name)
    # Macros may name macros, but not in a circle.
    for _ in settings:
        if value is None or not value.startswith("%"):
            break
        value = settings.get(value.removeprefix("%"))
    return value


def number_of(settings: Mapping[str, str], name: str) -> float | None:
    """The value of a setting as a finite number; None if it is not set, or none."""
    try:
        value = float(value_of(settings, name) or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def differing(runs: Sequence[Mapping[str, str]]) -> list[str]:
    """The names of the settings that are not the same in all runs, in their order."""
    names = dict.fromkeys(name for settings in runs for name in settings)
    return [name for name in names if len({settings.get(name) for settings in runs}) > 1]


def short_names(names: Sequence[str]) -> dict[str, str]:
    """By name, the last part of it where that is enough to tell it from the others."""
    last = [name.rpartition(".")[2] for name in names]
    return {name: part if last.count(part) == 1 else name for name, part in zip(names, last, strict=True)}
