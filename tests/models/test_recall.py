"""What a memory looks up: the pairing of keys with the values that follow, metrics of hits, and the retrieval loss."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mechanisms import LENGTH, ROWS, VOCAB, Mechanism, apply_model, init_params
from test_continuous_cache import documents, read

from memorizing.batch import Batch
from memorizing.context import Context, Rngs
from memorizing.models.attention.base import normalize
from memorizing.models.attention.knn import KNNAttention
from memorizing.models.lm_config import LMConfig
from memorizing.models.memory import external_memory, recall, retrieval
from memorizing.models.memory.continuous_cache import ContinuousCache
from memorizing.models.memory.external_memory import Memory
from memorizing.models.memory.recall import LookUps, Targets, TokensAround
from memorizing.models.memory.retrieval import NO_NEIGHBOUR
from memorizing.models.memory.search import ExactSearch
from memorizing.training.step import Carried, batch_gradient

M = 3 * LENGTH
OWN = KNNAttention(M, num_neighbors=4)
NEXT = dataclasses.replace(OWN, stored_value="next")


def model_of(attention: KNNAttention) -> LMConfig:
    return Mechanism("", attention_at=((1, attention),)).config


@functools.cache
def params() -> Any:
    return jax.jit(lambda: init_params(model_of(OWN), ROWS, LENGTH, jax.random.key(0)))()


def context_after(attention: KNNAttention, num_segments: int) -> tuple[Context, tuple]:
    """What a model carries after some segments, and what it has read."""
    inputs = documents(0, num_segments)
    _, context = read(model_of(attention), params(), *inputs)
    return context, inputs


def memory_of(attention: KNNAttention, context: Context) -> Memory:
    """As the next segment reads it, if it begins no document."""
    config = model_of(attention)
    (memory,) = config.memories(config.prepare_context(context, np.zeros(ROWS, bool)))
    return memory


@pytest.mark.parametrize("num_segments", [2, 3, 5, 8])
def test_a_key_is_stored_with_the_value_of_the_position_after_it(num_segments: int):
    """The same values as with their own keys, each with the key of the slot before; none across documents."""
    own, next_ = (memory_of(each, context_after(each, num_segments)[0]) for each in (OWN, NEXT))
    np.testing.assert_array_equal(own.tokens, next_.tokens)
    own_valid, valid = np.asarray(own.valid), np.asarray(next_.valid)
    assert not (valid & ~own_valid).any()
    newest = num_segments * LENGTH % M
    for row in range(ROWS):
        order = np.roll(np.arange(M), -newest)
        for before, slot in itertools.pairwise(order):
            assert valid[row, slot] == (own_valid[row, slot] and own_valid[row, before])
            if valid[row, slot]:
                np.testing.assert_array_equal(next_.values[row, :, slot], own.values[row, :, slot])
                np.testing.assert_array_equal(next_.keys[row, :, slot], own.keys[row, :, before])
    assert valid.any() and (own_valid & ~valid).any(), "the test cannot see what it checks"


def test_what_is_found_is_what_followed():
    """One head, one neighbour, and a query that is a stored key: the value is that of the position after it."""
    memory = memory_of(NEXT, context_after(NEXT, 4)[0])
    row = int(np.argmax(np.asarray(memory.valid).sum(axis=1)))
    slots = np.flatnonzero(memory.valid[row])[:LENGTH]
    queries = jnp.broadcast_to(memory.keys[row][:, slots].swapaxes(0, 1), (ROWS, len(slots), 2, 8))
    reading = retrieval.read(queries, jnp.ones(2), memory, 1, ExactSearch())
    np.testing.assert_allclose(reading.values[row], memory.values[row][:, slots].swapaxes(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("attention", [OWN, NEXT], ids=["own", "next"])
@pytest.mark.parametrize("num_segments", [1, 3, 4, 7])
def test_the_tokens_around_a_key_are_those_of_the_document(attention: KNNAttention, num_segments: int):
    """Whatever the clock: what was read where a key was made, and what followed there, also in the next segment."""
    context, (tokens, _, _) = context_after(attention, num_segments)
    memory = memory_of(attention, context)
    following = np.random.default_rng(5).integers(0, VOCAB, (ROWS, LENGTH), np.int32)
    slots = jnp.broadcast_to(jnp.arange(M), (ROWS, M))
    around = recall.tokens_around(memory, slots, following, context["clock"], attention.stores_next)
    read_so_far = np.concatenate([tokens, following], axis=1)
    newest = num_segments * LENGTH
    for row, slot in zip(*np.nonzero(np.asarray(memory.valid)), strict=True):
        # The last position before the segment that fell on this slot; with the next value, the one before has the key.
        position = newest - 1 - (newest - 1 - slot) % M - attention.stores_next
        is_oldest = attention.stores_next and position < newest - M
        assert is_oldest or around.read[row, slot] == read_so_far[row, position]
        assert around.followed[row, slot] == read_so_far[row, position + 1]


# Hits.

B, T, N, K, H = 2, 8, 3, 4, 8


def look_ups(rng: np.random.Generator) -> tuple[LookUps, TokensAround, Memory, np.ndarray, Targets]:
    """Random ones, some without a neighbour, among few tokens; the second row ends early."""
    queries, keys = (normalize(jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32)) for _ in range(2))
    logits = np.where(rng.random((B, T, N, K)) < 0.8, rng.normal(size=(B, T, N, K)), NO_NEIGHBOUR)
    found = LookUps(
        queries,
        keys,
        jnp.asarray([1.0, 4.0, 9.0]),
        jnp.asarray(rng.integers(0, M, (B, T, N, K))),
        jnp.asarray(logits, jnp.float32),
    )
    around = TokensAround(*(jnp.asarray(rng.integers(0, 4, (B, T, N, K))) for _ in range(2)))
    tokens = rng.integers(0, 4, (B, T))
    is_real = np.arange(T)[None] < np.array([[T], [T - 3]])
    valid = jnp.asarray(rng.random((B, M)) < 0.7)
    memory = Memory(None, None, jnp.asarray(rng.integers(0, 4, (B, M))), valid)
    return found, around, memory, tokens, recall.targets(jnp.asarray(tokens), jnp.asarray(is_real))


def test_targets_are_the_next_tokens_of_the_segment():
    tokens = jnp.asarray([[3, 5, 7, 9], [2, 4, 6, 8]])
    wanted = recall.targets(tokens, jnp.asarray([[True] * 4, [True, True, False, False]]))
    np.testing.assert_array_equal(wanted.known, [[True, True, True, False], [True, False, False, False]])
    np.testing.assert_array_equal(np.asarray(wanted.tokens)[np.asarray(wanted.known)], [5, 7, 9, 4])


def test_metrics_count_hits():
    """Against plain counting; with eight queries a row, all of them are measured here."""
    found, around, memory, tokens, wanted = look_ups(np.random.default_rng(0))
    metrics = recall.recall_metrics(found.logits, around, memory, jnp.asarray(tokens), wanted)
    queries = [(b, t) for b in range(B) for t in range(T) if wanted.known[b, t]]
    candidates = [
        memory.tokens[b, slot] == wanted.tokens[b, t] for b, t in queries for slot in range(M) if memory.valid[b, slot]
    ]
    np.testing.assert_allclose(metrics["hit_chance"], np.mean(candidates), rtol=1e-5)
    for head in range(N):
        hits, same, on_hits, entropies = [], [], [], []
        for b, t in queries:
            exists = np.asarray(found.logits[b, t, head]) > NO_NEIGHBOUR
            weights = np.asarray(jax.nn.softmax(found.logits[b, t, head][exists]))
            is_hit = np.asarray(around.followed)[b, t, head, exists] == wanted.tokens[b, t]
            hits += list(is_hit)
            same += list(np.asarray(around.read)[b, t, head, exists] == tokens[b, t])
            on_hits.append(weights[is_hit].sum())
            entropies.append(-(weights * np.log(weights)).sum())
        expected = {
            "hit_share": np.mean(hits),
            "same_token_share": np.mean(same),
            "hit_weight": np.mean(on_hits),
            "weight_entropy": np.mean(entropies),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name][head], value, rtol=1e-5, err_msg=name)


def test_metrics_of_an_empty_memory_are_finite():
    found, around, memory, tokens, wanted = look_ups(np.random.default_rng(0))
    nothing = jnp.full_like(found.logits, NO_NEIGHBOUR)
    metrics = recall.recall_metrics(nothing, around, external_memory.cleared(memory), jnp.asarray(tokens), wanted)
    for name, value in metrics.items():
        assert not np.any(value), name


@pytest.mark.parametrize("num_rows", [1, 2, 5])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_the_retrieval_loss_is_that_of_its_definition(num_rows: int, is_weighted: bool):
    """There are two rows: of more than there are nothing is added, least of all a row's own future."""
    found, around, _, tokens, wanted = look_ups(np.random.default_rng(1))
    taught = np.random.default_rng(2).integers(0, 3, (B, T)).astype(np.float32) if is_weighted else None
    total = 0.0
    for b, t, n in np.ndindex(B, T, N):
        if not wanted.known[b, t]:
            continue
        logits = [float(logit) for logit in found.logits[b, t, n]]
        followed = [int(token) for token in around.followed[b, t, n]]
        for s in range(t):
            logits.append(float(found.scale[n] * found.queries[b, t, n] @ found.keys[b, s, n]))
            followed.append(int(tokens[b, s + 1]))
        for s in range(T if num_rows > 1 else 0):
            if wanted.known[1 - b, s]:
                logits.append(float(found.scale[n] * found.queries[b, t, n] @ found.keys[1 - b, s, n]))
                followed.append(int(tokens[1 - b, s + 1]))
        weights = np.exp(np.array(logits) - max(logits))
        on_hits = weights[np.array(followed) == wanted.tokens[b, t]].sum()
        if on_hits > 0:
            total -= np.log(on_hits / weights.sum()) * (1 if taught is None else taught[b, t])
    measured = recall.retrieval_loss(found, around.followed, wanted, taught, num_rows)
    np.testing.assert_allclose(measured, total / (B * T * N), rtol=1e-5)


