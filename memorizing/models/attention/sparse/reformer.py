"""Reformer's attention (Kitaev et al. 2020): positions see those of their hash bucket, in several rounds of hashing."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from memorizing.array_typing import Activations, HeadScale
from memorizing.context import Attended, Layout, Report, Rngs, Segment
from memorizing.errors import Count, Range, UserError, Width
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
)
from memorizing.models.attention.relative_bias import BiasedAttention
from memorizing.models.attention.sparse import buckets, dense
from memorizing.models.attention.sparse.buckets import Pairs, Sorted
from memorizing.models.attention.sparse.dividing import check_divides
from memorizing.models.memory.retrieval import NEIGHBOURS
from memorizing.models.partial_softmax import Partial

# Logit of the query's own position, which counts only where nothing else is visible (section 2 of the paper).
_ITSELF = -1e5


@dataclasses.dataclass(frozen=True)
class ReformerAttention(BiasedAttention):
    """Attention of shared queries and keys within the buckets of an angular hash.

    A position sees earlier ones that have its hash in any of the rounds, as far as they are found: positions are sorted
    by bucket and cut into chunks of C, and each sees its own chunk and the one before. It sees itself only where it
    sees nothing else. Hashes are drawn anew for each step, and are always the same in evaluation.

    As published, where a chunk begins depends on the buckets of later positions: what a position sees never contains a
    later one, but which earlier ones it sees depends on them. With `strictly_causal` a position sees the last C of its
    bucket up to itself in each round: nothing depends on what comes later, so that it can also be decoded.

    Attributes:
      hash_buckets: an even number, or 1 for a single bucket; the paper has 2 T / C of them. Several even numbers are
        hashed by themselves and make up a bucket together, as many as their product: cheaper where there are many.
      num_rounds: of hashing.
      chunk_size: C, in positions; divides the segment length.
      strictly_causal: whether nothing depends on later positions.
      num_buckets, max_distance: see `BiasedAttention`.
    """

    tells_attention: ClassVar[bool] = True
    caches_segment_only: ClassVar[bool] = True
    takes_memory_tokens: ClassVar[bool] = False
    decoding_advice: ClassVar[str] = (
        ", since where its chunks begin depends on later tokens; set ReformerAttention.strictly_causal = True in "
        "training and generation"
    )

    hash_buckets: Width | tuple[Width, ...] = 32
    num_rounds: Annotated[int, Range(1, 2**10)] = 2
    chunk_size: Count = 64
    strictly_causal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_rounds", "chunk_size"):
            if getattr(self, name) < 1:
                raise UserError(f"ReformerAttention.{name} = {getattr(self, name)}: at least 1")
        if self.hash_buckets != 1 and any(factor < 2 or factor % 2 for factor in self.hash_factors):
            raise UserError(
                f"ReformerAttention.hash_buckets = {self.hash_buckets}: an even number, since every direction has its "
                "opposite, or several of them; or 1"
            )

    @property
    def hash_factors(self) -> tuple[int, ...]:
        """Buckets of each hash that takes part in one."""
        return self.hash_buckets if isinstance(self.hash_buckets, tuple) else (self.hash_buckets,)

    @property
    def can_decode(self) -> bool:
        """Whether nothing depends on later positions."""
        return self.strictly_causal

    def check(self, segment_length: int) -> None:
        check_divides("ReformerAttention.chunk_size", self.chunk_size, segment_length)

    def layer(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        return ReformerLayer(self, dims, name=name)

    def flops(self, dims: LayerDims, layout: Layout) -> int:
        """Projections, of which queries and keys share one, hashing, and attention in chunks for every round."""
        length = layout.size
        projections = matmul_flops(length, dims.embed_dim, 3 * dims.width)
        hashing = matmul_flops(length, dims.width, sum(self.hash_factors) // 2)
        attend = attend_flops(dims, length, 2 * self.chunk_size)
        return projections + self.num_rounds * (hashing + attend)

    @classmethod
    def example(cls, segment_length: int) -> Example:
        size = next(size for size in range(64, 0, -1) if segment_length % size == 0)
        num_buckets = 2 * segment_length // size
        # Two even factors of about the same size, if there are.
        factors = [each for each in range(2, int(num_buckets**0.5) + 1, 2) if num_buckets % (2 * each) == 0]
        hash_buckets = (factors[-1], num_buckets // factors[-1]) if factors else num_buckets
        reformer = cls(hash_buckets=hash_buckets, chunk_size=size)
        meaning = (
            f"nothing carried; {reformer.num_rounds} rounds of {num_buckets} hash buckets in chunks of {size}, "
            "in every layer"
        )
        return Example("Reformer", meaning, reformer)


class ReformerLayer(nn.Module):
    """See `Attention.layer`."""

    attention: ReformerAttention
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
        values = project_to_heads(dims, "value")(x)
        keys = normalize(queries)
        if dims.qk_norm == "l2":
            queries = keys
        scale = logit_scale(self, dims, fixed=dims.head_dim**-0.5)
        bias = config.distance_bias(dims)
        # [r, B, N, T]
        hashes = angular_hash(config, keys, segment.rngs)
        hashes = segment.chosen("hashes", checkpoint_name(hashes, NEIGHBOURS))

        report = Report(choices={"hashes": hashes})
        if segment.decoding is not None:
            keys = segment.with_kv_cache("keys", keys)
            values = segment.with_kv_cache("values", values)
            by_key = segment.with_kv_cache("hashes", jnp.moveaxis(hashes, (0, 3), (3, 1)))
            report = Report(kv_cache={"keys": keys, "values": values, "hashes": by_key})

        by_distance = bias(np.arange(values.shape[1]))
        if segment.is_decode_step:
            y = _attend_token(config, queries, keys, values, hashes, by_key, scale, by_distance, segment)
        else:
            y = attend_in_rounds(config, queries, keys, values, hashes, scale, by_distance, segment.is_real)
        if segment.num_shown:
            attended = attended_in_rounds(config, queries, keys, hashes, scale, by_distance, segment)
            report = dataclasses.replace(report, attended=(attended,))

        return project_from_heads(dims)(y), None if segment.decoding is not None else state, report


def angular_hash(
    config: ReformerAttention,
    vectors: Float[Array, "B T N H"],
    rngs: Rngs | None,
) -> Int[Array, "r B N T"]:
    """argmax([x R; -x R]) with random R, for every round and head (Andoni et al. 2015); no gradient.

    Args:
      config: how many rounds and buckets.
      vectors: x, of any length.
      rngs: of the layer; None, as in evaluation, for the same R always.
    """
    num_rows, length, num_heads, head_dim = vectors.shape
    if config.hash_buckets == 1:
        return jnp.zeros((config.num_rounds, num_rows, num_heads, length), jnp.int32)
    key = jax.random.key(0) if rngs is None else rngs.stream("hashes")
    vectors = jax.lax.stop_gradient(vectors).astype(jnp.float32)
    bucket = jnp.zeros((config.num_rounds, num_rows, num_heads, length), jnp.int32)
    for place, factor in enumerate(config.hash_factors):
        shape = (config.num_rounds, num_heads, head_dim, factor // 2)
        rotations = jax.random.normal(jax.random.fold_in(key, place), shape)
        # [r, B, N, T, b / 2]
        rotated = jnp.einsum("BTNH,rNHb->rBNTb", vectors, rotations)
        both = jnp.concatenate([rotated, -rotated], axis=-1)
        bucket = bucket * factor + jnp.argmax(both, axis=-1).astype(jnp.int32)
    return bucket


def attend_in_rounds(
    config: ReformerAttention,
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T N H"],
    values: Float[Array, "B T N H"],
    hashes: Int[Array, "r B N T"],
    scale: HeadScale,
    by_distance: Float[Array, "N T"],
    is_real: Bool[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Attention to everything that is found in any round, counted once (appendix A of the paper)."""
    positions = _sorted_in_rounds(config, hashes, is_real)

    def logits_of(products: Float[Array, "B N m C S"], pairs: Pairs) -> Float[Array, "B N m C S"]:
        logits = buckets.biased(products, by_distance, pairs.query, pairs.key, scale)
        is_itself = pairs.query[..., :, None] == pairs.key[..., None, :]
        return jnp.where(is_itself, _ITSELF, logits) - jnp.log(_times_found(config, pairs, positions))

    def attend_in_round(of_round: Sorted) -> Partial:
        pairs = buckets.pairs(of_round, config.chunk_size, config.strictly_causal)
        return buckets.attend(queries, keys, values, of_round, pairs, logits_of)

    rounds = jax.lax.map(attend_in_round, positions)
    return jnp.moveaxis(partial_softmax.join_axis(rounds).values, 1, 2)


