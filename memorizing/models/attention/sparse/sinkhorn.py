"""Sparse Sinkhorn Attention (Tay et al. 2020): every block of queries sees itself and one block of sorted keys."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memorizing.array_typing import Activations, HeadScale
from memorizing.context import Attended, Layout, Report, Rngs, Segment
from memorizing.errors import Count, Range
from memorizing.models import partial_softmax
from memorizing.models.attention.base import (
    Example,
    LayerDims,
    attend_flops,
    logit_scale,
    matmul_flops,
    normalize,
    project_from_heads,
    project_to_heads,
    projection_flops,
)
from memorizing.models.attention.relative_bias import BiasedAttention
from memorizing.models.attention.sparse import dense
from memorizing.models.attention.sparse.dividing import check_divides, divisor_near_root
from memorizing.models.layers import Einsum
from memorizing.models.partial_softmax import HIDDEN

# How much of each block of keys is sorted to each block of queries.
Sorting = Float[Array, "B N m m"]


@dataclasses.dataclass(frozen=True)
class SinkhornAttention(BiasedAttention):
    """Blocks of keys are sorted by a matrix that is learned, and every block of queries sees the one that it gets.

    The segment is cut into m blocks. A small network scores, for the block of queries i of each head, every earlier
    block of keys by its place: R_i = relu(P relu(W s_i + b) + c), where s_i is the mean of the layer's inputs before
    block i. The scores are balanced in turn by rows and by columns (Sinkhorn 1964), so that they come near to a
    permutation; its rows mix blocks of keys and of values. A position attends, in one softmax, to its own block up to
    itself and to the mixture (sections 3.1 to 3.3 of the paper; s_i is a sum there). Time and memory for scores grow as
    T b + (T / b)^2.

    Nothing depends on later positions: block i gets earlier blocks alone, and columns are balanced over the blocks of
    queries up to i (section 3.3.2 of the paper). In training the scores have Gumbel noise.

    There is a score for each place, so that a model has the segment length that it was trained with.

    Attributes:
      block_size: b, in positions; divides the segment length.
      num_iterations: of balancing; with 0 the scores are exponentials.
      temperature: tau; the scores are divided by it, and the nearer it is to 0, the more the sorting is a permutation.
      num_buckets, max_distance: see `BiasedAttention`; of the own block. The mixture has no distance.
    """

    can_decode: ClassVar[bool] = True
    caches_segment_only: ClassVar[bool] = True
    tells_attention: ClassVar[bool] = True
    takes_memory_tokens: ClassVar[bool] = False

    block_size: Count = 64
    num_iterations: Annotated[int, Range(0, 100)] = 5
    temperature: Annotated[float, Range(0, 1e3, without_ends=True)] = 0.75

    def check(self, segment_length: int) -> None:
        check_divides("SinkhornAttention.block_size", self.block_size, segment_length)

    def layer(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        return SinkhornLayer(self, dims, name=name)

    def flops(self, dims: LayerDims, layout: Layout) -> int:
        """Projections, the network that scores, the mixtures of keys and values, and attention to two blocks."""
        length = layout.size
        num_blocks = -(-length // self.block_size)
        score = matmul_flops(num_blocks, dims.embed_dim, dims.width) + matmul_flops(num_blocks, dims.width, num_blocks)
        mix = 2 * matmul_flops(num_blocks, num_blocks, self.block_size * dims.width)
        attend = attend_flops(dims, length, 2 * self.block_size)
        return projection_flops(dims, layout) + score + mix + attend

    @classmethod
    def example(cls, segment_length: int) -> Example:
        size = divisor_near_root(segment_length)
        meaning = (
            f"nothing carried; within a segment the own {size} positions and {size} of sorted ones, in every layer"
        )
        return Example("Sinkhorn", meaning, cls(block_size=size))


class SinkhornLayer(nn.Module):
    """See `Attention.layer`."""

    attention: SinkhornAttention
    dims: LayerDims

    @nn.compact
    def __call__(
        self,
        x: Activations,
        segment: Segment,
        state: tuple,
    ) -> tuple[Activations, tuple | None, Report]:
        config = self.attention
        dims = self.dims
        # [B, T, N, H]
        queries = project_to_heads(dims, "query")(x)
        keys = project_to_heads(dims, "key")(x)
        values = project_to_heads(dims, "value")(x)
        if dims.qk_norm == "l2":
            queries, keys = normalize(queries), normalize(keys)
        scale = logit_scale(self, dims, fixed=dims.head_dim**-0.5)
        # There is no mask of what is real: padding comes after all that is real, and no position sees a later one.
        cached = {
            name: segment.with_kv_cache(name, new)
            for name, new in {"inputs": x, "keys": keys, "values": values}.items()
        }
        inputs, keys, values = cached.values()
        sorting = balanced(config, self._scores(inputs), segment.rngs)
        by_distance = config.distance_bias(dims)(np.arange(keys.shape[1]))

        if segment.is_decode_step:
            assert segment.decoding is not None, "a decode step"
            query = segment.decoding.position + jnp.arange(queries.shape[1])
            weights = weights_of_some(config, queries, keys, sorting, scale, by_distance, query)
            y = jnp.einsum("BNtS,BSNH->BtNH", weights.astype(values.dtype), values)
        else:
            y = attend_in_blocks(config, queries, keys, values, sorting, scale, by_distance)
        y = project_from_heads(dims)(y)

        if segment.decoding is not None:
            return y, None, Report(kv_cache=cached)
        if not segment.num_shown:
            return y, state, Report()
        attended = _attended(config, queries, keys, sorting, scale, by_distance, segment.num_shown)
        return y, state, Report(attended=(attended,))

    def _scores(self, x: Activations) -> Float[Array, "B N m m"]:
        """What the network gives every block of queries for the blocks of keys, float32, at least 0."""
        dims = self.dims
        before = mean_before(x, self.attention.block_size)
        num_blocks = before.shape[1]
        hidden = Einsum(
            "BmD,DNH->BmNH",
            shape=(dims.embed_dim, dims.num_heads, dims.head_dim),
            axes=("embed", "heads", "head_dim"),
            dtype=jnp.float32,
            has_bias=True,
            name="sorting_hidden",
        )(before)
        scores = Einsum(
            "BmNH,NHj->BmNj",
            shape=(dims.num_heads, dims.head_dim, num_blocks),
            axes=("heads", "head_dim", None),
            dtype=jnp.float32,
            has_bias=True,
            name="sorting",
        )(nn.relu(hidden))
        return jnp.moveaxis(nn.relu(scores), 2, 1)


def mean_before(x: Activations, block_size: int) -> Float[Array, "B m D"]:
    """The mean of all positions before each block, float32; 0 before the first one."""
    num_rows, length, width = x.shape
    sums = jnp.sum(x.astype(jnp.float32).reshape(num_rows, -1, block_size, width), axis=2)
    up_to = jnp.cumsum(sums, axis=1)
    before = jnp.pad(up_to[:, :-1], ((0, 0), (1, 0), (0, 0)))
    number = np.maximum(np.arange(0, length, block_size), 1)
    return before / number[None, :, None]


def balanced(config: SinkhornAttention, scores: Float[Array, "B N m m"], rngs: Rngs | None) -> Sorting:
    """The scores as a matrix whose rows, and columns so far, sum to about 1; 0 for a block's own and later ones.

    Args:
      config: how.
      scores: of block j of keys, last, for block i of queries.
      rngs: of the layer; None, as in evaluation, for no noise.
    """
    shape = scores.shape[1:]
    if rngs is not None:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, shape))(rngs.row_streams("sorting"))
        scores = scores + noise
    is_earlier = np.tri(shape[-1], k=-1, dtype=bool)[None, None]

    def hidden(logarithms: Float[Array, "B N m m"]) -> Float[Array, "B N m m"]:
        return jnp.where(is_earlier, logarithms, HIDDEN)

    logarithms = hidden(scores / config.temperature)
    for _ in range(config.num_iterations):
        logarithms = hidden(logarithms - jax.nn.logsumexp(logarithms, axis=3, keepdims=True))
        logarithms = hidden(logarithms - jax.lax.cumlogsumexp(logarithms, axis=2))
    return jnp.exp(logarithms)


def attend_in_blocks(
    config: SinkhornAttention,
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T N H"],
    values: Float[Array, "B T N H"],
    sorting: Sorting,
    scale: HeadScale,
    by_distance: Float[Array, "N T"],
) -> Float[Array, "B T N H"]:
    """All positions at once."""
    num_rows, _, num_heads, head_dim = queries.shape
    size = config.block_size

    def in_blocks(x: Float[Array, "B T N H"]) -> Float[Array, "B N m b H"]:
        return jnp.moveaxis(x.reshape(num_rows, -1, size, num_heads, head_dim), 3, 1)

    def mixed(blocks: Float[Array, "B N m b H"]) -> Float[Array, "B N m b H"]:
        return jnp.einsum("BNij,BNjsH->BNisH", sorting.astype(blocks.dtype), blocks)

    def products(of_keys: Float[Array, "B N m b H"]) -> Float[Array, "B N m b b"]:
        return jnp.einsum("BNmtH,BNmsH->BNmts", query_blocks, of_keys, preferred_element_type=jnp.float32)

    query_blocks, key_blocks, value_blocks = map(in_blocks, (queries, keys, values))
    # [b, b]
    distance = np.arange(size)[:, None] - np.arange(size)[None, :]
    bias = by_distance[:, np.maximum(distance, 0)]
    of_head = scale[None, :, None, None, None]
    own_logits = (products(key_blocks) + bias[None, :, None]) * of_head
    own = partial_softmax.attend(own_logits, distance >= 0, value_blocks)

    # Nothing is before the first block.
    has_earlier = np.arange(query_blocks.shape[2]) > 0
    sorted_logits = products(mixed(key_blocks)) * of_head
    of_sorted = partial_softmax.attend(sorted_logits, has_earlier[:, None, None], mixed(value_blocks))
    y = partial_softmax.join(own, of_sorted).values
    return jnp.moveaxis(y, 1, 3).reshape(queries.shape)


def weights_of_some(
    config: SinkhornAttention,
    queries: Float[Array, "B t N H"],
    keys: Float[Array, "B S N H"],
    sorting: Sorting,
    scale: HeadScale,
    by_distance: Float[Array, "N S"],
    query: Int[Array, "t"],
) -> Float[Array, "B N t S"]:
    """The attention of some queries to all positions of a segment, float32: what it has to a mixture, to all of it.

    Where a row of the matrix sums to less than 1, so do these.
    """
    num_rows, length, num_heads, head_dim = keys.shape
    size = config.block_size
    position = jnp.arange(length)[None, :]
    # [t, S]
    sees_own = (query[:, None] // size == position // size) & (position <= query[:, None])
    own_logits = dense.logits(queries, keys, by_distance, scale, query)

    # [B, N, t, m]
    shares = sorting[:, :, query // size]
    key_blocks = keys.reshape(num_rows, -1, size, num_heads, head_dim)
    mixed = jnp.einsum("BNtm,BmsNH->BNtsH", shares.astype(keys.dtype), key_blocks)
    products = jnp.einsum("BtNH,BNtsH->BNts", queries, mixed, preferred_element_type=jnp.float32)
    sorted_logits = products * scale[None, :, None, None]
    sees_sorted = jnp.broadcast_to(query[:, None] >= size, (len(query), size))

    logits = jnp.concatenate([own_logits, sorted_logits], axis=-1)
    visible = jnp.concatenate([sees_own, sees_sorted], axis=-1)
    of_own, of_sorted = jnp.split(dense.softmax(logits, visible[None, None]), [length], axis=-1)
    of_mixed = jnp.einsum("BNtm,BNts->BNtms", shares, of_sorted)
    return of_own + of_mixed.reshape(of_own.shape)


def _attended(
    config: SinkhornAttention,
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T N H"],
    sorting: Sorting,
    scale: HeadScale,
    by_distance: Float[Array, "N T"],
    num_shown: int,
) -> Attended:
    """What the heads attended to, for an inspector; a position belongs to a block."""
    num_rows, length, num_heads, _ = queries.shape

    def weights(query: Int[Array, "t"]) -> Float[Array, "B N t S"]:
        return weights_of_some(config, queries[:, query], keys, sorting, scale, by_distance, query)

    block = jnp.arange(length) // config.block_size
    groups = jnp.broadcast_to(block[None, :, None, None], (num_rows, length, num_heads, 1))
    return dense.strongest(weights, length, num_shown, groups, ("block",), range(num_heads))
