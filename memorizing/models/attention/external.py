"""What mechanisms with an external memory share: its size, its search, and the local attention beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import jax

from memorizing.array_typing import Clock
from memorizing.context import Layout
from memorizing.errors import Count, Range, UserError
from memorizing.models.attention.base import Attention, LayerDims, attend_flops, matmul_flops
from memorizing.models.attention.full import FullAttention
from memorizing.models.memory import external_memory
from memorizing.models.memory.external_memory import Memory
from memorizing.models.memory.search import ApproximateSearch, ExactSearch


@dataclasses.dataclass(frozen=True)
class MemoryAttention(Attention):
    """A local attention and an external memory of the same keys and values.

    A segment is written to the memory before the next one reads it, so that no query retrieves a token of its own
    segment. The state has the fields `local`, `memory` (all segments but the last, as far as M slots reach) and
    `last_segment` (T slots), which waits to be written.

    Such layers are not stacked: the memory is far too large to be copied every step.

    Attributes:
      memory_size: M, in positions; a multiple of the segment length.
      num_neighbors: k.
      local: the mechanism of the local attention, one with a `core`.
      search: how neighbours are found: `ExactSearch` or `ApproximateSearch`.
    """

    stackable: ClassVar[bool] = False

    memory_size: Count = 8192
    num_neighbors: Annotated[int, Range(1, 2**16)] = 32
    local: Attention = FullAttention()
    search: ExactSearch | ApproximateSearch = ExactSearch()

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

    def prepare_state(self, state: Any, clock: Clock) -> Any:
        with jax.named_scope("external_memory_write"):
            memory = external_memory.write(state.memory, state.last_segment, clock - 1)
        local = self.local.prepare_state(state.local, clock)
        return dataclasses.replace(state, local=local, memory=memory)

    def flops(self, dims: LayerDims, layout: Layout) -> int:
        """The local attention, the score of every slot, and attention to the k nearest.

        Choosing the nearest is no arithmetic.
        """
        local = self.local.flops(dims, layout)
        search = matmul_flops(layout.size, dims.width, self.memory_size)
        attend = attend_flops(dims, layout.size, self.num_neighbors)
        return local + search + attend

    def with_memory_size(self, memory_size: int) -> MemoryAttention:
        return dataclasses.replace(self, memory_size=memory_size)

    def without_memory(self) -> Attention:
        return self.local

    def map_memory(self, state: Any, change: Callable[[Memory], Memory]) -> Any:
        return dataclasses.replace(
            state,
            memory=change(state.memory),
            last_segment=change(state.last_segment),
        )

    def memory(self, state: Any) -> Memory:
        return state.memory
