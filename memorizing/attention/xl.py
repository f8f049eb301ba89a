"""A Transformer-XL cache (Dai et al. 2019) of keys and values: every position also sees the last W positions before its segment."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from memorizing import masks
from memorizing.array_typing import AxesTree, HeadScale, Keys, Queries, Values
from memorizing.attention.base import Attention, LayerDims, T5Bias, hide, local_attention, visible_keys
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
      same_length: lets every position see exactly the last W positions up to itself (a sliding window), instead of the whole cache.
    """

    window: int = 512
    num_buckets: int = 32
    max_distance: int = 128
    same_length: bool = False

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
    ) -> tuple[Queries, XLState | None, Report]:
        config, length = self.attention, queries.shape[1]
        cached_keys, cached_values = hide(state.keys, state.valid), hide(state.values, state.valid)

        def seen(name: str, cached: jax.Array, own: jax.Array) -> jax.Array:
            return segment.extend(name, own if segment.continues else jnp.concatenate([cached, own], axis=1))

        def recent(own: jax.Array, cached: jax.Array) -> jax.Array:
            own = segment.layout.own(own)
            return jax.lax.stop_gradient(jnp.concatenate([cached, own], axis=1)[:, -config.window :])

        all_keys, all_values = seen("keys", cached_keys, keys), seen("values", cached_values, values)
        bias = T5Bias(self.dims.num_heads, config.num_buckets, config.max_distance, name="bias")
        bias, mask = bias(segment, length, all_keys.shape[1]), visible_keys(segment, length, state.valid)
        if config.same_length:
            mask &= segment.cut(masks.within(config.window, segment.layout.size, mask.shape[2]), length)[None]
        y = local_attention(queries, all_keys, all_values, scale, bias, mask)
        if segment.slice:
            return y, None, Report(kept={"keys": all_keys, "values": all_values})
        new_state = XLState(
            keys=recent(keys, cached_keys),
            values=recent(values, cached_values),
            valid=recent(segment.is_real, state.valid),
        )
        return y, new_state, Report()