def test_the_retrieval_loss_reaches_queries_keys_and_scale_and_nothing_that_does_not_count():
    found, around, _, _, wanted = look_ups(np.random.default_rng(1))

    def loss(queries: jax.Array, keys: jax.Array, scale: jax.Array, logits: jax.Array) -> jax.Array:
        of = found._replace(queries=queries, keys=keys, scale=scale, logits=logits)
        return recall.retrieval_loss(of, around.followed, wanted)

    inputs = (found.queries, found.keys, found.scale, found.logits)
    queries, keys, scale, logits = jax.grad(loss, argnums=(0, 1, 2, 3))(*inputs)
    for gradient in (queries, keys, scale, logits):
        assert np.isfinite(gradient).all() and np.any(gradient)
    # The last position has no target here, and is nobody's earlier position; beyond the end nothing counts.
    for gradient in (queries, keys, logits):
        assert not np.any(gradient[0, -1]) and not np.any(gradient[1, -4:])


@pytest.mark.parametrize("part", ["layer", "cache"])
def test_training_on_the_loss_turns_look_ups_into_hits(part: str):
    """A text of random words that repeats: 40 steps on the auxiliary loss alone bring the attention to hits."""
    if part == "layer":
        config = model_of(dataclasses.replace(NEXT, retrieval_loss=1.0))
    else:
        cache = ContinuousCache(M, num_neighbors=4, theta=4.0, retrieval_loss=1.0)
        config = dataclasses.replace(Mechanism("").config, continuous_cache=cache)
    text = np.tile(np.random.default_rng(0).permutation(VOCAB)[: 2 * LENGTH], 4)[None].repeat(ROWS, axis=0)
    segments = text.reshape(ROWS, 8, LENGTH).swapaxes(0, 1).astype(np.int32)
    values = jax.jit(lambda: init_params(config, ROWS, LENGTH, jax.random.key(0)))()

    @jax.jit
    def step(values: Any) -> tuple[Any, jax.Array]:
        def loss(values: Any) -> tuple[jax.Array, jax.Array]:
            context = config.init_context(ROWS, LENGTH)
            losses, shares = 0.0, []
            for segment in segments:
                everything = jnp.ones((ROWS, LENGTH), bool)
                output = apply_model(config, values, segment, everything, jnp.zeros(ROWS, bool), context)
                context = output.context
                losses += sum(output.report.losses.values())
                shares.append(next(v for k, v in output.report.metrics.items() if k.endswith("hit_weight")).mean())
            return losses, shares[-1]

        gradient, share = jax.grad(loss, has_aux=True)(values)
        return jax.tree.map(lambda value, change: value - 0.5 * change, values, gradient), share

    shares = []
    for _ in range(40):
        values, share = step(values)
        shares.append(float(share))
    assert shares[-1] > 1.5 * shares[0], (shares[0], shares[-1])


