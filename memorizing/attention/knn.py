"""kNN-augmented attention (Wu et al. 2022, "Memorizing Transformers", section 3): a local attention and an external memory, joined by a gate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from memorizing import external_memory
from memorizing.array_typing import AxesTree, Clock, HeadScale, Keys, Queries, Values
from memorizing.attention.base import Attention, LayerDims
from memorizing.attention.full import FullAttention
from memorizing.context import Report, Segment
from memorizing.errors import UserError
from memorizing.external_memory import NEIGHBOURS, Memory, Search
from memorizing.search import ExactSearch


@struct.dataclass
class KNNState:
    """What a layer with an external memory carries.

    Attributes:
      local: state of the local attention.
      memory: keys and values of all segments but the last, as far as M slots reach.
      last_segment: the last segment's, T slots. They are written to the memory before the next segment reads it: at that moment nothing needs the slots that they replace.
        Written in the step that computed them, they would force a second copy of the memory, since that step's gradient still reads the old slots. (A step of several segments
        cannot avoid such copies: its gradient reads the slots that each of its segments saw.)
    """

    local: Any
    memory: Memory
    last_segment: Memory


@dataclasses.dataclass(frozen=True)
class KNNAttention(Attention):
    """y = g * attention to the k nearest slots of the memory + (1 - g) * local attention, with g = sigmoid(b) learned per head (section 3.1).

    A segment is written to the memory before the next one reads it, so that no query retrieves a token of its own segment. With a Transformer-XL cache the last W positions are
    both in the cache and in the memory, as in the authors' code. Where the memory is empty the output is exactly the local attention.

    Such layers are not stacked: the memory is far too large to be copied every step.

    Attributes:
      memory_size: M, in positions; a multiple of the segment length.
      num_neighbors: k.
      local: the mechanism of the local attention, one with a `core`.
      search: how neighbours are found: `ExactSearch` or `ApproximateSearch`.
      initial_gate: g at the start, between 0 and 1. A half, as the authors have it, takes half of the local attention away before the memory holds anything useful.
    """

    stackable: ClassVar[bool] = False

    memory_size: int = 8192
    num_neighbors: int = 32
    local: Attention = FullAttention()
    search: Search = ExactSearch()
    initial_gate: float = 0.5

    def __post_init__(self) -> None:
        if self.memory_size < 1:
            raise UserError(
                f"KNNAttention.memory_size = {self.memory_size}: at least one segment; "
                "for a model without memory set LMConfig.attention_at = ()"
            )
        if type(self.local).core is Attention.core:
            raise UserError(
                f"KNNAttention.local = @{type(self.local).__name__}(): the memory holds its keys and values, which it does "
                "not share; use @FullAttention() or @XLAttention(), or leave out the memory"
            )
        if self.num_neighbors < 1:
            raise UserError(f"KNNAttention.num_neighbors = {self.num_neighbors}: at least 1")
        if not 0 < self.initial_gate < 1:
            raise UserError(f"KNNAttention.initial_gate = {self.initial_gate}: expected a number between 0 and 1")

    def check(self, segment_length: int) -> None:
        if self.memory_size % segment_length:
            below = self.memory_size // segment_length * segment_length
            nearest = f"the nearest are {below} and {below + segment_length}" if below else f"at least {segment_length}"
            raise UserError(
                f"KNNAttention.memory_size = {self.memory_size} is not a multiple of the segment length {segment_length}: {nearest}"
            )
        self.local.check(segment_length)

    def init_state(self, dims: LayerDims, batch_size: int, segment_length: int) -> KNNState:
        def empty(num_slots: int) -> Memory:
            return external_memory.empty(batch_size, dims.num_heads, num_slots, dims.head_dim, dims.dtype)

        local = self.local.init_state(dims, batch_size, segment_length)
        return KNNState(local, empty(self.memory_size), empty(segment_length))

    def state_axes(self) -> AxesTree:
        def axes(slots: str) -> Memory:
            content = ("batch", "heads", slots, "head_dim")
            return Memory(keys=content, values=content, valid=("batch", slots))

        return KNNState(self.local.state_axes(), axes("memory"), axes("length"))

    def fresh_state(self) -> KNNState:
        empty = Memory(keys=None, values=None, valid=False)
        return KNNState(self.local.fresh_state(), empty, empty)

    def settle(self, state: KNNState, clock: Clock) -> KNNState:
        with jax.named_scope("external_memory_write"):
            memory = external_memory.write(state.memory, state.last_segment, clock - 1)
        return state.replace(local=self.local.settle(state.local, clock), memory=memory)

    def core(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        return KNNCore(self, dims, name=name)


class KNNCore(nn.Module):
    attention: KNNAttention
    dims: LayerDims

    def setup(self) -> None:
        self.local = self.attention.local.core(self.dims)
        # The local attention keeps the parameter names that it has without a memory: a finished model can be given one.
        nn.share_scope(self, self.local)
        bias = math.log(self.attention.initial_gate / (1 - self.attention.initial_gate))
        initializer = nn.with_logical_partitioning(nn.initializers.constant(bias), ("heads",))
        self.gate = self.param("gate", initializer, (self.dims.num_heads,), jnp.float32)

    def __call__(
        self, queries: Queries, keys: Keys, values: Values, scale: HeadScale, segment: Segment, state: KNNState
    ) -> tuple[Queries, KNNState | None, Report]:
        config = self.attention
        y_local, local_state, local_report = self.local(queries, keys, values, scale, segment, state.local)
        with jax.named_scope("external_memory"):
            reading = external_memory.read(queries, scale, state.memory, config.num_neighbors, config.search)
        # For those who look on (memorizing.inspection); nothing where the collection is not asked for.
        self.sow("intermediates", NEIGHBOURS, jax.tree.map(segment.layout.own, reading.neighbours))
        gate = nn.sigmoid(self.gate)
        memory_share = jnp.where(reading.found[:, :, None, None], gate[None, None, :, None], 0.0).astype(y_local.dtype)
        metrics = {
            **local_report.metrics,
            "gate": jax.lax.stop_gradient(gate),
            "memory_fill": jnp.mean(state.memory.valid, dtype=jnp.float32),
        }
        if not config.search.is_exact:
            metrics["search_recall"] = reading.recall
        report = local_report.replace(metrics=metrics)
        y = memory_share * reading.values + (1 - memory_share) * y_local
        if segment.slice:
            return y, None, report
        own = segment.layout.own
        last_segment = external_memory.of_segment(own(keys), own(values), own(segment.is_real))
        return y, KNNState(local_state, state.memory, last_segment), report


def forget_memories(context: Any) -> Any:
    """The same context with every external memory empty: local attention and caches keep theirs. For measuring what the memory is worth."""
    return map_memories(context, lambda memory: memory.replace(valid=jnp.zeros_like(memory.valid)))


def permute_memories(context: Any) -> Any:
    """The same context with the values of every external memory in random places: keys are found as before, and lead to what stood elsewhere."""

    def permute(memory: Memory) -> Memory:
        noise = jax.random.uniform(jax.random.key(0), memory.valid.shape)
        # Valid slots in random order first, and then the r-th valid slot gets the value of the r-th of those: nothing comes from an empty slot.
        shuffled = jnp.argsort(jnp.where(memory.valid, noise, jnp.inf), axis=-1)
        source = jnp.take_along_axis(shuffled, jnp.maximum(jnp.cumsum(memory.valid, axis=-1) - 1, 0), axis=-1)
        return memory.replace(values=jnp.take_along_axis(memory.values, source[:, None, :, None], axis=2))

    return map_memories(context, permute)


def map_memories(context: Any, change: Callable[[Memory], Memory]) -> Any:
    """The same context with every external memory changed, last segments too."""

    def change_state(state: Any) -> Any:
        if not isinstance(state, KNNState):
            return state
        return state.replace(memory=change(state.memory), last_segment=change(state.last_segment))

    return jax.tree.map(change_state, context, is_leaf=lambda state: isinstance(state, KNNState))
