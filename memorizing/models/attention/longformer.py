"""A sliding window and a few global positions, as a causal model can have them (Beltagy et al. 2020, "Longformer").

In the paper global tokens see everything and are seen by all. In a causal model they see what came before them, so that
only their other half is left: the first positions of a document (its title, an instruction) stay visible to all later
ones, however far away.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from memorizing.array_typing import AxesTree, HeadScale, Keys, Queries, Values
from memorizing.context import Layout, Report, Segment
from memorizing.errors import Count, Range
from memorizing.models import masks
from memorizing.models.attention.base import (
    Attention,
    Example,
    LayerDims,
    attend_flops,
    position_bias,
    projection_flops,
)
from memorizing.models.attention.local import hide, local_attention, push, visible_keys
from memorizing.models.layers import parameter
from memorizing.models.positions import check_buckets


@struct.dataclass
class LongformerState:
    """What is carried of a row's document.

    Attributes:
      global_keys, global_values: [B, g, N, H], of its first positions.
      keys, values: [B, W, N, H], of its last positions.
      valid: bool [B, W], which of the last ones there are.
      was_read: bool [B, g + W], whether so many positions of it were read: their count, up to what matters.
    """

    global_keys: Keys | Any
    global_values: Values | Any
    keys: Keys | Any
    values: Values | Any
    valid: Bool[Array, "B W"] | Any
    was_read: Bool[Array, "B R"] | Any

    @property
    def num_read(self) -> Int[Array, "B"]:
        """Positions that were read of the document, at most g + W."""
        return jnp.sum(self.was_read, axis=1, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class LongformerAttention(Attention):
    """Every position sees the last W up to itself, and the first g of its document.

    No gradient reaches what is carried. Beyond the window a learned bias of each head stands for the distance.

    Attributes:
      window: W, in positions.
      num_global: g, in positions.
      num_buckets, max_distance: T5's relative bias within the window; the distance is in tokens.
    """

    can_decode: ClassVar[bool] = True
    takes_memory_tokens: ClassVar[bool] = False

    window: Count = 512
    num_global: Count = 16
    num_buckets: Annotated[int, Range(2, 2**16)] = 32
    max_distance: Count = 128

    def __post_init__(self) -> None:
        check_buckets("LongformerAttention", self.num_buckets, self.max_distance)

    def init_state(self, dims: LayerDims, batch_size: int, segment_length: int) -> LongformerState:
        def zeros(num_positions: int) -> jax.Array:
            return jnp.zeros((batch_size, num_positions, dims.num_heads, dims.head_dim), dims.dtype)

        return LongformerState(
            global_keys=zeros(self.num_global),
            global_values=zeros(self.num_global),
            keys=zeros(self.window),
            values=zeros(self.window),
            valid=jnp.zeros((batch_size, self.window), bool),
            was_read=jnp.zeros((batch_size, self.num_global + self.window), bool),
        )

    def state_axes(self) -> AxesTree:
        content = ("batch", "length", "heads", "head_dim")
        return LongformerState(
            global_keys=content,
            global_values=content,
            keys=content,
            values=content,
            valid=("batch", "length"),
            was_read=("batch", "length"),
        )

    def fresh_state(self) -> LongformerState:
        return LongformerState(None, None, None, None, valid=False, was_read=False)

    def core(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        return LongformerCore(self, dims, name=name)

    def flops(self, dims: LayerDims, layout: Layout) -> int:
        num_keys = self.num_global + self.window + layout.size
        return projection_flops(dims, layout) + attend_flops(dims, layout.size, num_keys)

    @classmethod
    def example(cls, segment_length: int) -> Example:
        longformer = cls(window=segment_length)
        meaning = (
            f"keys and values of the last {segment_length} positions and of the document's first "
            f"{longformer.num_global}, in every layer"
        )
        return Example("Longformer", meaning, longformer)


class LongformerCore(nn.Module):
    """The dot-product core: see `Attention.core`."""

    attention: LongformerAttention
    dims: LayerDims

    @nn.compact
    def __call__(
        self,
        queries: Queries,
        keys: Keys,
        values: Values,
        scale: HeadScale,
        segment: Segment,
        state: LongformerState,
    ) -> tuple[Queries, LongformerState | None, Report]:
        config = self.attention
        # A global position is in a place of its own as soon as it has left the window.
        first = jnp.arange(config.num_global)[None, :]
        is_stored = first < state.num_read[:, None]
        is_past = first < state.num_read[:, None] - config.window
        # [B, g + W, N, H]
        carried_keys = jnp.concatenate([hide(state.global_keys, is_stored), hide(state.keys, state.valid)], axis=1)
        carried_values = jnp.concatenate(
            [hide(state.global_values, is_stored), hide(state.values, state.valid)], axis=1
        )
        # [B, S, N, H], S = g + W + T
        all_keys = segment.with_kv_cache("keys", keys, carried_keys)
        all_values = segment.with_kv_cache("values", values, carried_values)

        num_queries = queries.shape[1]
        num_keys = all_keys.shape[1]
        # [T, S]
        near = segment.select(masks.within(config.window, segment.layout.size, num_keys), num_queries)
        near &= (jnp.arange(num_keys) >= config.num_global)[None, :]
        valid = jnp.concatenate([is_past, state.valid], axis=1)
        mask = visible_keys(segment, num_queries, valid)
        mask &= near[None] | self._is_global(state, num_keys)[:, None, :]
        bias = self._bias(segment, near)
        y = local_attention(queries, all_keys, all_values, scale, bias, mask).values

        if segment.decoding is not None:
            return y, None, Report(kv_cache={"keys": all_keys, "values": all_values})
        return y, self._next(state, carried_keys, carried_values, keys, values, segment), Report()

    def _is_global(self, state: LongformerState, num_keys: int) -> Bool[Array, "B S"]:
        """Which keys are of the first positions of the document."""
        config = self.attention
        # Of [global; window; segment]: where they stand in the document.
        place = jnp.arange(num_keys)[None, :] - config.num_global - config.window + state.num_read[:, None]
        is_own_place = jnp.arange(num_keys)[None, :] < config.num_global
        return is_own_place | (place < config.num_global)

    def _bias(self, segment: Segment, near: Bool[Array, "T S"]) -> Float[Array, "N T S"] | None:
        """The bias of the logits: by distance within the window, and the same for all distances beyond."""
        config = self.attention
        num_queries, num_keys = near.shape
        bias = position_bias(self.dims, config.num_buckets, config.max_distance, segment, num_queries, num_keys)
        if bias is None:
            return None
        shape = (self.dims.num_heads,)
        beyond = parameter(self, "beyond", nn.initializers.zeros, shape, ("heads",))
        return jnp.where(near[None], bias, beyond[:, None, None])

    def _next(
        self,
        state: LongformerState,
        carried_keys: Keys,
        carried_values: Values,
        keys: Keys,
        values: Values,
        segment: Segment,
    ) -> LongformerState:
        """The state after a segment."""
        num_global = self.attention.num_global
        num_real = jnp.sum(segment.is_real, axis=1, dtype=jnp.int32)
        # [B, g], where the document's first positions stand in the segment.
        place = jnp.arange(num_global)[None, :] - state.num_read[:, None]
        is_new = (place >= 0) & (place < num_real[:, None])

        def with_new(stored: Keys, new: Keys) -> Keys:
            index = jnp.clip(place, 0, new.shape[1] - 1)
            chosen = jnp.take_along_axis(new, index[..., None, None], axis=1)
            return jax.lax.stop_gradient(jnp.where(is_new[..., None, None], chosen, stored))

        return LongformerState(
            global_keys=with_new(carried_keys[:, :num_global], keys),
            global_values=with_new(carried_values[:, :num_global], values),
            keys=push(carried_keys[:, num_global:], keys),
            values=push(carried_values[:, num_global:], values),
            valid=push(state.valid, segment.is_real),
            was_read=jnp.arange(state.was_read.shape[1])[None, :] < (state.num_read + num_real)[:, None],
        )