def batch_with_answers(counts: tuple[int, ...]) -> Batch:
    """Words that come again in every segment; so many predictions of a row are scored, all of them for -1."""
    tokens = np.tile(np.arange(LENGTH // 2, dtype=np.int32), (len(counts), 3, 2))
    is_real = np.ones(tokens.shape, bool)
    is_real[1, 2, 3:] = False
    order = np.random.default_rng(0).permuted(np.broadcast_to(np.arange(3 * LENGTH), (len(counts), 3 * LENGTH)), axis=1)
    is_answer = (order.reshape(tokens.shape) < np.array(counts)[:, None, None]) | (np.array(counts) < 0)[:, None, None]
    start = np.zeros((len(counts), 3), bool)
    start[:, 0] = True
    loss_weights = (is_answer & is_real).astype(np.float32)
    return Batch(tokens, np.roll(tokens, -1, axis=2), loss_weights, is_real, start)


def test_in_text_every_position_counts_equally_in_the_retrieval_loss():
    batch = batch_with_answers((-1, -1, -1, -1))
    taught = np.asarray(recall.teaching_weights(batch))
    np.testing.assert_array_equal(taught, batch.is_real)


def test_what_stands_between_answers_is_no_part_of_the_mean():
    """What has no target, the last position of a segment or of a document, is one as before."""
    batch = batch_with_answers((5, 0, 1, 0))
    taught = np.asarray(recall.teaching_weights(batch))
    np.testing.assert_array_equal(taught > 0, batch.loss_weights > 0)
    known = np.asarray(recall.targets(batch.tokens, batch.is_real).known)
    not_taught = known & (batch.loss_weights == 0)
    np.testing.assert_allclose(taught[taught > 0], taught.size / (taught.size - not_taught.sum()), rtol=1e-6)


@pytest.mark.parametrize("part", ["layer", "cache"])
@pytest.mark.parametrize("counts", [(1, 9, 0, 2), (-1, 4, -1, 0)])
def test_microbatches_teach_what_the_whole_batch_does(part: str, counts: tuple[int, ...]):
    """However the answers are distributed over the rows; and what stands between them is not taught."""
    batch = batch_with_answers(counts)
    config = model_of(dataclasses.replace(NEXT, retrieval_loss=10.0))
    if part == "cache":
        cache = ContinuousCache(M, num_neighbors=4, retrieval_loss=10.0)
        config = dataclasses.replace(Mechanism("").config, continuous_cache=cache)
    values = jax.jit(lambda: init_params(config, len(counts), LENGTH, jax.random.key(0)))()
    rngs = Rngs(jax.random.key(0), jnp.arange(len(counts)))
    before = Carried(config.init_context(len(counts), LENGTH), {})

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(batch: Batch, num_microbatches: int) -> tuple[Any, dict]:
        gradient, _, metrics = batch_gradient(config, values, batch, before, rngs, num_microbatches)
        return gradient, metrics

    def retrieval_loss(metrics: dict) -> jax.Array:
        (loss,) = (value for name, value in metrics.items() if name.endswith("retrieval_loss"))
        return loss

    whole, metrics = gradient(batch, 1)
    assert retrieval_loss(metrics) > 0
    for num_microbatches in (2, 4):
        parts, of_parts = gradient(batch, num_microbatches)
        np.testing.assert_allclose(retrieval_loss(of_parts), retrieval_loss(metrics), rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), parts, whole)
    _, of_nothing = gradient(batch._replace(loss_weights=0 * batch.loss_weights), 1)
    assert retrieval_loss(of_nothing) == 0
