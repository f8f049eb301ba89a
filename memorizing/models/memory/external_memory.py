"""The external memory of the Memorizing Transformer (Wu et al. 2022, section 3): what it holds, how it is read and how it is written.

Per row and head, the keys and values of the last M positions of the row's document. Rows advance in lockstep, a segment a step, so one write position serves all of them:
the write is one contiguous update of a ring, and a mask of valid slots per row carries resets and padding. On a mesh, rows are sharded over `data`, heads over `model` and
slots over `memory`; slots keep their global order, so that the content does not depend on the mesh.
"""

from __future__ import annotations

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
    MemoryValidity,
    MemoryValues,
    NeighbourIndices,
    NeighbourScores,
    Queries,
    RealPositions,
    Values,
)
from memorizing.models.memory import search as search_lib

# Rematerialisation keeps what this names (see model.py): the search then runs once a step.
NEIGHBOURS = "neighbours"

Search = search_lib.ExactSearch | search_lib.ApproximateSearch


@struct.dataclass
class Memory:
    """M slots a row and head. A slot whose `valid` is false is empty, whatever its key and value hold.

    Attributes:
      keys, values: [B, N, M, H] in the dtype of the activations.
      valid: bool [B, M].
    """

    keys: MemoryKeys
    values: MemoryValues
    valid: MemoryValidity


@struct.dataclass
class Neighbours:
    """What queries attended to: the softmax of `scale * scores` over K are its weights.

    Attributes:
      slots: int32 [B, T, N, K]; see `positions_back`.
      scores: float32 [B, T, N, K], query . key; -inf where there is no neighbour. Where slots are sharded, K is a multiple of the number of neighbours, most of them none.
    """

    slots: Int[Array, "B T N K"]
    scores: Float[Array, "B T N K"]


@struct.dataclass
class Retrieved:
    """What an inspector sees of a layer with a memory.

    Attributes:
      neighbours: that the queries of the segment's own positions attended to.
      gate: float32 [N], share of the memory in the layer's output.
      scale: float32 [N], factor of the scores in the softmax.
    """

    neighbours: Neighbours
    gate: HeadScale
    scale: HeadScale


class Reading(NamedTuple):
    """What a segment got from the memory.

    Attributes:
      values: [B, T, N, H], zero where nothing was found.
      found: bool [B, T], whether the row had anything to find.
      neighbours: what was found; costs nothing unless it is used.
      recall: float32 scalar, share of the true neighbours that the search found for a few queries of each device; exactly 1 for an exact search, which is not checked.
    """

    values: Queries
    found: Bool[Array, "B T"]
    neighbours: Neighbours
    recall: Float[Array, ""]


def positions_back(slots: Any, clock: Any, num_slots: int, segment_length: int) -> Any:
    """How many positions before the first one of the segment that reads it a slot was written; at least 1, at most M. Integer arrays of NumPy or JAX.

    Args:
      slots: valid slots of a memory.
      clock: segments processed before the one that reads, by all rows alike.
      num_slots, segment_length: M, T.
    """
    segments_back = 1 + (clock - 1 - slots // segment_length) % (num_slots // segment_length)
    return segments_back * segment_length - slots % segment_length


def read(queries: Queries, scale: HeadScale, memory: Memory, num_neighbors: int, search: Search) -> Reading:
    """Attends to the k nearest slots of each query: softmax over `scale * query . key` over the retrieved only.

    No gradient reaches the memory or the choice of the neighbours; queries and scale get theirs through the retrieved keys and values.

    Args:
      queries: [B, T, N, H], L2-normalised as the stored keys are.
      scale: float32 [N], factor of the logits.
      memory: what earlier segments wrote.
      num_neighbors: k.
      search: how the k nearest are found.
    """
    memory = jax.lax.stop_gradient(memory)
    return sharded(
        functools.partial(_read_shard, num_neighbors=num_neighbors, search=search),
        in_specs=(_QUERIES, P("model"), _MEMORY),
        out_specs=Reading(_QUERIES, P("data", None), Neighbours(_NEIGHBOURS, _NEIGHBOURS), P()),
    )(queries, scale, memory)


def write(memory: Memory, segment: Memory, clock: Clock, head_axis: str | None = "model") -> Memory:
    """Overwrites the T oldest slots with a segment; padding takes its slots too, but stays invalid.

    Args:
      memory: M slots, M a multiple of T (of T times the shards of the mesh axis `memory`).
      segment: T slots.
      clock: int32 scalar, segments written before, by all rows alike.
      head_axis: mesh axis over which heads are sharded, None for none.
    """
    slots, written = P("data", head_axis, "memory", None), P("data", head_axis)
    specs = Memory(keys=slots, values=slots, valid=P("data", "memory"))
    segment_specs = Memory(keys=written, values=written, valid=P("data"))
    return sharded(_write_shard, in_specs=(specs, segment_specs, P()), out_specs=specs)(memory, segment, clock)


def of_segment(keys: Keys, values: Values, is_real: RealPositions) -> Memory:
    """A segment's keys and values, [B, T, N, H], in the layout of a memory; gradients are stopped."""
    keys, values = jax.lax.stop_gradient((keys.swapaxes(1, 2), values.swapaxes(1, 2)))
    return Memory(keys=keys, values=values, valid=is_real)


def cleared(memory: Memory) -> Memory:
    """The same memory, emptied."""
    return memory.replace(valid=jnp.zeros_like(memory.valid))


def permuted(memory: Memory) -> Memory:
    """The same memory with its values in random places: keys are found as before, and lead to what stood elsewhere."""
    noise = jax.random.uniform(jax.random.key(0), memory.valid.shape)
    # Valid slots in random order first, and then the r-th valid slot gets the value of the r-th of those: nothing comes
    # from an empty slot.
    shuffled = jnp.argsort(jnp.where(memory.valid, noise, jnp.inf), axis=-1)
    source = jnp.take_along_axis(shuffled, jnp.maximum(jnp.cumsum(memory.valid, axis=-1) - 1, 0), axis=-1)
    return memory.replace(values=jnp.take_along_axis(memory.values, source[:, None, :, None], axis=2))


def empty(batch_size: int, num_heads: int, num_slots: int, head_dim: int, dtype: jnp.dtype) -> Memory:
    """A memory that holds nothing."""
    shape = (batch_size, num_heads, num_slots, head_dim)
    return Memory(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch_size, num_slots), bool))


