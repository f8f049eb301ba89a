"""Top-k search of one head's memory: pure functions on matrices.

Both searches return `-inf` as the score of a neighbour that does not exist (fewer valid slots than neighbours asked for). Scores are accumulated in float32 whatever the
dtype of the keys, and never exist for a whole memory at once: the exact search walks over blocks of slots with a running top-k.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Scores = Float[Array, "T K"]
Indices = Int[Array, "T K"]


@dataclasses.dataclass(frozen=True)
class ExactSearch:
    """Finds exactly the k best slots (recall 1.0). Of equal scores the lower slot wins, as in `lax.top_k`.

    Attributes:
      block_size: slots scored at a time, at most; bounds the memory of the scores to T * block_size floats a head.
      group_size: slots whose maximum stands for them in the first of the two levels of a block's top-k.
    """

    block_size: int = 8192
    group_size: int = 32

    def top_k(
        self, queries: Float[Array, "T H"], keys: Float[Array, "M H"], valid: Bool[Array, "M"], k: int
    ) -> tuple[Scores, Indices]:
        num_slots, width = keys.shape
        block_size = _largest_divisor(num_slots, self.block_size)
        num_blocks = num_slots // block_size

        def search_block(block: tuple) -> tuple[Scores, Indices]:
            first, block_keys, block_valid = block
            scores, indices = _top_k_by_groups(_scores(queries, block_keys, block_valid), k, self.group_size)
            return scores, first + indices

        blocks = (
            jnp.arange(num_blocks, dtype=jnp.int32) * block_size,
            keys.reshape(num_blocks, block_size, width),
            valid.reshape(num_blocks, block_size),
        )
        best = search_block(jax.tree.map(lambda leaf: leaf[0], blocks))
        rest = jax.tree.map(lambda leaf: leaf[1:], blocks)
        return jax.lax.scan(lambda best, block: (_merge(best, search_block(block), k), None), best, rest)[0]


@dataclasses.dataclass(frozen=True)
class ApproximateSearch:
    """TPU's partial reduction (Chern et al. 2022) through `lax.approx_max_k`; exact on other hardware.

    Attributes:
      recall_target: expected share of the true top-k that is found.
    """

    recall_target: float = 0.95

    def top_k(
        self, queries: Float[Array, "T H"], keys: Float[Array, "M H"], valid: Bool[Array, "M"], k: int
    ) -> tuple[Scores, Indices]:
        k_found = min(k, len(keys))
        found = jax.lax.approx_max_k(_scores(queries, keys, valid), k_found, recall_target=self.recall_target)
        return _pad_neighbours(found, k)


def winners(scores: Float[Array, "*rows K"], k: int, axis_name: str | None) -> Bool[Array, "*rows K"]:
    """Which of this shard's neighbours are among the k best of all shards of the memory; only scores are exchanged.

    Of equal scores the lower shard wins, then the earlier place in the shard's list, so that the result is the top-k of the whole memory.

    Args:
      scores: this shard's k best, in descending order, -inf where there is none.
      axis_name: mesh axis over which slots are sharded, or None if they are not.
    """
    exists = scores > -jnp.inf
    if axis_name is None or jax.lax.axis_size(axis_name) == 1:
        return exists
    # [shards, *rows, K] -> [*rows, 1, shards * K]
    everyone = jnp.moveaxis(jax.lax.all_gather(scores, axis_name), 0, -2)
    everyone = everyone.reshape(*scores.shape[:-1], 1, -1)
    mine = scores[..., :, None]
    place = jax.lax.axis_index(axis_name) * scores.shape[-1] + jnp.arange(scores.shape[-1])
    earlier = jnp.arange(everyone.shape[-1])[None, :] < place[:, None]
    earlier = jnp.broadcast_to(earlier, (*scores.shape, everyone.shape[-1]))
    rank = jnp.sum((everyone > mine) | ((everyone == mine) & earlier), axis=-1)
    return exists & (rank < k)


def _scores(queries: Float[Array, "T H"], keys: Float[Array, "S H"], valid: Bool[Array, "S"]) -> Float[Array, "T S"]:
    scores = jnp.einsum("TH,SH->TS", queries, keys, preferred_element_type=jnp.float32)
    return jnp.where(valid[None, :], scores, -jnp.inf)


def _top_k_by_groups(scores: Float[Array, "T S"], k: int, group_size: int) -> tuple[Scores, Indices]:
    """Exact top-k in two levels: each of the k best scores lies in one of the k groups with the greatest maxima, so only those groups are sorted."""
    num_rows, num_slots = scores.shape
    group_size = _largest_divisor(num_slots, group_size)
    num_groups = num_slots // group_size
    if num_groups <= k:
        return _pad_neighbours(jax.lax.top_k(scores, min(k, num_slots)), k)
    groups = scores.reshape(num_rows, num_groups, group_size)
    _, best_groups = jax.lax.top_k(groups.max(axis=-1), k)
    # In ascending order, so that of equal scores the lower slot still comes first.
    best_groups = jnp.sort(best_groups, axis=-1)
    candidates = jnp.take_along_axis(groups, best_groups[:, :, None], axis=1)
    best, place = jax.lax.top_k(candidates.reshape(num_rows, k * group_size), k)
    group = jnp.take_along_axis(best_groups, place // group_size, axis=1)
    return best, group * group_size + place % group_size


def _merge(first: tuple[Scores, Indices], second: tuple[Scores, Indices], k: int) -> tuple[Scores, Indices]:
    """The k best of two lists; of equal scores the first list's."""
    scores, indices = (jnp.concatenate(pair, axis=-1) for pair in zip(first, second, strict=True))
    scores, place = jax.lax.top_k(scores, k)
    return scores, jnp.take_along_axis(indices, place, axis=-1)


def _pad_neighbours(found: tuple[Scores, Indices], k: int) -> tuple[Scores, Indices]:
    missing = ((0, 0), (0, k - found[0].shape[-1]))
    return jnp.pad(found[0], missing, constant_values=-jnp.inf), jnp.pad(found[1], missing)


def _largest_divisor(number: int, limit: int) -> int:
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)
