"""The continuous cache: what it predicts, what it must not see, and that it is the same however the work is cut."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from mechanisms import ALL_REAL, LENGTH, NO_START, ROWS, VOCAB, Mechanism, apply_model, init_params, random_tokens

from memorizing import context as context_lib
from memorizing.context import Context
from memorizing.cost.flops import segment_flops
from memorizing.errors import UserError
from memorizing.models.attention.xl import XLAttention
from memorizing.models.lm_config import LMConfig
from memorizing.models.losses import next_token_nats
from memorizing.models.memory import external_memory
from memorizing.models.memory.continuous_cache import CONTINUOUS_CACHE, ContinuousCache, mix_in
from memorizing.runtime import sharding

CACHE = ContinuousCache(memory_size=3 * LENGTH, num_neighbors=4, theta=5.0, weight=0.4)
# Every slot is a neighbour: what is in the cache shows.
ALL_SLOTS = dataclasses.replace(CACHE, num_neighbors=3 * LENGTH)
PLAIN = Mechanism("full").config
WITH_CACHE = dataclasses.replace(PLAIN, continuous_cache=CACHE)


@functools.cache
def params_of(config: LMConfig) -> Any:
    return jax.jit(lambda: init_params(config, 4, LENGTH, jax.random.key(0)))()


@functools.cache
def forward_of(config: LMConfig) -> Any:
    return jax.jit(lambda *inputs: apply_model(config, *inputs)[:2])


def read(
    config: LMConfig, params: Any, tokens: np.ndarray, is_real: np.ndarray, starts: np.ndarray, length: int = LENGTH
) -> tuple[np.ndarray, Context]:
    """Logits of whole rows [B, length * segments, V], and the context after them.

    Args:
      starts: bool [B, segments].
    """
    context, logits = config.init_context(len(tokens), length), []
    for index, start in enumerate(starts.T):
        own = slice(index * length, (index + 1) * length)
        part, context = forward_of(config)(params, tokens[:, own], is_real[:, own], start, context)
        logits.append(np.asarray(part))
    return np.concatenate(logits, axis=1), context


def documents(seed: int, num_segments: int, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, is_real and starts of rows whose documents begin at different times and end within segments."""
    rng = np.random.default_rng(seed)
    # Few different tokens, so that the same one is found several times.
    tokens = rng.integers(1, VOCAB // 4, (rows, num_segments * LENGTH), np.int32)
    is_real, starts = np.ones(tokens.shape, bool), np.zeros((rows, num_segments), bool)
    starts[:, 0] = True
    for row in range(rows):
        for start in range(row + 2, num_segments, 4):
            starts[row, start] = True
            is_real[row, start * LENGTH - rng.integers(1, LENGTH) : start * LENGTH] = False
    return tokens, is_real, starts


def expected_log_probabilities(
    cache: ContinuousCache, table: np.ndarray, logits: np.ndarray, inputs: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Equations 3 to 5 of Grave et al. 2017 in float64, by position, for the k nearest of the last M positions.

    The hidden states are what the model's logits are made from: its table has more rows than columns.

    Returns:
      Log probabilities; and the same with the next nearest in the place of the last of the k, where the two differ by
      rounding only: the same few tokens came before several places.
    """
    tokens, is_real, starts = inputs
    table, logits = table.astype(np.float64), logits.astype(np.float64)
    width = table.shape[1]
    hidden = np.linalg.lstsq(table * width**-0.5, logits.reshape(-1, VOCAB).T, rcond=None)[0].T
    hidden = hidden.reshape(*logits.shape[:2], width)
    hidden /= np.linalg.norm(hidden, axis=-1, keepdims=True)
    expected, alternative = np.empty_like(logits), np.empty_like(logits)
    for row in range(len(tokens)):
        document_start = 0
        for position in range(tokens.shape[1]):
            segment = position // LENGTH
            if starts[row, segment]:
                document_start = segment * LENGTH
            model = np.exp(logits[row, position] - logits[row, position].max())
            model /= model.sum()
            first = max(document_start + 1, segment * LENGTH - cache.memory_size)
            # The token at a place followed the hidden state before it.
            places = [place for place in range(first, segment * LENGTH) if is_real[row, place]]
            scores = np.array([hidden[row, position] @ hidden[row, place - 1] for place in places])
            by_score = np.argsort(-scores, kind="stable")
            nearest = by_score[: cache.num_neighbors]
            also_nearest = nearest.copy()
            if len(by_score) > len(nearest):
                last, next_one = by_score[len(nearest) - 1 :][:2]
                also_nearest[-1] = next_one if scores[last] - scores[next_one] < 1e-6 else last
            for found, result in ((nearest, expected), (also_nearest, alternative)):
                cached, weights = np.zeros(VOCAB), np.exp(cache.theta * scores[found])
                for which, weight in zip(found, weights, strict=True):
                    cached[tokens[row, places[which]]] += weight / weights.sum()
                share = cache.weight if places else 0.0
                result[row, position] = np.log((1 - share) * model + share * cached)
    return expected, alternative


@pytest.mark.parametrize("cache", [CACHE, ALL_SLOTS], ids=["nearest", "all slots"])
def test_agrees_with_the_equation(cache: ContinuousCache):
    """Whole documents, longer than the cache, which end within segments and begin at different times."""
    config = dataclasses.replace(PLAIN, continuous_cache=cache)
    inputs, params = documents(0, num_segments=9), params_of(PLAIN)
    is_real = inputs[1]
    alone, _ = read(PLAIN, params, *inputs)
    mixed, _ = read(config, params, *inputs)
    table = np.asarray(params["embedder"]["table"])
    expected, alternative = expected_log_probabilities(cache, table, alone, inputs)
    np.testing.assert_allclose(np.exp(expected).sum(axis=-1), 1, rtol=0, atol=1e-9)
    measured = np.asarray(jax.nn.log_softmax(mixed))
    is_alternative = np.abs(measured - alternative).max(axis=-1) < np.abs(measured - expected).max(axis=-1)
    expected = np.where(is_alternative[..., None], alternative, expected)
    np.testing.assert_allclose(measured[is_real], expected[is_real], rtol=0, atol=3e-4)
    difference = np.abs(measured - np.asarray(jax.nn.log_softmax(alone)))
    assert difference[is_real].max() > 1, "the test cannot see what it checks"


def test_an_empty_cache_changes_no_bit():
    inputs, params = documents(0, num_segments=1), params_of(PLAIN)
    alone, _ = read(PLAIN, params, *inputs)
    mixed, context = read(WITH_CACHE, params, *inputs)
    np.testing.assert_array_equal(mixed, alone)
    # Also one that was emptied after it had held something.
    tokens = random_tokens(np.random.default_rng(1))
    cleared = WITH_CACHE.map_memories(context, external_memory.cleared)
    logits = [
        forward_of(config)(params, tokens, ALL_REAL, NO_START, before)[0]
        for config, before in ((WITH_CACHE, cleared), (PLAIN, {key: context[key] for key in PLAIN.context_axes()}))
    ]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("place", [0, 3, LENGTH - 1])
def test_a_token_is_found_from_the_next_segment_on(place: int):
    """Never by the position that predicts it, nor by any of its own segment, whatever the place; then while M reach."""
    config = dataclasses.replace(PLAIN, continuous_cache=ALL_SLOTS)
    rng, num_segments = np.random.default_rng(0), 8
    tokens = rng.integers(1, VOCAB - 1, (ROWS, num_segments * LENGTH), np.int32)
    only = VOCAB - 1
    tokens[:, 2 * LENGTH + place] = only
    starts = np.zeros((ROWS, num_segments), bool)
    inputs = (tokens, np.ones(tokens.shape, bool), starts)
    alone, mixed = (jax.nn.log_softmax(read(each, params_of(PLAIN), *inputs)[0]) for each in (PLAIN, config))
    gain = np.asarray(mixed - alone)[:, LENGTH:, only].reshape(ROWS, num_segments - 1, LENGTH)
    # The segments from 1 on: 1 and 2 have not stored it, 3 to 5 find it, and from 6 on it is forgotten.
    np.testing.assert_allclose(gain[:, [0, 1, 5, 6]], np.log(1 - CACHE.weight), rtol=0, atol=1e-5)
    assert (gain[:, 2:5] > np.log(1 - CACHE.weight) + 1e-3).all()


def test_a_document_is_not_continued_by_the_next_one():
    """The first token of a document did not follow the last one of the document before, in the same row."""
    config = dataclasses.replace(PLAIN, continuous_cache=ALL_SLOTS)
    tokens = random_tokens(np.random.default_rng(0), 2 * LENGTH)
    starts = np.array([[True, True], [True, False], [True, True]])
    _, context = read(config, params_of(PLAIN), tokens, np.ones(tokens.shape, bool), starts)
    valid = np.asarray(context[CONTINUOUS_CACHE].last_segment.valid)
    np.testing.assert_array_equal(valid[:, 0], [False, True, False])
    assert valid[:, 1:].all()


def test_segments_of_two_lengths_agree_where_both_have_stored_the_same():
    """A position of the first half of a long segment sees what it sees in a short one."""
    window = XLAttention(window=LENGTH, same_length=True)
    config = dataclasses.replace(PLAIN, attention=window, continuous_cache=dataclasses.replace(CACHE, memory_size=32))
    tokens = random_tokens(np.random.default_rng(0), 8 * LENGTH)
    is_real, starts = np.ones(tokens.shape, bool), np.zeros((ROWS, 8), bool)
    short, _ = read(config, params_of(config), tokens, is_real, starts)
    long, _ = read(config, params_of(config), tokens, is_real, starts[:, ::2], length=2 * LENGTH)
    in_first_half = np.arange(tokens.shape[1]) % (2 * LENGTH) < LENGTH
    np.testing.assert_allclose(long[:, in_first_half], short[:, in_first_half], rtol=0, atol=2e-5)
    assert np.abs(long - short)[:, ~in_first_half].max() > 1e-3, "the test cannot see what it checks"


# What is learned.


def dense_mix(logits: jax.Array, tokens: jax.Array, scaled: jax.Array, weight_logit: jax.Array) -> jax.Array:
    """The mixture as it is written: a distribution of the cache over the whole vocabulary."""
    weights = jax.nn.softmax(scaled)
    cached = jnp.sum(weights[..., None] * jax.nn.one_hot(tokens, logits.shape[-1]), axis=-2)
    weight = jax.nn.sigmoid(weight_logit)[..., None]
    return jnp.log((1 - weight) * jax.nn.softmax(logits) + weight * cached)


def normalised(logits: jax.Array, *arguments: Any) -> jax.Array:
    """What `mix_in` gives as log-probabilities, by the normaliser that it gives."""
    mixed = mix_in(logits, *arguments)
    return mixed.logits - mixed.log_normalizer[..., None]


def test_the_mixture_and_its_gradients_are_those_of_the_dense_one():
    rng = np.random.default_rng(0)
    logits, scores = rng.normal(size=(2, 5, 9)).astype(np.float32), rng.normal(size=(2, 5, 6)).astype(np.float32)
    tokens, weight_logit = rng.integers(0, 9, (2, 5, 6)), rng.normal(size=(2, 5)).astype(np.float32)
    targets = jnp.asarray(rng.integers(0, 9, (2, 5)))

    def loss(mix: Any, logits: Any, scores: Any, theta: Any, weight_logit: Any) -> jax.Array:
        mixed = mix(logits, jnp.asarray(tokens), theta * scores, weight_logit)
        return next_token_nats(mixed, targets).sum() + jnp.sin(mixed).sum(), mixed

    arguments = (logits, scores, np.float32(3.0), weight_logit)
    (expected, expected_mixed), (measured, mixed) = (
        jax.grad(functools.partial(loss, mix), argnums=(0, 1, 2, 3), has_aux=True)(*arguments)
        for mix in (dense_mix, normalised)
    )
    np.testing.assert_allclose(mixed, expected_mixed, rtol=0, atol=1e-5)
    for new, old in zip(measured, expected, strict=True):
        np.testing.assert_allclose(new, old, rtol=0, atol=2e-5)


@pytest.mark.parametrize("mixing", ["learned", "gated"])
def test_what_is_learned_begins_with_the_given_numbers_and_gets_gradients(mixing: str):
    config = dataclasses.replace(PLAIN, continuous_cache=dataclasses.replace(CACHE, mixing=mixing))
    params, inputs = params_of(config), documents(0, num_segments=3)
    assert set(params) - set(params_of(PLAIN)) == {CONTINUOUS_CACHE}
    learned, context = read(config, params, *inputs)
    fixed, _ = read(WITH_CACHE, {key: params[key] for key in params_of(PLAIN)}, *inputs)
    np.testing.assert_allclose(learned, fixed, rtol=0, atol=1e-5)
    tokens = random_tokens(np.random.default_rng(1))

    def loss(params: Any) -> jax.Array:
        output = apply_model(config, params, tokens, ALL_REAL, NO_START, context)
        return next_token_nats(output.logits, tokens).sum()

    gradients = jax.jit(jax.grad(loss))(params)[CONTINUOUS_CACHE]
    assert set(gradients) == {"theta", "weight"} | ({"gate"} if mixing == "gated" else set())
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all() and np.any(gradient), name


def test_a_fixed_cache_has_no_parameters_and_fits_any_finished_model():
    assert jax.tree.structure(params_of(WITH_CACHE)) == jax.tree.structure(params_of(PLAIN))


# On a mesh.


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 3)], ids=["rows, heads and slots", "slots alone"])
def test_sharded_equals_unsharded(shape: tuple[int, int, int]):
    """Logits, what is stored, and gradients. The slots of a shard may all be empty, or all better than the others'."""
    cache = dataclasses.replace(CACHE, memory_size=6 * LENGTH, mixing="gated")
    config = dataclasses.replace(PLAIN, continuous_cache=cache)
    params = params_of(config)
    tokens, is_real, starts = documents(0, num_segments=8, rows=4)
    mesh = Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), ("data", "model", "memory"))

    def step(params: Any, context: Context, *inputs: Any) -> tuple:
        def loss(params: Any) -> tuple:
            output = apply_model(config, params, *inputs, context)
            return next_token_nats(output.logits, inputs[0]).mean(), output

        gradient, output = jax.grad(loss, has_aux=True)(params)
        return gradient, output.logits, output.context

    abstract = jax.eval_shape(lambda: config.init_context(4, LENGTH))
    shardings = sharding.tree_shardings(mesh, abstract, config.context_axes(), sharding.STATE_RULES)
    rows = NamedSharding(mesh, P("data"))
    alone, on_mesh = jax.jit(step), jax.jit(step, out_shardings=(None, None, shardings))
    expected_context = config.init_context(4, LENGTH)
    context = jax.device_put(expected_context, shardings)
    for index, start in enumerate(starts.T):
        own = slice(index * LENGTH, (index + 1) * LENGTH)
        inputs = (tokens[:, own], is_real[:, own], start)
        expected_gradient, expected_logits, expected_context = alone(params, expected_context, *inputs)
        with jax.set_mesh(mesh):
            placed = jax.device_put(inputs, rows)
            gradient, logits, context = on_mesh(params, context, *placed)
        np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=2e-5)
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
        jax.tree.map(close, gradient, expected_gradient)
        jax.tree.map(close, context, expected_context)
    assert np.asarray(context[CONTINUOUS_CACHE].memory.valid).any()