def _read_shard(
    queries: Queries, scale: HeadScale, memory: Memory, axis_name: str | None, *, num_neighbors: int, search: Search
) -> Reading:
    by_head = queries.swapaxes(1, 2)
    with jax.named_scope("search"):
        scores, indices = _search_heads(jax.lax.stop_gradient(by_head), memory, num_neighbors, search)
        recall = jnp.ones(()) if search.is_exact else _recall(by_head, memory, scores)
        scores = search_lib.winners(scores, num_neighbors, axis_name)
        first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * memory.valid.shape[-1]
        neighbours = Neighbours((first + indices).swapaxes(1, 2), scores.swapaxes(1, 2))
    with jax.named_scope("attend"):
        attended, log_sum = _attend_heads(by_head, scale, memory, scores, indices)
    found = jnp.any(memory.valid, axis=-1)
    if axis_name is not None:
        if jax.lax.axis_size(axis_name) > 1:
            # Every shard has attended to the neighbours that it holds: the softmax over all of them weighs it by its sum of exponentials.
            share = jnp.exp(log_sum - jax.lax.pmax(jax.lax.stop_gradient(log_sum), axis_name))
            attended = attended * (share / jax.lax.psum(share, axis_name))[..., None]
        attended = jax.lax.psum(attended, axis_name)
        found = jax.lax.pmax(found.astype(jnp.int32), axis_name) > 0
        recall = recall if search.is_exact else jax.lax.pmean(recall, ("data", "model", "memory"))
    found = jnp.broadcast_to(found[:, None], queries.shape[:2])
    return Reading(attended.swapaxes(1, 2).astype(queries.dtype), found, neighbours, recall)


