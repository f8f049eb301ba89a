"""A Transformer-XL cache (Dai et al. 2019) of keys and values.

Every position also sees the last W positions before its segment.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Shaped

from memorizing.array_typing import AxesTree, HeadScale, Keys, Queries, Values
from memorizing.context import Layout, Report, Segment
from memorizing.errors import Count, Range, UserError
from memorizing.models import masks
from memorizing.models.attention.base import (
    Attention,
    Example,
    LayerDims,
    attend_flops,
    hide,
    local_attention,
    position_bias,
    projection_flops,
    push,
    visible_keys,
)
from memorizing.models.positions import check_buckets


@struct.dataclass
class XLState:
    """The last W positions of the row's document.

    Attributes:
      keys, values: [B, W, N, H] in the dtype of the activations.
      valid: bool [B, W].
    """

    keys: Keys | Any
    values: Values | Any
    valid: Bool[Array, "B W"] | Any


@dataclasses.dataclass(frozen=True)
class XLAttention(Attention):
    """Attends to the segment and to a cache of the positions before it. No gradient reaches the cache.

    Attributes:
      window: W, in positions.
      num_buckets, max_distance: T5's relative bias; the distance is in tokens.
      same_length: lets every position see exactly the last W positions up to itself (a sliding window), instead of the
        whole cache.
    """

    can_decode: ClassVar[bool] = True

    window: Count = 512
    num_buckets: Annotated[int, Range(2, 2**16)] = 32
    max_distance: Count = 128
    same_length: bool = False

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(
                f"XLAttention.window = {self.window}: at least 1 position; without a cache use @FullAttention()"
            )
        check_buckets("XLAttention", self.num_buckets, self.max_distance)

    def init_state(self, dims: LayerDims, batch_size: int, segment_length: int) -> XLState:
        shape = (batch_size, self.window, dims.num_heads, dims.head_dim)
        return XLState(
            keys=jnp.zeros(shape, dims.dtype),
            values=jnp.zeros(shape, dims.dtype),
            valid=jnp.zeros(shape[:2], bool),
        )

    def state_axes(self) -> AxesTree:
        content = ("batch", "length", "heads", "head_dim")
        return XLState(keys=content, values=content, valid=("batch", "length"))

    def fresh_state(self) -> XLState:
        return XLState(keys=None, values=None, valid=False)

    def core(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        return XLCore(self, dims, name=name)

    def flops(self, dims: LayerDims, layout: Layout) -> int:
        num_keys = self.window + layout.size
        return projection_flops(dims, layout) + attend_flops(dims, layout.size, num_keys)

    @classmethod
    def example(cls, segment_length: int) -> Example:
        meaning = f"keys and values of {segment_length} positions in every layer"
        return Example("cache", meaning, cls(window=segment_length))


class XLCore(nn.Module):
    """The dot-product core: see `Attention.core`."""

    attention: XLAttention
    dims: LayerDims

    @nn.compact
    def __call__(
        self,
        queries: Queries,
        keys: Keys,
        values: Values,
        scale: HeadScale,
        segment: Segment,
        state: XLState,
    ) -> tuple[Queries, XLState | None, Report]:
        config = self.attention
        layout = segment.layout
        # [B, W, N, H]
        cached_keys = hide(state.keys, state.valid)
        cached_values = hide(state.values, state.valid)
        # [B, S, N, H], S = W + T
        all_keys = segment.with_kv_cache("keys", _after(cached_keys, keys, segment))
        all_values = segment.with_kv_cache("values", _after(cached_values, values, segment))
        num_queries = queries.shape[1]
        num_keys = all_keys.shape[1]

        # [B, T, S]
        mask = visible_keys(segment, num_queries, state.valid)
        if config.same_length:
            near = masks.within(config.window, layout.size, num_keys)
            mask &= segment.select(near, num_queries)[None]
        bias = position_bias(
            self.dims,
            config.num_buckets,
            config.max_distance,
            segment,
            num_queries,
            num_keys,
        )
        y = local_attention(queries, all_keys, all_values, scale, bias, mask)

        if segment.decoding is not None:
            return y, None, Report(kv_cache={"keys": all_keys, "values": all_values})
        new_state = XLState(
            keys=push(cached_keys, layout.own(keys)),
            values=push(cached_values, layout.own(values)),
            valid=push(state.valid, layout.own(segment.is_real)),
        )
        return y, new_state, Report()


def _after(
    cached: Shaped[Array, "B W *rest"],
    new: Shaped[Array, "B T *rest"],
    segment: Segment,
) -> Shaped[Array, "B S *rest"]:
    """[cached; new] for `Segment.with_kv_cache`; in a decode step only `new`, since the KV cache has the others."""
    if segment.is_decode_step:
        return new
    return jnp.concatenate([cached, new], axis=1)
