"""Exact top-k, a block of slots after the other: of the scores of a memory no more than a cache holds stand at once."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

PRECISION = jax.lax.Precision.HIGHEST

Scores = Float[Array, "T K"]
Indices = Int[Array, "T K"]


class Groups(NamedTuple):
    """G groups of S neighbouring slots for each query, in the order of the memory.

    Attributes:
      number: int32, index of the group in the memory.
      scores: float32, of each slot.
      maximum: float32, the greatest of them, which stands for the group.
    """

    number: Int[Array, "T G"]
    scores: Float[Array, "T G S"]
    maximum: Float[Array, "T G"]


class Block(NamedTuple):
    """Consecutive slots of the memory, which are scored together; of several blocks, with an axis of blocks in front.

    Attributes:
      first_group: int32 scalar, index of its first group in the memory.
      keys: [slots, H].
      valid: bool [slots].
    """

    first_group: Int[Array, "*blocks"]
    keys: Float[Array, "*blocks slots H"]
    valid: Bool[Array, "*blocks slots"]


def top_k(
    queries: Float[Array, "T H"],
    keys: Float[Array, "M H"],
    valid: Bool[Array, "M"],
    k: int,
    block_scores: int,
    group_size: int,
) -> tuple[Scores, Indices]:
    """Scores of the k best slots of each query in descending order, and their indices.

    Each of the k best scores lies in one of the k groups with the greatest maxima: blocks of slots are scored one after
    the other with a running choice of k groups, and only the slots of the last choice are sorted. What lies behind the
    block of the last valid slot is left out.

    Args:
      queries, keys, valid: of one head; slots that are not valid are never found.
      k: how many.
      block_scores: scores computed at a time, at most: queries times the slots of a block.
      group_size: slots of a group, at most.
    """
    num_queries = len(queries)
    num_slots = len(keys)
    group_size = largest_divisor(num_slots, group_size)
    num_groups = num_slots // group_size
    if num_groups <= k:
        all_scores = scores_of(queries, keys, valid)
        scores, indices = jax.lax.top_k(all_scores, min(k, num_slots))
        return pad_neighbours(scores, indices, k)

    block_groups = _groups_of_block(num_queries, num_groups, group_size, block_scores)
    best = _best_of_memory(queries, _split(keys, valid, block_groups, group_size), k, group_size)
    # [T, k * S]
    candidates = best.scores.reshape(num_queries, -1)
    scores, place = jax.lax.top_k(candidates, k)
    group = jnp.take_along_axis(best.number, place // group_size, axis=1)
    indices = group * group_size + place % group_size
    return scores, indices


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


def _groups_of_block(num_queries: int, num_groups: int, group_size: int, block_scores: int) -> int:
    """As many groups as fit into a block, in equal blocks."""
    group_scores = num_queries * group_size
    at_most = max(1, block_scores // group_scores)
    return largest_divisor(num_groups, at_most)


def _split(
    keys: Float[Array, "M H"],
    valid: Bool[Array, "M"],
    block_groups: int,
    group_size: int,
) -> Block:
    """All blocks of a memory, each of `block_groups` groups."""
    num_slots, width = keys.shape
    num_blocks = num_slots // (block_groups * group_size)
    return Block(
        first_group=jnp.arange(num_blocks, dtype=jnp.int32) * block_groups,
        keys=keys.reshape(num_blocks, -1, width),
        valid=valid.reshape(num_blocks, -1),
    )


def _best_of_memory(queries: Float[Array, "T H"], blocks: Block, k: int, group_size: int) -> Groups:
    """The k best groups of all blocks, with a running choice of k as each block is scored."""
    # [blocks, slots]
    num_blocks, block_slots = blocks.valid.shape
    block_groups = block_slots // group_size

    def groups_of(index: Int[Array, ""] | int) -> Groups:
        block = jax.tree.map(lambda leaf: leaf[index], blocks)
        return _score_block(queries, block, group_size)

    def add_block(index_and_best: tuple[Int[Array, ""], Groups]) -> tuple[Int[Array, ""], Groups]:
        index, best = index_and_best
        return index + 1, _best_groups(_joined(best, groups_of(index)), k)

    # The first one outside the loop: there is nothing yet to be joined with.
    first_groups = groups_of(0)
    if block_groups < k:
        first_groups = _joined(_no_groups(len(queries), k - block_groups, group_size), first_groups)
    best = _best_groups(first_groups, k)
    # While a memory fills, the blocks behind the last one that holds something are not looked at.
    last_block = jnp.max(jnp.where(blocks.valid.any(axis=-1), jnp.arange(num_blocks), 0))

    def is_left(index_and_best: tuple[Int[Array, ""], Groups]) -> Bool[Array, ""]:
        index, _ = index_and_best
        # That there are no more says how often the loop runs at most, which estimates of its cost look for.
        return (index <= last_block) & (index < num_blocks)

    _, best = jax.lax.while_loop(is_left, add_block, (jnp.int32(1), best))
    return best


def _score_block(queries: Float[Array, "T H"], block: Block, group_size: int) -> Groups:
    """The groups of a block with the scores of their slots."""
    num_queries = len(queries)
    num_groups = len(block.keys) // group_size
    scores = scores_of(queries, block.keys, block.valid)
    # [T, G, S]
    scores = scores.reshape(num_queries, num_groups, group_size)
    number = block.first_group + jnp.arange(num_groups, dtype=jnp.int32)
    return Groups(
        number=jnp.broadcast_to(number, (num_queries, num_groups)),
        scores=scores,
        maximum=scores.max(axis=-1),
    )


def _no_groups(num_queries: int, num_groups: int, group_size: int) -> Groups:
    """Groups of slots that do not exist."""
    return Groups(
        number=jnp.zeros((num_queries, num_groups), jnp.int32),
        scores=jnp.full((num_queries, num_groups, group_size), -jnp.inf),
        maximum=jnp.full((num_queries, num_groups), -jnp.inf),
    )


def _joined(earlier: Groups, later: Groups) -> Groups:
    """The groups of both, in their order."""
    return jax.tree.map(lambda *groups: jnp.concatenate(groups, axis=1), earlier, later)


def _best_groups(groups: Groups, k: int) -> Groups:
    """The k groups with the greatest maxima, still in the order of the memory.

    Of equal maxima the lower group comes first.
    """
    _, best = jax.lax.top_k(groups.maximum, k)
    # [T, k]
    place = jnp.sort(best, axis=-1)
    return Groups(
        number=jnp.take_along_axis(groups.number, place, axis=1),
        scores=jnp.take_along_axis(groups.scores, place[:, :, None], axis=1),
        maximum=jnp.take_along_axis(groups.maximum, place, axis=1),
    )


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
