"""Attention within buckets: positions with the same hash, or the same nearest centroid, see each other.

Positions are sorted by bucket, and by time within each. What is in one bucket then lies side by side, so that chunks of
the sorted positions that also look back one chunk contain what is to be seen, with no array of all queries by all keys.

Where a chunk begins depends on all positions of the segment, later ones too. Seeing whatever of the own bucket is in
the chunk and in the one before, as Reformer does (Kitaev et al. 2020, section 2), a position's view therefore depends
on later positions. Seeing the last C positions of the own bucket, with chunks of C, it does not: they are in these two
chunks wherever chunks begin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from memorizing.array_typing import HeadScale
from memorizing.models import partial_softmax
from memorizing.models.partial_softmax import Partial

# In sorted order, cut into m chunks of C.
Chunks = Shaped[Array, "B N m C *rest"]


class Sorted(NamedTuple):
    """Positions in the order of their buckets.

    Attributes:
      buckets: [B, N, T], by position.
      order: [B, N, T], the position at each rank.
      ranks: [B, N, T], the rank of each position.
    """

    buckets: Int[Array, "B N T"]
    order: Int[Array, "B N T"]
    ranks: Int[Array, "B N T"]


class Pairs(NamedTuple):
    """Queries and keys that meet, chunk by chunk.

    Attributes:
      query: [B, N, m, C], positions.
      key: [B, N, m, 2 C], positions of the chunk before and of the own one.
      visible: [B, N, m, C, 2 C].
    """

    query: Int[Array, "B N m C"]
    key: Int[Array, "B N m S"]
    visible: Bool[Array, "B N m C S"]


def sort(buckets: Int[Array, "B N T"], is_real: Bool[Array, "B T"], num_buckets: int) -> Sorted:
    """Sorts positions by bucket, and by time within each; what is not real is in a bucket of its own, the last."""
    buckets = jnp.where(is_real[:, None], buckets, num_buckets)
    order = jnp.argsort(buckets, axis=-1, stable=True)
    ranks = jnp.argsort(order, axis=-1)
    return Sorted(buckets, order, ranks)


def pairs(positions: Sorted, chunk_size: int, strictly_causal: bool) -> Pairs:
    """The pairs of one bucket that meet, the query's own position among them.

    Args:
      positions: T of them; `chunk_size` divides T.
      chunk_size: C.
      strictly_causal: whether a query sees exactly the last C positions of its bucket, whatever comes later.
    """
    query = _chunked(positions.order, chunk_size)
    bucket = _chunked(jnp.take_along_axis(positions.buckets, positions.order, axis=-1), chunk_size)
    key = with_chunk_before(query, fill=-1)
    key_bucket = with_chunk_before(bucket, fill=-1)

    visible = bucket[..., :, None] == key_bucket[..., None, :]
    visible &= key[..., None, :] <= query[..., :, None]
    visible &= key[..., None, :] >= 0
    if strictly_causal:
        # [C, 2 C], ranks from the query back to the key.
        back = jnp.arange(chunk_size)[:, None] + chunk_size - jnp.arange(2 * chunk_size)[None, :]
        visible &= (back < chunk_size)[None, None, None]
    return Pairs(query, key, visible)


def attend(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T N H"],
    values: Float[Array, "B T N H"],
    positions: Sorted,
    met: Pairs,
    logits_of: Callable[[Float[Array, "B N m C S"], Pairs], Float[Array, "B N m C S"]],
) -> Partial:
    """Attention of every position to those of its bucket that it meets, [B, N, T, ...].

    Args:
      queries, keys, values: of a whole segment.
      positions: in the order of their buckets.
      met: the pairs that meet: see `pairs`.
      logits_of: of the pairs, given their products q . k, float32.
    """
    chunk_size = met.query.shape[-1]
    heads_first = (jnp.moveaxis(each, 2, 1) for each in (queries, keys, values))
    # [B, N, m, C, H]
    query_chunks, key_chunks, value_chunks = (in_chunks(each, positions, chunk_size) for each in heads_first)
    products = jnp.einsum(
        "BNmtH,BNmsH->BNmts",
        query_chunks,
        with_chunk_before(key_chunks),
        preferred_element_type=jnp.float32,
    )
    y = partial_softmax.attend(logits_of(products, met), met.visible, with_chunk_before(value_chunks))
    return Partial(*(by_position(each, positions) for each in y))


def biased(
    products: Float[Array, "B N m t s"],
    by_distance: Float[Array, "N S"],
    query: Int[Array, "B N m t"],
    key: Int[Array, "B N m s"],
    scale: HeadScale,
) -> Float[Array, "B N m t s"]:
    """scale * (q . k + bias) of positions that met.

    Args:
      products: q . k.
      by_distance: bias of the logits at each distance back.
      query, key: their positions.
      scale: of the logits.
    """
    distance = jnp.maximum(query[..., :, None] - key[..., None, :], 0)
    heads = jnp.arange(by_distance.shape[0]).reshape(1, -1, 1, 1, 1)
    return (products + by_distance[heads, distance]) * scale.reshape(1, -1, 1, 1, 1)


def meets(
    positions: Sorted,
    query: Int[Array, "t"],
    chunk_size: int,
    strictly_causal: bool,
) -> Bool[Array, "B N t S"]:
    """The visible pairs of `pairs` for some queries and all keys.

    Args:
      positions: of a whole segment.
      query: their positions.
      chunk_size, strictly_causal: as of `pairs`.
    """
    ranks, own = positions.ranks, positions.buckets
    if strictly_causal:
        back = ranks[..., query, None] - ranks[..., None, :]
        is_near = back < chunk_size
    else:
        chunks = ranks // chunk_size
        back = chunks[..., query, None] - chunks[..., None, :]
        is_near = back <= 1
    is_same = own[..., query, None] == own[..., None, :]
    is_earlier = query[:, None] >= jnp.arange(own.shape[-1])[None, :]
    return is_same & is_near & is_earlier[None, None]


def in_chunks(x: Float[Array, "B N T H"], positions: Sorted, chunk_size: int) -> Float[Array, "B N m C H"]:
    """Entries of positions in sorted order, cut into chunks."""
    ordered = jnp.take_along_axis(x, positions.order[..., None], axis=2)
    return _chunked(ordered, chunk_size)


def by_position(chunks: Shaped[Array, "B N m C *rest"], positions: Sorted) -> Shaped[Array, "B N T *rest"]:
    """The inverse of `in_chunks`."""
    num_rows, num_heads, _, _, *rest = chunks.shape
    ordered = chunks.reshape(num_rows, num_heads, -1, *rest)
    ranks = positions.ranks.reshape(*positions.ranks.shape, *(1,) * len(rest))
    return jnp.take_along_axis(ordered, ranks, axis=2)


def with_chunk_before(chunks: Chunks, fill: int = 0) -> Shaped[Array, "B N m S *rest"]:
    """Every chunk behind the one before it, [B, N, m, 2 C, ...]; before the first one are fillers."""
    rest = ((0, 0),) * (chunks.ndim - 3)
    before = jnp.pad(chunks[:, :, :-1], ((0, 0), (0, 0), (1, 0), *rest), constant_values=fill)
    return jnp.concatenate([before, chunks], axis=3)


def last_of_bucket(
    query_bucket: Int[Array, "B N"],
    key_buckets: Int[Array, "B N S"],
    query: Int[Array, ""],
    window: int,
) -> Bool[Array, "B N S"]:
    """The last keys of the bucket of one query, up to its own position: what a decode step sees.

    Args:
      query_bucket, key_buckets: of the query, and of all positions of the segment.
      query: the query's position.
      window: number of keys.
    """
    is_same = query_bucket[..., None] == key_buckets
    is_same &= (jnp.arange(key_buckets.shape[-1]) <= query)[None, None]
    # The query itself is the first.
    nth_back = jax.lax.cumsum(is_same.astype(jnp.int32), axis=2, reverse=True)
    return is_same & (nth_back <= window)


def _chunked(ordered: Shaped[Array, "B N T *rest"], chunk_size: int) -> Shaped[Array, "B N m C *rest"]:
    num_rows, num_heads, _, *rest = ordered.shape
    return ordered.reshape(num_rows, num_heads, -1, chunk_size, *rest)
