"""Full causal attention within a segment: nothing is carried."""

from __future__ import annotations

import dataclasses

import flax.linen as nn

from memorizing import masks
from memorizing.array_typing import HeadScale, Keys, Queries, Values
from memorizing.attention.base import Attention, LayerDims, T5Bias, local_attention
from memorizing.context import Report, Segment


@dataclasses.dataclass(frozen=True)
class FullAttention(Attention):
    """Every position of the segment sees the earlier ones.

    Attributes:
      num_buckets, max_distance: T5's relative bias; the distance is in tokens.
    """

    num_buckets: int = 32
    max_distance: int = 128

    def core(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        return FullCore(self, dims, name=name)


class FullCore(nn.Module):
    attention: FullAttention
    dims: LayerDims

    @nn.compact
    def __call__(
        self, queries: Queries, keys: Keys, values: Values, scale: HeadScale, segment: Segment, state: tuple
    ) -> tuple[Queries, tuple, Report]:
        config, layout = self.attention, segment.layout
        bias = T5Bias(self.dims.num_heads, config.num_buckets, config.max_distance, name="bias")(layout, layout.size)
        mask = masks.visible(layout)[None] & segment.is_real[:, None, :]
        return local_attention(queries, keys, values, scale, bias, mask), state, Report()
