"""Whether a memory looks anything up: what the slots that it found lead to, as metrics and as an auxiliary loss.

A slot is a *hit* where the token that followed its key is the one that has to be predicted. Targets are known within a
segment, so that its last position has none and counts nowhere.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from memorizing.array_typing import Clock, HeadScale, Keys, Queries, Scalar, Tokens
from memorizing.batch import Batch
from memorizing.context import Report, Segment
from memorizing.models.memory.external_memory import Memory, take_slots
from memorizing.models.memory.retrieval import NO_NEIGHBOUR

# Of so many queries of a segment, at equal distances, a row is measured.
_MEASURED_QUERIES = 8


class TokensAround(NamedTuple):
    """What stood around the keys of some slots.

    Attributes:
      read: int32, the token that was read where the key was made.
      followed: int32, the token after it.
    """

    read: Int[Array, "B *rest"]
    followed: Int[Array, "B *rest"]


def tokens_around(
    memory: Memory,
    slots: Int[Array, "B *rest"],
    tokens: Tokens,
    clock: Clock,
    stores_next: bool,
) -> TokensAround:
    """The tokens around the keys of some slots of a memory, each of its own row.

    Args:
      memory: as a segment reads it.
      slots: of it.
      tokens: int32 [B, T], of that segment.
      clock: int32 scalar, segments processed before it.
      stores_next: whether a slot holds the key of the position before its own.
    """
    num_slots = memory.tokens.shape[1]
    own = take_slots(memory.tokens, slots)
    if stores_next:
        # For the oldest slot this is the newest token: what was read there is gone.
        return TokensAround(read=take_slots(memory.tokens, (slots - 1) % num_slots), followed=own)
    newest = (clock * tokens.shape[1] - 1) % num_slots
    # What followed the newest slot is the segment's first token.
    first = tokens[:, 0].reshape(-1, *(1,) * (slots.ndim - 1))
    followed = jnp.where(slots == newest, first, take_slots(memory.tokens, (slots + 1) % num_slots))
    return TokensAround(read=own, followed=followed)


class Targets(NamedTuple):
    """What each position of a segment has to predict, as far as the segment itself tells.

    Attributes:
      tokens: int32 [..., T].
      known: bool [..., T], false at the last real position and after it.
    """

    tokens: Int[Array, "*rows T"]
    known: Bool[Array, "*rows T"]


def targets(tokens: Int[Array, "*rows T"], is_real: Bool[Array, "*rows T"]) -> Targets:
    """The targets of a segment's own positions."""
    # The last position's is the first token, which is not used.
    has_next = jnp.roll(is_real, -1, axis=-1).at[..., -1].set(False)
    return Targets(jnp.roll(tokens, -1, axis=-1), is_real & has_next)


class LookUps(NamedTuple):
    """What the own positions of a segment looked up.

    Attributes:
      queries, keys: [B, T, N, H]; where there is an auxiliary loss both are of length 1.
      scale: float32 [N], factor of their products.
      slots: int32 [B, T, N, K], of the neighbours that were found.
      logits: float32 [B, T, N, K], before the softmax over K; NO_NEIGHBOUR where there is none.
    """

    queries: Queries
    keys: Keys
    scale: HeadScale
    slots: Int[Array, "B T N K"]
    logits: Float[Array, "B T N K"]


