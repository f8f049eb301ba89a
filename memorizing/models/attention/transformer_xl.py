"""Transformer-XL (Dai et al. 2019): a cache of the layer's inputs, and a relative encoding of its own."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from memorizing.array_typing import Activations, AxesTree
from memorizing.context import Layout, Report, Segment
from memorizing.errors import UserError
from memorizing.models import masks, positions
from memorizing.models.attention.base import (
    Attention,
    Example,
    LayerDims,
    attend_flops,
    attention_weights,
    hide,
    matmul_flops,
    projection_flops,
    visible_keys,
)
from memorizing.models.layers import Einsum


@struct.dataclass
class TransformerXLState:
    """Inputs of the layer at the last W positions of the row's document.

    Attributes:
      hidden: [B, W, D] in the dtype of the activations.
      valid: bool [B, W].
    """

    hidden: Float[Array, "B W D"]
    valid: Bool[Array, "B W"]


@dataclasses.dataclass(frozen=True)
class TransformerXLAttention(Attention):
    """Attends to the segment and to cached hidden states, projected anew with today's weights; no gradient reaches the cache (section 3.2).

    Attributes:
      window: W, in positions. It may be another one at evaluation: no parameter depends on it.
      clamp_distance: greater distances, in positions, are encoded as this one; 0 for no clamping.
      same_length: lets every position see exactly the last W positions up to itself, instead of the whole cache.
    """

    can_decode: ClassVar[bool] = True

    window: int = 512
    clamp_distance: int = 0
    same_length: bool = False

    def __post_init__(self) -> None:
        if self.window < 1 or self.clamp_distance < 0:
            raise UserError(f"{self}: window has to be at least 1, clamp_distance at least 0")

    def init_state(self, dims: LayerDims, batch_size: int, segment_length: int) -> TransformerXLState:
        hidden = jnp.zeros((batch_size, self.window, dims.embed_dim), dims.dtype)
        return TransformerXLState(hidden, jnp.zeros((batch_size, self.window), bool))

    def state_axes(self) -> AxesTree:
        return TransformerXLState(hidden=("batch", "length", "embed"), valid=("batch", "length"))

    def fresh_state(self) -> TransformerXLState:
        return TransformerXLState(hidden=None, valid=False)

    def layer(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        return TransformerXLLayer(self, dims, name=name)

    def flops(self, dims: LayerDims, layout: Layout) -> int:
        return relative_attention_flops(dims, layout, self.window)

    @classmethod
    def example(cls, segment_length: int) -> Example:
        meaning = f"Transformer-XL, {segment_length} cached positions in every layer"
        return Example("XL", meaning, cls(window=segment_length))


class TransformerXLLayer(nn.Module):
    """The layer: see `Attention.layer`."""

    attention: TransformerXLAttention
    dims: LayerDims

    @nn.compact
    def __call__(
        self, x: Activations, segment: Segment, state: TransformerXLState
    ) -> tuple[Activations, TransformerXLState | None, Report]:
        config, layout = self.attention, segment.layout
        # [B, W, D]
        hidden = hide(state.hidden, state.valid)
        # [B, T, S], S = W + T
        mask = visible_keys(segment, x.shape[1], state.valid)
        if config.same_length:
            near = masks.within(config.window, layout.size, mask.shape[2])
            mask &= segment.select(near, x.shape[1])[None]
        relative = RelativeAttention(self.dims, config.clamp_distance, name="relative")
        y, _, kv_cache = relative(x, hidden, mask, segment)
        if segment.decoding is not None:
            return y, None, Report(kv_cache=kv_cache)
        own = layout.own
        new_state = TransformerXLState(
            hidden=jax.lax.stop_gradient(jnp.concatenate([hidden, own(x)], axis=1)[:, -config.window :]),
            valid=jnp.concatenate([state.valid, own(segment.is_real)], axis=1)[:, -config.window :],
        )
        return y, new_state, Report()


class RelativeAttention(nn.Module):
    """Attention whose logits are (q + u) . k + (q + v) . r(distance), over sqrt(H), r a projection of sinusoids.

    Equation (5) without its first approximation.
    """

    dims: LayerDims
    clamp_distance: int = 0

    def setup(self) -> None:
        dims = self.dims
        size, axes = (dims.embed_dim, dims.num_heads, dims.head_dim), ("embed", "heads", "head_dim")
        self.query, self.key, self.value = (Einsum("BTD,DNH->BTNH", size, axes, dims.dtype) for _ in range(3))
        self.position = Einsum("RD,DNH->RNH", size, axes, dims.dtype)
        self.output = Einsum("BTNH,NHD->BTD", size[1:] + size[:1], axes[1:] + axes[:1], dims.dtype)
        initializer = nn.with_logical_partitioning(nn.initializers.normal(stddev=0.02), axes[1:])
        self.u, self.v = (self.param(name, initializer, size[1:], jnp.float32) for name in ("u", "v"))

    def __call__(
        self, x: Activations, hidden: Float[Array, "B W D"], mask: Bool[Array, "B T S"], segment: Segment
    ) -> tuple[Activations, Float[Array, "B N T S"], dict[str, jax.Array]]:
        """Attends from x to [hidden; x].

        Args:
          x: [B, T, D].
          hidden: carried states, S = W + T; zeros where the mask hides them.
          mask: true where visible.
          segment: whose positions, or some of them, x is.

        Returns:
          The output [B, T, D], the weights, and the KV cache.
        """
        seen = x if segment.is_decode_step else jnp.concatenate([hidden, x], axis=1)
        # [B, S, N, H]
        keys = segment.with_kv_cache("keys", self.key(seen))
        values = segment.with_kv_cache("values", self.value(seen))
        queries = self.query(x)
        num_keys = keys.shape[1]
        if segment.is_decode_step:
            distances = segment.decoding.kv_cache["distances"]
        else:
            distances = self._distances(segment, num_keys)
        with jax.named_scope("local_attention"):
            # [B, N, T, S]
            logits = _dot(queries + self.u[None, None].astype(x.dtype), keys)
            # [B, N, T, R], R = S + T - 1
            by_distance = jnp.einsum(
                "BTNH,RNH->BNTR",
                queries + self.v[None, None].astype(x.dtype),
                segment.select(distances, x.shape[1] + num_keys - 1),
                preferred_element_type=jnp.float32,
            )
            logits = logits + positions.by_key(by_distance, num_keys)
            weights = attention_weights(logits * self.dims.head_dim**-0.5, mask)
            y = jnp.einsum("BNTS,BSNH->BTNH", weights.astype(values.dtype), values)
        return self.output(y), weights, {"keys": keys, "values": values, "distances": distances}

    def content(self, x: Activations, hidden: Float[Array, "B W D"]) -> Float[Array, "B T N H"]:
        """Attention from x to hidden by content alone, everything visible (Rae et al. 2020, algorithm 2).

        Gradients reach `hidden` only: not x, and no parameter.
        """
        queries = self.query(jax.lax.stop_gradient(x), frozen=True)
        keys = self.key(hidden, frozen=True)
        values = self.value(hidden, frozen=True)
        weights = jax.nn.softmax(_dot(queries, keys) * self.dims.head_dim**-0.5, axis=-1).astype(values.dtype)
        return jnp.einsum("BNTS,BSNH->BTNH", weights, values)

    def _distances(self, segment: Segment, num_keys: int) -> Float[Array, "R N H"]:
        """Every distance in the segment, encoded and projected: r of the equation."""
        distances = positions.distances(segment.layout.size, num_keys)
        if self.clamp_distance:
            distances = distances.clip(max=self.clamp_distance)
        return self.position(positions.sinusoids(distances, self.dims.embed_dim).astype(self.dims.dtype))


def relative_attention_flops(dims: LayerDims, layout: Layout, num_cached: int) -> int:
    """FLOPs of attention to cached hidden states and the segment.

    The cached states' keys and values and the position term are part of it (Dai et al. 2019, section 3.3).
    """
    num_keys = num_cached + layout.size
    # From every query to every key, later ones included.
    num_distances = layout.size + num_keys - 1
    keys_and_values = matmul_flops(num_cached, dims.embed_dim, 2 * dims.width)
    encodings = matmul_flops(num_distances, dims.embed_dim, dims.width)
    position_term = matmul_flops(layout.size, dims.width, num_distances)
    attention = projection_flops(dims, layout) + attend_flops(dims, layout.size, num_keys)
    return attention + keys_and_values + encodings + position_term


def _dot(queries: Float[Array, "B T N H"], keys: Float[Array, "B S N H"]) -> Float[Array, "B N T S"]:
    return jnp.einsum("BTNH,BSNH->BNTS", queries, keys, preferred_element_type=jnp.float32)
