"""Files of one JSON object a line, as C4, the BigQuery exports and arXiv's metadata are distributed."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from memorizing.data.documents import damaged
from memorizing.data.formats import archives

# A file that is not JSON lines at all is not reported line by line.
_MAX_REPORTED_LINES = 20


def read(
    path: str, label: str, skipped: Counter[str], fields: Mapping[str, type]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the objects of a file at a path, local or gs://, compressed or not; see `objects`."""
    yield from objects(functools.partial(archives.open_file, path), label, skipped, fields)


def objects(
    open_file: Callable[[], IO[bytes]], label: str, skipped: Counter[str], fields: Mapping[str, type]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the objects of a file with the numbers of their lines, from 1.

    Args:
      open_file: opens it.
      label: names it in messages.
      skipped: counts damaged lines: not a JSON object, without one of `fields`, or not valid Unicode.
      fields: names and types of the values that every object must have.
    """
    num_damaged = 0
    for number, line in enumerate(_lines(open_file, label, skipped), start=1):
        if not line.strip():
            continue
        try:
            value = _parsed(line, fields)
        except ValueError as error:
            num_damaged += 1
            named = f"line {number}" if num_damaged <= _MAX_REPORTED_LINES else "further lines"
            skipped[damaged(f"{label}, {named}", str(error))] += 1
        else:
            yield number, value


def _lines(open_file: Callable[[], IO[bytes]], label: str, skipped: Counter[str]) -> Iterator[bytes]:
    try:
        with open_file() as file:
            while line := file.readline(archives.MAX_BYTES + 1):
                if len(line) <= archives.MAX_BYTES:
                    yield line
                    continue
                skipped[archives.TOO_LARGE] += 1
                while line and not line.endswith(b"\n"):
                    line = file.readline(archives.MAX_BYTES)
                # In its place, so that the lines after it keep their numbers.
                yield b""
    except archives.READ_ERRORS as error:
        skipped[damaged(label, archives.why(error))] += 1


def _parsed(line: bytes, fields: Mapping[str, type]) -> dict[str, Any]:
    """The object in a line. Raises ValueError, whose message says what is wrong."""
    try:
        value = json.loads(line.decode())
        # JSON can hold half of a surrogate pair as an escape, which is not a character.
        if b"\\ud" in line or b"\\uD" in line:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        raise ValueError("not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    for name, kind in fields.items():
        if not isinstance(value.get(name), kind):
            raise ValueError(f"no {name}" if name not in value else f"{name} is no {kind.__name__}")
    return value
