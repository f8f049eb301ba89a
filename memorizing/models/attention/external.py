"""What mechanisms with an external memory share: its size, its search, and the local attention beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import jax
from flax import struct

from memorizing.array_typing import AxesTree, Clock
from memorizing.context import Layout
from memorizing.errors import Count, Range, UserError
from memorizing.models.attention.base import Attention, LayerDims, attend_flops, matmul_flops
from memorizing.models.attention.full import FullAttention
from memorizing.models.memory import external_memory
from memorizing.models.memory.external_memory import LastKey, Memory
from memorizing.models.memory.search import ApproximateSearch, ExactSearch


@struct.dataclass
class MemoryState:
    """What a layer with an external memory carries; heads are key and value heads.

    Attributes:
      local: state of the local attention.
      memory: keys and values of all segments but the last, as far as M slots reach; keys are those before rotary
        positions.
      last_segment: the last segment's, T slots. They are written to the memory before the next segment reads it: at
        that moment nothing needs the slots that they replace. Written in the step that computed them, they would force
        a second copy of the memory, since that step's gradient still reads the old slots. (A step of several segments
        cannot avoid such copies: its gradient reads the slots that each of its segments saw.)
      last_key: the last segment's last one, where keys are stored with the next position's value; else ().
    """

    local: Any
    memory: Memory
    last_segment: Memory
    last_key: LastKey | tuple[()] = ()


@dataclasses.dataclass(frozen=True)
class MemoryAttention(Attention):
    """A local attention and an external memory of the same keys and values.

    A segment is written to the memory before the next one reads it, so that no query retrieves a token of its own
    segment: see `MemoryState`.

    Such layers are not stacked: the memory is far too large to be copied every step.

    Attributes:
      memory_size: M, in positions; a multiple of the segment length.
      num_neighbors: k.
      local: the mechanism of the local attention, one with a `core`.
      search: how neighbours are found: `ExactSearch` or `ApproximateSearch`.
      differentiable_memory: whether the gradient of a step reaches the keys and values that the step's own earlier
        segments stored, as those of the previous context do in the Focused Transformer (Tworkowski et al. 2023). None
        reaches the choice of the neighbours, nor what the memory held when the step began: with one segment a step
        (`BatchConfig.num_segments`) this changes nothing. Keys and values get a gradient of their own size, of which
        there may be two at a time.
      stores_next: whether keys are stored with the next position's value.
      own_parameters: names of what a layer has beyond its local attention.
    """

    stackable: ClassVar[bool] = False
    stores_next: ClassVar[bool] = False
    own_parameters: ClassVar[tuple[str, ...]] = ()

    memory_size: Count = 8192
    num_neighbors: Annotated[int, Range(1, 2**16)] = 32
    local: Attention = FullAttention()
    search: ExactSearch | ApproximateSearch = ExactSearch()
    differentiable_memory: bool = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.memory_size < 1:
            raise UserError(
                f"{name}.memory_size = {self.memory_size}: at least one segment; "
                "for a model without memory set LMConfig.attention_at = ()"
            )
        if type(self.local).core is Attention.core:
            raise UserError(
                f"{name}.local = @{type(self.local).__name__}(): the memory holds its keys and values, which it "
                "does not share; use @FullAttention() or @XLAttention(), or leave out the memory"
            )
        if self.num_neighbors < 1:
            raise UserError(f"{name}.num_neighbors = {self.num_neighbors}: at least 1")

    @property
    def can_decode(self) -> bool:
        """Whether its local attention can."""
        return self.local.can_decode

    @property
    def takes_memory_tokens(self) -> bool:
        """Whether its local attention does."""
        return self.local.takes_memory_tokens

    @property
    def caches_segment_only(self) -> bool:
        """Whether its local attention does: the memory is read anew for every position."""
        return self.local.caches_segment_only

    @property
    def tells_attention(self) -> bool:
        """Whether its local attention does; what the memory found is told apart."""
        return self.local.tells_attention

    def check(self, segment_length: int) -> None:
        if self.memory_size % segment_length:
            below = self.memory_size // segment_length * segment_length
            above = below + segment_length
            nearest = f"the nearest are {below} and {above}" if below else f"at least {segment_length}"
            raise UserError(
                f"{type(self).__name__}.memory_size = {self.memory_size} is not a multiple of the segment length "
                f"{segment_length}: {nearest}"
            )
        self.local.check(segment_length)

    def check_parts(self, dims: LayerDims) -> None:
        super().check_parts(dims)
        self.local.check_parts(dims)

    def init_state(self, dims: LayerDims, batch_size: int, segment_length: int) -> MemoryState:
        num_heads = self.memory_dims(dims).kv_heads

        def empty(num_slots: int) -> Memory:
            return external_memory.empty(batch_size, num_heads, num_slots, dims.head_dim, dims.dtype)

        no_key = LastKey.empty(batch_size, num_heads, dims.head_dim, dims.dtype)
        return MemoryState(
            local=self.local.init_state(dims, batch_size, segment_length),
            memory=empty(self.memory_size),
            last_segment=empty(segment_length),
            last_key=no_key if self.stores_next else (),
        )

    def state_axes(self) -> AxesTree:
        return MemoryState(
            local=self.local.state_axes(),
            memory=external_memory.axes("memory"),
            last_segment=external_memory.axes("length"),
            last_key=LastKey.axes() if self.stores_next else (),
        )

    def fresh_state(self) -> MemoryState:
        return MemoryState(
            local=self.local.fresh_state(),
            memory=Memory.fresh(),
            last_segment=Memory.fresh(),
            last_key=LastKey.fresh() if self.stores_next else (),
        )

    def prepare_state(self, state: MemoryState, clock: Clock) -> MemoryState:
        with jax.named_scope("external_memory_write"):
            memory = external_memory.write(state.memory, state.last_segment, clock - 1)
        local = self.local.prepare_state(state.local, clock)
        return dataclasses.replace(state, local=local, memory=memory)

    def flops(self, dims: LayerDims, layout: Layout) -> int:
        """The local attention, the score of every slot, and attention to the k nearest.

        Choosing the nearest is no arithmetic.
        """
        local = self.local.flops(dims, layout)
        heads = self.memory_dims(dims)
        search = matmul_flops(layout.size, heads.width, self.memory_size)
        attend = attend_flops(heads, layout.size, self.num_neighbors)
        return local + search + attend

    def with_memory_size(self, memory_size: int) -> MemoryAttention:
        return dataclasses.replace(self, memory_size=memory_size)

    def with_window(self, window: int) -> MemoryAttention:
        return dataclasses.replace(self, local=self.local.with_window(window))

    def without_memory(self) -> Attention:
        return self.local

    def map_memory(self, state: MemoryState, change: Callable[[Memory], Memory]) -> MemoryState:
        return dataclasses.replace(
            state,
            memory=change(state.memory),
            last_segment=change(state.last_segment),
        )

    def memory(self, state: MemoryState) -> Memory:
        return state.memory