# As a memory of the model.


def test_a_reset_hides_what_is_stored_and_does_not_touch_it():
    _, context = read(WITH_CACHE, params_of(PLAIN), *documents(0, num_segments=2))
    state = context[CONTINUOUS_CACHE]
    reset = CACHE.reset(state, np.ones(ROWS, bool))
    for name in ("memory", "last_segment"):
        old, new = getattr(state, name), getattr(reset, name)
        assert new.keys is old.keys and new.values is old.values
        assert not np.asarray(new.valid).any()
    assert not np.asarray(reset.last_key.valid).any()


def test_state_and_axes_have_one_structure():
    def check(leaf: jax.Array, names: tuple[str, ...]) -> None:
        assert len(names) == leaf.ndim and names[0] == "batch"

    jax.tree.map(check, CACHE.init_state(16, jnp.float32, ROWS, LENGTH), CACHE.state_axes())


def test_it_is_a_memory_of_the_model():
    assert WITH_CACHE.has_memory and WITH_CACHE.memory_sizes == {CONTINUOUS_CACHE: 3 * LENGTH}
    larger = WITH_CACHE.with_memory_size(4 * LENGTH)
    assert larger.continuous_cache == dataclasses.replace(CACHE, memory_size=4 * LENGTH)
    assert WITH_CACHE.without_memory() == WITH_CACHE.without_context() == PLAIN
    # A slot holds a key of 16 floats, a token id, and whether it is filled; the last key stands beside.
    num_slots = CACHE.memory_size + LENGTH
    added = WITH_CACHE.state_bytes(LENGTH) - PLAIN.state_bytes(LENGTH)
    assert added == num_slots * (16 * 4 + 4 + 1) + 16 * 4 + 1
    search, softmax = 2 * LENGTH * 16 * CACHE.memory_size, 3 * LENGTH * CACHE.num_neighbors
    assert segment_flops(WITH_CACHE, LENGTH) - segment_flops(PLAIN, LENGTH) == search + softmax


