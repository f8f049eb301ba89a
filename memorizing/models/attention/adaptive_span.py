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
from memorizing.models import partial_softmax, positions
from memorizing.models.attention.base import Example, LayerDims
from memorizing.models.attention.relative_bias import BiasedAttention
from memorizing.models.attention.xl import XLAttention, XLState
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

    @property
    def cache(self) -> XLAttention:
        """What it is but for the spans: it carries the same."""
        return XLAttention(self.window, same_length=True, num_buckets=self.num_buckets, max_distance=self.max_distance)

    def init_state(self, dims: LayerDims, batch_size: int, segment_length: int) -> XLState:
        return self.cache.init_state(dims, batch_size, segment_length)

    def state_axes(self) -> AxesTree:
        return self.cache.state_axes()

    def fresh_state(self) -> XLState:
        return self.cache.fresh_state()

    def core(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        return AdaptiveSpanCore(self, dims, name=name)

    def flops(self, dims: LayerDims, layout: Layout) -> int:
        return self.cache.flops(dims, layout)

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

    def setup(self) -> None:
        config = self.attention
        self.cache = config.cache.core(self.dims)
        # One scope: the cache's parameters have the names that they have without spans.
        nn.share_scope(self, self.cache)
        initial = math.log(config.initial_span / (1 - config.initial_span))
        self.span = parameter(self, "span", nn.initializers.constant(initial), (self.dims.num_heads,), ("heads",))

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
        span = config.window * nn.sigmoid(self.span)
        soft_mask = self._log_mask(span, segment, queries.shape[1], config.window + segment.layout.size)
        attended, state, report = self.cache.attend(queries, keys, values, scale, segment, state, soft_mask)
        if segment.decoding is not None:
            return attended.values, None, report
        losses = {"span": config.span_loss * jnp.mean(span)}
        metrics = {"span": jax.lax.stop_gradient(span)}
        return attended.values, state, dataclasses.replace(report, losses=losses, metrics=metrics)

    def _log_mask(
        self,
        span: Float[Array, "N"],
        segment: Segment,
        num_queries: int,
        num_keys: int,
    ) -> Float[Array, "N T S"]:
        """The logarithm of the soft mask, float32; `HIDDEN` where it is 0."""
        # A later key is hidden by the causal mask.
        distances = np.maximum(positions.distances(segment.layout.size, num_keys), 0)
        ramp = self.attention.ramp
        soft = jnp.clip((ramp + segment.tied(span)[:, None] - distances[None, :]) / ramp, 0, 1)
        is_seen = soft > 0
        # The logarithm has a gradient where it is taken only.
        logarithm = jnp.where(is_seen, jnp.log(jnp.where(is_seen, soft, 1.0)), partial_softmax.HIDDEN)
        by_distance = segment.select(logarithm, num_queries + num_keys - 1, axis=1)
        return positions.same_by_key(by_distance, num_queries, num_keys)
