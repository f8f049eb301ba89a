"""One update, as a pure function of state and batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from memorizing import context as context_lib
from memorizing.array_typing import Scalar, Tree
from memorizing.batch import Batch
from memorizing.context import Context, Inputs, Rngs
from memorizing.models import language_model
from memorizing.models.language_model import RECURRENT, LMConfig
from memorizing.models.losses import next_token_nats
from memorizing.models.memory.external_memory import NEIGHBOURS
from memorizing.training.state import TrainState

Metrics = dict[str, jax.Array]


class Carried(NamedTuple):
    """What goes from segment to segment, and from step to step."""

    context: Context
    buffers: Tree


def make_train_step(
    config: LMConfig, optimizer: optax.GradientTransformation, num_microbatches: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step to jit: `(state, batch) -> (new state, metrics)`.

    Gradients of a step reach through all its U segments, never into the context that it began with. With several
    microbatches, rows of batch and context are split together and the gradients added: the result is that of the whole
    batch to rounding. Only the buffers go from one microbatch to the next.

    Metrics: loss (nats per weighted token), loss_weight (their number), gradient_norm, and what the layers report,
    averaged over segments and microbatches.
    """
    gradient_of_loss = jax.grad(functools.partial(batch_loss, config), has_aux=True)

    def accumulate(
        params: Tree, batch: Batch, carried: Carried, rng: jax.Array
    ) -> tuple[Tree, tuple[Carried, Metrics]]:
        rngs = Rngs(rng, jnp.arange(batch.tokens.shape[0], dtype=jnp.int32))
        # Losses of the parts are averaged, so each divides by its share of the weight of all rows.
        weight = jnp.maximum(jnp.sum(batch.loss_weights), 1.0) / num_microbatches
        if num_microbatches == 1:
            return gradient_of_loss(params, batch, carried, rngs, weight)

        def add(running: tuple, part: tuple) -> tuple[tuple, tuple[Context, Metrics]]:
            total, buffers = running
            part_batch, part_context, part_rows = part
            part_rngs = rngs.replace(rows=part_rows)
            gradient, (after, metrics) = gradient_of_loss(
                params, part_batch, Carried(part_context, buffers), part_rngs, weight
            )
            total = jax.tree.map(lambda a, b: a + b / num_microbatches, total, gradient)
            return (total, after.buffers), (after.context, metrics)

        parts = context_lib.split_rows((batch, carried.context, rngs.rows), num_microbatches)
        start = (jax.tree.map(jnp.zeros_like, params), carried.buffers)
        (gradient, buffers), (contexts, metrics) = jax.lax.scan(add, start, parts)
        metrics = jax.tree.map(lambda values: values.mean(axis=0), metrics)
        return gradient, (Carried(context_lib.join_rows(contexts), buffers), metrics)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        carried = Carried(state.context, state.buffers)
        gradient, (after, metrics) = accumulate(state.params, batch, carried, rng)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics |= {"loss_weight": jnp.sum(batch.loss_weights), "gradient_norm": optax.tree.norm(gradient)}
        new_state = state.replace(
            step=state.step + 1, params=params, buffers=after.buffers, opt_state=opt_state, context=after.context
        )
        return new_state, metrics

    return train_step


def batch_loss(
    config: LMConfig, params: Tree, batch: Batch, carried: Carried, rngs: Rngs, weight: Scalar
) -> tuple[Scalar, tuple[Carried, Metrics]]:
    """Loss of U consecutive segments of each row, context and buffers carried from each to the next.

    The reset of rows happens in here, inside the differentiated function: what a mechanism begins a document with may be
    a parameter.

    Args:
      config: the model.
      params: what is differentiated.
      batch: U segments.
      carried: from the step before.
      rngs: random numbers of the step.
      weight: what the nats are divided by.

    Returns:
      Nats divided by `weight`, plus the auxiliary losses' mean over segments; and what is carried on, and metrics.
    """
    num_segments = batch.tokens.shape[1]

    def segment_loss(carried: Carried, segment_and_index: tuple) -> tuple[Carried, tuple]:
        segment, index = segment_and_index
        context = carried.context
        if config.recurrent_tokens:
            recurrent = config.recurrent_tokens.truncate(context[RECURRENT], index, num_segments)
            context = context | {RECURRENT: recurrent}
        output = language_model.apply(
            config,
            params,
            carried.buffers,
            Inputs(segment.tokens, segment.is_real, segment.start_of_document),
            context,
            rngs.replace(key=jax.random.fold_in(rngs.key, index)),
            update_buffers=True,
        )
        nats = jnp.sum(next_token_nats(output.logits, segment.targets) * segment.loss_weights) / weight
        report = output.report
        metrics = {"loss": nats * num_segments, **report.losses, **report.metrics}
        loss = nats + sum(report.losses.values()) / num_segments
        return Carried(output.context, output.buffers), (loss, metrics)

    if num_segments > 1:
        # Activations of one segment at a time: only what is carried is kept for each.
        segment_loss = jax.checkpoint(segment_loss, policy=jax.checkpoint_policies.save_only_these_names(NEIGHBOURS))
    segments = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), batch)
    inputs = (segments, jnp.arange(num_segments))
    carried, (losses, metrics) = jax.lax.scan(segment_loss, carried, inputs, unroll=num_segments == 1)
    return losses.sum(), (carried, jax.tree.map(lambda values: values.mean(axis=0), metrics))
