"""Everything that training changes, in one pytree, created already sharded."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memorizing.array_typing import Tree
from memorizing.context import Context
from memorizing.models import language_model
from memorizing.models.lm_config import LMConfig
from memorizing.runtime import sharding
from memorizing.runtime.sharding import MeshConfig


@struct.dataclass
class TrainState:
    """State of a training run.

    Attributes:
      step: int32 scalar, updates made.
      params: float32, by group of layers.
      buffers: arrays of the layers that have no rows and get no gradient, by group of layers.
      opt_state: of the optimizer.
      rng: uint32 key data; the randomness of a step is this folded with the step.
      context: what the rows carry from segment to segment, memories included.
    """

    step: jax.Array
    params: Tree
    buffers: Tree
    opt_state: Tree
    rng: jax.Array
    context: Context


def init_variables(config: LMConfig, num_rows: int, segment_length: int, rng: jax.Array) -> dict[str, Tree]:
    """`{"params": ..., "buffers": ...}`: see `language_model.init`."""
    return nn.unbox(language_model.init(config, num_rows, segment_length, rng))


def init_train_state(
    config: LMConfig, optimizer: optax.GradientTransformation, num_rows: int, segment_length: int, seed: int
) -> TrainState:
    """A fresh state, unsharded; to be jitted or shape-evaluated."""
    init_key, step_key = jax.random.split(jax.random.key(seed))
    variables = init_variables(config, num_rows, segment_length, init_key)
    return _begin(config, optimizer, num_rows, segment_length, variables, step_key)


def _begin(
    config: LMConfig,
    optimizer: optax.GradientTransformation,
    num_rows: int,
    segment_length: int,
    variables: dict[str, Tree],
    step_key: jax.Array,
) -> TrainState:
    """The state of a training that begins with these parameters and buffers."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        buffers=variables["buffers"],
        opt_state=optimizer.init(variables["params"]),
        rng=jax.random.key_data(step_key),
        context=config.init_context(num_rows, segment_length),
    )


def abstract_train_state(
    config: LMConfig,
    optimizer: optax.GradientTransformation,
    num_rows: int,
    segment_length: int,
    mesh: Mesh,
    mesh_config: MeshConfig,
) -> TrainState:
    """Shape, dtype and sharding of every leaf of the state."""
    boxed = language_model.abstract_variables(config, num_rows, segment_length)
    begin = functools.partial(_begin, config, optimizer, num_rows, segment_length)
    state = jax.eval_shape(begin, nn.unbox(boxed), jax.eval_shape(jax.random.key, 0))
    variables = sharding.variable_shardings(mesh, boxed, mesh_config.parameter_rules)
    params = variables["params"]
    replicated = NamedSharding(mesh, PartitionSpec())
    # The same tree with a sharding in the place of every array.
    shardings = dataclasses.replace(
        state,
        step=replicated,
        params=params,
        buffers=variables["buffers"],
        opt_state=sharding.like_parameters(
            mesh, state.opt_state, state.params, mesh_config.optimizer_shardings(state.params, params)
        ),
        rng=replicated,
        context=sharding.tree_shardings(mesh, state.context, config.context_axes(), sharding.STATE_RULES),
    )
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, shardings
    )
