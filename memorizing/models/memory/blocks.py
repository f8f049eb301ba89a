"""Exact top-k of a few queries at a time: of the scores of a memory no more than a cache holds stand at once."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

PRECISION = jax.lax.Precision.HIGHEST

Scores = Float[Array, "T K"]
Indices = Int[Array, "T K"]


class GroupedScores(NamedTuple):
    """Scores of a memory.

    Attributes:
      scores: float32, of each query and slot; -inf where it is empty.
      maxima: float32, of the S neighbouring slots of each of the G groups.
    """

    scores: Float[Array, "T M"]
    maxima: Float[Array, "T G"]


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

    def search_part(
        found: GroupedScores, part: Float[Array, "queries H"]
    ) -> tuple[GroupedScores, tuple[Scores, Indices]]:
        found = _scores_of_memory(found, part, keys, valid, block_scores)
        return found, _best_slots(found, k)

    num_parts = -(-num_queries // block_queries)
    at_once = -(-num_queries // num_parts)
    # [parts, queries, H]
    parts = jnp.pad(queries, [(0, num_parts * at_once - num_queries), (0, 0)]).reshape(num_parts, at_once, width)
    # All in the same room, one after the other: what lies behind the filled part of a memory is written once.
    nothing = _nothing_found(parts[0], keys, valid, group_size)
    # [parts, queries, k]
    _, (scores, indices) = jax.lax.scan(search_part, nothing, parts)
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


def _nothing_found(
    queries: Float[Array, "T H"],
    keys: Float[Array, "M H"],
    valid: Bool[Array, "M"],
    group_size: int,
) -> GroupedScores:
    """Scores of an empty memory."""
    # What a loop hands on has to vary over the devices of a mesh from the start, as the scores will.
    is_any = valid[0] & (jnp.vdot(queries[0], keys[0]) > 0)
    empty = jnp.where(is_any, -jnp.inf, -jnp.inf)
    num_queries, num_slots = len(queries), len(keys)
    return GroupedScores(
        jnp.broadcast_to(empty, (num_queries, num_slots)),
        jnp.broadcast_to(empty, (num_queries, num_slots // group_size)),
    )


def _scores_of_memory(
    found: GroupedScores,
    queries: Float[Array, "T H"],
    keys: Float[Array, "M H"],
    valid: Bool[Array, "M"],
    block_scores: int,
) -> GroupedScores:
    """Writes the scores of a memory's filled part over others, a block of groups after the other."""
    num_queries, num_groups = found.maxima.shape
    group_size = len(keys) // num_groups
    block_groups = largest_divisor(num_groups, max(1, block_scores // (num_queries * group_size)))
    num_blocks = num_groups // block_groups
    block_slots = block_groups * group_size

    def of_block(keys: Float[Array, "slots H"], valid: Bool[Array, "slots"]) -> GroupedScores:
        scores = scores_of(queries, keys, valid)
        return GroupedScores(scores, scores.reshape(num_queries, -1, group_size).max(axis=-1))

    if num_blocks == 1:
        return of_block(keys, valid)

    def add_block(index_and_found: tuple[Int[Array, ""], GroupedScores]) -> tuple[Int[Array, ""], GroupedScores]:
        index, found = index_and_found
        block_keys = jax.lax.dynamic_slice_in_dim(keys, index * block_slots, block_slots)
        block_valid = jax.lax.dynamic_slice_in_dim(valid, index * block_slots, block_slots)
        block = of_block(block_keys, block_valid)
        return index + 1, GroupedScores(
            jax.lax.dynamic_update_slice_in_dim(found.scores, block.scores, index * block_slots, axis=1),
            jax.lax.dynamic_update_slice_in_dim(found.maxima, block.maxima, index * block_groups, axis=1),
        )

    # While a memory fills, the blocks behind the last one that holds something are not looked at.
    has_valid = valid.reshape(num_blocks, block_slots).any(axis=-1)
    last_block = jnp.max(jnp.where(has_valid, jnp.arange(num_blocks), -1))

    def is_left(index_and_found: tuple[Int[Array, ""], GroupedScores]) -> Bool[Array, ""]:
        index, _ = index_and_found
        # That there are no more says how often the loop runs at most, which estimates of its cost look for.
        return (index <= last_block) & (index < num_blocks)

    _, found = jax.lax.while_loop(is_left, add_block, (jnp.zeros_like(last_block), found))
    return found


def _best_slots(found: GroupedScores, k: int) -> tuple[Scores, Indices]:
    """The k best slots of each query, of equal ones the lower first.

    Each of them lies in one of the k groups of neighbouring slots with the greatest maxima, of equal maxima the lower
    groups: only the slots of these are sorted.
    """
    num_queries, num_groups = found.maxima.shape
    # [T, G, S]
    groups = found.scores.reshape(num_queries, num_groups, -1)
    group_size = groups.shape[-1]
    _, best = jax.lax.top_k(found.maxima, k)
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
