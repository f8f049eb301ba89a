"""Everything that a user can set, and values that are seldom tried.

Fields and flags are those that are registered and that parsers have, not a list.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any

import memorizing.config.registry  # registers models and tasks
import memorizing.data.gin_registry  # noqa: F401  registers data
from memorizing import main
from memorizing.config.types import REGISTERED

OURS = [cls for cls in REGISTERED.values() if not cls.__module__.startswith(("tests", "test_", "tiny", "walk"))]
EXTREMES = (
    *(-(10**30), -(2**63), -1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**63, 10**12, 10**23, 10**30),
    *(-1.0, 0.0, 1e-300, 0.5, 1.0, 1e300, math.nan, math.inf, -math.inf),
)
# What else might stand there.
ODD = (
    "",
    "None",
    "()",
    "((1, 99999999999),)",
    "(5, 1)",
    "'x'",
    "[]",
    "{}",
    "1 # a comment",
    "True",
    "@",
    "%",
    "1e",
    "é",
)


def fields() -> list[tuple[type, str, Any]]:
    """Every field of every class that gin can configure."""
    found = []
    for cls in OURS:
        hints = typing.get_type_hints(cls, include_extras=True)
        found += [(cls, field.name, hints[field.name]) for field in dataclasses.fields(cls) if field.init]
    return found


def flags() -> list[tuple[str, argparse.Action]]:
    """Every flag of every command, and of the commands under them."""
    found = []
    for command in main.COMMANDS:
        parser = main._parser([command])
        (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        found += [(name, action) for name, action in flags_of(commands.choices[command], command)]
    return found


def flags_of(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.Action]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice, under in action.choices.items():
                yield from flags_of(under, f"{name} {choice}")
        elif action.option_strings:
            yield name, action