def test_its_values_can_be_permuted():
    """What is found then leads to other tokens of the same document."""
    _, context = read(WITH_CACHE, params_of(PLAIN), *documents(0, num_segments=4))
    (memory,) = WITH_CACHE.memories(context)
    (permuted,) = WITH_CACHE.memories(WITH_CACHE.map_memories(context, external_memory.permuted))
    valid = np.asarray(memory.valid)
    before, after = (np.asarray(each.tokens) for each in (memory, permuted))
    for row in range(ROWS):
        np.testing.assert_array_equal(np.sort(before[row, valid[row]]), np.sort(after[row, valid[row]]))
    assert (before != after).any()


def test_rows_split_and_join():
    _, context = read(WITH_CACHE, params_of(PLAIN), *documents(0, num_segments=3))
    joined = context_lib.join_rows(context_lib.split_rows(context, ROWS))
    jax.tree.map(np.testing.assert_array_equal, joined, context)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_size": 0}, r"ContinuousCache\.memory_size = 0"),
        ({"num_neighbors": 0}, r"ContinuousCache\.num_neighbors = 0"),
        ({"theta": 0.0}, r"ContinuousCache\.theta = 0\.0"),
        ({"weight": 1.0}, r"ContinuousCache\.weight = 1\.0"),
        ({"memory_size": LENGTH + 1}, r"multiple of the segment length 8: the nearest are 8 and 16"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        ContinuousCache(**settings).check(LENGTH)
