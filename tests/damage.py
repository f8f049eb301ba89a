"""Damage to a file: every single bit of it in turn, and every beginning of it."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence


def damages(
    file: pathlib.Path, places: range | None = None, bits: Sequence[int] = range(8), num_beginnings: int | None = None
) -> Iterator[bytes]:
    """Damages a file in one way after the other, and mends it at the end.

    Args:
      file: which one.
      places: of the bytes of which bits are changed; None for all.
      bits: of each of these bytes that are changed, one at a time.
      num_beginnings: how many lengths it is cut to; None for all.

    Yields:
      What is in the file now.
    """
    whole = file.read_bytes()
    count = len(whole) if num_beginnings is None else num_beginnings
    # In place: to write a whole file anew takes a file system milliseconds.
    with open(file, "r+b", buffering=0) as opened:
        for place in range(len(whole)) if places is None else places:
            for bit in bits:
                changed = bytes([whole[place] ^ 1 << bit])
                opened.seek(place)
                opened.write(changed)
                yield whole[:place] + changed + whole[place + 1 :]
            opened.seek(place)
            opened.write(whole[place : place + 1])
        for index in reversed(range(count)):
            length = index * len(whole) // count
            opened.truncate(length)
            yield whole[:length]
    file.write_bytes(whole)
