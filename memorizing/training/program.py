"""What an experiment compiles to on a mesh."""

from __future__ import annotations

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memorizing.array_typing import Tree
from memorizing.runtime.sharding import RowPlacement
from memorizing.training.experiment import Experiment
from memorizing.training.state import abstract_train_state, init_train_state
from memorizing.training.step import make_train_step


class Program:
    """The compiled functions of a run.

    Attributes:
      placement: where the rows of batches lie.
      rows: sharding of batches.
      abstract_state: shapes, dtypes and shardings of the training state.
      init, init_context: create the fresh state, or only its context, already sharded.
      step: `(state, batch) -> (state, metrics)`; the state is donated, so that memories are updated in place.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh) -> None:
        config = experiment.model
        batch = experiment.batch
        seed = experiment.loop.seed
        optimizer = experiment.make_optimizer()
        # B, T
        size = (batch.num_rows, batch.segment_length)
        self.placement = RowPlacement(mesh, batch.num_rows)
        self.rows = self.placement.sharding
        self.abstract_state = abstract_train_state(config, optimizer, *size, mesh, experiment.mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        replicated = NamedSharding(mesh, PartitionSpec())
        self.init = jax.jit(lambda: init_train_state(config, optimizer, *size, seed), out_shardings=shardings)
        self.init_context = jax.jit(lambda: config.init_context(*size), out_shardings=shardings.context)
        of_optimizer = experiment.mesh.optimizer_shardings(self.abstract_state.params, shardings.params)

        def to_optimizer(params: Tree) -> Tree:
            # Gradients are summed over the devices first. Left to itself, the compiler for some TPUs cuts the products
            # that they come from into as many parts as there are devices.
            whole = jax.lax.with_sharding_constraint(params, shardings.params)
            return jax.lax.with_sharding_constraint(whole, of_optimizer)

        train_step = make_train_step(config, optimizer, batch.num_microbatches, experiment.hold_frozen, to_optimizer)
        self.step = jax.jit(
            train_step,
            in_shardings=(shardings, self.rows),
            # Every process reads all metrics.
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        )
