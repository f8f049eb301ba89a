"""The Compressive Transformer (Rae et al. 2020): which states are kept, in which form, and what trains the compressor.

What a user relies on: what leaves the memory is kept as one state for every `rate` positions, in the order of time and
for this document only, and only the auxiliary loss
shapes how.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mechanisms import apply_model, init_params

from memorizing import context as context_lib
from memorizing.batch import Batch
from memorizing.context import Layout, Report, Rngs, Segment
from memorizing.errors import UserError
from memorizing.models.attention.base import LayerDims
from memorizing.models.attention.compressive import CompressiveAttention, CompressiveState
from memorizing.models.attention.transformer_xl import RelativeAttention, TransformerXLAttention
from memorizing.models.lm_config import LMConfig
from memorizing.runtime.sharding import MeshConfig
from memorizing.synthetic import RepeatedPassages
from memorizing.training.experiment import BatchConfig, Experiment
from memorizing.training.optimizer import AdamW
from memorizing.training.state import abstract_train_state
from memorizing.training.step import Carried, batch_loss

B, T, D, N, H = 3, 4, 8, 2, 4
W, C, RATE = 2 * T, 6, 2
DIMS = LayerDims(D, N, H, 8, 0.0, 1.0, jnp.dtype(jnp.float32))
SEGMENT = Segment(jnp.ones((B, T), bool), Layout(T))
BASE = CompressiveAttention(window=W, compressed_size=C, rate=RATE)
COMPRESSORS = ("mean", "max", "conv", "dilated", "most_used")


def config(compressor: str = "conv", loss: str = "none", **fields) -> CompressiveAttention:
    return dataclasses.replace(BASE, compressor=compressor, loss=loss, **fields)


@functools.cache
def layer_params(attention: CompressiveAttention) -> dict:
    """Of one layer, away from their start: the convolutions' biases are 0 there."""

    @jax.jit
    def init() -> dict:
        state = attention.init_state(DIMS, B, T)
        params = nn.unbox(attention.layer(DIMS).init(jax.random.key(0), jnp.zeros((B, T, D)), SEGMENT, state))["params"]
        keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
        return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), params)

    return init()


@functools.partial(jax.jit, static_argnums=0)
def apply(attention: CompressiveAttention, params: dict, x: jax.Array, state: CompressiveState) -> tuple:
    return attention.layer(DIMS).apply({"params": params}, x, SEGMENT, state)


def inputs() -> tuple[jax.Array, CompressiveState]:
    """A segment [B, T, D] and a state in which everything is valid."""
    rng = np.random.default_rng(1)
    shapes = ((B, T, D), (B, W, D), (B, C, D), (B, W))
    x, hidden, compressed, usage = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return x, CompressiveState(hidden, jnp.ones((B, W), bool), jnp.abs(usage), compressed, jnp.ones((B, C), bool))


# What is kept.


@functools.cache
def replay(compressor: str):
    """`(starts [S, B], is_real [S, B, T]) -> states after each segment`.

    The layer's input at a position is its global time, in every channel.
    """
    attention = config(compressor)
    params = layer_params(attention)

    def segment(carry: tuple, inputs: tuple) -> tuple:
        state, clock = carry
        start, is_real = inputs
        state = context_lib.reset_rows(state, attention.fresh_state(), start)
        x = jnp.broadcast_to((clock * T + jnp.arange(T)).astype(jnp.float32)[None, :, None], (B, T, D))
        _, state, _ = attention.layer(DIMS).apply({"params": params}, x, Segment(is_real, Layout(T)), state)
        return (state, clock + 1), state

    @jax.jit
    def run(starts: jax.Array, is_real: jax.Array) -> CompressiveState:
        return jax.lax.scan(segment, (attention.init_state(DIMS, B, T), 0), (starts, is_real))[1]

    return run


SEGMENTS = 10


