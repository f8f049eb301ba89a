"""The external memory of the Memorizing Transformer (Wu et al. 2022, section 3): its content, and how it is written.

It holds, per row and head, the keys and values of the last M positions of the row's document. Rows advance in lockstep,
a segment a step, so one write position serves all of them: the write is one contiguous update of a ring, and a mask of
valid slots per row carries resets and padding. On a mesh, rows are sharded over `data`, heads over `model` and slots
over `memory`; slots have their global order, so that the content does not depend on the mesh.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from memorizing.array_typing import (
    Clock,
    Keys,
    MemoryKeys,
    MemoryTokens,
    MemoryValidity,
    MemoryValues,
    RealPositions,
    RowFlags,
    Tokens,
    Values,
)


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
    differentiable: bool = False,
) -> Memory:
    """A segment's slots, each with the key and the value of one position.

    Args:
      keys, values: [B, T, N, H].
      tokens: int32 [B, T].
      is_real: bool [B, T].
      differentiable: whether keys and values keep their gradient.
    """
    slots = Memory(
        keys=_heads_first(keys),
        values=None if values is None else _heads_first(values),
        tokens=tokens.astype(jnp.int32),
        valid=is_real,
    )
    return slots if differentiable else jax.lax.stop_gradient(slots)


def of_segment_with_next_values(
    keys: Keys,
    values: Values | None,
    tokens: Tokens,
    is_real: RealPositions,
    before: LastKey,
    differentiable: bool = False,
) -> tuple[Memory, LastKey]:
    """A segment's slots, each with the value of a position and the key of the one before it.

    So a query that resembles a key finds what followed there. A segment's slots are known when it ends, but for its
    last key, which goes with the first value of the next segment.

    Args:
      keys, values, tokens, is_real, differentiable: see `of_segment`.
      before: last key of the segment before.

    Returns:
      The slots, and the segment's own last key.
    """
    keys = keys if differentiable else jax.lax.stop_gradient(keys)
    keys_before = jnp.concatenate([before.key[:, None], keys[:, :-1]], axis=1)
    has_key = jnp.concatenate([before.valid[:, None], is_real[:, :-1]], axis=1)
    slots = of_segment(keys_before, values, tokens, is_real & has_key, differentiable)
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


def first_slot(memory: Memory, axis_name: str | None) -> Int[Array, ""] | int:
    """The number of this shard's first slot in the whole memory."""
    if axis_name is None:
        return 0
    shard_slots = memory.valid.shape[-1]
    return jax.lax.axis_index(axis_name) * shard_slots


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
