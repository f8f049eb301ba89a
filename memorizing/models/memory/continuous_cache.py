"""The continuous cache (Grave, Joulin and Usunier 2017): a memory of the tokens that followed, mixed into the output.

It stands around the whole stack. The hidden state that predicts the next token is compared with those that predicted
earlier tokens of the document; the tokens that followed the most similar ones get a share of the probability. Without
parameters of its own it works on any finished model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from memorizing.array_typing import (
    Activations,
    AxesTree,
    Clock,
    Logits,
    PerToken,
    RealPositions,
    RowFlags,
    Scalar,
    Tokens,
)
from memorizing.context import Report, Segment, reset_rows
from memorizing.errors import Count, Factor, FactorAboveZero, Range, Share, UserError
from memorizing.models.attention.base import SOFTMAX_FLOPS, matmul_flops, normalize
from memorizing.models.layers import parameter
from memorizing.models.memory import external_memory, recall, retrieval
from memorizing.models.memory import search as search_lib
from memorizing.models.memory.external_memory import LastKey, Memory
from memorizing.models.memory.recall import LookUps
from memorizing.models.memory.retrieval import NEIGHBOURS, NO_NEIGHBOUR, Neighbours, Retrieved
from memorizing.models.memory.search import ExactSearch, Search

# The entry of the cache in parameters, context and reports.
CONTINUOUS_CACHE = "continuous_cache"


@struct.dataclass
class ContinuousCacheState:
    """Every token of the document under the hidden state that predicted it.

    A slot holds an input of the model and the normalised hidden state of the position before. So a segment's slots are
    known when the segment ends, and its last prediction is stored with the next segment, whose first input it is.

    Attributes:
      memory: slots of all segments but the last, as far as M reach: one head whose keys are as wide as the model, and
        no values but the tokens.
      last_segment: the last segment's T slots, which are written to the memory before the next segment reads it.
      last_key: that of the last segment's last position.
    """

    memory: Memory
    last_segment: Memory
    last_key: LastKey


@dataclasses.dataclass(frozen=True)
class ContinuousCache:
    """p(next) = (1 - weight) * model(next) + weight * cache(next), where cache(next) sums exp(theta * query . key).

    The sum is over those of the k nearest slots that hold the token, divided by that over all k. Queries and keys are
    hidden states after the last norm, of length 1. A segment is stored before the next one reads: no position finds its
    own target, nor a token of its own segment. Where the cache is empty the logits are exactly the model's.

    Attributes:
      memory_size: M, in tokens; a multiple of the segment length.
      num_neighbors: k.
      theta: how sharply similar positions are preferred.
      weight: share of the cache in the prediction, between 0 and 1.
      mixing: 'fixed' takes `theta` and `weight` as they are; 'learned' learns both, from these values on; 'gated'
        learns theta, and a weight for each position that is a function of its hidden state.
      search: how neighbours are found: `ExactSearch` or `ApproximateSearch`.
      retrieval_loss: factor of an auxiliary loss, which brings the hidden states together that were followed by the
        same token (TRIME): see `recall.retrieval_loss`.
      retrieval_rows: rows of the batch among whose positions that loss lets them choose, the own included.
    """

    memory_size: Count = 2048
    num_neighbors: Annotated[int, Range(1, 2**16)] = 32
    theta: FactorAboveZero = 15.0
    weight: Share = 0.3
    mixing: Literal["fixed", "learned", "gated"] = "fixed"
    search: Search = ExactSearch()
    retrieval_loss: Factor = 0.0
    retrieval_rows: Count = 1

    def __post_init__(self) -> None:
        if self.memory_size < 1:
            raise UserError(
                f"ContinuousCache.memory_size = {self.memory_size}: at least one segment; without a cache set "
                "LMConfig.continuous_cache = None"
            )
        if self.num_neighbors < 1:
            raise UserError(f"ContinuousCache.num_neighbors = {self.num_neighbors}: at least 1")
        if self.theta <= 0:
            raise UserError(f"ContinuousCache.theta = {self.theta}: a number above 0")
        if not 0 < self.weight < 1:
            raise UserError(f"ContinuousCache.weight = {self.weight}: expected a number between 0 and 1")
        if not 0 <= self.retrieval_loss < math.inf:
            raise UserError(f"ContinuousCache.retrieval_loss = {self.retrieval_loss}: a factor, 0 for no such loss")
        if self.retrieval_rows < 1:
            raise UserError(f"ContinuousCache.retrieval_rows = {self.retrieval_rows}: at least 1, the own row")

    @property
    def has_parameters(self) -> bool:
        """Whether anything of it is learned."""
        return self.mixing != "fixed"

    def check(self, segment_length: int) -> None:
        """Raises UserError if the cache is not made of whole segments."""
        if self.memory_size % segment_length:
            below = self.memory_size // segment_length * segment_length
            nearest = f"the nearest are {below} and {below + segment_length}" if below else f"at least {segment_length}"
            raise UserError(
                f"ContinuousCache.memory_size = {self.memory_size} is not a multiple of the segment length "
                f"{segment_length}: {nearest}"
            )

    # What it carries.

    def init_state(
        self, embed_dim: int, dtype: jnp.dtype, batch_size: int, segment_length: int
    ) -> ContinuousCacheState:
        """The state of rows that have seen nothing."""

        def empty(num_slots: int) -> Memory:
            memory = external_memory.empty(batch_size, 1, num_slots, embed_dim, dtype)
            return dataclasses.replace(memory, values=None)

        return ContinuousCacheState(
            memory=empty(self.memory_size),
            last_segment=empty(segment_length),
            last_key=LastKey.empty(batch_size, 1, embed_dim, dtype),
        )

    def state_axes(self) -> AxesTree:
        """The logical axis names of every leaf of the state."""

        def axes(slots: str) -> Memory:
            return dataclasses.replace(external_memory.axes(slots, heads="one", width="embed"), values=None)

        return ContinuousCacheState(
            memory=axes("memory"),
            last_segment=axes("length"),
            last_key=LastKey.axes(heads="one", width="embed"),
        )

    def prepare_state(self, state: ContinuousCacheState, clock: Clock) -> ContinuousCacheState:
        """Stores the segment before. Idempotent; `clock` counts the segments processed."""
        with jax.named_scope("external_memory_write"):
            memory = external_memory.write(state.memory, state.last_segment, clock - 1, head_axis=None)
        return dataclasses.replace(state, memory=memory)

    def reset(self, state: ContinuousCacheState, start_of_document: RowFlags) -> ContinuousCacheState:
        """Empties the flagged rows."""
        fresh = ContinuousCacheState(
            memory=Memory.fresh(),
            last_segment=Memory.fresh(),
            last_key=LastKey.fresh(),
        )
        return reset_rows(state, fresh, start_of_document)

    def record(
        self, state: ContinuousCacheState, hidden: Activations, tokens: Tokens, is_real: RealPositions
    ) -> ContinuousCacheState:
        """The state after a segment. No gradient flows into it.

        Args:
          state: that the segment has read.
          hidden: [B, T, D], after the last norm.
          tokens: int32 [B, T], the segment's inputs.
          is_real: bool [B, T].
        """
        # [B, T, 1, D]
        keys = normalize(hidden)[:, :, None]
        last_segment, last_key = external_memory.of_segment_with_next_values(
            keys, None, tokens, is_real, state.last_key
        )
        return ContinuousCacheState(state.memory, last_segment, last_key)

    def map_memory(self, state: ContinuousCacheState, change: Callable[[Memory], Memory]) -> ContinuousCacheState:
        """The same state with the memory changed, and with what waits to be written to it."""
        return dataclasses.replace(state, memory=change(state.memory), last_segment=change(state.last_segment))

    # What it computes.

    def mix(
        self,
        logits: Logits,
        hidden: Activations,
        state: ContinuousCacheState,
        mixture: MixtureNumbers,
        segment: Segment,
    ) -> tuple[Mixed, Report]:
        """The logits with the cache mixed into them, and what the cache reports.

        Gradients reach the model's logits, the hidden states and the numbers of the mixture, never what is stored.

        Args:
          logits, hidden: float32 [B, T, V] and [B, T, D], the model's predictions and what they are made from.
          state: as the segment reads it.
          mixture: theta and weight.
          segment: whose own positions these are.
        """
        queries = normalize(hidden)
        with jax.named_scope("external_memory"):
            found = look_up(queries, state.memory, self.num_neighbors, self.search)
            scaled = found.scaled(mixture.theta)
            mixed = mix_in(logits, found.tokens, scaled, mixture.weight_logit)

        weight = jnp.mean(nn.sigmoid(mixture.weight_logit))
        theta = jnp.asarray(mixture.theta, jnp.float32)
        metrics = {
            "memory_fill": jnp.mean(state.memory.valid, dtype=jnp.float32),
            "theta": theta,
            "weight": weight,
        }
        retrieved = Retrieved(found.neighbours, gate=weight[None], scale=theta[None], stores_next=True)
        report = jax.lax.stop_gradient(Report(metrics=metrics, retrieved=retrieved))
        if segment.decoding is not None:
            return mixed, report
        look_ups = LookUps(
            queries=queries[:, :, None],
            keys=queries[:, :, None],
            scale=theta[None],
            slots=found.neighbours.slots,
            logits=scaled[:, :, None],
        )
        report = recall.add_to(
            report,
            look_ups,
            state.memory,
            segment,
            self.retrieval_loss,
            self.retrieval_rows,
            stores_next=True,
        )
        return mixed, report

    def flops(self, embed_dim: int, segment_length: int) -> int:
        """Forward FLOPs of a segment of one row: the score of every slot, and the softmax over the k nearest."""
        search = matmul_flops(segment_length, embed_dim, self.memory_size)
        return search + SOFTMAX_FLOPS * segment_length * self.num_neighbors


class MixtureNumbers(NamedTuple):
    """How the cache is mixed into the prediction.

    Attributes:
      theta: factor of the scores; a number, or a float32 scalar where it is learned.
      weight_logit: float32 [B, T], whose sigmoid is the weight of the cache.
    """

    theta: Scalar | float
    weight_logit: Float[Array, "B T"]


class Mixture(nn.Module):
    """Theta and weight: as they are given, or learned."""

    config: ContinuousCache

    @nn.compact
    def __call__(self, hidden: Activations) -> MixtureNumbers:
        """Those of the positions whose hidden states [B, T, D] these are."""
        config = self.config
        weight_logit = math.log(config.weight / (1 - config.weight))
        if not config.has_parameters:
            return MixtureNumbers(config.theta, jnp.full(hidden.shape[:2], weight_logit))
        # softplus of it is theta.
        theta = self._scalar("theta", config.theta + math.log(-math.expm1(-config.theta)))
        bias = jnp.broadcast_to(self._scalar("weight", weight_logit), hidden.shape[:2])
        if config.mixing == "gated":
            gate = parameter(self, "gate", nn.initializers.zeros, hidden.shape[-1:], ("embed",))
            bias = bias + jnp.einsum("BTD,D->BT", hidden.astype(jnp.float32), gate)
        return MixtureNumbers(nn.softplus(theta), bias)

    def _scalar(self, name: str, value: float) -> Scalar:
        return parameter(self, name, nn.initializers.constant(value), (), ())


class Found(NamedTuple):
    """The slots nearest to each query.

    Attributes:
      neighbours: with one head; the scores are differentiable functions of the queries.
      tokens: int32 [B, T, K], what followed there.
    """

    neighbours: Neighbours
    tokens: Int[Array, "B T K"] | Any

    def scaled(self, theta: Scalar | float) -> Float[Array, "B T K"]:
        """theta * score of each neighbour, NO_NEIGHBOUR where there is none."""
        scores = self.neighbours.scores[:, :, 0]
        is_neighbour = scores > -jnp.inf
        return jnp.where(is_neighbour, theta * jnp.where(is_neighbour, scores, 0.0), NO_NEIGHBOUR)


def look_up(queries: Activations, memory: Memory, num_neighbors: int, search: Search) -> Found:
    """Finds the k nearest slots of each query, on every shard of the mesh its own.

    Args:
      queries: [B, T, D], normalised as the keys are; the scores are differentiable functions of them.
      memory: with one head.
      num_neighbors: k.
      search: how the nearest are found.
    """
    return external_memory.sharded(
        functools.partial(_look_up_shard, num_neighbors=num_neighbors, search=search),
        in_specs=(P("data", None, None), external_memory.specs(memory, head_axis=None)),
        out_specs=Found(
            Neighbours(slots=P("data", None, None, "memory"), scores=P("data", None, None, "memory")),
            tokens=P("data", None, "memory"),
        ),
    )(queries, jax.lax.stop_gradient(memory))


def _look_up_shard(
    queries: Activations, memory: Memory, axis_name: str | None, *, num_neighbors: int, search: Search
) -> Found:
    # [B, M, D]
    keys = memory.keys[:, 0]
    with jax.named_scope("search"):
        # [B, T, K]
        scores, slots = search.of_heads(jax.lax.stop_gradient(queries), keys, memory.valid, num_neighbors)
        scores, slots = checkpoint_name((scores, slots), NEIGHBOURS)
        scores = search_lib.best_of_all_shards(scores, num_neighbors, axis_name)
    is_neighbour = scores > -jnp.inf
    # What is no neighbour may hold anything, also NaN: the query's best slot, which comes first, stands in for it.
    slots = jnp.where(is_neighbour, slots, slots[..., :1])
    holds_any = jnp.any(memory.valid, axis=-1)

    # The gradient gathers a row's keys again: those of all rows would be K times the size of the activations.
    @jax.checkpoint
    def with_gradient(row: tuple) -> Float[Array, "T K"]:
        return retrieval.differentiable_scores(*row)

    # A query that meets an empty shard gets no gradient from whatever lies there.
    reading = jnp.where(holds_any[:, None, None], queries, 0)
    products = jax.lax.map(with_gradient, (jnp.where(is_neighbour, scores, 0.0), reading, keys, slots))
    scores = jnp.where(is_neighbour, products, -jnp.inf)
    tokens = external_memory.take_slots(memory.tokens, slots)
    slots = external_memory.first_slot(memory, axis_name) + slots
    return Found(Neighbours(slots[:, :, None], scores[:, :, None]), tokens)


class Mixed(NamedTuple):
    """A distribution over the vocabulary.

    Attributes:
      logits: float32 [B, T, V].
      log_normalizer: float32 [B, T], log of the sum of their exponentials.
    """

    logits: Logits
    log_normalizer: PerToken


def mix_in(
    logits: Logits,
    tokens: Int[Array, "B T K"],
    scaled: Float[Array, "B T K"],
    weight_logit: Float[Array, "B T"],
) -> Mixed:
    """(1 - weight) * softmax(logits) + weight * cache, as logits; the logits themselves where the cache is empty.

    Of the vocabulary only those tokens are touched that were found. As logits are, these are log-probabilities but for
    a constant of each position, log((1 - weight) / sum of exp(logits)), which the softmax takes away.

    Args:
      logits: float32 [B, T, V].
      tokens: int32 [B, T, K], what the cache found.
      scaled: float32 [B, T, K], theta * score; NO_NEIGHBOUR where there is no neighbour.
      weight_logit: float32 [B, T], whose sigmoid is the weight.
    """
    is_neighbour = scaled > NO_NEIGHBOUR
    # [B, T, K]
    weights = jnp.where(is_neighbour, jax.nn.softmax(scaled, axis=-1), 0.0)
    # [B, T, K, K]: whether the second neighbour holds the token of the first.
    is_same = (tokens[..., :, None] == tokens[..., None, :]) & is_neighbour[..., None, :]
    # [B, T, K], the cache's probability of each neighbour's token
    cached = jnp.sum(jnp.where(is_same, weights[..., None, :], 0.0), axis=-1)
    # Every token once: at the first neighbour that holds it.
    is_earlier = jnp.tri(tokens.shape[-1], k=-1, dtype=bool)[None, None]
    is_first = is_neighbour & ~jnp.any(is_same & is_earlier, axis=-1) & (cached > 0)
    # [B, T]
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    # log(weight / (1 - weight)) is `weight_logit`.
    cache = (log_normalizer + weight_logit)[..., None] + jnp.log(jnp.where(is_first, cached, 1.0))
    # log(exp(logit) + exp(cache)) - logit
    gain = jax.nn.softplus(cache - jnp.take_along_axis(logits, tokens, axis=-1))
    # Over rows and positions by vmap: a scatter with batch dimensions stays on the device of its row.
    add = jax.vmap(jax.vmap(lambda of_position, tokens, gain: of_position.at[tokens].add(gain)))
    mixed = add(logits, tokens, jnp.where(is_first, gain, 0.0))
    # The sum of exp(logits) has grown by weight / (1 - weight) of itself.
    has_any = jnp.any(is_neighbour, axis=-1)
    growth = jnp.where(has_any, jax.nn.softplus(weight_logit), 0.0)
    return Mixed(mixed, log_normalizer + growth)
