"""Transformer-XL against the paper's equation (Dai et al.

2019, section 3.3 and appendix B), and what its cache promises.

What a user relies on: reading a text segment by segment gives what reading it at once would give, as far back as the
cached states reach through the layers, and no further.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mechanisms import apply_model, init_params

from memorizing.context import Layout, Segment
from memorizing.errors import UserError
from memorizing.models import positions
from memorizing.models.attention.base import LayerDims
from memorizing.models.attention.transformer_xl import TransformerXLAttention, TransformerXLState
from memorizing.models.attention.xl import XLAttention
from memorizing.models.language_model import ModelOutput
from memorizing.models.lm_config import LMConfig

# The encoding.


@settings(max_examples=20)
@given(num_queries=st.integers(1, 7), num_cached=st.integers(0, 7))
def test_the_shift_is_a_double_loop(num_queries: int, num_cached: int):
    num_keys = num_cached + num_queries
    distances = positions.distances(num_queries, num_keys).tolist()
    by_distance = np.random.default_rng(0).normal(size=(2, 3, num_queries, len(distances))).astype(np.float32)
    by_key = np.asarray(jax.jit(positions.by_key, static_argnums=1)(by_distance, num_keys))
    assert by_key.shape == (2, 3, num_queries, num_keys)
    for query in range(num_queries):
        for key in range(num_keys):
            distance = num_cached + query - key
            np.testing.assert_array_equal(by_key[:, :, query, key], by_distance[:, :, query, distances.index(distance)])


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 5), (7, 7), (128, 128), (200, 300), (384, 512)])
def test_what_all_queries_share_is_by_key_as_if_each_had_its_own(num_queries: int, num_keys: int):
    by_distance = jax.random.normal(jax.random.key(0), (2, num_queries + num_keys - 1))
    of_each = jnp.broadcast_to(by_distance[:, None], (2, num_queries, num_queries + num_keys - 1))
    np.testing.assert_array_equal(
        positions.same_by_key(by_distance, num_queries, num_keys), positions.by_key(of_each, num_keys)
    )


B, T, W, D, N, H = 3, 4, 6, 8, 2, 4
DIMS = LayerDims(D, N, H, 8, 0.0, 1.0, jnp.dtype(jnp.float32))
# Row 0 has a full cache, row 1 half of one and a padded end, row 2 has nothing yet.
VALID = np.arange(W) >= np.array([0, 3, W])[:, None]
IS_REAL = np.arange(T) < np.array([T, 3, T])[:, None]


@functools.cache
def layer_case() -> tuple[dict, np.ndarray, np.ndarray]:
    """Parameters, x [B, T, D] and cached states [B, W, D], float64."""
    rng = np.random.default_rng(0)
    kernels = {name: {"kernel": rng.normal(size=(D, N, H))} for name in ("query", "key", "value", "position")}
    params = kernels | {"output": {"kernel": rng.normal(size=(N, H, D))}}
    params |= {"u": rng.normal(size=(N, H)), "v": rng.normal(size=(N, H))}
    return params, rng.normal(size=(B, T, D)), rng.normal(size=(B, W, D))


@functools.partial(jax.jit, static_argnums=0)
def apply(config: TransformerXLAttention, x: np.ndarray, hidden: np.ndarray) -> tuple[jax.Array, TransformerXLState]:
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), {"relative": layer_case()[0]})
    state = TransformerXLState(jnp.asarray(hidden, jnp.float32), jnp.asarray(VALID))
    segment = Segment(jnp.asarray(IS_REAL), Layout(T))
    y, state, _ = config.layer(DIMS).apply({"params": params}, jnp.asarray(x, jnp.float32), segment, state)
    return y, state


def encoding(distance: int) -> np.ndarray:
    angles = [distance / 10_000 ** (2 * i / D) for i in range(D // 2)]
    return np.array([*map(math.sin, angles), *map(math.cos, angles)])


def reference(x: np.ndarray, hidden: np.ndarray, clamp: int, window: int) -> np.ndarray:
    """A = q k + q W_kR R + u k + v W_kR R, over sqrt(H): the equation term by term, key by key."""
    p = layer_case()[0]
    y = np.zeros((B, T, D))
    for b, n, t in np.ndindex(B, N, T):
        query = x[b, t] @ p["query"]["kernel"][:, n]
        # Every visible state with its distance back.
        seen = [(t + W - w, hidden[b, w]) for w in range(W) if VALID[b, w]]
        seen += [(t - s, x[b, s]) for s in range(t + 1) if IS_REAL[b, s] or s == t]
        seen = [(distance, state) for distance, state in seen if distance < window]
        logits, values = [], []
        for distance, state in seen:
            key = state @ p["key"]["kernel"][:, n]
            position = encoding(min(distance, clamp)) @ p["position"]["kernel"][:, n]
            terms = query @ key + query @ position + p["u"][n] @ key + p["v"][n] @ position
            logits.append(terms / math.sqrt(H))
            values.append(state @ p["value"]["kernel"][:, n])
        weights = np.exp(np.array(logits) - max(logits))
        y[b, t] += weights / weights.sum() @ np.array(values) @ p["output"]["kernel"][n]
    return y


@pytest.mark.parametrize(("clamp", "same_length"), [(0, False), (0, True), (1, False), (5, True), (100, False)])
def test_attention_is_the_equation(clamp: int, same_length: bool):
    config = TransformerXLAttention(window=W, clamp_distance=clamp, same_length=same_length)
    _, x, hidden = layer_case()
    expected = reference(x, hidden, clamp or 10**9, W if same_length else 10**9)
    y, state = apply(config, x, hidden)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5)
    # What is cached are the layer's inputs, of the last W positions.
    expected_hidden = np.concatenate([np.where(VALID[..., None], hidden, 0), x], axis=1)[:, -W:]
    np.testing.assert_array_equal(state.hidden, expected_hidden.astype(np.float32))
    np.testing.assert_array_equal(state.valid, np.concatenate([VALID, IS_REAL], axis=1)[:, -W:])


def test_no_gradient_reaches_the_cache_or_leaves_through_it():
    _, x, hidden = layer_case()
    config = TransformerXLAttention(window=W)

    def outputs(x: jax.Array, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, state = apply(config, x, hidden)
        return jnp.sum(jnp.sin(y)), jnp.sum(jnp.sin(state.hidden))

    of_output, of_cached = jax.jit(jax.jacrev(outputs, argnums=(0, 1)))(x, hidden)
    assert np.any(of_output[0]), "the test cannot see what it forbids"
    assert not np.any(of_output[1])
    assert not np.any(of_cached[0])
    assert not np.any(of_cached[1])


# The language model, segment by segment.

VOCAB = 16


@dataclasses.dataclass(frozen=True)
class Reader:
    """A model that reads a text in segments."""

    attention: TransformerXLAttention | XLAttention
    num_layers: int = 2

    @functools.cached_property
    def config(self) -> LMConfig:
        return LMConfig(
            VOCAB, self.num_layers, embed_dim=D, num_heads=N, head_dim=H, mlp_dim=16, attention=self.attention
        )

    @functools.cached_property
    def segment(self):
        @jax.jit
        def segment(params: dict, tokens: jax.Array, context: dict) -> ModelOutput:
            flags = jnp.ones(tokens.shape, bool)
            return apply_model(self.config, params, tokens, flags, ~flags[:, 0], context)

        return functools.partial(segment, parameters(type(self.attention), self.num_layers))

    def __call__(self, text: np.ndarray, lengths: list[int], context: dict | None = None) -> np.ndarray:
        """Logits of the whole text [B, sum(lengths), V]."""
        assert text.shape[1] == sum(lengths)
        context = context or self.config.init_context(len(text), lengths[0])
        logits = []
        for tokens in np.split(text, np.cumsum(lengths)[:-1], axis=1):
            output = self.segment(tokens, context)
            logits.append(output.logits)
            context = output.context
        return np.concatenate(logits, axis=1)


@functools.cache
def parameters(mechanism: type, num_layers: int) -> dict:
    """Those of any window. Not those of the start, where u and v are nearly 0; the larger ones make attention sharp."""

    @jax.jit
    def init() -> dict:
        params = init_params(Reader(mechanism(), num_layers).config, 1, 2, jax.random.key(0))
        keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
        return jax.tree.map(lambda leaf: 1.5 * leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), params)

    return init()


def random_text(length: int, rows: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, VOCAB, (rows, length), np.int32)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_segments_equal_one_pass_where_the_cache_holds_the_history(num_layers: int):
    """Exact at any depth, because every layer's states are cached, and wherever the text is cut."""
    read, text = Reader(TransformerXLAttention(window=12), num_layers), random_text(12)
    whole = read(text, [12])
    assert np.ptp(whole, axis=1).max() > 0.1
    for lengths in ([4, 4, 4], [8, 4]):
        np.testing.assert_allclose(read(text, lengths), whole, rtol=0, atol=2e-5)


