"""The Recurrent Memory Transformer (Bulatov et al.

2022 and 2023): what memory tokens see, what they carry, and how far back the gradient goes through them.

What a user relies on: the model learns through as many segments as was asked for, and through no more; memory tokens
are seen by the segment and by nothing that outlives it but
the next segment's memory tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mechanisms import apply_model, init_params

from memorizing.batch import Batch
from memorizing.context import Context, Layout, Rngs, Segment
from memorizing.errors import UserError
from memorizing.models import masks
from memorizing.models.attention.base import Attention, LayerDims, normalize
from memorizing.models.attention.compressive import CompressiveAttention
from memorizing.models.attention.full import FullAttention
from memorizing.models.attention.knn import KNNAttention
from memorizing.models.attention.transformer_xl import TransformerXLAttention
from memorizing.models.attention.xl import XLAttention
from memorizing.models.layers import Embedder
from memorizing.models.lm_config import RECURRENT, LMConfig
from memorizing.models.positions import t5_buckets
from memorizing.models.recurrent_tokens import MemoryTokens, RecurrentTokens, RecurrentTokensState
from memorizing.training.step import Carried, batch_loss

# What sees what.


def positions_of(layout: Layout, num_cached: int) -> list[tuple[str, int]]:
    """Every key as its kind and its time."""
    kinds = (
        ["cached"] * num_cached + ["read"] * layout.num_read + ["own"] * layout.length + ["write"] * layout.num_write
    )
    return [(kind, time - num_cached) for time, kind in enumerate(kinds)]


def sees(layout: Layout, query: tuple[str, int], key: tuple[str, int]) -> bool:
    """The definition, in words (Bulatov et al. 2022, section 3; 2023, section 3)."""
    (query_kind, query_time), (key_kind, key_time) = query, key
    if layout.bidirectional:
        return True
    if key_kind == "cached":
        return query_kind == "own" or layout.memory_sees_cache
    if query_kind == key_kind and query_kind in ("read", "write"):
        return True
    return key_time <= query_time


sizes = st.integers(0, 3)


@settings(max_examples=30)
@given(
    layout=st.builds(Layout, st.integers(1, 4), sizes, sizes, st.booleans(), memory_sees_cache=st.booleans()),
    num_cached=sizes,
)
def test_visible_is_its_definition(layout: Layout, num_cached: int):
    keys = positions_of(layout, num_cached)
    if layout.bidirectional and not layout.memory_sees_cache:
        layout = dataclasses.replace(layout, memory_sees_cache=True)
    expected = [[sees(layout, query, key) for key in keys] for query in keys[num_cached:]]
    visible = jax.jit(masks.visible, static_argnums=(0, 1))(layout, num_cached)
    np.testing.assert_array_equal(visible, expected)


def test_an_encoders_memory_does_not_see_the_cache_either_where_it_may_not():
    layout = RecurrentTokens(num_tokens=2, version="encoder", sees_cache=False).layout(3)
    seen = np.asarray(masks.visible(layout, num_cached=2))
    assert not seen[:2, :2].any()
    assert seen[:, 2:].all()
    assert seen[2:].all()


def test_layouts_of_the_two_versions():
    decoder, encoder = (RecurrentTokens(num_tokens=3, version=version).layout(5) for version in ("decoder", "encoder"))
    assert (decoder.num_read, decoder.length, decoder.num_write, decoder.bidirectional) == (3, 5, 3, False)
    assert (encoder.num_read, encoder.length, encoder.num_write, encoder.bidirectional) == (3, 5, 0, True)


# What they are at the start and what they become.

B, T, R = 3, 4, 2
VOCAB, D, N, H = 32, 8, 2, 4
DIMS = LayerDims(D, N, H, 16, 0.0, 1.0, jnp.dtype(jnp.float32))
FULL, XL, TRANSFORMER_XL = FullAttention(), XLAttention(window=2 * T), TransformerXLAttention(window=2 * T)
KNN = KNNAttention(memory_size=2 * T, num_neighbors=2)
COMPRESSIVE = CompressiveAttention(window=T, compressed_size=2, rate=2)


def language_model(
    recurrent: RecurrentTokens | None = None, attention: Attention = FULL, num_layers: int = 2
) -> LMConfig:
    sizes = (VOCAB, num_layers, D, N, H, 16)
    return LMConfig(*sizes, attention=attention, recurrent_tokens=recurrent, initial_logit_scale=4.0)


RNGS = Rngs(jax.random.key(0), jnp.arange(B))
DECODER = language_model(RecurrentTokens(R))
ENCODER = language_model(RecurrentTokens(R, version="encoder"))


@functools.cache
def model_params(model: LMConfig) -> dict:
    return jax.jit(lambda: init_params(model, B, T, jax.random.key(0)))()


def random_tokens(num_segments: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(1, VOCAB, (B, num_segments, T), np.int32))


@functools.partial(jax.jit, static_argnums=0)
def run(model: LMConfig, params: dict, start: jax.Array, context: Context) -> tuple:
    """Output of one segment, and what passed between its parts: the tokens around the embedding and the last norm."""

    seen = {}

    def look_on(next_method: Any, args: tuple, kwargs: dict, call: Any) -> Any:
        output = next_method(*args, **kwargs)
        if call.method_name == "__call__" and isinstance(call.module, MemoryTokens):
            seen["around"] = output
        if call.method_name == "__call__" and call.module.name == "final_norm":
            seen["final"] = output
        return output

    tokens = random_tokens()[:, 0]
    with nn.intercept_methods(look_on):
        output = apply_model(model, params, tokens, tokens > 0, start, context)
    return output, seen["around"], seen["final"]


def test_initial_tokens_are_independent_vectors_like_embeddings():
    """As many different directions as there are tokens.

    Copies of one vector could only be told apart by their position.
    """
    initial = model_params(dataclasses.replace(language_model(RecurrentTokens(6)), embed_dim=64))[RECURRENT]["initial"]
    singular = np.linalg.svd(initial, compute_uv=False)
    assert singular[-1] > 0.1 * singular[0]
    assert 0.5 < np.std(initial) < 2


@pytest.mark.parametrize("model", [DECODER, ENCODER], ids=["decoder", "encoder"])
def test_a_document_begins_with_the_initial_tokens_and_goes_on_with_the_state(model: LMConfig):
    """Row 0 goes on, row 1 begins a document over whatever was there, row 2 has not begun yet."""
    carried = np.random.default_rng(1).normal(size=(B, R, D)).astype(np.float32)
    carried[1] = np.nan
    state = RecurrentTokensState(jnp.asarray(carried), jnp.array([True, True, False]))
    context = model.init_context(B, T) | {RECURRENT: state}
    params = model_params(model)
    output, around, final = run(model, params, jnp.array([False, True, False]), context)
    initial = params[RECURRENT]["initial"]
    memory = jnp.stack([carried[0], initial, initial])
    own = params["embedder"]["table"][random_tokens()[:, 0]]
    is_decoder = model is DECODER
    np.testing.assert_array_equal(around, jnp.concatenate([memory, own, memory][: 3 if is_decoder else 2], axis=1))
    # The next memory: what the write tokens became, or of an encoder, the memory tokens themselves.
    new_state = output.context[RECURRENT]
    np.testing.assert_array_equal(new_state.tokens, final[:, R + T :] if is_decoder else final[:, :R])
    assert new_state.started.all()
    # Logits at the segment's own positions and nowhere else.
    assert output.logits.shape == (B, T, VOCAB)
    expected = np.einsum("BTD,VD->BTV", final[:, R : R + T], params["embedder"]["table"]) / np.sqrt(D)
    np.testing.assert_allclose(output.logits, expected, rtol=0, atol=1e-5)
    assert np.isfinite(output.logits).all()


# What caches and memories hold.


@pytest.mark.parametrize("version", ["decoder", "encoder"])
@pytest.mark.parametrize("attention", [XL, TRANSFORMER_XL, COMPRESSIVE, KNN], ids=lambda each: type(each).__name__)
def test_caches_and_memories_hold_the_segments_own_positions_only(attention: Attention, version: str):
    """As many as the segment has, and what they hold does not depend on the memory tokens' activations."""
    layout = RecurrentTokens(R, version=version).layout(T)
    tokens = jnp.zeros((B, T), jnp.int32)
    segment = Segment(jnp.ones((B, layout.size), bool), layout, tokens=tokens, clock=jnp.asarray(0))
    layer, state = attention.layer(DIMS), attention.init_state(DIMS, B, T)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, layout.size, D)), jnp.float32)
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), x, segment, state))["params"]
    is_own = (jnp.arange(layout.size) >= R) & (jnp.arange(layout.size) < R + T)

    @jax.jit
    def carried(x: jax.Array) -> list[jax.Array]:
        new = layer.apply({"params": params}, x, segment, state)[1]
        if attention is KNN:
            return [new.last_segment.keys, new.last_segment.values, new.last_segment.valid]
        return [new.keys, new.values, new.valid] if attention is XL else [new.hidden, new.valid]

    of_x = carried(x)
    assert int(of_x[-1].sum()) == B * T
    for one, other in zip(of_x, carried(jnp.where(is_own[None, :, None], x, -3 * x)), strict=True):
        np.testing.assert_array_equal(one, other)
    own = x[:, R : R + T]
    if attention is XL:
        expected = normalize(jnp.einsum("BTD,DNH->BTNH", own, params["key"]["kernel"]))
        np.testing.assert_allclose(of_x[0][:, -T:], expected, rtol=0, atol=1e-6)
    elif attention is KNN:
        expected = normalize(jnp.einsum("BTD,DNH->BTNH", own, params["key"]["kernel"]))
        np.testing.assert_allclose(of_x[0], expected.swapaxes(1, 2), rtol=0, atol=1e-6)
    else:
        np.testing.assert_array_equal(of_x[0][:, -T:], own)


