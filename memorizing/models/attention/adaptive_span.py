"""Attention whose heads learn how far back they look (Sukhbaatar et al. 2019, "Adaptive Attention Span").

With z the span of a head and x the distance back, a soft mask m(x) = clip((R + z - x) / R, 0, 1) multiplies the
exponentials of the softmax. A loss on z makes every head as short as it can be.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from memorizing.array_typing import AxesTree, HeadScale, Keys, Queries, Values
from memorizing.context import Layout, Report, Segment
from memorizing.errors import Count, Factor, Range
from memorizing.models import masks, partial_softmax, positions
from memorizing.models.attention.base import (
    Example,
    LayerDims,
    attend_flops,
    projection_flops,
)
from memorizing.models.attention.local import hide, push, visible_keys
from memorizing.models.attention.relative_bias import BiasedAttention
from memorizing.models.attention.xl import XLState
from memorizing.models.layers import parameter


@dataclasses.dataclass(frozen=True)
class AdaptiveSpanAttention(BiasedAttention):
    """Every position sees at most the last W up to itself, every head as far as its learned span reaches.

    The paper keeps z within [0, W] by clipping it after each step; here it is W sigmoid(a) with a learned a. Shapes are
    those of the longest span: short ones save no time, but say which window would do.

    Attributes:
      window: W, in positions, the longest span.
      ramp: R, in positions, over which the mask falls from 1 to 0.
      initial_span: of every head, as a share of W.
      span_loss: weight of the mean span of the heads, in positions, in the loss; the paper has 2e-6.
      num_buckets, max_distance: see `BiasedAttention`.
    """

    can_decode: ClassVar[bool] = True

    window: Count = 512
    ramp: Count = 32
    initial_span: Annotated[float, Range(0, 1, without_ends=True)] = 0.1
    span_loss: Factor = 2e-6

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
        return AdaptiveSpanCore(self, dims, name=name)

    def flops(self, dims: LayerDims, layout: Layout) -> int:
        num_keys = self.window + layout.size
        return projection_flops(dims, layout) + attend_flops(dims, layout.size, num_keys)

    @classmethod
    def example(cls, segment_length: int) -> Example:
        meaning = (
            f"keys and values of {segment_length} positions, of which heads learn how many they see, in every layer"
        )
        return Example("adaptive span", meaning, cls(window=segment_length))


class AdaptiveSpanCore(nn.Module):
    """The dot-product core: see `Attention.core`."""

    attention: AdaptiveSpanAttention
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
        all_keys = segment.with_kv_cache("keys", keys, cached_keys)
        all_values = segment.with_kv_cache("values", values, cached_values)
        num_queries = queries.shape[1]
        num_keys = all_keys.shape[1]

        # [B, T, S]
        mask = visible_keys(segment, num_queries, state.valid)
        near = masks.within(config.window, layout.size, num_keys)
        mask &= segment.select(near, num_queries)[None]
        bias = config.position_bias(self.dims, segment, num_queries, num_keys)
        initial = math.log(config.initial_span / (1 - config.initial_span))
        shape = (self.dims.num_heads,)
        span = parameter(self, "span", nn.initializers.constant(initial), shape, ("heads",))
        span = config.window * nn.sigmoid(span)

        # [B, N, T, S]
        logits = jnp.einsum("BTNH,BSNH->BNTS", queries, all_keys, preferred_element_type=jnp.float32)
        if bias is not None:
            logits = logits + bias[None]
        logits = logits * scale[None, :, None, None]
        logits = logits + self._log_mask(span, segment, num_queries, num_keys)[None]
        y = partial_softmax.attend(logits, mask[:, None], all_values.swapaxes(1, 2)).values.swapaxes(1, 2)

        if segment.decoding is not None:
            return y, None, Report(kv_cache={"keys": all_keys, "values": all_values})
        report = Report(
            losses={"span": config.span_loss * jnp.mean(span)},
            metrics={"span": jax.lax.stop_gradient(span)},
        )
        new_state = XLState(
            keys=push(cached_keys, layout.own(keys)),
            values=push(cached_values, layout.own(values)),
            valid=push(state.valid, layout.own(segment.is_real)),
        )
        return y, new_state, report

    def _log_mask(
        self,
        span: Float[Array, "N"],
        segment: Segment,
        num_queries: int,
        num_keys: int,
    ) -> Float[Array, "N T S"]:
        """The logarithm of the soft mask; `HIDDEN` where it is 0."""
        # A later key is hidden by the causal mask.
        distances = np.maximum(positions.distances(segment.layout.size, num_keys), 0)
        ramp = self.attention.ramp
        soft = jnp.clip((ramp + span[:, None] - distances[None, :]) / ramp, 0, 1)
        is_seen = soft > 0
        # The logarithm has a gradient where it is taken only.
        logarithm = jnp.where(is_seen, jnp.log(jnp.where(is_seen, soft, 1.0)), partial_softmax.HIDDEN)
        by_distance = segment.select(logarithm, num_queries + num_keys - 1, axis=1)
        return positions.same_by_key(by_distance, num_queries, num_keys)