@pytest.mark.parametrize("compressor", ["mean", "max"])
@settings(max_examples=20)
@given(
    starts=hnp.arrays(bool, (SEGMENTS, B), elements=st.sampled_from([True, False, False, False, False, False])),
    num_real=hnp.arrays(int, (SEGMENTS, B), elements=st.sampled_from([T, T, T, T, 0, 1, 3])),
)
def test_slot_j_holds_exactly_rate_consecutive_states(compressor: str, starts: np.ndarray, num_real: np.ndarray):
    """Against two plain queues a row, which begin and end documents at different times; None is an empty slot."""
    is_real = np.arange(T) < num_real[..., None]
    states = jax.device_get(replay(compressor)(starts, is_real))
    pool = {"mean": np.mean, "max": np.max}[compressor]
    for row in range(B):
        memory: list = [None] * W
        compressed: list = [None] * C
        for segment in range(SEGMENTS):
            if starts[segment, row]:
                memory, compressed = [None] * W, [None] * C
            for _ in range(T // RATE):
                block, memory = memory[:RATE], memory[RATE:]
                compressed = [*compressed[1:], None if None in block else pool(block)]
            times = range(segment * T, (segment + 1) * T)
            memory += [time if real else None for time, real in zip(times, is_real[segment, row], strict=True)]
            state = jax.tree.map(lambda leaf, s=segment, r=row: leaf[s, r], states)
            for slots, valid, expected in (
                (state.hidden, state.valid, memory),
                (state.compressed, state.compressed_valid, compressed),
            ):
                where = f"segment {segment}, row {row}"
                np.testing.assert_array_equal(valid, [value is not None for value in expected], err_msg=where)
                values = np.array([value for value in expected if value is not None])
                np.testing.assert_array_equal(slots[valid], np.repeat(values[:, None], D, axis=1), err_msg=where)


def reference_compress(compressor: str, params: dict, old: np.ndarray, usage: np.ndarray) -> np.ndarray:
    """One row, [T, D] to [T / RATE, D], in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, float), params.get("compressor", {}))
    if compressor == "most_used":
        return old[sorted(np.argsort(-usage)[: T // RATE])]
    if compressor == "dilated":
        for name, dilation in (("dilated_0", 1), ("dilated_1", 2)):
            kernel, bias = params[name]["kernel"], params[name]["bias"]
            padded = np.pad(old, ((dilation, dilation), (0, 0)))
            convolved = [sum(padded[t + i * dilation] @ kernel[i] for i in range(3)) + bias for t in range(T)]
            old = old + np.maximum(convolved, 0)
    blocks = old.reshape(T // RATE, RATE, D)
    if compressor in ("mean", "max"):
        return getattr(np, compressor)(blocks, axis=1)
    kernel = params["convolution"]["kernel"]
    return np.array([sum(block[i] @ kernel[i] for i in range(RATE)) for block in blocks])


def received(params: dict, x: jax.Array, state: CompressiveState) -> np.ndarray:
    """Attention that each position of the memory gets from a segment, all heads and queries together. [B, W]"""
    carried = jnp.concatenate([state.compressed, state.hidden], axis=1)
    mask = jnp.broadcast_to(jnp.tri(T, C + W + T, C + W, dtype=bool), (B, T, C + W + T))
    _, weights, _ = RelativeAttention(DIMS).apply({"params": params["relative"]}, x, carried, mask, SEGMENT)
    return np.asarray(weights.sum(axis=(1, 2))[:, C : C + W])


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_what_enters_the_compressed_memory(compressor: str):
    attention, (x, state) = config(compressor), inputs()
    params = layer_params(attention)
    assert ("compressor" in params) == (compressor in ("conv", "dilated"))
    _, new_state, _ = apply(attention, params, x, state)
    usage = np.asarray(state.usage) + received(params, x, state)
    np.testing.assert_allclose(new_state.usage[:, : W - T], usage[:, T:], rtol=1e-5)
    np.testing.assert_array_equal(new_state.usage[:, W - T :], np.zeros((B, T)))
    num_new = T // RATE
    assert new_state.compressed.shape == (B, C, D)
    np.testing.assert_array_equal(new_state.compressed[:, :-num_new], state.compressed[:, num_new:])
    for row in range(B):
        expected = reference_compress(compressor, params, np.asarray(state.hidden[row, :T], float), usage[row, :T])
        np.testing.assert_allclose(new_state.compressed[row, -num_new:], expected, rtol=0, atol=1e-5)


def test_most_used_keeps_what_was_attended_to_most_in_the_order_of_time():
    """Not in the order of attention, and with the validity of the positions that it keeps."""
    attention, (x, state) = config("most_used"), inputs()
    usage = np.zeros((B, W), np.float32)
    # Rates of attention far above what one segment can add.
    usage[:, :T] = [[0, 900, 500, 0], [900, 0, 0, 500], [500, 0, 900, 0]]
    state = state.replace(usage=jnp.asarray(usage), valid=state.valid.at[1, 3].set(False))
    _, new_state, _ = apply(attention, layer_params(attention), x, state)
    for row, kept in enumerate([[1, 2], [0, 3], [0, 2]]):
        expected = np.where(state.valid[row, kept, None], state.hidden[row, kept], 0)
        np.testing.assert_array_equal(new_state.compressed[row, -2:], expected)
        np.testing.assert_array_equal(new_state.compressed_valid[row, -2:], state.valid[row, kept])


def test_most_used_does_not_listen_to_padding():
    attention, (x, state) = config("most_used"), inputs()
    is_real = jnp.broadcast_to(jnp.arange(T) < 1, (B, T))
    usages = []
    for content in (x, x.at[:, 1:].multiply(-3.0)):
        variables, segment = {"params": layer_params(attention)}, Segment(is_real, Layout(T))
        usages.append(attention.layer(DIMS).apply(variables, content, segment, state)[1].usage)
    np.testing.assert_array_equal(*usages)


# What the model sees.


def language_model(attention: CompressiveAttention | TransformerXLAttention, num_layers: int = 2) -> LMConfig:
    return LMConfig(16, num_layers, embed_dim=D, num_heads=N, head_dim=H, mlp_dim=16, attention=attention)


@functools.cache
def model_params(model: LMConfig) -> dict:
    @jax.jit
    def init() -> dict:
        params = init_params(model, B, T, jax.random.key(0))
        keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(params))))
        return jax.tree.map(lambda leaf: 1.5 * leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), params)

    return init()


def read(model: LMConfig, text: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Logits of a text, segment by segment: [S, B, T], starts [S, B] -> [S, B, T, V]."""

    @jax.jit
    def scan(params: dict) -> jax.Array:
        def segment(context: dict, inputs: tuple) -> tuple:
            tokens, start = inputs
            output = apply_model(model, params, tokens, tokens > 0, start, context)
            return output.context, output.logits

        return jax.lax.scan(segment, model.init_context(text.shape[1], T), (jnp.asarray(text), jnp.asarray(starts)))[1]

    return np.asarray(scan(model_params(dataclasses.replace(model, attention=BASE))))


def random_text(num_segments: int, rows: int = B) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 16, (num_segments, rows, T), np.int32)


