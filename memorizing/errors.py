"""What a user may give, the one exception for what cannot work, errors in one line, and the exit codes.

Every number that a user can set says which values it takes, where it is declared: a field by its annotation, a flag by
its type. They are checked in one place each, before anything is built or read.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import math
import os
from collections.abc import Callable, Iterator
from typing import Annotated, TypeVar

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_START_AGAIN = 42

Number = TypeVar("Number", int, float)


class UserError(ValueError):
    """Something the user gave cannot work.

    The message says what was given, what was expected and what to do, and names the flag or gin binding.
    The command line prints it without a traceback and exits with 2.
    """


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a setting takes; never NaN, never infinite.

    Attributes:
      least, most: the ends.
      without_ends: whether the ends themselves are left out.
    """

    least: float
    most: float
    without_ends: bool = False

    def __contains__(self, value: float) -> bool:
        # Python compares whole numbers of any size with floats exactly.
        if self.without_ends:
            return self.least < value < self.most
        return self.least <= value <= self.most

    def __str__(self) -> str:
        if self.without_ends:
            return f"above {self.least:,} and below {self.most:,}"
        return f"from {self.least:,} to {self.most:,}"

    def of(self, kind: Callable[[str], Number]) -> Callable[[str], Number]:
        """A type for argparse: such a number in this range."""

        def parse(text: str) -> Number:
            value = kind(text)
            if value not in self:
                raise argparse.ArgumentTypeError(f"={text}: expected {self}")
            return value

        # argparse names it where the text is no number at all.
        parse.__name__ = kind.__name__
        return parse


# Sizes, counts and steps fit 32 bits, with which JAX counts.
MOST = 2**31 - 1
Count = Annotated[int, Range(1, MOST)]
CountOrNone = Annotated[int, Range(0, MOST)]
Seed = Annotated[int, Range(0, MOST)]
# Of an axis of a parameter.
Width = Annotated[int, Range(1, 2**24)]
Share = Annotated[float, Range(0, 1)]
Factor = Annotated[float, Range(0, 1e30)]
FactorAboveZero = Annotated[float, Range(1e-30, 1e30)]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# What a file system says that has no room, or does not let us: the program is right, and has to end.
_REFUSALS = ("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS", "EIO", "ESTALE", "ENOTCONN", "EMFILE", "ENFILE")


def what_the_machine_lacks(error: BaseException) -> str | None:
    """Room, memory or permission, if it is the lack of that which caused an error, in one line; else None."""
    if isinstance(error, UserError):
        # It says itself what to do.
        return None
    numbers = {getattr(errno, name) for name in _REFUSALS if hasattr(errno, name)}
    for cause in causes(error):
        text = first_line(cause)
        if isinstance(cause, OSError) and cause.errno in numbers:
            where = f": {cause.filename}" if cause.filename else ""
            return f"{cause.strerror}{where}"
        # Libraries in other languages tell it in their own words, and the system's.
        for number in numbers:
            if os.strerror(number) in str(cause):
                return f"{os.strerror(number)} ({text[:200]})"
        if isinstance(cause, MemoryError) or text.startswith("RESOURCE_EXHAUSTED"):
            return f"out of memory ({text[:200]})"
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_number(value: object) -> bool:
    """Whether a range can be asked of it. True and False are no numbers to a user."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
