"""A Transformer-XL cache (Dai et al. 2019) of keys and values: every position also sees the last W positions before its segment."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from memorizing import masks
from memorizing.array_typing import AxesTree, HeadScale, Keys, Queries, Values
from memorizing.attention.base import Attention, LayerDims, T5Bias, hide, local_attention
from memorizing.context import Report, Segment
from memorizing.errors import UserError


@struct.dataclass
class XLState:
    """The last W positions of the row's document.

    Attributes:
      keys, values: [B, W, N, H] in the dtype of the activations.
      valid: bool [B, W].
    """

    keys: Keys
    values: Values
    valid: jax.Array


@dataclasses.dataclass(frozen=True)
class XLAttention(Attention):
    """Attends to the segment and to a cache of the positions before it. No gradient reaches the cache.

    Attributes:
      window: W, in positions.
      num_buckets, max_distance: T5's relative bias; the distance is in tokens.
    """

    window: int = 512
    num_buckets: int = 32
    max_distance: int = 128

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(
                f"XLAttention.window = {self.window}: at least 1 position; without a cache use @FullAttention()"
            )

    def init_state(self, dims: LayerDims, batch_size: int, segment_length: int) -> XLState:
        shape = (batch_size, self.window, dims.num_heads, dims.head_dim)
        return XLState(
            keys=jnp.zeros(shape, dims.dtype), values=jnp.zeros(shape, dims.dtype), valid=jnp.zeros(shape[:2], bool)
        )

    def state_axes(self) -> AxesTree:
        axes = ("batch", "length", "heads", "head_dim")
        return XLState(keys=axes, values=axes, valid=axes[:2])

    def fresh_state(self) -> XLState:
        return XLState(keys=None, values=None, valid=False)

    def core(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        return XLCore(self, dims, name=name)


class XLCore(nn.Module):
    attention: XLAttention
    dims: LayerDims

    @nn.compact
    def __call__(
        self, queries: Queries, keys: Keys, values: Values, scale: HeadScale, segment: Segment, state: XLState
    ) -> tuple[Queries, XLState, Report]:
        config, layout = self.attention, segment.layout

        def recent(own: jax.Array, cached: jax.Array) -> jax.Array:
            return jax.lax.stop_gradient(jnp.concatenate([cached, layout.own(own)], axis=1)[:, -config.window :])

        cached_keys, cached_values = hide(state.keys, state.valid), hide(state.values, state.valid)
        new_state = XLState(
            keys=recent(keys, cached_keys),
            values=recent(values, cached_values),
            valid=recent(segment.is_real, state.valid),
        )
        keys = jnp.concatenate([cached_keys, keys], axis=1)
        values = jnp.concatenate([cached_values, values], axis=1)
        bias = T5Bias(self.dims.num_heads, config.num_buckets, config.max_distance, name="bias")(layout, keys.shape[1])
        mask = masks.visible(layout, config.window)[None] & segment.with_cached(state.valid)[:, None, :]
        return local_attention(queries, keys, values, scale, bias, mask), new_state, Report()
