"""Spans that heads learn: against their definition, over a whole document."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memorizing.context import Layout, Report, Segment
from memorizing.models.attention.adaptive_span import AdaptiveSpanAttention
from memorizing.models.attention.base import Attention, LayerDims
from memorizing.models.positions import t5_buckets

T, HEADS, WIDTH = 6, 2, 4
DIMS = LayerDims(8, HEADS, WIDTH, 8, 0.0, 2.0, jnp.dtype("float32"))
NUM_SEGMENTS = 4
SPAN = AdaptiveSpanAttention(window=9, ramp=3, initial_span=0.3, span_loss=0.5, num_buckets=8, max_distance=20)


def read(attention: Attention) -> tuple[dict[str, np.ndarray], dict[str, Any], Report]:
    """Queries, keys, values and results [positions, N, H] of a document of some segments, parameters, last report."""
    rng = np.random.default_rng(0)
    shape = (NUM_SEGMENTS, 1, T, HEADS, WIDTH)
    stream = {name: rng.normal(size=shape).astype(np.float32) for name in ("queries", "keys", "values")}
    core = attention.core(DIMS)
    scale = jnp.array([1.0, 2.0])
    segment = Segment(jnp.ones((1, T), bool), Layout(T))

    @jax.jit
    def run() -> tuple:
        state = attention.init_state(DIMS, 1, T)
        first = [stream[name][0] for name in ("queries", "keys", "values")]
        params = nn.unbox(core.init(jax.random.key(0), *first, scale, segment, state))["params"]
        # Away from where they begin.
        params = jax.tree.map(lambda leaf: leaf + jnp.linspace(-0.5, 0.5, leaf.size).reshape(leaf.shape), params)
        results = []
        report = Report()
        for index in range(NUM_SEGMENTS):
            inputs = [stream[name][index] for name in ("queries", "keys", "values")]
            y, state, report = core.apply({"params": params}, *inputs, scale, segment, state)
            results.append(y)
        return jnp.stack(results), params, report

    results, params, report = jax.device_get(run())
    joined = {name: values.reshape(-1, HEADS, WIDTH).astype(np.float64) for name, values in stream.items()}
    return joined | {"results": results.reshape(-1, HEADS, WIDTH)}, params, report


def logits_of(stream: dict[str, np.ndarray], params: dict[str, Any], head: int) -> np.ndarray:
    """(q . k + bias) * scale of all pairs, [S, S]; the bias as of near positions."""
    num = len(stream["keys"])
    back = np.arange(num)[:, None] - np.arange(num)[None, :]
    bias = params["bias"]["table"][head, t5_buckets(back, 8, 20)]
    return (stream["queries"][:, head] @ stream["keys"][:, head].T + bias) * [1.0, 2.0][head]


def test_a_head_sees_as_far_as_its_span_and_the_loss_is_on_the_spans():
    stream, params, report = read(SPAN)
    num = len(stream["keys"])
    back = np.arange(num)[:, None] - np.arange(num)[None, :]
    spans = SPAN.window / (1 + np.exp(-params["span"]))
    assert spans[0] < spans[1]
    for head in range(HEADS):
        soft = np.clip((SPAN.ramp + spans[head] - back) / SPAN.ramp, 0, 1) * ((back >= 0) & (back < SPAN.window))
        weights = soft * np.exp(logits_of(stream, params, head))
        expected = weights / weights.sum(axis=1, keepdims=True) @ stream["values"][:, head]
        np.testing.assert_allclose(stream["results"][:, head], expected, atol=1e-5)
    np.testing.assert_allclose(report.losses["span"], SPAN.span_loss * spans.mean(), rtol=1e-5)
    np.testing.assert_allclose(report.metrics["span"], spans, rtol=1e-5)


@pytest.mark.parametrize("wanted_back", [2, 7])
def test_a_span_grows_where_it_pays_and_shrinks_where_it_does_not(wanted_back: int):
    """By gradient: of a head that is asked for what stands within its span, and of one that is asked for more."""
    attention = AdaptiveSpanAttention(
        window=9, ramp=6, initial_span=0.5, span_loss=0.01, num_buckets=8, max_distance=20
    )
    core = attention.core(DIMS)
    length = 12
    segment = Segment(jnp.ones((1, length), bool), Layout(length))
    vectors = jnp.zeros((1, length, HEADS, WIDTH))
    values = jnp.asarray(np.random.default_rng(0).normal(size=(1, length, HEADS, WIDTH)), jnp.float32)
    state = attention.init_state(DIMS, 1, length)

    @jax.jit
    def gradient() -> jax.Array:
        params = nn.unbox(core.init(jax.random.key(0), vectors, vectors, values, jnp.ones(HEADS), segment, state))
        # Without a bias: only the span decides how much of what is far is seen.
        params = jax.tree.map(jnp.zeros_like, params)

        def loss(params: Any) -> jax.Array:
            y, _, report = core.apply(params, vectors, vectors, values, jnp.ones(HEADS), segment, state)
            away = y[:, wanted_back:] - values[:, :-wanted_back]
            return jnp.mean(jnp.square(away)) + sum(report.losses.values())

        return jax.grad(loss)(params)["params"]["span"]

    sign = np.sign(gradient())
    np.testing.assert_array_equal(sign, 1 if wanted_back == 2 else -1)