def test_what_was_dropped_from_the_cache_never_was():
    """Shift invariance.

    The same text behind a segment of other text, which is not in the cache any more, gives the same logits.
    """
    read, text, other = Reader(TransformerXLAttention(window=12)), random_text(12), random_text(4, seed=1)
    context = read.segment(other, read.config.init_context(2, 4)).context
    after_other = read(text, [4, 4, 4], context)
    assert np.abs(after_other - read(text, [4, 4, 4])).max() > 0.1
    dropped = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if leaf.dtype == bool else leaf, context)
    np.testing.assert_array_equal(read(text, [4, 4, 4], dropped), read(text, [4, 4, 4]))


SEGMENT = 3


@pytest.mark.parametrize("same_length", [False, True])
@pytest.mark.parametrize("mechanism", [TransformerXLAttention, XLAttention])
@pytest.mark.parametrize(("num_layers", "window"), [(1, 3), (3, 3), (2, 6)])
def test_reaches_as_far_as_layers_times_window_and_not_further(
    mechanism: type, num_layers: int, window: int, same_length: bool
):
    """The last segment's logits, when one earlier token is another.

    Row i has its i-th token changed. Beyond the reach they are equal to the last bit.
    """
    read = Reader(mechanism(window=window, same_length=same_length), num_layers)
    length = -(-(num_layers * window + SEGMENT) // SEGMENT + 1) * SEGMENT
    text = np.repeat(random_text(length, rows=1), length, axis=0)
    changed = text.copy()
    changed[np.arange(length), np.arange(length)] = text[0] % (VOCAB - 1) + 1
    lengths = [SEGMENT] * (length // SEGMENT)
    differs = (read(text, lengths) != read(changed, lengths)).any(axis=-1)
    for query in range(length - SEGMENT, length):
        # Of a whole cache everything before the segment is seen; of the same length, W - 1 positions before the query.
        first = query - num_layers * (window - 1) if same_length else length - SEGMENT - num_layers * window
        expected = (np.arange(length) >= first) & (np.arange(length) <= query)
        np.testing.assert_array_equal(differs[:, query], expected, err_msg=f"query {query}")


@pytest.mark.parametrize("window", [2, 5, 8])
def test_with_same_length_every_query_sees_exactly_as_many_keys(window: int):
    """Read off one-hot values: without queries, u and v the weights are equal, 1 over the number of visible keys."""
    length, width = 4, 16
    dims = LayerDims(width, 1, width, 8, 0.0, 1.0, jnp.dtype(jnp.float32))
    eye, zero = jnp.eye(width), jnp.zeros((width, 1, width))
    kernels = {"query": zero, "key": zero, "position": zero, "value": eye[:, None], "output": eye[None]}
    params = {name: {"kernel": kernel} for name, kernel in kernels.items()} | {"u": zero[0], "v": zero[0]}
    hidden, x = eye[None, :window], eye[None, window : window + length]
    state = TransformerXLState(hidden, jnp.ones((1, window), bool))
    segment = Segment(jnp.ones((1, length), bool), Layout(length))
    layer = TransformerXLAttention(window=window, same_length=True).layer(dims)
    weights = jax.jit(layer.apply)({"params": {"relative": params}}, x, segment, state)[0][0]
    for query in range(length):
        last = window + query
        expected = [1 / window if last - window < key <= last else 0 for key in range(width)]
        np.testing.assert_allclose(weights[query], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("same_length", [False, True])
def test_a_longer_cache_at_evaluation_takes_the_same_parameters(same_length: bool):
    short = Reader(TransformerXLAttention(window=4, same_length=same_length))
    long = Reader(TransformerXLAttention(window=8, same_length=same_length, clamp_distance=4))
    whole = Reader(TransformerXLAttention(window=100, clamp_distance=4))
    text = random_text(12)
    expected = whole(text, [12])
    difference = np.abs(long(text, [4, 4, 4]) - expected).max(axis=(0, 2))
    # 8 positions of the cache and the segment's own: all of the text, or of the same length, its last 8 positions.
    assert (difference[: 8 if same_length else 12] < 2e-5).all()
    assert np.abs(short(text, [4, 4, 4]) - expected)[:, 8:].max() > 0.01


@pytest.mark.parametrize("fields", [{"window": 0}, {"clamp_distance": -1}])
def test_impossible_settings_are_told(fields: dict):
    with pytest.raises(UserError, match=next(iter(fields))):
        TransformerXLAttention(**fields)
