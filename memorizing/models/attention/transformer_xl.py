"""Transformer-XL (Dai et al. 2019): a cache of the layer's inputs, and a relative encoding of its own."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from memorizing.array_typing import Activations, AxesTree
from memorizing.context import Layout, Report, Segment
from memorizing.errors import Count, CountOrNone, UserError
from memorizing.models import masks, positions
from memorizing.models.attention.base import Attention, Example, LayerDims, attend_flops, matmul_flops, projection_flops
from memorizing.models.attention.local import attention_weights, hide, push, visible_keys
from memorizing.models.layers import Einsum, parameter


@struct.dataclass
class TransformerXLState:
    """Inputs of the layer at the last W positions of the row's document.

    Attributes:
      hidden: [B, W, D] in the dtype of the activations.
      valid: bool [B, W].
    """

    hidden: Float[Array, "B W D"] | Any
    valid: Bool[Array, "B W"] | Any


@dataclasses.dataclass(frozen=True)
class TransformerXLAttention(Attention):
    """Attends to the segment and to cached hidden states, projected anew with today's weights.

    No gradient reaches the cache (section 3.2).

    Attributes:
      window: W, in positions. It may be another one at evaluation: no parameter depends on it.
      clamp_distance: greater distances, in positions, are encoded as this one; 0 for no clamping.
      same_length: lets every position see exactly the last W positions up to itself, instead of the whole cache.
    """

    can_decode: ClassVar[bool] = True

    window: Count = 512
    clamp_distance: CountOrNone = 0
    same_length: bool = False

    def __post_init__(self) -> None:
        if self.window < 1 or self.clamp_distance < 0:
            raise UserError(f"{self}: window has to be at least 1, clamp_distance at least 0")

    def init_state(self, dims: LayerDims, batch_size: int, segment_length: int) -> TransformerXLState:
        return TransformerXLState(
            hidden=jnp.zeros((batch_size, self.window, dims.embed_dim), dims.dtype),
            valid=jnp.zeros((batch_size, self.window), bool),
        )

    def state_axes(self) -> AxesTree:
        return TransformerXLState(
            hidden=("batch", "length", "embed"),
            valid=("batch", "length"),
        )

    def fresh_state(self) -> TransformerXLState:
        return TransformerXLState(hidden=None, valid=False)

    def layer(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        return TransformerXLLayer(self, dims, name=name)

    def flops(self, dims: LayerDims, layout: Layout) -> int:
        return relative_attention_flops(dims, layout, self.window)

    def with_window(self, window: int) -> TransformerXLAttention:
        return dataclasses.replace(self, window=window)

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
        self,
        x: Activations,
        segment: Segment,
        state: TransformerXLState,
    ) -> tuple[Activations, TransformerXLState | None, Report]:
        config = self.attention
        layout = segment.layout
        num_queries = x.shape[1]
        # [B, W, D]
        hidden = hide(state.hidden, state.valid)

        # [B, T, S], S = W + T
        mask = visible_keys(segment, num_queries, state.valid)
        if config.same_length:
            num_keys = mask.shape[2]
            near = masks.within(config.window, layout.size, num_keys)
            mask &= segment.select(near, num_queries)[None]

        relative = RelativeAttention(self.dims, config.clamp_distance, name="relative")
        y, _, kv_cache = relative(x, hidden, mask, segment)

        if segment.decoding is not None:
            return y, None, Report(kv_cache=kv_cache)
        new_state = TransformerXLState(
            hidden=push(hidden, layout.own(x)),
            valid=push(state.valid, layout.own(segment.is_real)),
        )
        return y, new_state, Report()


class RelativeAttention(nn.Module):
    """Attention whose logits are (q + u) . k + (q + v) . r(distance), over sqrt(H), r a projection of sinusoids.

    Equation (5) without its first approximation.
    """

    dims: LayerDims
    clamp_distance: CountOrNone = 0

    def setup(self) -> None:
        dims = self.dims
        by_head = (dims.num_heads, dims.head_dim)
        by_head_axes = ("heads", "head_dim")

        def projection(equation: str) -> Einsum:
            return Einsum(
                equation,
                shape=(dims.embed_dim, *by_head),
                axes=("embed", *by_head_axes),
                dtype=dims.dtype,
            )

        self.query = projection("BTD,DNH->BTNH")
        self.key = projection("BTD,DNH->BTNH")
        self.value = projection("BTD,DNH->BTNH")
        self.position = projection("RD,DNH->RNH")
        self.output = Einsum(
            "BTNH,NHD->BTD",
            shape=(*by_head, dims.embed_dim),
            axes=(*by_head_axes, "embed"),
            dtype=dims.dtype,
        )
        initializer = nn.initializers.normal(stddev=0.02)
        self.u = parameter(self, "u", initializer, by_head, by_head_axes)
        self.v = parameter(self, "v", initializer, by_head, by_head_axes)

    def __call__(
        self,
        x: Activations,
        hidden: Float[Array, "B W D"],
        mask: Bool[Array, "B T S"],
        segment: Segment,
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
        # [B, S, D]; in a decode step [B, 1, D].
        seen = x if segment.is_decode_step else jnp.concatenate([hidden, x], axis=1)
        # [B, S, N, H]
        keys = segment.with_kv_cache("keys", self.key(seen))
        values = segment.with_kv_cache("values", self.value(seen))
        # [B, T, N, H]
        queries = self.query(x)
        num_queries = x.shape[1]
        num_keys = keys.shape[1]
        distances = self._distances(segment, num_keys)

        with jax.named_scope("local_attention"):
            # [B, N, T, S]
            content_bias = self.u[None, None].astype(x.dtype)
            content_logits = _dot(queries + content_bias, keys)

            # [B, N, T, R], R = S + T - 1
            position_bias = self.v[None, None].astype(x.dtype)
            by_distance = jnp.einsum(
                "BTNH,RNH->BNTR",
                queries + position_bias,
                segment.select(distances, num_queries + num_keys - 1),
                preferred_element_type=jnp.float32,
            )
            position_logits = positions.by_key(by_distance, num_keys)

            logits = content_logits + position_logits
            logits = logits * self.dims.head_dim**-0.5
            weights = attention_weights(logits, mask)
            y = jnp.einsum("BNTS,BSNH->BTNH", weights.astype(values.dtype), values)

        kv_cache = {"keys": keys, "values": values, "distances": distances}
        return self.output(y), weights, kv_cache

    def content(self, x: Activations, hidden: Float[Array, "B W D"]) -> Float[Array, "B T N H"]:
        """Attention from x to hidden by content alone, everything visible (Rae et al. 2020, algorithm 2).

        Gradients reach `hidden` only: not x, and no parameter.
        """
        x = jax.lax.stop_gradient(x)
        queries = self.query(x, frozen=True)
        keys = self.key(hidden, frozen=True)
        values = self.value(hidden, frozen=True)
        logits = _dot(queries, keys) * self.dims.head_dim**-0.5
        weights = jax.nn.softmax(logits, axis=-1)
        return jnp.einsum("BNTS,BSNH->BTNH", weights.astype(values.dtype), values)

    def _distances(self, segment: Segment, num_keys: int) -> Float[Array, "R N H"]:
        """Every distance in the segment, encoded and projected: r of the equation."""
        decoding = segment.decoding
        if decoding is not None and decoding.kv_cache is not None:
            return decoding.kv_cache["distances"]
        distances = positions.distances(segment.layout.size, num_keys)
        if self.clamp_distance:
            distances = distances.clip(max=self.clamp_distance)
        # [R, D]
        encoded = positions.sinusoids(distances, self.dims.embed_dim)
        return self.position(segment.tied(encoded.astype(self.dims.dtype)))


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


def _dot(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B S N H"],
) -> Float[Array, "B N T S"]:
    return jnp.einsum(
        "BTNH,BSNH->BNTS",
        queries,
        keys,
        preferred_element_type=jnp.float32,
    )
