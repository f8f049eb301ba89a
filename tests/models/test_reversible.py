"""Reversible layers: inputs come back from outputs, and gradients are those of ordinary differentiation."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mechanisms import LENGTH, VOCAB, drawn_variables

from memorizing.batch import Batch
from memorizing.context import Layout, Report, Rngs, Segment
from memorizing.errors import UserError
from memorizing.models.attention.full import FullAttention
from memorizing.models.attention.knn import KNNAttention
from memorizing.models.attention.sparse.factorized import SparseAttention
from memorizing.models.attention.sparse.reformer import ReformerAttention
from memorizing.models.attention.sparse.routing import RoutingAttention
from memorizing.models.attention.xl import XLAttention
from memorizing.models.lm_config import LMConfig
from memorizing.models.recurrent_tokens import RecurrentTokens
from memorizing.models.stack import reversible
from memorizing.models.stack.reversible import Halves, ReversibleInputs, Streams
from memorizing.training.state import init_variables
from memorizing.training.step import Carried, batch_gradient

ROWS, SEGMENTS = 2, 2
XL = XLAttention(window=LENGTH)
REFORMER = ReformerAttention(hash_buckets=4, num_rounds=2, chunk_size=4)
ROUTING = RoutingAttention(num_clusters=2, cluster_size=4, local=XL)
MODEL = LMConfig(VOCAB, 4, 16, 2, 8, 32, residuals="reversible", dropout=0.25, initial_logit_scale=4.0)


class Outputs(NamedTuple):
    state: Any
    report: Report


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_inputs_are_computed_back_from_outputs(dtype: str, tolerance: float):
    with jax.enable_x64(dtype == "float64"):
        rng = np.random.default_rng(0)
        x = Streams(*jnp.asarray(rng.normal(size=(2, 2, 3, 8)), dtype))
        kernels = jnp.asarray(rng.normal(size=(6, 2, 8, 8)) / 3, dtype)
        layer = Halves(
            lambda params, x, state, *_: (jnp.tanh(x @ params[0]), Outputs(state, Report())),
            lambda params, x, *_: jnp.sin(x @ params[1]),
        )
        segment = Segment(jnp.ones((2, 3), bool), Layout(3))
        y = x
        for kernel in kernels:
            inputs = {"layer": ReversibleInputs(kernel, (), ())}
            y, outputs = reversible.pass_layers({"layer": layer}, False, y, inputs, {"layer": segment})
        found = (y, y)
        for kernel in kernels[::-1]:
            inputs = ReversibleInputs(kernel, (), ())
            found, _ = reversible.layer_backward(layer, *found, inputs, segment, {}, outputs["layer"])
        assert found[0].first.dtype == dtype
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), found[0], x)


def batch() -> Batch:
    rng = np.random.default_rng(0)
    shape = (ROWS, SEGMENTS, LENGTH)
    tokens, targets = (rng.integers(1, VOCAB, shape, np.int32) for _ in range(2))
    is_real = np.ones(shape, bool)
    is_real[1, -1, 5:] = False
    return Batch(tokens, targets, is_real.astype(np.float32), is_real, np.ones(shape[:2], bool) & (np.arange(2) == 0))


def gradient(config: LMConfig) -> tuple:
    """Of one step of two segments, and what it carries on."""

    @jax.jit
    def run(params: Any, buffers: Any) -> tuple:
        carried = Carried(config.init_context(ROWS, LENGTH), buffers)
        rngs = Rngs(jax.random.key(1), jnp.arange(ROWS))
        return batch_gradient(config, params, batch(), carried, rngs, 1)

    variables = drawn_variables(config)
    return jax.device_get(run(variables["params"], variables["buffers"]))


CONFIGS = {
    "a pattern with a cache and hashes": dataclasses.replace(MODEL, attention=(XL, REFORMER)),
    "an external memory among others": dataclasses.replace(
        MODEL, num_layers=3, attention=FullAttention(), attention_at=((2, KNNAttention(2 * LENGTH, 4, local=XL)),)
    ),
    "centroids and a loss of their own": dataclasses.replace(MODEL, attention=ROUTING),
}
# What is a part of those above, or passed around the layers.
MORE = {
    "full": MODEL,
    "memory tokens around them": dataclasses.replace(MODEL, recurrent_tokens=RecurrentTokens(2)),
}


@pytest.mark.parametrize(
    "config",
    [
        *(pytest.param(config, id=name) for name, config in CONFIGS.items()),
        *(pytest.param(config, id=name, marks=pytest.mark.nightly) for name, config in MORE.items()),
    ],
)
def test_gradients_are_those_of_ordinary_differentiation(config: LMConfig, monkeypatch: pytest.MonkeyPatch):
    """Dropout and hashing, carried context, buffers, auxiliary losses and reports included."""
    found = gradient(config)

    def plainly(*args: Any) -> tuple:
        y, outputs, _ = reversible._forward(*args)
        return y, outputs

    monkeypatch.setattr(reversible, "pass_layers", plainly)
    expected = gradient(config)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(expected[0]))
    for (path, leaf), (_, other) in zip(*map(jax.tree_util.tree_leaves_with_path, (found, expected)), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-4, err_msg=jax.tree_util.keystr(path))


@functools.cache
def temporary_bytes(residuals: str, num_layers: int, remat: str = "none", remat_every: int = 1) -> int:
    """Of a gradient, by the compiled program's own account."""
    config = LMConfig(VOCAB, num_layers, 32, 2, 16, 64, residuals=residuals, remat=remat, remat_every=remat_every)
    rows, length = 2, 256
    variables = jax.eval_shape(lambda: init_variables(config, rows, length, jax.random.key(0)))
    context = jax.eval_shape(lambda: config.init_context(rows, length))
    tokens = jax.ShapeDtypeStruct((rows, 1, length), jnp.int32)
    flags = jax.ShapeDtypeStruct((rows, 1, length), bool)
    weights = jax.ShapeDtypeStruct((rows, 1, length), jnp.float32)
    start = jax.ShapeDtypeStruct((rows, 1), bool)

    def loss(params: Any, buffers: Any, context: Any, batch: Batch) -> Any:
        rngs = Rngs(jax.random.key(1), jnp.arange(rows))
        return batch_gradient(config, params, batch, Carried(context, buffers), rngs, 1)[0]

    batch = Batch(tokens, tokens, weights, flags, start)
    compiled = jax.jit(loss).lower(variables["params"], variables["buffers"], context, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("optimized")
def test_memory_does_not_grow_with_the_number_of_layers():
    """Nor with what depends on parameters alone: the bias of all layers would weigh more than their activations."""
    few, many = (temporary_bytes("reversible", num_layers) for num_layers in (4, 24))
    assert many < 1.01 * few
    few, many = (temporary_bytes("plain", num_layers) for num_layers in (4, 12))
    assert many > 1.8 * few, "the test cannot see what it forbids"


def test_a_reversible_model_can_be_sparse_too():
    config = dataclasses.replace(MODEL, attention=SparseAttention(stride=4))
    assert np.isfinite(gradient(config)[2]["loss"])


@pytest.mark.parametrize("chunks", [2, pytest.param(8, marks=pytest.mark.nightly)])
def test_an_mlp_in_chunks_is_the_same_mlp(chunks: int):
    config = dataclasses.replace(MODEL, residuals="plain", num_layers=2)
    found, expected = gradient(dataclasses.replace(config, mlp_chunks=chunks)), gradient(config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), found, expected)


