"""kNN-augmented attention (Wu et al. 2022, section 3): a local attention and an external memory, joined by a gate."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from memorizing.array_typing import HeadScale, Keys, Queries, Values
from memorizing.context import Report, Segment
from memorizing.errors import Count, Factor, Share, UserError
from memorizing.models.attention.base import Example, LayerDims
from memorizing.models.attention.external import MemoryAttention, MemoryState
from memorizing.models.layers import parameter
from memorizing.models.memory import external_memory, recall, retrieval
from memorizing.models.memory.external_memory import LastKey, Memory
from memorizing.models.memory.recall import LookUps
from memorizing.models.memory.retrieval import Reading, Retrieved


@dataclasses.dataclass(frozen=True)
class KNNAttention(MemoryAttention):
    """y = g * attention to the k nearest slots of the memory + (1 - g) * local attention (section 3.1).

    The gate g = sigmoid(b) is learned for each head. With a Transformer-XL cache the last W positions are both in the
    cache and in the memory, as in the authors' code. Where the memory is empty the output is exactly the local
    attention.

    Attributes:
      memory_size, num_neighbors, local, search, differentiable_memory: see `MemoryAttention`.
      initial_gate: g at the start, between 0 and 1. A half, as the authors have it, takes half of the local attention
        away before the memory holds anything useful.
      stored_value: 'own' stores a position's key with its value, as in the paper; 'next' with the value of the position
        after it, so that a query which resembles the key gets what followed there.
      retrieval_loss: factor of an auxiliary loss that teaches queries and keys to find positions which were followed by
        the token that has to be predicted: see `recall.retrieval_loss`. The paper has none.
      retrieval_rows: rows of the batch among whose positions that loss lets them choose, the own included.
    """

    own_parameters: ClassVar[tuple[str, ...]] = ("gate",)

    initial_gate: Share = 0.5
    stored_value: Literal["own", "next"] = "own"
    retrieval_loss: Factor = 0.0
    retrieval_rows: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.initial_gate < 1:
            raise UserError(f"KNNAttention.initial_gate = {self.initial_gate}: expected a number between 0 and 1")
        if not 0 <= self.retrieval_loss < math.inf:
            raise UserError(f"KNNAttention.retrieval_loss = {self.retrieval_loss}: a factor, 0 for no such loss")
        if self.retrieval_rows < 1:
            raise UserError(f"KNNAttention.retrieval_rows = {self.retrieval_rows}: at least 1, the own row")

    @property
    def stores_next(self) -> bool:
        """Whether keys are stored with the next position's value."""
        return self.stored_value == "next"

    def check_parts(self, dims: LayerDims) -> None:
        if dims.qk_norm == "none":
            raise UserError(
                "LMConfig.qk_norm = 'none': an external memory compares keys of different times, which have to have "
                "the same length; use 'l2', or a model without a memory"
            )
        super().check_parts(dims)

    def core(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        return KNNCore(self, dims, name=name)

    @classmethod
    def example(cls, segment_length: int) -> Example:
        knn = cls()
        meaning = f"the {knn.num_neighbors} nearest of {knn.memory_size} positions in layer"
        return Example("kNN", meaning, knn, is_everywhere=False)


class KNNCore(nn.Module):
    """The dot-product core: see `Attention.core`."""

    attention: KNNAttention
    dims: LayerDims

    def setup(self) -> None:
        config = self.attention
        self.local = config.local.core(self.dims)
        # The local attention has the same parameter names as without a memory: a finished model can get one.
        nn.share_scope(self, self.local)

        initial_bias = math.log(config.initial_gate / (1 - config.initial_gate))
        initializer = nn.initializers.constant(initial_bias)
        self.gate = parameter(self, "gate", initializer, (self.dims.num_heads,), ("heads",))

    def __call__(
        self,
        queries: Queries,
        keys: Keys,
        values: Values,
        scale: HeadScale,
        segment: Segment,
        state: MemoryState,
    ) -> tuple[Queries, MemoryState | None, Report]:
        config = self.attention
        local_y, local_state, local_report = self.local(
            queries,
            keys,
            values,
            scale,
            segment,
            state.local,
        )
        with jax.named_scope("external_memory"):
            reading = retrieval.read(
                queries,
                scale,
                state.memory,
                config.num_neighbors,
                config.search,
                differentiable=config.differentiable_memory,
            )

        gate = nn.sigmoid(self.gate)
        memory_share = _memory_share(gate, reading.found)
        memory_share = memory_share.astype(local_y.dtype)
        y = memory_share * reading.values + (1 - memory_share) * local_y

        report = self._report(local_report, reading, gate, scale, segment, state)
        if segment.decoding is not None:
            return y, None, report
        own = segment.layout.own
        look_ups = LookUps(own(queries), own(keys), scale, own(reading.neighbours.slots), own(reading.logits))
        report = recall.add_to(
            report,
            look_ups,
            state.memory,
            segment,
            config.retrieval_loss,
            config.retrieval_rows,
            config.stores_next,
        )
        last_segment, last_key = self._slots(keys, values, segment, state.last_key)
        return y, MemoryState(local_state, state.memory, last_segment, last_key), report

    def _slots(
        self,
        keys: Keys,
        values: Values,
        segment: Segment,
        before: LastKey | tuple[()],
    ) -> tuple[Memory, LastKey | tuple[()]]:
        """The segment's slots, and the key that waits for the next segment."""
        own = segment.layout.own
        assert segment.tokens is not None, "a layer with a memory is told the tokens"
        content = (own(keys), own(values), segment.tokens, own(segment.is_real))
        differentiable = self.attention.differentiable_memory
        if not isinstance(before, LastKey):
            return external_memory.of_segment(*content, differentiable), ()
        return external_memory.of_segment_with_next_values(*content, before, differentiable)

    def _report(
        self,
        local: Report,
        reading: Reading,
        gate: HeadScale,
        scale: HeadScale,
        segment: Segment,
        state: MemoryState,
    ) -> Report:
        """What the local attention reports, and what the memory did."""
        metrics = {
            **local.metrics,
            "gate": jax.lax.stop_gradient(gate),
            "memory_fill": jnp.mean(state.memory.valid, dtype=jnp.float32),
        }
        if not self.attention.search.is_exact:
            metrics["search_recall"] = reading.recall
        neighbours = jax.tree.map(segment.layout.own, reading.neighbours)
        retrieved = jax.lax.stop_gradient(Retrieved(neighbours, gate, scale, stores_next=self.attention.stores_next))
        return dataclasses.replace(local, metrics=metrics, retrieved=retrieved)


def _memory_share(gate: HeadScale, found: Bool[Array, "B T"]) -> Float[Array, "B T N 1"]:
    """The gate of each head, and 0 where the memory had nothing to find."""
    found = found[:, :, None, None]
    gate = gate[None, None, :, None]
    return jnp.where(found, gate, 0.0)
