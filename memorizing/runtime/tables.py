"""Tables and figures as text."""

from __future__ import annotations

from collections.abc import Sequence

_UNITS = (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6))


def with_unit(count: float) -> str:
    """FLOPs to three figures: '1.23 P'."""
    # Rounded before the unit is chosen: 999.6 T is 1.00 P.
    rounded = float(f"{count:.2e}")
    unit, size = next((unit for unit in _UNITS if rounded >= unit[1]), _UNITS[-1])
    figures = rounded / size
    return f"{figures:,.{2 if figures < 10 else 1 if figures < 100 else 0}f} {unit}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: '1:02:03'."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def align(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of text with aligned columns, the first `left` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
