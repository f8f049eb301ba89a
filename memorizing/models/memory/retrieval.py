"""Reading an external memory: search for the nearest slots of each query, and attention to them.

See Wu et al. 2022, section 3. Every shard of a mesh reads its own slots.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Shaped

from memorizing.array_typing import (
    HeadScale,
    NeighbourIndices,
    NeighbourScores,
    Queries,
)
from memorizing.models.layers import soft_cap
from memorizing.models.memory import search as search_lib
from memorizing.models.memory.external_memory import Memory, first_slot, sharded, specs
from memorizing.models.memory.placement import Placement, turned
from memorizing.models.memory.search import Scores, Search
from memorizing.models.positions import Rotary

# Rematerialisation saves what has this name (see stack/remat.py): the search then runs once a step.
NEIGHBOURS = "neighbours"
# Logit where there is no neighbour: of weight 0 beside any other, and finite for a query that has none.
NO_NEIGHBOUR = -1e30
# Queries of a head of which the recall of an approximate search is measured.
_CHECKED_QUERIES = 8


@struct.dataclass
class Neighbours:
    """The slots that queries attended to: their weights are the softmax of `scale * scores` over K.

    Attributes:
      slots: int32 [B, T, N, K]; see `external_memory.positions_back`.
      scores: float32 [B, T, N, K], query . key; -inf where there is no neighbour. Where slots are sharded, K is a
        multiple of the number of neighbours, most of them none.
    """

    slots: Int[Array, "B T N K"] | Any
    scores: Float[Array, "B T N K"] | Any


@struct.dataclass
class Retrieved:
    """What an inspector sees of a layer with a memory.

    Attributes:
      neighbours: those of the segment's own positions.
      gate: float32 [N], share of the memory in the layer's output.
      scale: float32 [N], factor of the scores in the softmax.
      stores_next: whether a slot has the key of the position before its own.
      logit_cap: of the scaled scores, see `layers.soft_cap`.
    """

    neighbours: Neighbours
    gate: HeadScale | Any
    scale: HeadScale | Any
    stores_next: bool = struct.field(pytree_node=False, default=False)
    logit_cap: float = struct.field(pytree_node=False, default=0.0)


class Reading(NamedTuple):
    """What a segment got from the memory.

    Attributes:
      values: [B, T, N, H], zero where nothing was found.
      found: bool [B, T], whether the row had anything to find.
      neighbours: the neighbours that were found; costs nothing unless it is used.
      logits: float32 [B, T, N, K], what the softmax over the neighbours is of, as functions of queries and scale;
        NO_NEIGHBOUR where there is none.
      recall: float32 scalar, share of the true neighbours that the search found for a few queries of each device;
        exactly 1 for an exact search, which is not checked.
      log_normalizer: float32 [B, T, N], logarithm of the sum of the logits' exponentials, about NO_NEIGHBOUR where
        there is none; costs nothing unless it is used.
    """

    values: Queries | Any
    found: Bool[Array, "B T"] | Any
    neighbours: Neighbours
    logits: Float[Array, "B T N K"] | Any
    recall: Float[Array, ""] | Any
    log_normalizer: Float[Array, "B T N"] | Any


# How arrays lie on a mesh.
_QUERIES = P("data", None, "model", None)
_NEIGHBOURS = P("data", None, "model", "memory")
_READING = Reading(
    values=_QUERIES,
    found=P("data", None),
    neighbours=Neighbours(slots=_NEIGHBOURS, scores=_NEIGHBOURS),
    logits=_NEIGHBOURS,
    recall=P(),
    log_normalizer=P("data", None, "model"),
)


def read(
    queries: Queries,
    scale: HeadScale,
    memory: Memory,
    num_neighbors: int,
    search: Search,
    placement: Placement | None = None,
    logit_cap: float = 0.0,
    differentiable: bool = False,
) -> Reading:
    """Attends to the k nearest slots of each query: softmax over `scale * query . key` over the retrieved only.

    No gradient reaches the choice of the neighbours, and none the memory unless it is asked for; queries and scale get
    theirs through the retrieved keys and values.

    Args:
      queries: [B, T, N, H], L2-normalised if the stored keys are.
      scale: float32 [N], factor of the logits, above 0.
      memory: what earlier segments wrote.
      num_neighbors: k.
      search: how the k nearest are found.
      placement: where keys stand, if they are to be turned; queries are turned already.
      logit_cap: see `layers.soft_cap`.
      differentiable: whether the retrieved keys and values get a gradient.
    """
    if not differentiable:
        memory = jax.lax.stop_gradient(memory)
    read_shard = functools.partial(
        _read_shard,
        num_neighbors=num_neighbors,
        search=search,
        logit_cap=logit_cap,
        differentiable=differentiable,
    )
    read_sharded = sharded(
        read_shard,
        in_specs=(_QUERIES, P("model"), specs(memory), P("memory")),
        out_specs=_READING,
    )
    return read_sharded(queries, scale, memory, placement)


def _read_shard(
    queries: Queries,
    scale: HeadScale,
    memory: Memory,
    placement: Placement | None,
    axis_name: str | None,
    *,
    num_neighbors: int,
    search: Search,
    logit_cap: float,
    differentiable: bool,
) -> Reading:
    """`read` on one shard of the mesh, whose slots are a part of the memory's."""
    # [B, N, T, H]
    by_head = queries.swapaxes(1, 2)

    with jax.named_scope("search"):
        # [B, N, T, K]
        scores, indices = _search_heads(
            *jax.lax.stop_gradient((by_head, memory)),
            num_neighbors,
            search,
            placement,
        )
        recall = jnp.ones(()) if search.is_exact else _recall(by_head, memory, scores, placement)
        scores = search_lib.best_of_all_shards(scores, num_neighbors, axis_name)
        slots = first_slot(memory, axis_name) + indices
        neighbours = Neighbours(
            slots=slots.swapaxes(1, 2),
            scores=scores.swapaxes(1, 2),
        )

    with jax.named_scope("attend"):
        attended, log_sum, logits = _attend_heads(
            by_head,
            scale,
            memory,
            scores,
            indices,
            placement,
            logit_cap,
            differentiable,
        )

    # [B]
    found = jnp.any(memory.valid, axis=-1)
    if axis_name is not None:
        attended, log_sum = _add_shards(attended, log_sum, axis_name)
        found = jax.lax.pmax(found.astype(jnp.int32), axis_name) > 0
        recall = recall if search.is_exact else jax.lax.pmean(recall, ("data", "model", "memory"))

    found = jnp.broadcast_to(found[:, None], queries.shape[:2])
    values = attended.swapaxes(1, 2).astype(queries.dtype)
    return Reading(values, found, neighbours, logits.swapaxes(1, 2), recall, log_sum.swapaxes(1, 2))