# Training over several segments a step.


def cuts(num_segments: int, backward_segments: int) -> set[int]:
    """Segments that no gradient leaves backwards: from the last one backwards, runs of that many and one."""
    if backward_segments < 0:
        return set()
    return set(range(num_segments - 1 - backward_segments, -1, -(backward_segments + 1)))


@pytest.mark.parametrize(
    ("num_segments", "backward_segments"),
    [(2, 0), (2, 1), (3, 1), (4, 1), (5, -1), (5, 0), (5, 3), (5, 4), (5, 5)],
)
def test_gradient_reaches_back_exactly_as_far_as_it_is_let(num_segments: int, backward_segments: int):
    """Of every segment's loss with respect to every segment's embedded tokens.

    The last to the first is what the truncation is about. Row 1 begins a document in segment 1.
    """
    model = language_model(RecurrentTokens(R, backward_segments=backward_segments), num_layers=1)
    params = model_params(model)
    # Every row and segment has tokens of its own, so that their embeddings can be told apart.
    tokens = np.arange(2 * num_segments).reshape(2, num_segments, 1).repeat(2, axis=2) + 1
    starts = np.zeros((2, num_segments), bool)
    starts[1, 1] = True
    context = model.init_context(2, 2)

    def loss(shift: jax.Array, weights: jax.Array) -> jax.Array:
        def encode(next_method, args, kwargs, method):
            is_encode = isinstance(method.module, Embedder) and method.method_name == "encode"
            embedded = next_method(*args, **kwargs)
            return embedded + shift[args[0]] if is_encode else embedded

        is_real = jnp.ones(tokens.shape, bool)
        batch = Batch(jnp.asarray(tokens), jnp.asarray(tokens), weights, is_real, jnp.asarray(starts))
        with nn.intercept_methods(encode):
            return batch_loss(model, params, batch, Carried(context, {}), RNGS, jnp.ones(()))[0]

    # [rows and segments of the loss, tokens, D]; the embedding itself is shared with the output, the shift is not.
    one_hot = jnp.eye(tokens[..., 0].size)[..., None].repeat(2, axis=2).reshape(-1, *tokens.shape)
    gradient = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(jnp.zeros((VOCAB, D)), one_hot)
    reached = np.any(gradient, axis=-1)[:, tokens[..., 0].ravel()]
    borders = [cuts(num_segments, backward_segments)] * 2
    borders[1] = borders[1] | {1}
    for row, of_loss in np.ndindex(2, num_segments):
        expected = np.zeros((2, num_segments), bool)
        for segment in range(of_loss + 1):
            expected[row, segment] = not any(segment < border <= of_loss for border in borders[row])
        actual = reached[row * num_segments + of_loss].reshape(2, num_segments)
        np.testing.assert_array_equal(actual, expected, err_msg=f"row {row}, loss of segment {of_loss}")
    first_from_last = reached[num_segments - 1, 0]
    assert first_from_last == (backward_segments == -1 or backward_segments >= num_segments - 1)