def test_at_rate_one_a_compressor_that_changes_nothing_makes_a_transformer_xl():
    """The mean of one state is the state.

    Then the two memories are one cache of W + C positions, with the same parameters, whenever rows begin their
    documents.
    """
    text, starts = random_text(9), np.zeros((9, B), bool)
    starts[[0, 0, 4], [0, 1, 1]] = True
    # A padded end, whose slots stay empty in both.
    text[2, 2, 2:] = 0
    compressive = read(language_model(config("mean", rate=1, compressed_size=2 * T)), text, starts)
    transformer_xl = read(language_model(TransformerXLAttention(window=W + 2 * T)), text, starts)
    short = read(language_model(TransformerXLAttention(window=W)), text, starts)
    np.testing.assert_allclose(compressive, transformer_xl, rtol=0, atol=1e-5)
    assert np.abs(short - transformer_xl).max() > 0.1


def test_reaches_rate_times_further_than_a_cache_of_equal_cost():
    """One layer: its last segment changes with a token W + rate * C back, and not with one before that.

    A cache of W + C positions has nothing left there.
    """
    num_segments = (W + RATE * C) // T + 3
    length = num_segments * T
    text = np.repeat(random_text(num_segments, rows=1), length, axis=1)
    changed = text.copy()
    position = np.arange(length)
    changed[position // T, position, position % T] = text[position // T, 0, position % T] % 15 + 1
    starts = np.zeros((num_segments, length), bool)

    def seen(model: LMConfig) -> np.ndarray:
        """Which tokens the last segment's first position sees; distances count from it."""
        differs = read(model, text, starts)[-1, :, 0] != read(model, changed, starts)[-1, :, 0]
        return differs.any(axis=-1)[: length - T]

    distance = length - T - np.arange(length - T)
    compressive = seen(language_model(config(), num_layers=1))
    np.testing.assert_array_equal(compressive, distance <= W + RATE * C)
    np.testing.assert_array_equal(
        seen(language_model(TransformerXLAttention(window=W + C), num_layers=1)), distance <= W + C
    )


# What trains the compressor.


def reference_loss(params: dict, x: np.ndarray, old: np.ndarray, new: np.ndarray) -> float:
    """One row: mean square of attn(x, old) - attn(x, new), by content alone, everything visible."""
    kernels = {name: np.asarray(params["relative"][name]["kernel"], float) for name in ("query", "key", "value")}

    def attend(states: np.ndarray) -> np.ndarray:
        read = []
        for n in range(N):
            query, key, value = (
                each @ kernels[name][:, n] for name, each in zip(kernels, (x, states, states), strict=True)
            )
            weights = np.exp(query @ key.T / math.sqrt(H))
            read.append(weights / weights.sum(axis=1, keepdims=True) @ value)
        return np.array(read)

    return float(np.mean((attend(old) - attend(new)) ** 2))


@pytest.mark.parametrize("loss", ["attention", "autoencoding"])
def test_the_loss_is_the_mean_over_rows_that_have_something_to_compress(loss: str):
    """Row 1's oldest segment is empty, row 2's in part: they add nothing, and what their slots hold reaches nothing."""
    attention, (x, state) = config(loss=loss, loss_weight=3.0), inputs()
    params = layer_params(attention)
    valid = state.valid.at[1, :T].set(False).at[2, T - 1].set(False)
    hidden = jnp.where(valid[..., None], state.hidden, jnp.nan)
    state = state.replace(valid=valid, hidden=hidden)
    y, new_state, report = apply(attention, params, x, state)
    old, new = np.asarray(state.hidden[0, :T], float), np.asarray(new_state.compressed[0, -T // RATE :], float)
    if loss == "attention":
        expected = reference_loss(params, np.asarray(x[0], float), old, new)
    else:
        kernel = np.asarray(params["decompressor"]["convolution"]["kernel"], float)
        expected = np.mean((np.einsum("PE,ECD->PCD", new, kernel).reshape(T, D) - old) ** 2)
    np.testing.assert_allclose(report.losses[f"compression_{loss}"], 3 * expected / B, rtol=1e-4)
    assert np.isfinite(y).all()
    assert np.isfinite(new_state.hidden).all()
    assert np.isfinite(new_state.compressed).all()

    def total(params: dict, x: jax.Array) -> jax.Array:
        y, _, report = apply(attention, params, x, state)
        return jnp.sum(y) + sum(report.losses.values())

    for leaf in jax.tree.leaves(jax.jit(jax.grad(total, argnums=(0, 1)))(params, x)):
        assert np.isfinite(leaf).all()


def test_the_loss_does_not_listen_to_padding():
    attention, (x, state) = config(loss="attention"), inputs()
    variables, is_real = {"params": layer_params(attention)}, jnp.broadcast_to(jnp.arange(T) < 1, (B, T))
    losses = []
    for content in (x, x.at[:, 1:].multiply(-3.0)):
        segment = Segment(is_real, Layout(T))
        report = attention.layer(DIMS).apply(variables, content, segment, state)[2]
        losses.append(report.losses["compression_attention"])
    np.testing.assert_array_equal(*losses)


@pytest.mark.parametrize(
    "attention", [config(loss="none"), config("mean", "attention"), config("most_used", "attention")]
)
def test_nothing_to_train_is_no_loss(attention: CompressiveAttention):
    x, state = inputs()
    _, _, report = apply(attention, layer_params(attention), x, state)
    assert report == Report()


@pytest.mark.parametrize(
    ("compressor", "loss"), [("conv", "attention"), ("dilated", "attention"), ("conv", "autoencoding")]
)
def test_the_auxiliary_loss_trains_the_compressor_and_nothing_else_does(compressor: str, loss: str):
    """Though later segments of the step read what it compressed.

    Their gradient would take the compressor away from the past for the sake of the next tokens.
    """
    model = language_model(config(compressor, loss), num_layers=1)
    # As many segments as it takes to fill both memories.
    num_segments = (W + RATE * C) // T + 1
    text = jnp.asarray(random_text(num_segments).swapaxes(0, 1))
    context = model.init_context(B, T)

    @jax.jit
    def gradient(params: dict, weight_of_tokens: float) -> dict:
        weights = jnp.full(text.shape, weight_of_tokens)
        batch = Batch(text, text, weights, jnp.ones(text.shape, bool), jnp.zeros((B, num_segments), bool))
        return jax.grad(
            lambda p: batch_loss(
                model, p, batch, Carried(context, {}), Rngs(jax.random.key(0), jnp.arange(B)), jnp.ones(())
            )[0]
        )(params)

    of_auxiliary, of_both = (
        dict(jax.tree_util.tree_leaves_with_path(gradient(model_params(model), weight))) for weight in (0.0, 1.0)
    )
    is_compressor = {path: "compressor']" in jax.tree_util.keystr(path) for path in of_both}
    assert any(is_compressor.values())
    for path, leaf in of_auxiliary.items():
        assert np.any(leaf) == is_compressor[path], jax.tree_util.keystr(path)
    for path, leaf in of_both.items():
        assert np.any(leaf != of_auxiliary[path]) != is_compressor[path], jax.tree_util.keystr(path)


@pytest.mark.parametrize("loss", ["attention", "autoencoding"])
def test_without_the_auxiliary_loss_the_compressor_stays_worse(loss: str):
    """The ablation of the paper: gradient descent on the loss reconstructs what is lost otherwise."""
    attention, (x, state) = config(loss=loss), inputs()

    @jax.jit
    def train(params: dict) -> jax.Array:
        def step(params: dict, _: None) -> tuple:
            value, slope = jax.value_and_grad(lambda p: sum(apply(attention, p, x, state)[2].losses.values()))(params)
            return jax.tree.map(lambda leaf, g: leaf - 0.03 * g, params, slope), value

        return jax.lax.scan(step, params, length=100)[1]

    losses = np.asarray(train(layer_params(attention)))
    assert losses[-1] < 0.5 * losses[0]


# Settings.


@pytest.mark.parametrize("compressor", ["conv", "most_used", "dilated"])
def test_a_run_knows_where_every_parameter_lies(compressor: str):
    """Asked for before the first step: without an answer no run starts, not even on one device."""
    model = language_model(config(compressor, "attention"))
    mesh = MeshConfig(data=2, model=2, memory=2).make_mesh()
    state = abstract_train_state(model, AdamW().build(), 2, T, mesh, MeshConfig())
    assert all(leaf.sharding is not None for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 6}, "window = 6 is not a multiple of the segment length 4"),
        ({"window": 0}, "window = 0"),
        ({"rate": 3}, "rate = 3 does not divide the segment length 4"),
        ({"rate": 0}, "rate = 0"),
        ({"compressed_size": 1}, "compressed_size = 1 does not hold the 2 states of one segment"),
    ],
)
def test_impossible_settings_are_told_before_anything_runs(fields: dict, message: str):
    model = language_model(dataclasses.replace(BASE, **fields))
    with pytest.raises(UserError, match=message):
        Experiment(RepeatedPassages(vocab_size=16), model, BatchConfig(tokens_per_step=B * T, segment_length=T))