def _add_shards(
    attended: Float[Array, "B N T H"],
    log_sum: Float[Array, "B N T"],
    axis_name: str,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
    """Attention to the neighbours of all shards, from each shard's attention to the neighbours that it holds.

    The softmax over all neighbours weighs a shard by its sum of exponentials. Also returns the logarithm of all shards'
    sum.
    """
    if jax.lax.axis_size(axis_name) == 1:
        return jax.lax.psum((attended, log_sum), axis_name)
    greatest = jax.lax.pmax(jax.lax.stop_gradient(log_sum), axis_name)
    share = jnp.exp(log_sum - greatest)
    total = jax.lax.psum(share, axis_name)
    share = share / total
    attended = attended * share[..., None]
    return jax.lax.psum(attended, axis_name), greatest + jnp.log(total)


def _search_heads(
    queries: Float[Array, "B N T H"],
    memory: Memory,
    num_neighbors: int,
    search: Search,
    placement: Placement | None,
) -> tuple[NeighbourScores, NeighbourIndices]:
    """The k nearest slots of each query, in each head's own memory."""
    num_rows, num_heads = queries.shape[:2]
    scores, indices = search.of_heads(
        _flatten_heads(queries),
        _flatten_heads(memory.keys),
        memory.valid,
        num_neighbors,
        placement,
    )
    # [B, N, T, K]
    scores = _unflatten_heads(scores, num_rows, num_heads)
    indices = _unflatten_heads(indices, num_rows, num_heads)
    return checkpoint_name((scores, indices), NEIGHBOURS)


def _recall(
    queries: Float[Array, "B N T H"],
    memory: Memory,
    scores: NeighbourScores,
    placement: Placement | None,
) -> Float[Array, ""]:
    """Recall for a few queries of the first head of the first row: a check in every step has to be cheap."""
    step = max(queries.shape[2] // _CHECKED_QUERIES, 1)
    head = (
        queries[0, 0, ::step],
        turned(memory.keys[0, 0], placement),
        memory.valid[0],
        scores[0, 0, ::step],
    )
    return search_lib.recall(*jax.lax.stop_gradient(head))


def _attend_heads(
    queries: Float[Array, "B N T H"],
    scale: HeadScale,
    memory: Memory,
    scores: NeighbourScores,
    indices: NeighbourIndices,
    placement: Placement | None,
    logit_cap: float,
    differentiable: bool,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"], NeighbourScores]:
    """Softmax attention to the neighbours with a score above -inf (0 where there is none).

    Also returns the logarithm of its sum of exponentials, and its logits, in float32.
    """
    num_rows, num_heads = queries.shape[:2]
    num_slots = memory.valid.shape[1]
    # Slots of all heads in one table: sliced by head, the memory would be copied head by head before a few of its slots
    # are gathered.
    all_keys = memory.keys.reshape(-1, memory.keys.shape[-1])
    all_values = memory.values.reshape(-1, memory.values.shape[-1])
    # With a gradient a head has tables of its own: to that of one table every row would add the whole memory's.
    own_tables = (_flatten_heads(memory.keys), _flatten_heads(memory.values)) if differentiable else ()

    # Neighbours are gathered row by row, and again for the gradient: those of all rows would be K times the size of the
    # activations.
    @jax.checkpoint
    def attend_head(head: tuple) -> tuple[Float[Array, "T H"], Float[Array, "T"], Scores]:
        number, head_queries, head_scores, head_indices, *own = head
        table = _Table(*own, first_slot=0) if own else _Table(all_keys, all_values, number * num_slots)
        found = (head_queries, head_scores, head_indices)
        return _attend_head(*found, table, scale[number % num_heads], placement, logit_cap)

    # Queries of a row whose memory is empty meet whatever lies in a slot: they get nothing, and no gradient.
    holds_any = jnp.any(memory.valid, axis=-1)[:, None, None, None]
    heads = (
        jnp.arange(num_rows * num_heads),
        _flatten_heads(jnp.where(holds_any, queries, 0)),
        _flatten_heads(scores),
        _flatten_heads(indices),
        *own_tables,
    )
    attended, log_sum, logits = jax.lax.map(attend_head, heads, batch_size=num_heads)
    # [B, N, T, H] and [B, N, T]
    attended = _unflatten_heads(attended, num_rows, num_heads)
    log_sum = _unflatten_heads(log_sum, num_rows, num_heads)
    logits = _unflatten_heads(logits, num_rows, num_heads)
    attended, log_sum = checkpoint_name((attended, log_sum), NEIGHBOURS)
    return jnp.where(holds_any, attended, 0), log_sum, logits


class _Table(NamedTuple):
    """Where the memory of a head lies.

    Attributes:
      keys, values: [slots, H], of several heads or of this one.
      first_slot: of the head's memory.
    """

    keys: Float[Array, "slots H"] | Any
    values: Float[Array, "slots H"] | Any
    first_slot: Int[Array, ""] | int


def _attend_head(
    queries: Float[Array, "T H"],
    scores: Scores,
    indices: Int[Array, "T K"],
    table: _Table,
    scale: Float[Array, ""],
    placement: Placement | None,
    logit_cap: float,
) -> tuple[Float[Array, "T H"], Float[Array, "T"], Scores]:
    """`_attend_heads` of one head."""
    is_neighbour = scores > -jnp.inf
    # What is no neighbour may hold anything, and 0 * NaN is NaN: the query's best, which comes first, stands in for it.
    head_slots = jnp.where(is_neighbour, indices, indices[:, :1])
    slots = table.first_slot + head_slots

    # [T, K]
    found_scores = jnp.where(is_neighbour, scores, 0.0)
    placed = () if placement is None else (placement.of_slots[head_slots], placement.rotary)
    products = differentiable_scores(found_scores, queries, table.keys, slots, *placed)
    logits = soft_cap(scale * products, logit_cap)
    logits = jnp.where(is_neighbour, logits, NO_NEIGHBOUR)

    weights = jax.nn.softmax(logits).astype(table.values.dtype)
    attended = jnp.einsum(
        "TK,TKH->TH",
        weights,
        _gather(table.values, slots),
        preferred_element_type=jnp.float32,
    )
    return attended.astype(table.values.dtype), jax.nn.logsumexp(logits, axis=-1), logits


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def differentiable_scores(
    scores: Float[Array, "T K"],
    queries: Float[Array, "T H"],
    keys: Float[Array, "slots H"],
    slots: Int[Array, "T K"],
    positions: Int[Array, "T K"] | None = None,
    rotary: Rotary | None = None,
) -> Float[Array, "T K"]:
    """The scores that the search found, as functions of the queries, and of the keys if these have a gradient.

    They are query . key already, so that the keys are gathered for the gradient only.

    Args:
      scores: that were found.
      queries: of the search.
      keys, slots: the neighbours are these slots of the table of keys.
      positions, rotary: how their keys were turned; None where they were not.
    """
    return scores


def _differentiable_scores_jvp(
    rotary: Rotary | None,
    primals: tuple,
    tangents: tuple,
) -> tuple[Float[Array, "T K"], Float[Array, "T K"]]:
    scores, queries, keys, slots, positions = primals
    _, queries_change, keys_change, *_ = tangents

    def products(queries: Float[Array, "T H"], keys: Float[Array, "slots H"]) -> Float[Array, "T K"]:
        neighbours = _gather(keys, slots)
        if rotary is not None:
            neighbours = rotary.turn(neighbours, positions)
        return jnp.einsum(
            "TH,TKH->TK",
            queries,
            neighbours,
            preferred_element_type=jnp.float32,
        )

    scores_change = jnp.zeros_like(scores)
    if not isinstance(queries_change, SymbolicZero):
        scores_change = products(queries_change, keys)
    if not isinstance(keys_change, SymbolicZero):
        scores_change += products(queries, keys_change)
    return scores, scores_change


# What has no gradient is not computed: of most memories the keys.
differentiable_scores.defjvp(_differentiable_scores_jvp, symbolic_zeros=True)


def _gather(
    all_slots: Shaped[Array, "slots H"],
    slots: Int[Array, "T K"],
) -> Shaped[Array, "T K H"]:
    """Rows of a table, in its dtype."""
    # Without a barrier XLA for TPUs widens bfloat16 rows to float32 as it gathers them, and the product reads twice the
    # bytes; behind one it widens what it has read.
    return jax.lax.optimization_barrier(all_slots[slots])


def _flatten_heads(array: Shaped[Array, "B N *rest"]) -> Shaped[Array, "heads *rest"]:
    """The heads of all rows, one after the other."""
    return array.reshape(-1, *array.shape[2:])


def _unflatten_heads(
    array: Shaped[Array, "heads *rest"],
    num_rows: int,
    num_heads: int,
) -> Shaped[Array, "B N *rest"]:
    """The inverse of `_flatten_heads`."""
    return array.reshape(num_rows, num_heads, *array.shape[1:])
