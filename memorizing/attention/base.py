"""What all mechanisms share: the sizes of a layer, the interface, and the projections around a dot-product core."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from memorizing import masks, positions
from memorizing.array_typing import Activations, AxesTree, Clock, HeadScale, Keys, Queries, Tree, Values
from memorizing.context import Report, Segment
from memorizing.layers import Einsum


@dataclasses.dataclass(frozen=True)
class LayerDims:
    """Sizes of one layer.

    Attributes:
      embed_dim, num_heads, head_dim, mlp_dim: D, N, H, F.
      dropout: probability, on the outputs of attention and MLP.
      initial_logit_scale: value at initialisation of the learned per-head scale of the logits.
      dtype: dtype of activations and of carried states.
    """

    embed_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    dropout: float
    initial_logit_scale: float
    dtype: jnp.dtype


class Attention:
    """A mechanism: a frozen dataclass that builds its layer and describes the state which the layer carries from segment to segment.

    The three trees have the same structure. The defaults are those of a mechanism without state whose layer is a dot-product core between projections; a mechanism with
    projections of its own overrides `layer`, the others provide `core`.

    Attributes:
      stackable: whether equal neighbouring layers may be scanned, their states stacked and unstacked (copied) every step.
    """

    stackable: ClassVar[bool] = True

    def init_state(self, dims: LayerDims, batch_size: int, segment_length: int) -> Tree:
        """The state of rows that have seen nothing. Every leaf has the row axis first."""
        return ()

    def state_axes(self) -> AxesTree:
        """The logical axis names of every leaf of the state."""
        return ()

    def fresh_state(self) -> Tree:
        """What a reset writes: see `context.reset_rows`."""
        return ()

    def settle(self, state: Tree, clock: Clock) -> Tree:
        """What is to be done with the state before a segment reads it, outside of everything that is recomputed for the gradient. Done twice it is as done once.

        Args:
          state: as the segment before left it; rows that begin a document are reset afterwards.
          clock: int32 scalar, segments processed before this one.
        """
        return state

    def core(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        """A module `(queries, keys, values, scale, segment, state) -> (output [B, T, N, H], new state, Report)`."""
        raise TypeError(f"{type(self).__name__} has no core: it provides its layer itself")

    def layer(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        """A module `(x [B, T, D], segment, state) -> (y [B, T, D], new state, Report)`."""
        return ProjectedAttention(self, dims, name=name)

    def check(self, segment_length: int) -> None:
        """Raises UserError if the mechanism cannot work with segments of this length."""


class ProjectedAttention(nn.Module):
    """Projects to queries, keys and values, lets the mechanism's core attend, and projects back.

    Queries and keys are L2-normalised and the logits multiplied by a learned scale per head, so that keys stored long ago keep their magnitude.
    """

    attention: Attention
    dims: LayerDims

    @nn.compact
    def __call__(self, x: Activations, segment: Segment, state: Tree) -> tuple[Activations, Tree, Report]:
        dims = self.dims
        size = (dims.embed_dim, dims.num_heads, dims.head_dim)
        axes = ("embed", "heads", "head_dim")

        def project(name: str) -> jax.Array:
            return Einsum("BTD,DNH->BTNH", size, axes, dims.dtype, name=name)(x)

        queries, keys, values = normalize(project("query")), normalize(project("key")), project("value")
        initializer = nn.initializers.constant(dims.initial_logit_scale)
        scale = self.param(
            "scale", nn.with_logical_partitioning(initializer, ("heads",)), (dims.num_heads,), jnp.float32
        )
        core = self.attention.core(dims, name="core")
        y, state, report = core(queries, keys, values, jnp.abs(scale), segment, state)
        y = Einsum("BTNH,NHD->BTD", size[1:] + size[:1], axes[1:] + axes[:1], dims.dtype, name="output")(y)
        return y, state, report


class T5Bias(nn.Module):
    """A learned bias a head and bucket of distance (Raffel et al. 2020)."""

    num_heads: int
    num_buckets: int
    max_distance: int

    @nn.compact
    def __call__(self, segment: Segment, num_queries: int, num_keys: int) -> Float[Array, "N T S"]:
        layout = segment.layout
        initializer = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        table = self.param(
            "table",
            nn.with_logical_partitioning(initializer, ("heads", None)),
            (self.num_heads, self.num_buckets),
            jnp.float32,
        )
        distances = positions.distances(layout.size, num_keys)
        buckets = positions.t5_buckets(distances, self.num_buckets, self.max_distance, layout.bidirectional)
        by_distance = segment.cut(table[:, buckets], num_queries + num_keys - 1, axis=1)
        return positions.same_by_key(by_distance, num_queries, num_keys)


def normalize(x: Queries) -> Queries:
    """x / |x| over the last axis, with the sum in float32."""
    squares = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(squares + 1e-6)).astype(x.dtype)


def hide(cached: jax.Array, valid: Bool[Array, "B W"]) -> jax.Array:
    """Carried slots [B, W, ...] with zeros where they are empty, and no gradient: empty slots may hold anything, and what the mask turns into 0 * NaN would be NaN."""
    return jnp.where(valid.reshape(valid.shape + (1,) * (cached.ndim - 2)), jax.lax.stop_gradient(cached), 0)


def visible_keys(segment: Segment, num_queries: int, valid: Bool[Array, "B W"] | None = None) -> Bool[Array, "B T S"]:
    """Which of the keys [carried; segment] each query sees: those that the layout shows and that hold something. Every position sees at least itself, so that no row is empty.

    Args:
      segment: whose positions, or a slice of them, the queries are.
      num_queries: T.
      valid: which of the carried keys hold something; None where nothing is carried.
    """
    is_key = segment.is_real if valid is None else segment.with_cached(valid)
    size, num_keys = segment.layout.size, is_key.shape[1]
    seen = segment.cut(masks.visible(segment.layout, num_keys - size), num_queries)
    itself = segment.cut(masks.itself(size, num_keys), num_queries)
    return seen[None] & is_key[:, None, :] | itself[None]


def attention_weights(logits: Float[Array, "B N T S"], mask: Bool[Array, "B T S"]) -> Float[Array, "B N T S"]:
    """softmax over the visible keys, float32.

    Args:
      logits: float32.
      mask: true where a key is visible, as it is somewhere for every query.
    """
    return jax.nn.softmax(jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min), axis=-1)


def local_attention(
    queries: Queries,
    keys: Keys,
    values: Values,
    scale: HeadScale,
    bias: Float[Array, "N T S"],
    mask: Bool[Array, "B T S"],
) -> Queries:
    """softmax(scale * (q . k + bias)) v over the visible keys."""
    with jax.named_scope("local_attention"):
        logits = jnp.einsum("BTNH,BSNH->BNTS", queries, keys, preferred_element_type=jnp.float32)
        weights = attention_weights((logits + bias[None]) * scale[None, :, None, None], mask)
        return jnp.einsum("BNTS,BSNH->BTNH", weights.astype(values.dtype), values)
