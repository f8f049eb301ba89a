"""Where the keys of a memory stand, which were stored before their positions turned them."""

from __future__ import annotations

from typing import Any

from flax import struct
from jaxtyping import Array, Float, Int

from memorizing.models.positions import Rotary


@struct.dataclass
class Placement:
    """Where keys of a memory stand, which were stored before their positions turned them.

    Attributes:
      of_slots: int32 [M], the position of each.
      rotary: how positions turn keys.
    """

    of_slots: Int[Array, "M"] | Any
    rotary: Rotary = struct.field(pytree_node=False)


def turned(keys: Float[Array, "M H"], placement: Placement | None) -> Float[Array, "M H"]:
    """The keys of a head where they stand."""
    return keys if placement is None else placement.rotary.turn(keys, placement.of_slots)
