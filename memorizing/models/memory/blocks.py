"""Exact top-k of a few queries at a time: of the scores of a memory no more than a cache holds stand at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

PRECISION = jax.lax.Precision.HIGHEST

Scores = Float[Array, "T K"]
Indices = Int[Array, "T K"]


def top_k(
    queries: Float[Array, "T H"],
    keys: Float[Array, "M H"],
    valid: Bool[Array, "M"],
    k: int,
    block_queries: int,
    block_scores: int,
    group_size: int,
) -> tuple[Scores, Indices]:
    """Scores of the k best slots of each query in descending order, and their indices.

    Args:
      queries, keys, valid: of one head; slots that are not valid are never found.
      k: how many.
      block_queries: queries searched at a time, at most.
      block_scores: scores computed at a time, at most: queries times the slots of a block. What lies behind the block
        of the last valid slot is left out.
      group_size: slots of a group, at most.
    """
    num_queries, width = queries.shape
    num_slots = len(keys)
    group_size = largest_divisor(num_slots, group_size)
    if num_slots // group_size <= k:
        all_scores = scores_of(queries, keys, valid)
        scores, indices = jax.lax.top_k(all_scores, min(k, num_slots))
        return pad_neighbours(scores, indices, k)

    def search_block(queries: Float[Array, "queries H"]) -> tuple[Scores, Indices]:
        block_slots = max(1, block_scores // len(queries))
        return _best_slots(_scores_of_memory(queries, keys, valid, block_slots), k, group_size)

    num_blocks = -(-num_queries // block_queries)
    if num_blocks == 1:
        return search_block(queries)
    at_once = -(-num_queries // num_blocks)
    padded = jnp.pad(queries, [(0, num_blocks * at_once - num_queries), (0, 0)])
    # [blocks, queries, k]
    scores, indices = jax.lax.map(search_block, padded.reshape(num_blocks, at_once, width))
    return scores.reshape(-1, k)[:num_queries], indices.reshape(-1, k)[:num_queries]


def scores_of(
    queries: Float[Array, "T H"],
    keys: Float[Array, "S H"],
    valid: Bool[Array, "S"],
) -> Float[Array, "T S"]:
    """query . key, -inf for empty slots."""
    scores = jnp.einsum(
        "TH,SH->TS",
        queries,
        keys,
        precision=PRECISION,
        preferred_element_type=jnp.float32,
    )
    return jnp.where(valid[None, :], scores, -jnp.inf)


def _scores_of_memory(
    queries: Float[Array, "T H"],
    keys: Float[Array, "M H"],
    valid: Bool[Array, "M"],
    block_slots: int,
) -> Float[Array, "T M"]:
    """`scores_of` the whole memory, a block of slots after the other."""
    num_slots = len(keys)
    block_slots = largest_divisor(num_slots, block_slots)
    num_blocks = num_slots // block_slots
    if num_blocks == 1:
        return scores_of(queries, keys, valid)

    def scores_of_block(first: Int[Array, ""] | int) -> Float[Array, "T slots"]:
        block_keys = jax.lax.dynamic_slice_in_dim(keys, first, block_slots)
        block_valid = jax.lax.dynamic_slice_in_dim(valid, first, block_slots)
        return scores_of(queries, block_keys, block_valid)

    def add_block(index_and_scores: tuple[Int[Array, ""], Array]) -> tuple[Int[Array, ""], Array]:
        index, scores = index_and_scores
        first = index * block_slots
        return index + 1, jax.lax.dynamic_update_slice_in_dim(scores, scores_of_block(first), first, axis=1)

    # While a memory fills, the blocks behind the last one that holds something are not looked at.
    has_valid = valid.reshape(num_blocks, block_slots).any(axis=-1)
    last_block = jnp.max(jnp.where(has_valid, jnp.arange(num_blocks), 0))

    def is_left(index_and_scores: tuple[Int[Array, ""], Array]) -> Bool[Array, ""]:
        index, _ = index_and_scores
        # That there are no more says how often the loop runs at most, which estimates of its cost look for.
        return (index <= last_block) & (index < num_blocks)

    # The first one outside the loop: what it is joined to then varies over the devices of a mesh as it does itself.
    scores = jnp.pad(scores_of_block(0), [(0, 0), (0, num_slots - block_slots)], constant_values=-jnp.inf)
    _, scores = jax.lax.while_loop(is_left, add_block, (jnp.int32(1), scores))
    return scores


def _best_slots(scores: Float[Array, "T M"], k: int, group_size: int) -> tuple[Scores, Indices]:
    """The k best slots of each query, of equal ones the lower first.

    Each of them lies in one of the k groups of neighbouring slots with the greatest maxima, of equal maxima the lower
    groups: only the slots of these are sorted.
    """
    num_queries = len(scores)
    # [T, G, S]
    groups = scores.reshape(num_queries, -1, group_size)
    _, best = jax.lax.top_k(groups.max(axis=-1), k)
    # In the order of the memory, so that of equal slots the lower one comes first.
    best = jnp.sort(best, axis=-1)
    # [T, k, S] -> [T, k * S]
    candidates = jnp.take_along_axis(groups, best[:, :, None], axis=1).reshape(num_queries, -1)
    scores, place = jax.lax.top_k(candidates, k)
    group = jnp.take_along_axis(best, place // group_size, axis=1)
    return scores, group * group_size + place % group_size


def pad_neighbours(
    scores: Float[Array, "*queries found"],
    indices: Int[Array, "*queries found"],
    k: int,
) -> tuple[Float[Array, "*queries K"], Int[Array, "*queries K"]]:
    """The neighbours that were found, followed by neighbours that do not exist: k in all."""
    num_missing = k - scores.shape[-1]
    padding = [(0, 0)] * (scores.ndim - 1) + [(0, num_missing)]
    scores = jnp.pad(scores, padding, constant_values=-jnp.inf)
    indices = jnp.pad(indices, padding)
    return scores, indices


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of a number that is not above the limit."""
    candidates = range(min(number, limit), 0, -1)
    return next(divisor for divisor in candidates if number % divisor == 0)