def attended_in_rounds(
    config: ReformerAttention,
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T N H"],
    hashes: Int[Array, "r B N T"],
    scale: HeadScale,
    by_distance: Float[Array, "N T"],
    segment: Segment,
) -> Attended:
    """What `attend_in_rounds` attends to, for an inspector; a position belongs to a bucket in each round."""
    length = queries.shape[1]
    heads = range(queries.shape[2])
    positions = _sorted_in_rounds(config, hashes, segment.is_real)

    def weights(query: Int[Array, "t"]) -> Float[Array, "B N t S"]:
        def found(of_round: Sorted) -> Bool[Array, "B N t S"]:
            return buckets.meets(of_round, query, config.chunk_size, config.strictly_causal)

        visible = jnp.any(jax.vmap(found)(positions), axis=0)
        logits = dense.logits(queries[:, query], keys, by_distance, scale, query)
        is_itself = query[:, None] == jnp.arange(length)[None, :]
        return dense.softmax(jnp.where(is_itself[None, None], _ITSELF, logits), visible)

    names = tuple(f"bucket in round {index}" for index in range(1, config.num_rounds + 1))
    groups = jnp.moveaxis(hashes, (0, 3), (3, 1))
    return dense.strongest(weights, length, segment.num_shown, groups, names, heads)