def add_to(
    report: Report,
    look_ups: LookUps,
    memory: Memory,
    segment: Segment,
    loss_factor: float,
    loss_rows: int,
    stores_next: bool,
) -> Report:
    """The report with what the neighbours led to: metrics, and the auxiliary loss.

    Args:
      report: of the layer.
      look_ups: of a whole segment.
      memory: as the segment read it.
      segment: it.
      loss_factor: of the auxiliary loss; 0 for none.
      loss_rows: see `retrieval_loss`.
      stores_next: see `tokens_around`.
    """
    assert segment.tokens is not None and segment.clock is not None, "a layer with a memory is told both"
    wanted = targets(segment.tokens, segment.layout.own(segment.is_real))
    around = tokens_around(memory, look_ups.slots, segment.tokens, segment.clock, stores_next)
    metrics = recall_metrics(look_ups.logits, around, memory, segment.tokens, wanted)
    losses = dict(report.losses)
    if loss_factor:
        nats = retrieval_loss(look_ups, around.followed, wanted, segment.taught, loss_rows)
        losses["retrieval_loss"] = loss_factor * nats
    return dataclasses.replace(report, losses=losses, metrics={**report.metrics, **metrics})


def recall_metrics(
    logits: Float[Array, "B T N K"],
    around: TokensAround,
    memory: Memory,
    tokens: Tokens,
    wanted: Targets,
) -> dict[str, jax.Array]:
    """How well a few queries of each row looked up; float32, means over them.

    Args:
      logits: of the neighbours, before the softmax over K; NO_NEIGHBOUR where there is none.
      around: int32 [B, T, N, K], tokens around the neighbours' keys.
      memory: that was read.
      tokens: int32 [B, T], of the segment.
      wanted: what its positions have to predict.

    Returns:
      hit_share [N]: share of the neighbours that are hits.
      hit_weight [N]: share of the attention that is on hits.
      hit_chance: share of the target among all tokens of the memory, which a search at random would find.
      same_token_share [N]: share of the neighbours that were read where the same token was.
      weight_entropy [N]: of the attention to the neighbours, in nats.
    """
    every = max(tokens.shape[1] // _MEASURED_QUERIES, 1)
    logits, read, followed, tokens, target, known = (array[:, ::every] for array in (logits, *around, tokens, *wanted))
    num_slots = jnp.sum(memory.valid, axis=1)
    # [B, Q]: queries that have a target and something to find.
    counts = known & (num_slots > 0)[:, None]
    # [B, Q, N, K]
    exists = (logits > NO_NEIGHBOUR) & counts[:, :, None, None]
    is_hit = exists & (followed == target[:, :, None, None])
    is_same = exists & (read == tokens[:, :, None, None])
    weights = jnp.where(exists, jax.nn.softmax(logits, axis=-1), 0.0)
    nats = -jnp.sum(weights * jnp.log(jnp.where(weights > 0, weights, 1.0)), axis=-1)

    def count_in_memory(query: tuple[Int[Array, "B"], Bool[Array, "B"]]) -> Int[Array, "B"]:
        target, is_counted = query
        is_target = (memory.tokens == target[:, None]) & memory.valid & is_counted[:, None]
        return jnp.sum(is_target, axis=1)

    # One query after the other: all of them at once would take as much room as a part of the memory.
    would_hit = jax.lax.map(count_in_memory, (target.T, counts.T))

    # Sums over a row: by head [B, N], and of all heads [B].
    of_heads = [
        jnp.sum(is_hit, axis=(1, 3)),
        jnp.sum(weights * is_hit, axis=(1, 3)),
        jnp.sum(is_same, axis=(1, 3)),
        jnp.sum(nats, axis=1),
        jnp.sum(exists, axis=(1, 3)),
    ]
    of_rows = [
        jnp.sum(would_hit, axis=0),
        jnp.sum(counts, axis=1),
        jnp.sum(counts, axis=1) * num_slots,
    ]
    # Over rows in one reduction: on a mesh each is an exchange between devices. [N, 8]
    by_row = [*of_heads, *(jnp.broadcast_to(row[:, None], of_heads[0].shape) for row in of_rows)]
    totals = jnp.sum(jnp.stack(by_row, axis=-1).astype(jnp.float32), axis=0)
    hits, hit_weight, same, nats, num_neighbours, would_hit, num_queries, num_candidates = jnp.moveaxis(totals, -1, 0)
    metrics = {
        "hit_share": hits / jnp.maximum(num_neighbours, 1),
        "hit_weight": hit_weight / jnp.maximum(num_queries, 1),
        "hit_chance": would_hit[0] / jnp.maximum(num_candidates[0], 1),
        "same_token_share": same / jnp.maximum(num_neighbours, 1),
        "weight_entropy": nats / jnp.maximum(num_queries, 1),
    }
    return jax.lax.stop_gradient(metrics)


def retrieval_loss(
    look_ups: LookUps,
    followed: Int[Array, "B T N K"],
    wanted: Targets,
    taught: Float[Array, "B T"] | None = None,
    num_rows: int = 1,
) -> Scalar:
    """-log of the attention to hits, among the neighbours found and positions of the batch.

    Those are the earlier positions of the own segment, and all of the segments of other rows if these are asked for.

    That is the objective of TRIME (Zhong et al. 2022, equation 4 without the vocabulary) on the layer's own scores. The
    segment's keys get a gradient, so that keys and queries learn to meet; the memory's only if it is read with one. A
    position at which there is no hit to be found counts nothing.

    Args:
      look_ups: of the segment.
      followed: int32 [B, T, N, K], the token after the key of each neighbour.
      wanted: what the positions have to predict.
      taught: float32 [B, T], how much each position counts; None for equally much. See `teaching_weights`.
      num_rows: rows of the batch (of a microbatch) whose segments have candidates, the own included: TRIME's in-batch
        memories, and the negatives of other documents of the Focused Transformer (Tworkowski et al. 2023).

    Returns:
      Nats a position and head.
    """
    batch_size, length, num_heads, _ = look_ups.queries.shape
    all_logits = [look_ups.logits]
    all_tokens = [followed]
    for shift in range(min(num_rows, batch_size)):
        keys, tokens, known = (jnp.roll(rows, shift, axis=0) for rows in (look_ups.keys, *wanted))
        products = jnp.einsum("BTNH,BSNH->BTNS", look_ups.queries, keys, preferred_element_type=jnp.float32)
        scores = products * look_ups.scale[None, None, :, None]
        is_candidate = known[:, None, None, :]
        if shift == 0:
            # What followed an earlier position is known: it is the next one at the latest.
            is_candidate &= jnp.tri(length, k=-1, dtype=bool)[None, :, None, :]
        all_logits.append(jnp.where(is_candidate, scores, NO_NEIGHBOUR))
        all_tokens.append(jnp.broadcast_to(tokens[:, None, None, :], scores.shape))

    # [B, T, N, K + rows * S]
    logits = jnp.concatenate(all_logits, axis=-1)
    led_to = jnp.concatenate(all_tokens, axis=-1)
    is_hit = (led_to == wanted.tokens[:, :, None, None]) & (logits > NO_NEIGHBOUR)

    has_hit = jnp.any(is_hit, axis=-1) & wanted.known[:, :, None]
    of_hits = jax.nn.logsumexp(jnp.where(is_hit, logits, NO_NEIGHBOUR), axis=-1)
    nats = jnp.where(has_hit, jax.nn.logsumexp(logits, axis=-1) - of_hits, 0.0)
    if taught is not None:
        nats *= taught[:, :, None]
    return jnp.sum(nats) / (batch_size * length * num_heads)


def teaching_weights(batch: Batch) -> Float[Array, "B U T"]:
    """How much each position of a batch counts in the retrieval loss: those alone whose predictions the loss counts.

    Of a task that scores only answers, what stands between them is neither taught nor a part of the mean. In text every
    position counts 1.

    Args:
      batch: the whole one: a part of it may have more answers than another.
    """
    is_counted = batch.loss_weights > 0
    # Positions that have a target in their segment and are not taught.
    num_left_out = jnp.sum(targets(batch.tokens, batch.is_real).known & ~is_counted)
    num_positions = is_counted.size
    return jnp.where(is_counted, num_positions / (num_positions - num_left_out), 0.0)
