"""The external memory of the Memorizing Transformer (Wu et al. 2022, section 3): content, reading, writing.

It holds, per row and head, the keys and values of the last M positions of the row's document. Rows advance in lockstep,
a segment a step, so one write position serves all of them: the write is one contiguous update of a ring, and a mask of
valid slots per row carries resets and padding. On a mesh, rows are sharded over `data`, heads over `model` and slots
over `memory`; slots have their global order, so that the content does not depend on the mesh.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Shaped

from memorizing.array_typing import (
    Clock,
    HeadScale,
    Keys,
    MemoryKeys,
    MemoryTokens,
    MemoryValidity,
    MemoryValues,
    NeighbourIndices,
    NeighbourScores,
    Queries,
    RealPositions,
    RowFlags,
    Tokens,
    Values,
)
from memorizing.models.layers import soft_cap
from memorizing.models.memory import search as search_lib
from memorizing.models.memory.search import Indices, Scores, Search
from memorizing.models.positions import Rotary

# Rematerialisation saves what has this name (see stack.py): the search then runs once a step.
NEIGHBOURS = "neighbours"
# Logit where there is no neighbour: of weight 0 beside any other, and finite for a query that has none.
NO_NEIGHBOUR = -1e30
# Queries of a head of which the recall of an approximate search is measured.
_CHECKED_QUERIES = 8


@struct.dataclass
class Memory:
    """M slots a row and head. A slot whose `valid` is false is empty, whatever its key and value hold.

    Attributes:
      keys, values: [B, N, M, H] in the dtype of the activations. Values are None where the tokens are all that is read.
      tokens: int32 [B, M], the token of the position whose value it is.
      valid: bool [B, M].
    """

    keys: MemoryKeys | Any
    values: MemoryValues | Any
    tokens: MemoryTokens | Any
    valid: MemoryValidity | Any

    @classmethod
    def fresh(cls) -> Memory:
        """What a reset writes: see `context.reset_rows`."""
        return cls(keys=None, values=None, tokens=None, valid=False)


@struct.dataclass
class LastKey:
    """The key of a segment's last position, where a key is stored with the value of the position after it.

    Attributes:
      key: [B, N, H].
      valid: bool [B], false where that position belongs to no document, or to another one.
    """

    key: Float[Array, "B N H"] | Any
    valid: RowFlags | Any

    @classmethod
    def empty(cls, batch_size: int, num_heads: int, head_dim: int, dtype: jnp.dtype) -> LastKey:
        """Before the first segment."""
        return cls(
            key=jnp.zeros((batch_size, num_heads, head_dim), dtype),
            valid=jnp.zeros(batch_size, bool),
        )

    @classmethod
    def axes(cls, heads: str = "heads", width: str = "head_dim") -> LastKey:
        """The logical axis names of every leaf, given those of the axes N and H."""
        return cls(key=("batch", heads, width), valid=("batch",))

    @classmethod
    def fresh(cls) -> LastKey:
        """What a reset writes."""
        return cls(key=None, valid=False)


@struct.dataclass
class Neighbours:
    """The slots that queries attended to: their weights are the softmax of `scale * scores` over K.

    Attributes:
      slots: int32 [B, T, N, K]; see `positions_back`.
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
    """

    neighbours: Neighbours
    gate: HeadScale | Any
    scale: HeadScale | Any
    stores_next: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Placement:
    """Where keys of a memory stand, which were stored before their positions turned them.

    Attributes:
      of_slots: int32 [M], the position of each.
      rotary: how positions turn keys.
    """

    of_slots: Int[Array, "M"] | Any
    rotary: Rotary = struct.field(pytree_node=False)


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


def positions_back(slots: Any, clock: Any, num_slots: int, segment_length: int) -> Any:
    """How many positions before the first one of the segment that reads it a slot was written; at least 1, at most M.

    Args:
      slots: valid slots of a memory; an integer array of NumPy or JAX, as the result is.
      clock: segments processed before the one that reads, by all rows alike.
      num_slots, segment_length: M, T.
    """
    num_segments = num_slots // segment_length
    segment = slots // segment_length
    segments_back = 1 + (clock - 1 - segment) % num_segments
    return segments_back * segment_length - slots % segment_length


def take_slots(of_slots: Int[Array, "B M"], slots: Int[Array, "B *rest"]) -> Int[Array, "B *rest"]:
    """The entries of a table by slot, for each of some slots of the same row."""
    return jax.vmap(lambda row, slots: row[slots])(of_slots, slots)


def read(
    queries: Queries,
    scale: HeadScale,
    memory: Memory,
    num_neighbors: int,
    search: Search,
    placement: Placement | None = None,
    logit_cap: float = 0.0,
) -> Reading:
    """Attends to the k nearest slots of each query: softmax over `scale * query . key` over the retrieved only.

    No gradient reaches the memory or the choice of the neighbours; queries and scale get theirs through the retrieved
    keys and values.

    Args:
      queries: [B, T, N, H], L2-normalised if the stored keys are.
      scale: float32 [N], factor of the logits, above 0.
      memory: what earlier segments wrote.
      num_neighbors: k.
      search: how the k nearest are found.
      placement: where keys stand, if they are to be turned; queries are turned already.
      logit_cap: see `layers.soft_cap`.
    """
    memory = jax.lax.stop_gradient(memory)
    read_shard = functools.partial(_read_shard, num_neighbors=num_neighbors, search=search, logit_cap=logit_cap)
    read_sharded = sharded(
        read_shard,
        in_specs=(_QUERIES, P("model"), specs(memory), P("memory")),
        out_specs=_READING,
    )
    return read_sharded(queries, scale, memory, placement)


def write(memory: Memory, segment: Memory, clock: Clock, head_axis: str | None = "model") -> Memory:
    """Overwrites the T oldest slots with a segment; padding takes its slots too, but stays invalid.

    Args:
      memory: M slots, M a multiple of T (of T times the shards of the mesh axis `memory`).
      segment: T slots.
      clock: int32 scalar, segments written before, by all rows alike.
      head_axis: mesh axis over which heads are sharded, None for none.
    """
    write_sharded = sharded(
        _write_shard,
        in_specs=(specs(memory, head_axis), specs(segment, head_axis, slot_axis=None), P()),
        out_specs=specs(memory, head_axis),
    )
    return write_sharded(memory, segment, clock)


def specs(memory: Memory, head_axis: str | None = "model", slot_axis: str | None = "memory") -> Memory:
    """How a memory lies on a mesh: the tree of its partitions.

    Args:
      memory: some of its fields may be None.
      head_axis, slot_axis: mesh axes over which heads and slots are sharded, None for none.
    """
    content = P("data", head_axis, slot_axis, None)
    by_slot = P("data", slot_axis)
    return jax.tree.map(lambda leaf: content if leaf.ndim == 4 else by_slot, memory)


def of_segment(
    keys: Keys,
    values: Values | None,
    tokens: Tokens,
    is_real: RealPositions,
) -> Memory:
    """A segment's slots, each with the key and the value of one position; gradients are stopped.

    Args:
      keys, values: [B, T, N, H].
      tokens: int32 [B, T].
      is_real: bool [B, T].
    """
    slots = Memory(
        keys=_heads_first(keys),
        values=None if values is None else _heads_first(values),
        tokens=tokens.astype(jnp.int32),
        valid=is_real,
    )
    return jax.lax.stop_gradient(slots)


def of_segment_with_next_values(
    keys: Keys,
    values: Values | None,
    tokens: Tokens,
    is_real: RealPositions,
    before: LastKey,
) -> tuple[Memory, LastKey]:
    """A segment's slots, each with the value of a position and the key of the one before it.

    So a query that resembles a key finds what followed there. A segment's slots are known when it ends, but for its
    last key, which goes with the first value of the next segment.

    Args:
      keys, values, tokens, is_real: see `of_segment`.
      before: last key of the segment before.

    Returns:
      The slots, and the segment's own last key.
    """
    keys = jax.lax.stop_gradient(keys)
    keys_before = jnp.concatenate([before.key[:, None], keys[:, :-1]], axis=1)
    has_key = jnp.concatenate([before.valid[:, None], is_real[:, :-1]], axis=1)
    slots = of_segment(keys_before, values, tokens, is_real & has_key)
    return slots, LastKey(keys[:, -1], is_real[:, -1])


def _heads_first(array: Float[Array, "B T N H"]) -> Float[Array, "B N T H"]:
    return array.swapaxes(1, 2)


def cleared(memory: Memory) -> Memory:
    """The same memory, emptied."""
    return dataclasses.replace(memory, valid=jnp.zeros_like(memory.valid))


def permuted(memory: Memory) -> Memory:
    """The same memory with its values in random places: keys are found as before, and lead to values of other keys."""
    noise = jax.random.uniform(jax.random.key(0), memory.valid.shape)
    # Valid slots in random order first, and then the r-th valid slot gets the value of the r-th of those: nothing comes
    # from an empty slot.
    random_order = jnp.argsort(jnp.where(memory.valid, noise, jnp.inf), axis=-1)
    rank = jnp.cumsum(memory.valid, axis=-1) - 1
    # [B, M]
    source = jnp.take_along_axis(random_order, jnp.maximum(rank, 0), axis=-1)
    tokens = jnp.take_along_axis(memory.tokens, source, axis=1)
    if memory.values is None:
        return dataclasses.replace(memory, tokens=tokens)
    values = jnp.take_along_axis(memory.values, source[:, None, :, None], axis=2)
    return dataclasses.replace(memory, values=values, tokens=tokens)


def empty(
    batch_size: int,
    num_heads: int,
    num_slots: int,
    head_dim: int,
    dtype: jnp.dtype,
) -> Memory:
    """A memory that holds nothing."""
    shape = (batch_size, num_heads, num_slots, head_dim)
    return Memory(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        tokens=jnp.zeros((batch_size, num_slots), jnp.int32),
        valid=jnp.zeros((batch_size, num_slots), bool),
    )


def axes(slots: str, heads: str = "heads", width: str = "head_dim") -> Memory:
    """The logical axis names of every leaf, given those of the axes M, N and H."""
    content = ("batch", heads, slots, width)
    by_slot = ("batch", slots)
    return Memory(keys=content, values=content, tokens=by_slot, valid=by_slot)


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
) -> Reading:
    """`read` on one shard of the mesh, whose slots are a part of the memory's."""
    # [B, N, T, H]
    by_head = queries.swapaxes(1, 2)

    with jax.named_scope("search"):
        # [B, N, T, K]
        scores, indices = _search_heads(
            jax.lax.stop_gradient(by_head),
            memory,
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
        attended, log_sum, logits = _attend_heads(by_head, scale, memory, scores, indices, placement, logit_cap)

    # [B]
    found = jnp.any(memory.valid, axis=-1)
    if axis_name is not None:
        attended, log_sum = _add_shards(attended, log_sum, axis_name)
        found = jax.lax.pmax(found.astype(jnp.int32), axis_name) > 0
        recall = recall if search.is_exact else jax.lax.pmean(recall, ("data", "model", "memory"))

    found = jnp.broadcast_to(found[:, None], queries.shape[:2])
    values = attended.swapaxes(1, 2).astype(queries.dtype)
    return Reading(values, found, neighbours, logits.swapaxes(1, 2), recall, log_sum.swapaxes(1, 2))


def first_slot(memory: Memory, axis_name: str | None) -> Int[Array, ""] | int:
    """The number of this shard's first slot in the whole memory."""
    if axis_name is None:
        return 0
    shard_slots = memory.valid.shape[-1]
    return jax.lax.axis_index(axis_name) * shard_slots


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
    """Searches head after head: the scores of all heads at once would not fit beside a large memory."""
    # One loop over rows and heads: in two, each row of the memory would be copied before its heads are searched.
    num_rows, num_heads = queries.shape[:2]

    def search_head(head: tuple) -> tuple[Scores, Indices]:
        number, head_queries, head_keys = head
        row = number // num_heads
        head_keys = _turned(head_keys, placement)
        return search.top_k(head_queries, head_keys, memory.valid[row], num_neighbors)

    heads = (
        jnp.arange(num_rows * num_heads),
        _flatten_heads(queries),
        _flatten_heads(memory.keys),
    )
    scores, indices = jax.lax.map(search_head, heads)
    # [B, N, T, K]
    scores = _unflatten_heads(scores, num_rows, num_heads)
    indices = _unflatten_heads(indices, num_rows, num_heads)
    return checkpoint_name((scores, indices), NEIGHBOURS)


def _turned(head_keys: Float[Array, "M H"], placement: Placement | None) -> Float[Array, "M H"]:
    """The keys of a head where they stand."""
    return head_keys if placement is None else placement.rotary.turn(head_keys, placement.of_slots)


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
        _turned(memory.keys[0, 0], placement),
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

    # Neighbours are gathered row by row, and again for the gradient: those of all rows would be K times the size of the
    # activations.
    @jax.checkpoint
    def attend_head(head: tuple) -> tuple[Float[Array, "T H"], Float[Array, "T"], Scores]:
        number, head_queries, head_scores, head_indices = head
        is_neighbour = head_scores > -jnp.inf
        first_slot = number * num_slots
        # What is no neighbour may hold anything, and 0 * NaN is NaN: the query's best, which comes first, stands in for
        # it.
        head_slots = jnp.where(is_neighbour, head_indices, head_indices[:, :1])
        slots = first_slot + head_slots

        # [T, K]
        found_scores = jnp.where(is_neighbour, head_scores, 0.0)
        placed = () if placement is None else (placement.of_slots[head_slots], placement.rotary)
        products = differentiable_scores(found_scores, head_queries, all_keys, slots, *placed)
        logits = soft_cap(scale[number % num_heads] * products, logit_cap)
        logits = jnp.where(is_neighbour, logits, NO_NEIGHBOUR)

        weights = jax.nn.softmax(logits).astype(all_values.dtype)
        attended = jnp.einsum(
            "TK,TKH->TH",
            weights,
            _gather(all_values, slots),
            preferred_element_type=jnp.float32,
        )
        attended = attended.astype(all_values.dtype)
        log_sum = jax.nn.logsumexp(logits, axis=-1)
        return attended, log_sum, logits

    # Queries of a row whose memory is empty meet whatever lies in a slot: they get nothing, and no gradient.
    holds_any = jnp.any(memory.valid, axis=-1)[:, None, None, None]
    heads = (
        jnp.arange(num_rows * num_heads),
        _flatten_heads(jnp.where(holds_any, queries, 0)),
        _flatten_heads(scores),
        _flatten_heads(indices),
    )
    attended, log_sum, logits = jax.lax.map(attend_head, heads, batch_size=num_heads)
    # [B, N, T, H] and [B, N, T]
    attended = _unflatten_heads(attended, num_rows, num_heads)
    log_sum = _unflatten_heads(log_sum, num_rows, num_heads)
    logits = _unflatten_heads(logits, num_rows, num_heads)
    attended, log_sum = checkpoint_name((attended, log_sum), NEIGHBOURS)
    return jnp.where(holds_any, attended, 0), log_sum, logits


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def differentiable_scores(
    scores: Float[Array, "T K"],
    queries: Float[Array, "T H"],
    keys: Float[Array, "slots H"],
    slots: Int[Array, "T K"],
    positions: Int[Array, "T K"] | None = None,
    rotary: Rotary | None = None,
) -> Float[Array, "T K"]:
    """The scores that the search found, as functions of the queries.

    They are query . key already, so that the keys are gathered for the gradient only.

    Args:
      scores: that were found.
      queries: of the search.
      keys, slots: the neighbours are these slots of the table of keys.
      positions, rotary: how their keys were turned; None where they were not.
    """
    return scores


@differentiable_scores.defjvp
def _differentiable_scores_jvp(
    rotary: Rotary | None,
    primals: tuple,
    tangents: tuple,
) -> tuple[Float[Array, "T K"], Float[Array, "T K"]]:
    scores, _, keys, slots, positions = primals
    queries_change = tangents[1]
    neighbours = _gather(keys, slots)
    if rotary is not None:
        neighbours = rotary.turn(neighbours, positions)
    scores_change = jnp.einsum(
        "TH,TKH->TK",
        queries_change,
        neighbours,
        preferred_element_type=jnp.float32,
    )
    return scores, scores_change


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


def _write_shard(
    memory: Memory,
    segment: Memory,
    clock: Clock,
    axis_name: str | None,
) -> Memory:
    """Writes where the segment's slots lie on this shard, else writes back what was there (T slots, not the memory)."""
    length = segment.valid.shape[-1]
    shard_slots = memory.valid.shape[-1]
    if axis_name is None:
        shard = 0
        num_shards = 1
    else:
        shard = jax.lax.axis_index(axis_name)
        num_shards = jax.lax.axis_size(axis_name)

    # The first slot of the segment, in the whole memory and on its shard.
    num_segments = num_shards * shard_slots // length
    slot = (clock % num_segments) * length
    is_on_shard = slot // shard_slots == shard
    first = slot % shard_slots

    def update(slots: jax.Array, new: jax.Array) -> jax.Array:
        # [B, N, M, H] or [B, M]
        axis = 2 if slots.ndim == 4 else 1
        old = jax.lax.dynamic_slice_in_dim(slots, first, length, axis)
        written = jnp.where(is_on_shard, new, old)
        return jax.lax.dynamic_update_slice_in_dim(slots, written, first, axis)

    return jax.tree.map(update, memory, segment)


def sharded(function: Callable, in_specs: tuple, out_specs: Any) -> Callable:
    """`function(*args, axis_name)` on every shard of the mesh that is set, `axis_name` being the axis of the slots.

    Where no mesh is set: on the whole, with None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return functools.partial(function, axis_name=None)
    return jax.shard_map(
        functools.partial(function, axis_name="memory"),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
    )
