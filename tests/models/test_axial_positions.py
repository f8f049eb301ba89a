"""A learned vector for each position of a segment, put together from its axes; the same token by token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mechanisms import LENGTH, ROWS, random_tokens

from memorizing.context import Decoding, Inputs
from memorizing.errors import UserError
from memorizing.models import language_model
from memorizing.models.layers import PositionTable
from memorizing.models.lm_config import LMConfig
from memorizing.training.state import init_variables

CONFIG = LMConfig(32, 1, 16, 2, 8, 32, positions="none", learned_positions=(2, 4))


def test_a_position_has_a_part_for_each_axis():
    first, second = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    params = {"table_0": first[:2], "table_1": second}
    vectors = PositionTable((2, 4), 6, jnp.dtype("float32")).apply({"params": params}, 3, 5)[0]
    for row, position in enumerate(range(3, 8)):
        expected = np.concatenate([first[position // 4], second[position % 4]])
        np.testing.assert_array_equal(vectors[row], expected)


def test_a_segment_is_read_token_by_token_with_the_same_positions():
    """Without them, and without a bias, only the mask would tell one place from another."""
    tokens = random_tokens(np.random.default_rng(0))
    inputs = Inputs(tokens, np.ones((ROWS, LENGTH), bool), np.ones(ROWS, bool))
    context = CONFIG.init_context(ROWS, LENGTH)

    @jax.jit
    def read() -> tuple:
        params = init_variables(CONFIG, ROWS, LENGTH, jax.random.key(0))["params"]
        whole = language_model.apply(CONFIG, params, {}, inputs, context).logits
        prefill = Decoding(jnp.zeros((), jnp.int32))
        kv_cache = language_model.apply(CONFIG, params, {}, inputs, context, decoding=prefill).report.kv_cache
        steps = []
        for position in (2, LENGTH - 1):
            token = dataclasses.replace(inputs, tokens=tokens[:, position : position + 1])
            decoding = Decoding(jnp.asarray(position), kv_cache)
            steps.append(language_model.apply(CONFIG, params, {}, token, context, decoding=decoding).logits[:, 0])
        moved = jnp.roll(params["positions"]["table_1"], 1, axis=0)
        others = params | {"positions": params["positions"] | {"table_1": moved}}
        return whole, jnp.stack(steps, axis=1), language_model.apply(CONFIG, others, {}, inputs, context).logits

    whole, steps, moved = read()
    np.testing.assert_allclose(steps, whole[:, [2, LENGTH - 1]], atol=1e-5)
    assert np.abs(moved - whole).max() > 0.1


@pytest.mark.parametrize(
    ("sizes", "pattern"), [((2, 3), "fewer than the segment length 8"), ((2, 2, 2), "which share it equally")]
)
def test_a_mistake_is_told(sizes: tuple[int, ...], pattern: str):
    with pytest.raises(UserError, match=pattern):
        dataclasses.replace(CONFIG, learned_positions=sizes).check(LENGTH)
