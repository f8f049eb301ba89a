"""Top-k search of one head's memory: pure functions on matrices.

Both searches return `-inf` as the score of a neighbour that does not exist (fewer valid slots than neighbours asked for). Scores are accumulated in float32 whatever the
dtype of the keys, and float32 keys are multiplied as such: TPUs and GPUs would else round them first.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from memorizing.errors import UserError

_PRECISION = jax.lax.Precision.HIGHEST

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


@dataclasses.dataclass(frozen=True)
class ExactSearch:
    """Finds exactly the k best slots (recall 1.0). Of equal scores the lower slot wins, as in `lax.top_k`.

    Each of the k best scores lies in one of the k groups with the greatest maxima: blocks of slots are scored one after the other with a running choice of k groups, and only the
    slots of the last choice are sorted. The defaults were the fastest of several on CPUs, for 256 and 1024 queries and 2048 to 65536 slots.

    Attributes:
      block_scores: scores computed at a time for a head, at most: queries times the slots of a block, as many as stay in a cache.
      group_size: slots of a group, at most.
    """

    is_exact: ClassVar[bool] = True

    block_scores: int = 1 << 21
    group_size: int = 16

    def __post_init__(self) -> None:
        if min(self.block_scores, self.group_size) < 1:
            raise UserError(f"{self}: block_scores and group_size have to be at least 1")

    def top_k(
        self, queries: Float[Array, "T H"], keys: Float[Array, "M H"], valid: Bool[Array, "M"], k: int
    ) -> tuple[Scores, Indices]:
        num_queries, (num_slots, width) = len(queries), keys.shape
        group_size = _largest_divisor(num_slots, self.group_size)
        num_groups = num_slots // group_size
        if num_groups <= k:
            return _pad_neighbours(jax.lax.top_k(_scores(queries, keys, valid), min(k, num_slots)), k)
        block_groups = _largest_divisor(num_groups, max(1, self.block_scores // (num_queries * group_size)))
        num_blocks = num_groups // block_groups

        def add_block(best: Groups, block: tuple) -> tuple[Groups, None]:
            first, block_keys, block_valid = block
            scores = _scores(queries, block_keys, block_valid).reshape(num_queries, block_groups, group_size)
            number = jnp.broadcast_to(first + jnp.arange(block_groups, dtype=jnp.int32), scores.shape[:2])
            return _best_groups(best, Groups(number, scores, scores.max(axis=-1)), k), None

        none = Groups(
            number=jnp.zeros((num_queries, k), jnp.int32),
            scores=jnp.full((num_queries, k, group_size), -jnp.inf),
            maximum=jnp.full((num_queries, k), -jnp.inf),
        )
        blocks = (
            jnp.arange(num_blocks, dtype=jnp.int32) * block_groups,
            keys.reshape(num_blocks, -1, width),
            valid.reshape(num_blocks, -1),
        )
        # The first one outside the loop: what is carried then varies over a mesh as the blocks do.
        best, _ = add_block(none, jax.tree.map(lambda leaf: leaf[0], blocks))
        best, _ = jax.lax.scan(add_block, best, jax.tree.map(lambda leaf: leaf[1:], blocks))
        scores, place = jax.lax.top_k(best.scores.reshape(num_queries, -1), k)
        group = jnp.take_along_axis(best.number, place // group_size, axis=1)
        return scores, group * group_size + place % group_size


@dataclasses.dataclass(frozen=True)
class ApproximateSearch:
    """TPU's partial reduction (Chern et al. 2022) through `lax.approx_max_k`; elsewhere, where that is an exact and slower search, the exact one.

    Attributes:
      recall_target: expected share of the true top-k that is found.
    """

    is_exact: ClassVar[bool] = False

    recall_target: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.recall_target <= 1:
            raise UserError(
                f"ApproximateSearch.recall_target = {self.recall_target}: a share, more than 0 and at most 1"
            )

    def top_k(
        self, queries: Float[Array, "T H"], keys: Float[Array, "M H"], valid: Bool[Array, "M"], k: int
    ) -> tuple[Scores, Indices]:
        of_tpu, elsewhere = functools.partial(self.partial_reduction, k=k), functools.partial(ExactSearch().top_k, k=k)
        return jax.lax.platform_dependent(queries, keys, valid, tpu=of_tpu, default=elsewhere)

    def partial_reduction(
        self, queries: Float[Array, "T H"], keys: Float[Array, "M H"], valid: Bool[Array, "M"], k: int
    ) -> tuple[Scores, Indices]:
        """What `top_k` is on TPUs."""
        # Queries beside each other, slots below: the TPU sorts what is left of them along this axis, and would else copy it into this order first.
        scores = jnp.einsum("SH,TH->ST", keys, queries, precision=_PRECISION, preferred_element_type=jnp.float32)
        scores = jnp.where(valid[:, None], scores, -jnp.inf)
        found = jax.lax.approx_max_k(scores, min(k, len(keys)), reduction_dimension=0, recall_target=self.recall_target)
        # Left to itself XLA transposes all that was sorted, and takes the k best from that.
        best = [with_layout_constraint(leaf, Layout((0, 1))) for leaf in found]
        return _pad_neighbours((best[0].T, best[1].T), k)


def recall(
    queries: Float[Array, "T H"], keys: Float[Array, "M H"], valid: Bool[Array, "M"], found: Scores
) -> Float[Array, ""]:
    """Share of the true K best of each query that a search found, 1 where there is nothing to find; without sorting anything.

    Args:
      queries, keys, valid: what was searched.
      found: [T, K] scores that the search returned.
    """
    num_neighbors, scores = found.shape[-1], _scores(queries, keys, valid)
    # The same product may be rounded otherwise in another program; vectors have norm 1.
    better = jnp.sum(scores[:, None, :] > found[:, :, None] + 1e-5, axis=-1)
    num_right = jnp.sum((found > -jnp.inf) & (better < num_neighbors), dtype=jnp.float32)
    num_true = len(queries) * jnp.minimum(jnp.sum(valid), num_neighbors)
    return jnp.where(num_true > 0, num_right / jnp.maximum(num_true, 1), 1.0)


def winners(scores: Float[Array, "*rows K"], k: int, axis_name: str | None) -> Float[Array, "*rows K"]:
    """The scores of those of this shard's neighbours that are among the k best of all shards of the memory, -inf for the others; only scores are exchanged.

    Of equal scores the lower shard wins, then the earlier place in the shard's list, so that the result is the top-k of the whole memory.

    Args:
      scores: this shard's k best, in descending order, -inf where there is none.
      axis_name: mesh axis over which slots are sharded, or None if they are not.
    """
    if axis_name is None or jax.lax.axis_size(axis_name) == 1:
        return scores
    # [shards, *rows, K] -> [*rows, 1, shards * K]
    everyone = jnp.moveaxis(jax.lax.all_gather(scores, axis_name), 0, -2)
    everyone = everyone.reshape(*scores.shape[:-1], 1, -1)
    mine = scores[..., :, None]
    place = jax.lax.axis_index(axis_name) * scores.shape[-1] + jnp.arange(scores.shape[-1])
    earlier = jnp.arange(everyone.shape[-1])[None, :] < place[:, None]
    earlier = jnp.broadcast_to(earlier, (*scores.shape, everyone.shape[-1]))
    rank = jnp.sum((everyone > mine) | ((everyone == mine) & earlier), axis=-1)
    return jnp.where(rank < k, scores, -jnp.inf)


def _scores(queries: Float[Array, "T H"], keys: Float[Array, "S H"], valid: Bool[Array, "S"]) -> Float[Array, "T S"]:
    scores = jnp.einsum("TH,SH->TS", queries, keys, precision=_PRECISION, preferred_element_type=jnp.float32)
    return jnp.where(valid[None, :], scores, -jnp.inf)


def _best_groups(earlier: Groups, later: Groups, k: int) -> Groups:
    """The k groups with the greatest maxima, still in the order of the memory: of equal scores the lower slot comes first."""
    number, scores, maximum = (jnp.concatenate(both, axis=1) for both in zip(earlier, later, strict=True))
    place = jnp.sort(jax.lax.top_k(maximum, k)[1], axis=-1)
    return Groups(
        number=jnp.take_along_axis(number, place, axis=1),
        scores=jnp.take_along_axis(scores, place[:, :, None], axis=1),
        maximum=jnp.take_along_axis(maximum, place, axis=1),
    )


def _pad_neighbours(found: tuple[Scores, Indices], k: int) -> tuple[Scores, Indices]:
    missing = ((0, 0), (0, k - found[0].shape[-1]))
    return jnp.pad(found[0], missing, constant_values=-jnp.inf), jnp.pad(found[1], missing)


def _largest_divisor(number: int, limit: int) -> int:
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)
