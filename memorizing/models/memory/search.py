"""Top-k search of heads' memories: pure functions of queries, keys and which slots are valid.

Both searches return `-inf` as the score of a neighbour that does not exist (fewer valid slots than neighbours asked
for). Scores are accumulated in float32 whatever the dtype of the keys, and float32 keys are multiplied as such: TPUs
and GPUs would else round them first. Scores of a search have no gradient: who needs one scores the found slots again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from memorizing.errors import Count, Share, UserError
from memorizing.models.memory import blocks, slabs
from memorizing.models.memory.blocks import PRECISION, Indices, Scores, pad_neighbours, scores_of
from memorizing.models.memory.placement import Placement, turned

# Scope of what runs where many slots are equally good only: estimates of a program's cost leave it out.
RARE = "rare"
# Two programs may round the same product otherwise: of vectors of length 1, or relative to a greater product.
_ROUNDING = 1e-5


class HeadScores(NamedTuple):
    """What a search finds for all heads.

    Attributes:
      scores: float32, of the k best slots of each query, in descending order; -inf where there is none.
      indices: int32, of these slots.
    """

    scores: Float[Array, "heads T K"]
    indices: Int[Array, "heads T K"]


@runtime_checkable
class Search(Protocol):
    """A way to find the slots of a head's memory whose keys are nearest to a query.

    Attributes:
      is_exact: whether it always finds the true ones.
    """

    is_exact: ClassVar[bool]

    def top_k(
        self,
        queries: Float[Array, "T H"],
        keys: Float[Array, "M H"],
        valid: Bool[Array, "M"],
        k: int,
    ) -> tuple[Scores, Indices]:
        """Scores of the k best slots of each query of a head in descending order, and their indices."""
        ...

    def of_heads(
        self,
        queries: Float[Array, "heads T H"],
        keys: Float[Array, "heads M H"],
        valid: Bool[Array, "rows M"],
        k: int,
        placement: Placement | None = None,
    ) -> HeadScores:
        """The same for every head, in its own memory.

        Args:
          queries, keys: of the heads of one row after those of the other.
          valid: of each row.
          k: how many.
          placement: where keys stand, if they are to be turned.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ExactSearch:
    """Finds exactly the k best slots (recall 1.0). Of equal scores the lower slot wins, as in `lax.top_k`.

    On TPUs in slabs (see `slabs`), elsewhere, and where many slots are equally good, in blocks (see `blocks`). The
    defaults for blocks were the fastest of several on CPUs, for 64 to 768 queries and 2048 to 65536 slots; those for
    slabs are the cheapest of several by the estimate of the TPU compiler.

    Attributes:
      block_queries: queries of a head that are searched at a time, at most.
      block_scores: scores computed at a time, at most: queries times the slots of a block.
      group_size: slots of a group, at most.
      slabs: slots of a group on TPUs, at most, each from another slab; 1 for blocks there too.
      slab_scores: scores written at a time on TPUs, at most.
    """

    is_exact: ClassVar[bool] = True

    block_queries: Count = 64
    block_scores: Count = 1 << 17
    group_size: Count = 16
    slabs: Count = 32
    slab_scores: Count = 1 << 25

    def __post_init__(self) -> None:
        if min(dataclasses.astuple(self)) < 1:
            raise UserError(f"{self}: all of these have to be at least 1")

    def top_k(
        self,
        queries: Float[Array, "T H"],
        keys: Float[Array, "M H"],
        valid: Bool[Array, "M"],
        k: int,
    ) -> tuple[Scores, Indices]:
        """Scores of the k best slots of each query of a head, in blocks."""
        return blocks.top_k(queries, keys, valid, k, self.block_queries, self.block_scores, self.group_size)

    def of_heads(
        self,
        queries: Float[Array, "heads T H"],
        keys: Float[Array, "heads M H"],
        valid: Bool[Array, "rows M"],
        k: int,
        placement: Placement | None = None,
    ) -> HeadScores:
        """The same for every head, in its own memory."""
        in_blocks = functools.partial(_head_by_head, self.top_k, k=k, placement=placement)
        if self.slabs == 1:
            return in_blocks(queries, keys, valid)
        in_slabs = functools.partial(self.in_slabs, k=k, placement=placement)
        return jax.lax.platform_dependent(queries, keys, valid, tpu=in_slabs, default=in_blocks)

    def in_slabs(
        self,
        queries: Float[Array, "heads T H"],
        keys: Float[Array, "heads M H"],
        valid: Bool[Array, "rows M"],
        k: int,
        placement: Placement | None = None,
    ) -> HeadScores:
        """`of_heads` as TPUs compute it.

        Texts that are read side by side (`jax.vmap`) are searched one after the other: their condition would be no
        condition any more, and the slower search would run for all, each time.
        """
        of_text = functools.partial(self._in_slabs_of_text, k=k)
        return jax.custom_batching.sequential_vmap(of_text)(queries, keys, valid, placement)

    def _in_slabs_of_text(
        self,
        queries: Float[Array, "heads T H"],
        keys: Float[Array, "heads M H"],
        valid: Bool[Array, "rows M"],
        placement: Placement | None,
        k: int,
    ) -> HeadScores:
        found = slabs.top_k(queries, keys, valid, k, self.slabs, self.slab_scores, placement)
        num_heads = len(queries)
        heads_of_row = num_heads // len(valid)

        def again(head: Int[Array, ""]) -> tuple[Scores, Indices]:
            head_keys = turned(keys[head], placement)
            row_valid = valid[head // heads_of_row]
            # Not `self.top_k`, which may be another one in a subclass.
            return ExactSearch.top_k(self, queries[head], head_keys, row_valid, k)

        def certain(head: Int[Array, ""]) -> tuple[Scores, Indices]:
            return found.scores[head], found.indices[head]

        def repaired() -> HeadScores:
            return HeadScores(
                *jax.lax.map(
                    lambda head: jax.lax.cond(found.is_certain[head], certain, again, head),
                    jnp.arange(num_heads),
                )
            )

        with jax.named_scope(RARE):
            return jax.lax.cond(
                jnp.all(found.is_certain),
                lambda: HeadScores(found.scores, found.indices),
                repaired,
            )


@dataclasses.dataclass(frozen=True)
class ApproximateSearch:
    """TPU's partial reduction (Chern et al. 2022) through `lax.approx_max_k`.

    Elsewhere `approx_max_k` is an exact and slower search, so there the search is `ExactSearch`.

    Attributes:
      recall_target: expected share of the true top-k that is found.
    """

    is_exact: ClassVar[bool] = False

    recall_target: Share = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.recall_target <= 1:
            raise UserError(
                f"ApproximateSearch.recall_target = {self.recall_target}: a share, more than 0 and at most 1"
            )

    def top_k(
        self,
        queries: Float[Array, "T H"],
        keys: Float[Array, "M H"],
        valid: Bool[Array, "M"],
        k: int,
    ) -> tuple[Scores, Indices]:
        """Scores of the k best slots of each query in descending order, and their indices."""
        on_tpu = functools.partial(self.partial_reduction, k=k)
        elsewhere = functools.partial(ExactSearch().top_k, k=k)
        return jax.lax.platform_dependent(
            queries,
            keys,
            valid,
            tpu=on_tpu,
            default=elsewhere,
        )

    def of_heads(
        self,
        queries: Float[Array, "heads T H"],
        keys: Float[Array, "heads M H"],
        valid: Bool[Array, "rows M"],
        k: int,
        placement: Placement | None = None,
    ) -> HeadScores:
        """The same for every head, in its own memory."""
        return _head_by_head(self.top_k, queries, keys, valid, k, placement)

    def partial_reduction(
        self,
        queries: Float[Array, "T H"],
        keys: Float[Array, "M H"],
        valid: Bool[Array, "M"],
        k: int,
    ) -> tuple[Scores, Indices]:
        """`top_k` as TPUs compute it."""
        # Queries beside each other, slots below: the TPU sorts what is left of them along this axis, and would else
        # copy it into this order first.
        scores = jnp.einsum(
            "SH,TH->ST",
            keys,
            queries,
            precision=PRECISION,
            preferred_element_type=jnp.float32,
        )
        scores = jnp.where(valid[:, None], scores, -jnp.inf)
        found = jax.lax.approx_max_k(
            scores,
            min(k, len(keys)),
            reduction_dimension=0,
            recall_target=self.recall_target,
        )
        # Left to itself XLA transposes all that was sorted, and takes the k best from that.
        best_scores, best_indices = [with_layout_constraint(leaf, Layout((0, 1))) for leaf in found]
        return pad_neighbours(best_scores.T, best_indices.T, k)


def _head_by_head(
    top_k: Callable,
    queries: Float[Array, "heads T H"],
    keys: Float[Array, "heads M H"],
    valid: Bool[Array, "rows M"],
    k: int,
    placement: Placement | None,
) -> HeadScores:
    """`Search.of_heads` by a search of one head: the scores of all heads at once would not fit beside a large memory.

    Those of a decode step do, one query a head: all heads of a row are searched at once.
    """
    # One loop over rows and heads: in two, each row of the memory would be copied before its heads are searched.
    heads_of_row = len(queries) // len(valid)

    def search_head(head: tuple) -> HeadScores:
        number, head_queries, head_keys = head
        row = number // heads_of_row
        return HeadScores(*top_k(head_queries, turned(head_keys, placement), valid[row], k))

    num_at_once = heads_of_row if queries.shape[1] == 1 else None
    return jax.lax.map(search_head, (jnp.arange(len(queries)), queries, keys), batch_size=num_at_once)


def recall(
    queries: Float[Array, "T H"],
    keys: Float[Array, "M H"],
    valid: Bool[Array, "M"],
    found: Scores,
) -> Float[Array, ""]:
    """Share of the true K best of each query that a search found, 1 where there is nothing to find.

    Nothing is sorted: a neighbour that was found is a true one if fewer than K slots have a better score.

    Args:
      queries, keys, valid: what was searched.
      found: [T, K] scores that the search returned.
    """
    num_neighbors = found.shape[-1]
    scores = scores_of(queries, keys, valid)
    # [T, K]
    rounding = _ROUNDING * jnp.maximum(jnp.abs(found), 1.0)
    is_better = scores[:, None, :] > (found + rounding)[:, :, None]
    num_better = jnp.sum(is_better, axis=-1)

    is_right = (found > -jnp.inf) & (num_better < num_neighbors)
    num_right = jnp.sum(is_right, dtype=jnp.float32)
    num_true = len(queries) * jnp.minimum(jnp.sum(valid), num_neighbors)
    return jnp.where(num_true > 0, num_right / jnp.maximum(num_true, 1), 1.0)


def best_of_all_shards(
    scores: Float[Array, "*rows K"],
    k: int,
    axis_name: str | None,
) -> Float[Array, "*rows K"]:
    """The scores of this shard's neighbours that are among the k best of all shards, -inf for its other neighbours.

    Only scores are exchanged. Of equal scores the lower shard wins, then the earlier place in the shard's list, so that
    the result is the top-k of the whole memory.

    Args:
      scores: this shard's k best, in descending order, -inf where there is none.
      axis_name: mesh axis over which slots are sharded, or None if they are not.
    """
    if axis_name is None or jax.lax.axis_size(axis_name) == 1:
        return scores
    *rows, num_own = scores.shape

    # [shards, *rows, K] -> [*rows, 1, shards * K]
    all_scores = jax.lax.all_gather(scores, axis_name)
    all_scores = jnp.moveaxis(all_scores, 0, -2)
    all_scores = all_scores.reshape(*rows, 1, -1)
    num_all = all_scores.shape[-1]
    # [*rows, K, 1]
    own_scores = scores[..., :, None]

    # [*rows, K, shards * K]
    place = jax.lax.axis_index(axis_name) * num_own + jnp.arange(num_own)
    is_earlier = jnp.arange(num_all)[None, :] < place[:, None]
    is_earlier = jnp.broadcast_to(is_earlier, (*rows, num_own, num_all))
    is_better = all_scores > own_scores
    is_equal = all_scores == own_scores
    is_before = is_better | (is_equal & is_earlier)

    rank = jnp.sum(is_before, axis=-1)
    return jnp.where(rank < k, scores, -jnp.inf)
