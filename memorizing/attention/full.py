"""Full causal attention within a segment: nothing is carried."""

from __future__ import annotations

import dataclasses

import flax.linen as nn

from memorizing.array_typing import HeadScale, Keys, Queries, Values
from memorizing.attention.base import Attention, LayerDims, T5Bias, local_attention, visible_keys
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
    ) -> tuple[Queries, tuple | None, Report]:
        config, length = self.attention, queries.shape[1]
        keys, values = segment.extend("keys", keys), segment.extend("values", values)
        bias = T5Bias(self.dims.num_heads, config.num_buckets, config.max_distance, name="bias")
        bias, mask = bias(segment, length, keys.shape[1]), visible_keys(segment, length)
        y = local_attention(queries, keys, values, scale, bias, mask)
        if segment.slice:
            return y, None, Report(kept={"keys": keys, "values": values})
        return y, state, Report()
