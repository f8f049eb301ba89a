"""What mechanisms tell an inspector is what they attended to: it explains the outputs of their layers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mechanisms import LENGTH, MECHANISMS, ROWS, XL

from memorizing.context import Layout, Report, Segment
from memorizing.models.attention.base import Attention, LayerDims
from memorizing.models.attention.sparse.factorized import SparseAttention
from memorizing.models.attention.sparse.routing import RoutingAttention
from memorizing.models.layers import Einsum

DIMS = LayerDims(16, 2, 8, 32, 0.0, 4.0, jnp.dtype("float32"))
# Each once, in an order that is the same in every process.
OF_CONTRACT = dict.fromkeys(
    part for each in MECHANISMS for part in each.config.stack.mechanisms if part.tells_attention
)
TELLING = [
    *OF_CONTRACT,
    SparseAttention(sees="split", stride=4),
    RoutingAttention(num_clusters=3, cluster_size=4, num_local_heads=0),
]
# A document ends within a segment.
IS_REAL = np.arange(LENGTH)[None] < np.array([LENGTH, LENGTH - 3, LENGTH])[:, None]


def read(attention: Attention, num_shown: int) -> tuple[Report, np.ndarray, np.ndarray]:
    """The report of a layer, its values [B, T, N, H], and what its heads gave [B, T, N, H]."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, LENGTH, DIMS.embed_dim)), jnp.float32)
    tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)
    segment = Segment(jnp.asarray(IS_REAL), Layout(LENGTH), tokens=tokens, clock=jnp.zeros((), jnp.int32))
    state = attention.init_state(DIMS, ROWS, LENGTH)
    layer = attention.layer(DIMS)
    seen: dict[str, Any] = {}

    def watch(next_method: Any, args: tuple, kwargs: dict, call: Any) -> Any:
        y = next_method(*args, **kwargs)
        if isinstance(call.module, Einsum):
            seen[call.module.name] = args[0] if call.module.name == "output" else y
        return y

    @jax.jit
    def apply(x: jax.Array) -> tuple:
        variables = layer.init(jax.random.key(0), x, segment, state)
        with nn.intercept_methods(watch):
            _, _, report = layer.apply(variables, x, segment.replace(num_shown=num_shown), state)
        return report, seen["value"], seen["output"]

    return jax.device_get(apply(x))


@pytest.mark.parametrize("attention", TELLING, ids=lambda attention: repr(attention)[:60])
def test_what_is_told_explains_the_output(attention: Attention):
    """Weights times values of the positions that are told are what the heads gave; the greatest weights come first."""
    report, values, given = read(attention, LENGTH)
    heads_told = []
    for told in report.attended:
        heads_told += told.heads
        weights = np.where(told.positions >= 0, told.weights, 0)
        assert (np.diff(told.weights, axis=-1) <= 0).all()
        assert (told.positions <= np.arange(LENGTH)[None, :, None, None]).all()
        rows, heads = np.arange(ROWS)[:, None, None, None], np.array(told.heads)[None, None, :, None]
        seen = np.sum(weights[..., None] * values[rows, told.positions, heads], axis=3)
        expected = given[:, :, np.array(told.heads)]
        np.testing.assert_allclose(seen[IS_REAL], expected[IS_REAL], atol=2e-6)
        assert told.groups.shape == (ROWS, LENGTH, len(told.heads), len(told.group_names))
    # Local heads that carry a cache tell nothing.
    expected_heads = [1] if getattr(attention, "local", None) == XL else [0, 1]
    assert heads_told == expected_heads


def test_fewer_positions_are_the_best_ones_and_none_unless_they_are_asked_for():
    attention = SparseAttention(stride=4)
    (every,) = read(attention, LENGTH)[0].attended
    (best,) = read(attention, 3)[0].attended
    np.testing.assert_array_equal(best.weights, every.weights[..., :3])
    np.testing.assert_array_equal(best.positions, every.positions[..., :3])
    assert read(attention, 0)[0].attended == ()