def _search_heads(
    queries: Float[Array, "B N T H"], memory: Memory, num_neighbors: int, search: Search
) -> tuple[NeighbourScores, NeighbourIndices]:
    """Searches head after head: the scores of all heads at once would not fit beside a large memory."""
    # One loop over rows and heads: in two, each row of the memory would be copied before its heads are searched.
    num_heads = queries.shape[1]

    def search_head(head: tuple) -> tuple[NeighbourScores, NeighbourIndices]:
        number, head_queries, head_keys = head
        return search.top_k(head_queries, head_keys, memory.valid[number // num_heads], num_neighbors)

    heads = (jnp.arange(queries.shape[0] * num_heads), _by_head(queries), _by_head(memory.keys))
    found = jax.tree.map(
        lambda leaf: leaf.reshape(*queries.shape[:2], *leaf.shape[1:]), jax.lax.map(search_head, heads)
    )
    return checkpoint_name(found, NEIGHBOURS)


def _recall(queries: Float[Array, "B N T H"], memory: Memory, scores: NeighbourScores) -> Float[Array, ""]:
    """Of a few queries of the first head of the first row: a check in every step has to be cheap."""
    few = slice(0, None, max(queries.shape[2] // _CHECKED_QUERIES, 1))
    head = (queries[0, 0, few], memory.keys[0, 0], memory.valid[0], scores[0, 0, few])
    return search_lib.recall(*jax.lax.stop_gradient(head))


def _attend_heads(
    queries: Float[Array, "B N T H"],
    scale: HeadScale,
    memory: Memory,
    scores: NeighbourScores,
    indices: NeighbourIndices,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
    """Softmax attention to the neighbours with a score above -inf (0 where there is none), and the logarithm of its sum of exponentials in float32."""
    num_heads, num_slots = queries.shape[1], memory.valid.shape[1]
    # Slots of all heads in one table: sliced by head, the memory would be copied head by head before a few of its slots are gathered.
    all_keys, all_values = (slots.reshape(-1, slots.shape[-1]) for slots in (memory.keys, memory.values))

    # Neighbours are gathered row by row, and again for the gradient: those of all rows would be K times the size of the activations.
    @jax.checkpoint
    def attend_head(head: tuple) -> tuple[Float[Array, "T H"], Float[Array, "T"]]:
        number, head_queries, head_scores, head_indices = head
        is_neighbour = head_scores > -jnp.inf
        # What is no neighbour may hold anything, and 0 * NaN is NaN: the query's best, which comes first, stands in for it.
        slots = number * num_slots + jnp.where(is_neighbour, head_indices, head_indices[:, :1])
        products = with_gradient(jnp.where(is_neighbour, head_scores, 0.0), head_queries, all_keys, slots)
        logits = jnp.where(is_neighbour, scale[number % num_heads] * products, _NO_NEIGHBOUR)
        weights = jax.nn.softmax(logits).astype(all_values.dtype)
        attended = jnp.einsum("TK,TKH->TH", weights, _gather(all_values, slots), preferred_element_type=jnp.float32)
        return attended.astype(all_values.dtype), jax.nn.logsumexp(logits, axis=-1)

    # Queries of a row whose memory is empty meet whatever lies in a slot: they get nothing, and no gradient.
    holds_any = jnp.any(memory.valid, axis=-1)[:, None, None, None]
    numbers = jnp.arange(queries.shape[0] * num_heads)
    heads = (numbers, _by_head(jnp.where(holds_any, queries, 0)), _by_head(scores), _by_head(indices))
    attended = jax.tree.map(
        lambda leaf: leaf.reshape(*queries.shape[:2], *leaf.shape[1:]),
        jax.lax.map(attend_head, heads, batch_size=num_heads),
    )
    attended, log_sum = checkpoint_name(attended, NEIGHBOURS)
    return jnp.where(holds_any, attended, 0), log_sum


@jax.custom_jvp
def with_gradient(
    scores: Float[Array, "T K"],
    queries: Float[Array, "T H"],
    keys: Float[Array, "slots H"],
    slots: Int[Array, "T K"],
) -> Float[Array, "T K"]:
    """The scores that the search found, as functions of the queries: they are query . key already, so that the keys are gathered for the gradient only."""
    return scores


@with_gradient.defjvp
def _with_gradient_jvp(primals: tuple, tangents: tuple) -> tuple[Float[Array, "T K"], Float[Array, "T K"]]:
    scores, _, keys, slots = primals
    change = jnp.einsum("TH,TKH->TK", tangents[1], _gather(keys, slots), preferred_element_type=jnp.float32)
    return scores, change


def _gather(all_slots: Shaped[Array, "slots H"], slots: Int[Array, "T K"]) -> Shaped[Array, "T K H"]:
    """Rows of a table, in its dtype."""
    # Without a barrier XLA for TPUs widens bfloat16 rows to float32 as it gathers them, and the product reads twice the bytes; behind one it widens what it has read.
    return jax.lax.optimization_barrier(all_slots[slots])


def _by_head(array: Shaped[Array, "B N *rest"]) -> Shaped[Array, "heads *rest"]:
    """The heads of all rows, one after the other."""
    return array.reshape(-1, *array.shape[2:])


def _write_shard(memory: Memory, segment: Memory, clock: Clock, axis_name: str | None) -> Memory:
    """Writes where the segment's slots lie on this shard, else writes back what was there (T slots, not the memory)."""
    shard, num_shards = (0, 1) if axis_name is None else (jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name))
    length, shard_slots = segment.valid.shape[-1], memory.valid.shape[-1]
    slot = (clock % (num_shards * shard_slots // length)) * length
    mine, first = slot // shard_slots == shard, slot % shard_slots

    def update(slots: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        old = jax.lax.dynamic_slice_in_dim(slots, first, length, axis)
        return jax.lax.dynamic_update_slice_in_dim(slots, jnp.where(mine, new, old), first, axis)

    return Memory(
        keys=update(memory.keys, segment.keys, 2),
        values=update(memory.values, segment.values, 2),
        valid=update(memory.valid, segment.valid, 1),
    )


_CHECKED_QUERIES = 8
# Logit where there is no neighbour: of weight 0 beside any other, and finite for a query that has none.
_NO_NEIGHBOUR = -1e30
_QUERIES = P("data", None, "model", None)
_NEIGHBOURS = P("data", None, "model", "memory")
_MEMORY = Memory(
    keys=P("data", "model", "memory", None), values=P("data", "model", "memory", None), valid=P("data", "memory")
)


def sharded(function: Callable, in_specs: tuple, out_specs: Any) -> Callable:
    """`function(*args, axis_name)` on every shard of the mesh that is set, `axis_name` being the axis of the slots; on the whole, with None, where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return functools.partial(function, axis_name=None)
    return jax.shard_map(
        functools.partial(function, axis_name="memory"), mesh=mesh, in_specs=in_specs, out_specs=out_specs
    )
