"""Full causal attention within a segment: nothing is carried."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn

from memorizing.context import Layout
from memorizing.models.attention.base import LayerDims, attend_flops, projection_flops
from memorizing.models.attention.local import LocalCore
from memorizing.models.attention.relative_bias import BiasedAttention
from memorizing.models.attention.xl import XLAttention
from memorizing.models.positions import LayerPositions, Rotary


@dataclasses.dataclass(frozen=True)
class FullAttention(BiasedAttention):
    """Every position of the segment sees the earlier ones.

    Attributes:
      num_buckets, max_distance: see `BiasedAttention`.
      positions: of these layers, where they have others than the model (`LMConfig.positions`).
    """

    can_decode: ClassVar[bool] = True
    caches_segment_only: ClassVar[bool] = True
    takes_all_parts: ClassVar[bool] = True
    joins_memory: ClassVar[bool] = True

    positions: LayerPositions = None

    def core(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        return LocalCore(self, dims.with_positions(self.positions), name=name)

    def check_parts(self, dims: LayerDims) -> None:
        if isinstance(self.positions, Rotary):
            self.positions.check(dims.head_dim)

    def with_window(self, window: int) -> XLAttention:
        return XLAttention(
            window, num_buckets=self.num_buckets, max_distance=self.max_distance, positions=self.positions
        )

    def flops(self, dims: LayerDims, layout: Layout) -> int:
        return projection_flops(dims, layout) + attend_flops(dims, layout.size, layout.size)