def make_batch(num_segments: int) -> Batch:
    """Row 1 begins a document in the second segment, row 2 has a padded end in the third and goes on."""
    tokens, starts = np.array(random_tokens(num_segments)), np.zeros((B, num_segments), bool)
    starts[:, 0] = starts[1, 1] = True
    targets = np.roll(tokens, -1, axis=2)
    is_real = np.ones(targets.shape, bool)
    is_real[2, 2, 2:] = False
    return Batch(*map(jnp.asarray, (tokens, targets, is_real.astype(np.float32), is_real, starts)))


RMT = RecurrentTokens(R)
CARRIERS = {
    "rmt": language_model(RMT, num_layers=1),
    "rmt and xl": language_model(RMT, XL, num_layers=1),
    "rmt and knn": language_model(RMT, KNN, num_layers=1),
    "compressive": language_model(attention=COMPRESSIVE, num_layers=1),
}


@pytest.mark.parametrize("model", CARRIERS.values(), ids=CARRIERS)
def test_segments_of_one_step_equal_steps_of_one_segment(model: LMConfig):
    """The loss, what is reported and the context.

    How many segments make a step changes where the gradient goes, and nothing else.
    """
    num_segments = 4
    batch, context = make_batch(num_segments), model.init_context(B, T)

    params = model_params(model)

    @jax.jit
    def loss(batch: Batch, context: Context) -> tuple:
        value, (carried, metrics) = batch_loss(model, params, batch, Carried(context, {}), RNGS, jnp.ones(()))
        return value, (carried.context, metrics)

    together, (together_context, together_metrics) = loss(batch, context)
    losses, metrics = [], []
    for segment in range(num_segments):
        part = jax.tree.map(lambda leaf, s=segment: leaf[:, s : s + 1], batch)
        value, (context, values) = loss(part, context)
        losses.append(value)
        metrics.append(values)
    auxiliary = sum(values.get("layer_00/compression_attention", 0) for values in metrics)
    np.testing.assert_allclose(together, sum(losses) - auxiliary * (1 - 1 / num_segments), rtol=1e-5)
    # The metric `loss` is per token of a step.
    for name, value in (together_metrics | {"loss": sum(values["loss"] for values in metrics) / num_segments}).items():
        np.testing.assert_allclose(
            value, sum(values[name] for values in metrics) / num_segments, rtol=1e-4, err_msg=name
        )
    for one, other in zip(jax.tree.leaves(together_context), jax.tree.leaves(context), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_activations_of_one_segment_at_a_time():
    """Eight segments a step take the memory of two, but for what is carried between them and their tokens."""
    model, length = language_model(RMT, num_layers=1), 64

    def memory_and_inputs(num_segments: int) -> tuple[int, int]:
        def gradient(params: dict, batch: Batch, context: Context) -> tuple:
            def loss(params: dict) -> tuple:
                return batch_loss(model, params, batch, Carried(context, {}), RNGS, jnp.ones(()))

            return jax.grad(loss, has_aux=True)(params)

        def batch() -> Batch:
            tokens = jnp.zeros((B, num_segments, length), jnp.int32)
            return Batch(tokens, tokens, tokens.astype(jnp.float32), tokens == 0, tokens[..., 0] > 0)

        inputs = jax.eval_shape(lambda: (model_params(model), batch(), model.init_context(B, length)))
        compiled = jax.jit(gradient).lower(*inputs).compile()
        num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(inputs[1:]))
        return compiled.memory_analysis().temp_size_in_bytes, num_bytes

    (of_two, inputs_of_two), (of_eight, inputs_of_eight) = memory_and_inputs(2), memory_and_inputs(8)
    assert of_eight - of_two < 3 * (inputs_of_eight - inputs_of_two) + 6 * 3 * B * R * D * 4
    assert of_eight < 1.1 * of_two


