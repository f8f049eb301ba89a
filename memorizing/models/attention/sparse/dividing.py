"""Segments that are cut into equal parts."""

from __future__ import annotations

from memorizing.errors import UserError


def check_divides(setting: str, size: int, segment_length: int) -> None:
    """Raises UserError, which names the setting, unless `size` positions divide the segment."""
    if segment_length % size:
        above = -(-segment_length // size) * size
        raise UserError(
            f"{setting} = {size} does not divide the segment length {segment_length}: choose another one, or segments "
            f"of {above}"
        )


def divisor_near_root(segment_length: int) -> int:
    """The divisor of the segment's length that is nearest to its square root."""
    divisors = [size for size in range(1, segment_length + 1) if segment_length % size == 0]
    return min(divisors, key=lambda divisor: abs(divisor - segment_length**0.5))
