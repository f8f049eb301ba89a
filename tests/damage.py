"""Damage to a file: every single bit of it in turn, and beginnings of it."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator


def damages(file: pathlib.Path, places: range | None = None, num_beginnings: int = 40) -> Iterator[bytes]:
    """Damages a file in one way after the other, and mends it at the end.

    Args:
      file: which one.
      places: of the bytes whose bits are changed; None for all.
      num_beginnings: how many lengths it is cut to.

    Yields:
      What is in the file now.
    """
    whole = file.read_bytes()
    # In place: to write a whole file anew takes a file system milliseconds.
    with open(file, "r+b", buffering=0) as opened:
        for place in places or range(len(whole)):
            for bit in range(8):
                changed = bytes([whole[place] ^ 1 << bit])
                opened.seek(place)
                opened.write(changed)
                yield whole[:place] + changed + whole[place + 1 :]
            opened.seek(place)
            opened.write(whole[place : place + 1])
    for index in range(num_beginnings):
        beginning = whole[: index * len(whole) // num_beginnings]
        file.write_bytes(beginning)
        yield beginning
    file.write_bytes(whole)
