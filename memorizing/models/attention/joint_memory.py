"""A memory for a model that exists: one softmax over what is local and what is retrieved.

Of those who did it before: one softmax and keys without positions are those of the Focused Transformer (Tworkowski et
al. 2023) and InfLLM (Xiao et al. 2024); the factor tanh(alpha), 0 at the start, is Flamingo's (Alayrac et al. 2022).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from memorizing.array_typing import HeadScale, Keys, Queries, Values
from memorizing.context import Report, Segment
from memorizing.errors import Count, CountOrNone, UserError
from memorizing.models.attention.base import Example, LayerDims
from memorizing.models.attention.external import MemoryAttention, MemoryState
from memorizing.models.attention.local import Attended, in_groups, turned_queries
from memorizing.models.layers import parameter
from memorizing.models.memory import external_memory, recall, retrieval
from memorizing.models.memory.external_memory import Memory
from memorizing.models.memory.placement import Placement
from memorizing.models.memory.recall import LookUps
from memorizing.models.memory.retrieval import NO_NEIGHBOUR, Neighbours, Reading, Retrieved
from memorizing.models.positions import Rotary


@dataclasses.dataclass(frozen=True)
class JointMemoryAttention(MemoryAttention):
    """y = local + tanh(alpha) * w * (memory - local), w = sigmoid(z_memory + beta - z_local).

    `local` and `memory` are attention to the local keys and to the k nearest slots of the memory, with the model's own
    scale of the logits, and z are the logarithms of their sums of exponentials: with alpha at infinity and beta = 0
    that is one softmax over all of them. alpha and beta are learned for each query head and begin as 0, so that a model
    that gets such a memory computes, bit for bit, what it did without.

    Each query head searches the keys of its key head. The memory does not show what the local attention sees itself:
    its cache, and its sinks.

    Not all heads look far back: with `heads` some have a memory, and the others their local attention alone. (Heads
    that retrieve: Wu et al. 2024, arXiv 2404.15574; caches for these alone: Xiao et al. 2024, arXiv 2410.10819.)

    Where positions are rotary, a key stands at its true place in the document as long as no distance to it is above
    the trained length, which is decided for each slot and segment; all others stand where the furthest of those do. So
    a document within the trained length is read as full attention to the k nearest would read it.

    Attributes:
      memory_size, num_neighbors, local, search, differentiable_memory: see `MemoryAttention`.
      mixing: 'learned', or 'full': tanh(alpha) is 1 and beta 0, and there are no parameters. A model that is not to be
        trained is read with 'full'.
      distances: of rotary positions: 'true', as above; or 'constant': all that is remembered is at the trained length.
      trained_length: positions of the documents that the model was trained on.
      heads: key heads that have a memory, from 0, with the query heads that read them; () for all.
    """

    takes_all_parts: ClassVar[bool] = True
    is_compiled_apart: ClassVar[bool] = True
    own_parameters: ClassVar[tuple[str, ...]] = ("alpha", "beta")

    mixing: Literal["learned", "full"] = "learned"
    distances: Literal["true", "constant"] = "true"
    trained_length: Count = 8192
    heads: tuple[CountOrNone, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.local.joins_memory:
            raise UserError(
                f"JointMemoryAttention.local = @{type(self.local).__name__}(): it cannot share a softmax with a memory; use "
                "@FullAttention(), or @XLAttention() with XLAttention.same_length = False"
            )

    def check(self, segment_length: int) -> None:
        super().check(segment_length)
        window = self.local.num_before
        if self.memory_size <= window:
            raise UserError(
                f"JointMemoryAttention.memory_size = {self.memory_size}: its last {window} positions are the cache's "
                "(XLAttention.window), and nothing is left; choose a larger memory or a smaller window"
            )
        if self.trained_length <= segment_length + window:
            raise UserError(
                f"JointMemoryAttention.trained_length = {self.trained_length}: no more than a segment and its cache, "
                f"{segment_length + window} positions; choose shorter segments, a narrower window, or the length that "
                "the model was trained on"
            )

    def check_parts(self, dims: LayerDims) -> None:
        super().check_parts(dims)
        if dims.qk_norm == "l2" and dims.kv_heads != dims.num_heads:
            raise UserError(
                f"LMConfig.num_kv_heads = {dims.num_kv_heads} with LMConfig.qk_norm = 'l2': heads that share their keys "
                "cannot learn a scale each in @JointMemoryAttention(); leave out one of the two"
            )
        if len(set(self.heads)) < len(self.heads) or not all(0 <= head < dims.kv_heads for head in self.heads):
            raise UserError(
                f"JointMemoryAttention.heads = {self.heads}: different key heads from 0 to {dims.kv_heads - 1}, or () for all"
            )

    def memory_dims(self, dims: LayerDims) -> LayerDims:
        if not self.heads:
            return dims
        num_kv_heads = len(self.heads)
        num_heads = num_kv_heads * (dims.num_heads // dims.kv_heads)
        return dataclasses.replace(dims, num_heads=num_heads, num_kv_heads=num_kv_heads)

    def with_heads(self, heads: tuple[int, ...]) -> JointMemoryAttention:
        return dataclasses.replace(self, heads=heads)

    def with_openings(self) -> JointMemoryAttention:
        return dataclasses.replace(self, mixing="learned")

    def openings(self, shares: Float[Array, "N"]) -> dict[str, Array]:
        return {"alpha": jnp.arctanh(shares), "beta": jnp.zeros_like(shares)}

    def core(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        return JointMemoryCore(self, dims, name=name)

    @classmethod
    def example(cls, segment_length: int) -> Example:
        joint = cls()
        meaning = f"one softmax with the {joint.num_neighbors} nearest of {joint.memory_size} positions in layer"
        return Example("joint", meaning, joint, is_everywhere=False)


class JointMemoryCore(nn.Module):
    """The dot-product core: see `Attention.core`."""

    attention: JointMemoryAttention
    dims: LayerDims

    def setup(self) -> None:
        config = self.attention
        self.local = config.local.core(self.dims)
        # The local attention has the same parameter names as without a memory: a finished model can get one.
        nn.share_scope(self, self.local)
        if config.mixing == "learned":
            shape = (self.dims.num_heads,)
            self.alpha = parameter(self, "alpha", nn.initializers.zeros, shape, ("heads",))
            self.beta = parameter(self, "beta", nn.initializers.zeros, shape, ("heads",))

    def __call__(
        self,
        queries: Queries,
        keys: Keys,
        values: Values,
        scale: HeadScale,
        segment: Segment,
        state: MemoryState,
    ) -> tuple[Queries, MemoryState | None, Report]:
        local, local_state, report = self.local.attend(queries, keys, values, scale, segment, state.local)
        with jax.named_scope("external_memory"):
            memory = self._not_seen_locally(state, segment)
            reading = self._of_all_heads(self._read(queries, scale, memory, segment))
            share = self._memory_share(local, reading)
            y = _joined(local.values, reading.values, share)

        report = self._report(report, reading, share, scale, memory, segment)
        if segment.decoding is not None:
            return y, None, report
        own = segment.layout.own
        look_ups = LookUps(own(queries), own(keys), scale, own(reading.neighbours.slots), own(reading.logits))
        report = recall.add_to(report, look_ups, memory, segment, loss_factor=0.0, loss_rows=1, stores_next=False)
        assert segment.tokens is not None, "a layer with a memory is told the tokens"
        last_segment = external_memory.of_segment(
            own(self._with_memory(keys)),
            own(self._with_memory(values)),
            segment.tokens,
            own(segment.is_real),
            self.attention.differentiable_memory,
        )
        return y, MemoryState(local_state, state.memory, last_segment), report

    def _with_memory(self, x: Float[Array, "B T N *rest"]) -> Float[Array, "B T heads *rest"]:
        """Of query heads or key heads those that have a memory."""
        heads = self.attention.heads
        if not heads:
            return x
        # [B, T, K, N / K, ...]
        grouped = in_groups(x, self.dims.kv_heads)
        return grouped[:, :, np.array(heads)].reshape(*x.shape[:2], -1, *x.shape[3:])

    def _of_all_heads(self, reading: Reading) -> Reading:
        """The same for all query heads: those without a memory have found nothing."""
        heads = self.attention.heads
        if not heads:
            return reading
        # The place of each key head in the memory; behind its last what stands for those that it does not have.
        place = np.full(self.dims.kv_heads, len(heads))
        place[list(heads)] = np.arange(len(heads))

        def spread(x: Shaped[Array, "B T heads *rest"], nothing: float) -> Shaped[Array, "B T N *rest"]:
            grouped = in_groups(x, len(heads))
            absent = jnp.full_like(grouped[:, :, :1], nothing)
            # [B, T, K, N / K, ...]
            everywhere = jnp.concatenate([grouped, absent], axis=2)[:, :, place]
            return everywhere.reshape(*x.shape[:2], self.dims.num_heads, *x.shape[3:])

        slots, scores = reading.neighbours.slots, reading.neighbours.scores
        return reading._replace(
            values=spread(reading.values, 0),
            neighbours=Neighbours(spread(slots, 0), spread(scores, -jnp.inf)),
            logits=spread(reading.logits, NO_NEIGHBOUR),
            log_normalizer=spread(reading.log_normalizer, NO_NEIGHBOUR),
        )

    def _not_seen_locally(self, state: MemoryState, segment: Segment) -> Memory:
        """The memory without what the local attention sees itself."""
        seen = self.attention.local.sees_before(state.local, self._positions_back(segment))
        return dataclasses.replace(state.memory, valid=state.memory.valid & ~seen)

    def _positions_back(self, segment: Segment) -> Int[Array, "M"]:
        """How many positions before the segment's first one each slot was written."""
        num_slots = self.attention.memory_size
        slots = jnp.arange(num_slots)
        return external_memory.positions_back(slots, segment.clock, num_slots, segment.layout.length)

    def _read(self, queries: Queries, scale: HeadScale, memory: Memory, segment: Segment) -> Reading:
        """What each query head that has a memory finds among the keys of its key head.

        The query heads of a group are as many queries of one head of the memory: so neither search nor attention has to
        know of groups.
        """
        config = self.attention
        dims = config.memory_dims(self.dims)
        num_heads, num_kv_heads = dims.num_heads, dims.kv_heads
        placed_queries, placement = self._at_positions(self._with_memory(queries), segment)
        # [heads]
        own_scale = self._with_memory(scale[None, None])[0, 0]
        reading = retrieval.read(
            _fold(placed_queries, num_kv_heads),
            # Without a learned scale that of all heads is the same.
            own_scale if num_kv_heads == num_heads else own_scale[:num_kv_heads],
            memory,
            config.num_neighbors,
            config.search,
            placement,
            self.dims.attention_logit_cap,
            config.differentiable_memory,
        )
        slots = _unfold(reading.neighbours.slots, num_heads)
        scores = _unfold(reading.neighbours.scores, num_heads)
        num_queries = queries.shape[1]
        return reading._replace(
            values=_unfold(reading.values, num_heads),
            # The same for all queries of a row.
            found=reading.found[:, :num_queries],
            neighbours=Neighbours(slots, scores),
            logits=_unfold(reading.logits, num_heads),
            log_normalizer=_unfold(reading.log_normalizer, num_heads),
        )

    def _at_positions(self, queries: Queries, segment: Segment) -> tuple[Queries, Placement | None]:
        """Queries as the search needs them, and where the memory's keys are to stand."""
        config = self.attention
        rotary = self.local.dims.positions
        if not isinstance(rotary, Rotary):
            return queries, None
        if config.distances == "constant":
            far = jnp.full((1, 1, 1), config.trained_length)
            return rotary.turn(queries, far), None
        # The furthest place from which the segment's last position is still within the trained length.
        furthest = config.trained_length - segment.layout.size
        back = jnp.minimum(self._positions_back(segment), furthest)
        return turned_queries(rotary, segment, queries), Placement(-back, rotary)

    def _memory_share(self, local: Attended, reading: Reading) -> Float[Array, "B T N"]:
        """What share of each head's output the memory has; exactly 0 where it had nothing to find."""
        difference = reading.log_normalizer - local.log_normalizer
        if self.attention.mixing == "learned":
            weight = nn.sigmoid(difference + self.beta[None, None])
            weight = jnp.tanh(self.alpha)[None, None] * weight
        else:
            weight = nn.sigmoid(difference)
        return jnp.where(reading.found[:, :, None], weight, 0.0)

    def _report(
        self,
        report: Report,
        reading: Reading,
        share: Float[Array, "B T N"],
        scale: HeadScale,
        memory: Memory,
        segment: Segment,
    ) -> Report:
        """What the local attention reports, and what the memory did."""
        layout = segment.layout
        metrics = {**report.metrics, "memory_fill": jnp.mean(memory.valid, dtype=jnp.float32)}
        if self.attention.mixing == "learned":
            metrics["alpha"] = self.alpha
            metrics["beta"] = self.beta
        if not self.attention.search.is_exact:
            metrics["search_recall"] = reading.recall
        if segment.decoding is not None:
            return dataclasses.replace(report, metrics=jax.lax.stop_gradient(metrics))
        is_real = layout.own(segment.is_real)[:, :, None]
        own_share = jnp.where(is_real, layout.own(share), 0.0)
        # [N]
        mean_share = jnp.sum(own_share, axis=(0, 1)) / jnp.maximum(jnp.sum(is_real), 1)
        metrics["memory_share"] = mean_share
        neighbours = jax.tree.map(layout.own, reading.neighbours)
        retrieved = Retrieved(neighbours, mean_share, scale, logit_cap=self.dims.attention_logit_cap)
        return dataclasses.replace(
            report,
            metrics=jax.lax.stop_gradient(metrics),
            retrieved=jax.lax.stop_gradient(retrieved),
        )


