"""Everything that training changes, in one pytree, created already sharded."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memorizing import sharding
from memorizing.array_typing import Tree
from memorizing.context import Context
from memorizing.model import LanguageModel, LMConfig
from memorizing.sharding import MeshConfig


@struct.dataclass
class TrainState:
    """State of a training run.

    Attributes:
      step: int32 scalar, updates made.
      params: float32, by layer group.
      opt_state: of the optimizer.
      rng: uint32 key data; the randomness of a step is this folded with the step.
      context: what the rows carry from segment to segment, memories included.
    """

    step: jax.Array
    params: Tree
    opt_state: Tree
    rng: jax.Array
    context: Context


def init_params(config: LMConfig, num_rows: int, segment_length: int, rng: jax.Array) -> Tree:
    """Parameters that still carry their logical axis names. They do not depend on rows and segment, which only have to fit mesh and mechanisms."""
    tokens, flags = jnp.zeros((num_rows, segment_length), jnp.int32), jnp.ones((num_rows, segment_length), bool)
    context = config.init_context(num_rows, segment_length)
    return LanguageModel(config).init(rng, tokens, flags, flags[:, 0], context)["params"]


def init_train_state(
    config: LMConfig, optimizer: optax.GradientTransformation, num_rows: int, segment_length: int, seed: int
) -> TrainState:
    """A fresh state, unsharded; to be jitted or shape-evaluated."""
    init_key, step_key = jax.random.split(jax.random.key(seed))
    params = nn.unbox(init_params(config, num_rows, segment_length, init_key))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
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
    state = jax.eval_shape(lambda: init_train_state(config, optimizer, num_rows, segment_length, seed=0))
    boxed = jax.eval_shape(lambda: init_params(config, num_rows, segment_length, jax.random.key(0)))
    params = sharding.parameter_shardings(mesh, boxed, mesh_config.parameter_rules)
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = TrainState(
        step=replicated,
        params=params,
        opt_state=sharding.like_parameters(mesh, state.opt_state, state.params, params),
        rng=replicated,
        context=sharding.tree_shardings(mesh, state.context, config.context_axes(), sharding.STATE_RULES),
    )
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, shardings
    )