def _sorted_in_rounds(config: ReformerAttention, hashes: Int[Array, "r B N T"], is_real: Bool[Array, "B T"]) -> Sorted:
    """Positions in the order of their buckets, in every round."""
    num_buckets = math.prod(config.hash_factors)
    return jax.vmap(lambda of_round: buckets.sort(of_round, is_real, num_buckets))(hashes)


def _times_found(config: ReformerAttention, pairs: Pairs, positions: Sorted) -> Float[Array, "B N m C S"]:
    """In how many rounds a pair that meets in one of them does so, at least 1: N of equation 10 in the paper.

    Args:
      config: of the layer.
      pairs: of one round.
      positions: of all rounds.
    """
    # Ranks differ by less than C in the strict form; chunks differ by at most 1 in the published one.
    unit = 1 if config.strictly_causal else config.chunk_size
    reach = config.chunk_size - 1 if config.strictly_causal else 1
    query, key = (each.reshape(*each.shape[:2], -1) for each in (pairs.query, jnp.maximum(pairs.key, 0)))

    def count(times: Int[Array, "B N m C S"], of_round: Sorted) -> tuple[Int[Array, "B N m C S"], None]:
        def of_pairs(by_position: Int[Array, "B N T"]) -> tuple[Int[Array, "B N m C 1"], Int[Array, "B N m 1 S"]]:
            of_query = jnp.take_along_axis(by_position, query, axis=2).reshape(pairs.query.shape)
            of_key = jnp.take_along_axis(by_position, key, axis=2).reshape(pairs.key.shape)
            return of_query[..., :, None], of_key[..., None, :]

        query_bucket, key_bucket = of_pairs(of_round.buckets)
        query_place, key_place = of_pairs(of_round.ranks // unit)
        is_found = (query_bucket == key_bucket) & (query_place - key_place <= reach)
        return times + is_found, None

    none = jnp.zeros(pairs.visible.shape, jnp.int32)
    times, _ = jax.lax.scan(count, none, positions)
    return jnp.maximum(times, 1).astype(jnp.float32)


def _attend_token(
    config: ReformerAttention,
    queries: Float[Array, "B 1 N H"],
    keys: Float[Array, "B S N H"],
    values: Float[Array, "B S N H"],
    hashes: Int[Array, "r B N 1"],
    by_key: Int[Array, "B S N r"],
    scale: HeadScale,
    by_distance: Float[Array, "N S"],
    segment: Segment,
) -> Float[Array, "B 1 N H"]:
    """One position of a decode step, against the keys that it finds in any round."""
    assert segment.decoding is not None, "a decode step"
    query = segment.decoding.position

    def found(of_query: Int[Array, "B N"], of_keys: Int[Array, "B S N"]) -> Bool[Array, "B N S"]:
        return buckets.last_of_bucket(of_query, of_keys.swapaxes(1, 2), query, config.chunk_size)

    # [r, B, N, S]
    in_rounds = jax.vmap(found, in_axes=(0, 3))(hashes[..., 0], by_key)
    visible = jnp.any(in_rounds, axis=0)
    logits = dense.logits(queries, keys, by_distance, scale, query[None])
    is_itself = jnp.arange(keys.shape[1]) == query
    logits = jnp.where(is_itself[None, None, None], _ITSELF, logits)
    return dense.attend(logits, visible[:, :, None], values)