def test_a_loss_in_chunks_is_the_same_loss():
    config = dataclasses.replace(MODEL, residuals="plain", num_layers=2)
    found, expected = gradient(dataclasses.replace(config, loss_chunks=4)), gradient(config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), found, expected)


@pytest.mark.parametrize("remat", [("layer", 2), pytest.param(("dots", 1), marks=pytest.mark.nightly)], ids=str)
def test_what_is_computed_again_is_the_same(remat: tuple[str, int]):
    """Dropout and hashes, too; also where the blocks do not divide the repetitions of the pattern."""
    plain = dataclasses.replace(MODEL, residuals="plain", num_layers=6, attention=(XL, REFORMER))
    found = gradient(dataclasses.replace(plain, remat=remat[0], remat_every=remat[1]))
    for (path, leaf), (_, other) in zip(
        *map(jax.tree_util.tree_leaves_with_path, (found, plainly_differentiated(plain))), strict=True
    ):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-4, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "residuals,unroll,remat", [("plain", 2, "none"), ("plain", 3, "dots"), ("reversible", 2, "none")]
)
def test_repetitions_that_are_unrolled_are_the_same(residuals: str, unroll: int, remat: str):
    """Three of them: also where as many as are unrolled do not divide them, and where no scan is left."""
    plain = dataclasses.replace(MODEL, residuals=residuals, num_layers=6, attention=(XL, REFORMER))
    found = gradient(dataclasses.replace(plain, unroll=unroll, remat=remat))
    for (path, leaf), (_, other) in zip(
        *map(jax.tree_util.tree_leaves_with_path, (found, plainly_differentiated(plain))), strict=True
    ):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-4, err_msg=jax.tree_util.keystr(path))


@functools.cache
def plainly_differentiated(config: LMConfig) -> tuple:
    return gradient(config)


@pytest.mark.usefixtures("optimized")
def test_layers_that_are_computed_again_need_less_memory():
    every, fourth, nothing = (
        temporary_bytes("plain", 16, *remat) for remat in (("layer", 1), ("layer", 4), ("none", 1))
    )
    assert max(every, fourth) < 0.5 * nothing


def test_what_does_not_go_together_is_refused():
    with pytest.raises(UserError, match=r"LMConfig.remat = 'layer' with LMConfig.residuals = 'reversible'"):
        dataclasses.replace(MODEL, remat="layer")
    with pytest.raises(UserError, match=r"LMConfig.mlp_chunks = 3 does not divide the 8 positions"):
        dataclasses.replace(MODEL, mlp_chunks=3).check(8)