def _joined(local: Queries, memory: Queries, share: Float[Array, "B T N"]) -> Queries:
    """local + share * (memory - local), in float32: where the share is 0 that is `local`, bit for bit."""
    wide = local.astype(jnp.float32)
    difference = memory.astype(jnp.float32) - wide
    return (wide + share[..., None] * difference).astype(local.dtype)


def _fold(queries: Float[Array, "B T N *rest"], num_kv_heads: int) -> Float[Array, "B queries K *rest"]:
    """Query heads as more queries of the key head that they read."""
    num_rows, _, num_heads, *rest = queries.shape
    if num_heads == num_kv_heads:
        return queries
    # [B, T, N / K, K, ...]
    grouped = jnp.moveaxis(in_groups(queries, num_kv_heads), 3, 2)
    return grouped.reshape(num_rows, -1, num_kv_heads, *rest)


def _unfold(folded: Shaped[Array, "B queries K *rest"], num_heads: int) -> Shaped[Array, "B T N *rest"]:
    """The inverse of `_fold`."""
    num_rows, num_queries, num_kv_heads, *rest = folded.shape
    group = num_heads // num_kv_heads
    if group == 1:
        return folded
    # [B, T, K, N / K, ...]
    grouped = folded.reshape(num_rows, num_queries // group, group, num_kv_heads, *rest).swapaxes(2, 3)
    return grouped.reshape(num_rows, -1, num_heads, *rest)