def test_initial_tokens_learn_where_a_document_begins():
    """All of them, and not in a step without a beginning."""
    batch = make_batch(3)
    context = DECODER.init_context(B, T) | {RECURRENT: RecurrentTokensState(jnp.ones((B, R, D)), jnp.ones(B, bool))}

    @jax.jit
    def gradient(params: dict, starts: jax.Array) -> jax.Array:
        part = batch._replace(start_of_document=starts)
        loss = jax.grad(lambda p: batch_loss(DECODER, p, part, Carried(context, {}), RNGS, jnp.ones(()))[0])
        return loss(params)[RECURRENT]["initial"]

    starts = batch.start_of_document
    assert np.any(gradient(model_params(DECODER), starts), axis=1).all()
    assert not np.any(gradient(model_params(DECODER), jnp.zeros_like(starts)))


@pytest.mark.parametrize("fields", [{"num_tokens": 0}, {"backward_segments": -2}])
def test_impossible_settings_are_told(fields: dict):
    with pytest.raises(UserError, match=next(iter(fields))):
        RecurrentTokens(**fields)


@pytest.mark.parametrize("num_buckets", [2, 3, 4])
def test_few_buckets_tell_before_from_after(num_buckets: int):
    """As the encoder's segments need them."""
    buckets = t5_buckets(np.arange(-3, 4), num_buckets, 128, bidirectional=True)
    assert set(buckets[:3]).isdisjoint(buckets[3:]) and buckets.max() < num_buckets
