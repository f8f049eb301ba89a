"""Full causal attention within a segment: nothing is carried."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn

from memorizing.array_typing import HeadScale, Keys, Queries, Values
from memorizing.context import Layout, Report, Segment
from memorizing.models.attention.base import (
    LayerDims,
    attend_flops,
    projection_flops,
)
from memorizing.models.attention.local import Attended, at_positions, local_attention, visible_keys
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
    takes_all_parts: ClassVar[bool] = True
    joins_memory: ClassVar[bool] = True

    positions: LayerPositions = None

    def core(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        return FullCore(self, dims.with_positions(self.positions), name=name)

    def check_parts(self, dims: LayerDims) -> None:
        if isinstance(self.positions, Rotary):
            self.positions.check(dims.head_dim)

    def with_window(self, window: int) -> XLAttention:
        return XLAttention(
            window, num_buckets=self.num_buckets, max_distance=self.max_distance, positions=self.positions
        )

    def flops(self, dims: LayerDims, layout: Layout) -> int:
        return projection_flops(dims, layout) + attend_flops(dims, layout.size, layout.size)


class FullCore(nn.Module):
    """The dot-product core: see `Attention.core`."""

    attention: FullAttention
    dims: LayerDims

    def __call__(
        self,
        queries: Queries,
        keys: Keys,
        values: Values,
        scale: HeadScale,
        segment: Segment,
        state: tuple,
    ) -> tuple[Queries, tuple | None, Report]:
        attended, state, report = self.attend(queries, keys, values, scale, segment, state)
        return attended.values, state, report

    @nn.compact
    def attend(
        self,
        queries: Queries,
        keys: Keys,
        values: Values,
        scale: HeadScale,
        segment: Segment,
        state: tuple,
    ) -> tuple[Attended, tuple | None, Report]:
        """The same, with the normalisers of its softmax."""
        config = self.attention
        # [B, S, K, H]
        keys = segment.with_kv_cache("keys", keys)
        values = segment.with_kv_cache("values", values)
        num_queries = queries.shape[1]
        num_keys = keys.shape[1]

        mask = visible_keys(segment, num_queries)
        bias = config.position_bias(self.dims, segment, num_queries, num_keys)
        placed = at_positions(self.dims, segment, queries, keys)
        attended = local_attention(*placed, values, scale, bias, mask, self.dims.attention_logit_cap)

        if segment.decoding is not None:
            return attended, None, Report(kv_cache={"keys": keys, "values": values})
        return attended, state, Report()
