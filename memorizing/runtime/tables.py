"""Tables and figures as text."""

from __future__ import annotations

from collections.abc import Sequence

_UNITS = (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6))


def with_unit(count: float) -> str:
    """FLOPs to three figures: '1.23 P'."""
    # Rounded before the unit is chosen: 999.6 T is 1.00 P.
    rounded = float(f"{count:.2e}")
    unit, size = next((unit for unit in _UNITS if rounded >= unit[1]), _UNITS[-1])
    number = rounded / size
    if number < 10:
        decimals = 2
    elif number < 100:
        decimals = 1
    else:
        decimals = 0
    return f"{number:,.{decimals}f} {unit}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: '1:02:03'."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def align(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of text with aligned columns: the first `left` of them to the left, the others to the right."""
    columns = []
    for i, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        if i < left:
            columns.append([cell.ljust(width) for cell in column])
        else:
            columns.append([cell.rjust(width) for cell in column])
    lines = ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
    return "\n".join(lines)
