"""Mechanisms answer for themselves: whatever the rest of the library asks, every mechanism knows.

Nothing outside their room names one, so that an answer that is missing or wrong would show as a wrong plan, a memory
that
is not counted, or text that is generated wrongly.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mechanisms import LENGTH, ROWS, Mechanism, init_params

from memorizing.context import Layout
from memorizing.errors import UserError
from memorizing.models.attention import MECHANISMS
from memorizing.models.attention.base import Attention
from memorizing.models.lm_config import LMConfig
from memorizing.models.memory import external_memory
from memorizing.models.stack.arrays import unstack_paths
from memorizing.training.checkpoint import paths


def parts(mechanism: Mechanism) -> set[Attention]:
    """The mechanisms of its layers."""
    return set(mechanism.config.stack.mechanisms)


def names(config: LMConfig) -> set[str]:
    """Of the parameters, layer by layer."""
    params = jax.eval_shape(lambda: init_params(config, ROWS, LENGTH, jax.random.key(0)))
    return set(unstack_paths(paths(params), config.stack.stacked_layers))


def test_flops_grow_with_the_segment_and_count_at_least_the_projections(mechanism: Mechanism):
    dims = mechanism.config.dims
    for attention in parts(mechanism):
        short, long = (attention.flops(dims, Layout(length)) for length in (LENGTH, 2 * LENGTH))
        assert isinstance(short, int) and long > short >= 2 * 2 * LENGTH * dims.embed_dim**2


def test_bytes_of_a_row_are_those_of_the_state(mechanism: Mechanism):
    dims = mechanism.config.dims
    for attention in parts(mechanism):
        state = attention.init_state(dims, 3, LENGTH)
        num_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        assert 3 * attention.state_bytes(dims, LENGTH) == num_bytes
    context = mechanism.config.init_context(1, LENGTH)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(context) if leaf.ndim)
    assert mechanism.config.state_bytes(LENGTH) == whole


def test_a_memory_is_resized_left_out_and_found(mechanism: Mechanism):
    """Resized it has the same parameters; left out, fewer; and what is asked for is what lies in the state."""
    dims = mechanism.config.dims
    for attention in parts(mechanism):
        state = attention.init_state(dims, ROWS, LENGTH)
        memory = attention.memory(state)
        assert (memory is None) == (attention.memory_size == 0)
        if memory is None:
            assert attention.with_memory_size(64) is attention and attention.without_memory() is attention
            assert attention.map_memory(state, external_memory.cleared) is state
            continue
        assert memory.valid.shape == (ROWS, attention.memory_size)
        larger = attention.with_memory_size(8 * LENGTH)
        assert larger.memory(larger.init_state(dims, ROWS, LENGTH)).valid.shape == (ROWS, 8 * LENGTH)
        assert attention.without_memory().memory_size == 0
        full = jax.tree.map(jnp.ones_like, state)
        emptied = attention.map_memory(full, external_memory.cleared)
        assert not np.any(attention.memory(emptied).valid)
    config = mechanism.config
    if config.has_memory:
        of_model, of_larger, of_none = map(
            names, (config, config.with_memory_size(8 * LENGTH), config.without_memory())
        )
        assert of_model == of_larger and of_none <= of_model
        # A gate has parameters; a cache that is not trained has none.
        assert (of_none < of_model) == any(each.memory_size for each in config.stack.mechanisms)


def test_only_models_that_say_so_are_decoded(mechanism: Mechanism):
    assert all(type(attention.can_decode) is bool for attention in parts(mechanism))
    if mechanism.later_tokens_decide_what_is_seen:
        with pytest.raises(UserError, match=r"later tokens.*strictly_causal = True"):
            mechanism.config.check_can_decode()
    else:
        mechanism.config.check_can_decode()


@pytest.mark.parametrize("cls", MECHANISMS, ids=lambda cls: cls.__name__)
def test_tables_of_costs_have_an_example_of_every_mechanism_that_carries_something(cls: type[Attention]):
    example = cls.example(LENGTH)
    assert (example is None) == (cls is MECHANISMS[0]), "full attention is the table's first row"
    if example:
        assert isinstance(example.attention, cls) and example.name and example.meaning
