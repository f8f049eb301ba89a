"""A product-key memory finds exactly the best of all keys, and stands in the place of the MLP of the named layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mechanisms import LENGTH, ROWS, random_tokens

from memorizing.context import Inputs
from memorizing.cost.flops import segment_flops
from memorizing.errors import UserError
from memorizing.models import language_model
from memorizing.models.lm_config import LMConfig
from memorizing.models.memory.product_keys import ProductKeyMemory, ProductKeys, best_keys
from memorizing.training.state import init_variables

PLAIN = LMConfig(vocab_size=32, num_layers=4, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=32)
KEYS = ProductKeys(num_sub_keys=8, num_heads=2, num_neighbors=4, key_dim=6)
WITH_KEYS = dataclasses.replace(PLAIN, product_keys=KEYS, product_keys_at=(2,))


@pytest.mark.parametrize("num_sub_keys", [8, 200])
def test_the_best_of_all_keys_are_found(num_sub_keys: int):
    """Against the scores of all n * n keys, in float64; many sub-keys are searched in groups."""
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(2, 3, 2, 2, 5)).astype(np.float32)
    sub_keys = rng.normal(size=(2, 2, num_sub_keys, 5)).astype(np.float32)
    scores, keys = jax.jit(best_keys, static_argnums=2)(queries, sub_keys, 6)
    halves = np.einsum("BTNzh,Nznh->BTNzn", queries.astype(np.float64), sub_keys.astype(np.float64))
    every = (halves[..., 0, :, None] + halves[..., 1, None, :]).reshape(2, 3, 2, -1)
    np.testing.assert_array_equal(keys, np.argsort(-every, axis=-1)[..., :6])
    np.testing.assert_allclose(scores, -np.sort(-every, axis=-1)[..., :6], rtol=1e-5)


def test_output_and_gradient_are_those_of_a_softmax_over_all_keys():
    """With as many neighbours as keys nothing is left out: the plain softmax over the n * n keys, and its gradient."""
    config = dataclasses.replace(KEYS, num_sub_keys=3, num_neighbors=3)
    module = ProductKeyMemory(config, jnp.dtype("float32"))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 16)), jnp.float32)
    params = jax.tree.map(
        lambda leaf: leaf.value, module.init(jax.random.key(0), x), is_leaf=lambda leaf: hasattr(leaf, "value")
    )

    def dense(params: dict, x: jax.Array) -> jax.Array:
        p = params["params"]
        queries = jnp.einsum("btd,dnh->btnh", x, p["query"]["kernel"])
        mean, variance = queries.mean(-1, keepdims=True), queries.var(-1, keepdims=True)
        queries = (queries - mean) / jnp.sqrt(variance + 1e-6)
        halves = jnp.einsum("btnzh,nzkh->btnzk", queries.reshape(2, 4, 2, 2, 3), p["sub_keys"])
        sums = halves[..., 0, :, None] + halves[..., 1, None, :]
        best = jnp.sort(sums.reshape(2, 4, 2, 9), axis=-1)[..., -3:]
        shown = jnp.where(sums.reshape(2, 4, 2, 9) >= best[..., :1], sums.reshape(2, 4, 2, 9), -jnp.inf)
        return jnp.einsum("btnk,kd->btd", jax.nn.softmax(shown, axis=-1), p["values"])

    def with_gradient(function: Callable) -> tuple:
        y, pull_back = jax.vjp(function, params, x)
        return y, pull_back(jnp.cos(y))

    with jax.numpy_rank_promotion("allow"):
        results, expected = jax.jit(lambda: (with_gradient(module.apply), with_gradient(dense)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), results, expected)
    assert jnp.abs(results[1][0]["params"]["sub_keys"]).max() > 1e-3


def test_it_stands_in_the_place_of_the_mlp_of_its_layers():
    """The others are scanned as before, and gradient reaches the values, also in reversible layers and in chunks."""
    assert [group.name for group in WITH_KEYS.groups] == ["layers_00_01", "layer_02", "layer_03"]
    config = dataclasses.replace(WITH_KEYS, residuals="reversible", mlp_chunks=2)
    inputs = Inputs(random_tokens(np.random.default_rng(0)), np.ones((ROWS, LENGTH), bool), np.ones(ROWS, bool))
    context = config.init_context(ROWS, LENGTH)

    @jax.jit
    def params_and_gradient() -> tuple:
        params = init_variables(config, ROWS, LENGTH, jax.random.key(0))["params"]

        def loss(params: dict) -> jax.Array:
            return jnp.square(language_model.apply(config, params, {}, inputs, context).logits).mean()

        return params, jax.grad(loss)(params)

    params, gradient = params_and_gradient()
    assert params["layer_02"]["mlp"]["values"].shape == (64, 16) and set(params["layer_03"]["mlp"]) == {"up", "down"}
    for name in ("values", "sub_keys"):
        assert jnp.abs(gradient["layer_02"]["mlp"][name]).max() > 0
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert abs(WITH_KEYS.num_parameters / num_parameters - 1) < 0.05
    mlp = 2 * LENGTH * 16 * 2 * 32
    assert segment_flops(WITH_KEYS, LENGTH) == segment_flops(PLAIN, LENGTH) - mlp + KEYS.flops(16, LENGTH)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"product_keys": KEYS}, "set both or neither"),
        ({"product_keys_at": (1,)}, "set both or neither"),
        ({"product_keys": KEYS, "product_keys_at": (4,)}, "from 0 to 3"),
        ({"product_keys": KEYS, "product_keys_at": (1, 1)}, "different indices"),
    ],
)
def test_a_mistake_is_told(fields: dict, pattern: str):
    with pytest.raises(UserError, match=pattern):
        dataclasses.replace(PLAIN, **fields)
    with pytest.raises(UserError, match="at most ProductKeys"):
        ProductKeys(num_sub_keys=4, num_neighbors=8)
    with pytest.raises(UserError, match="two halves"):
        ProductKeys(key_dim=5)
