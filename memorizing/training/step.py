"""One update, as a pure function of state and batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from memorizing import context as context_lib
from memorizing.array_typing import Scalar, Tree
from memorizing.batch import Batch
from memorizing.context import Context, Inputs, Rngs
from memorizing.models import language_model
from memorizing.models.lm_config import RECURRENT, LMConfig
from memorizing.models.memory import recall
from memorizing.models.memory.retrieval import NEIGHBOURS
from memorizing.training.state import TrainState

Metrics = dict[str, jax.Array]


class Carried(NamedTuple):
    """What goes from segment to segment, and from step to step."""

    context: Context
    buffers: Tree


def make_train_step(
    config: LMConfig,
    optimizer: optax.GradientTransformation,
    num_microbatches: int = 1,
    hold: Callable[[Tree], Tree] = lambda params: params,
    to_optimizer: Callable[[Tree], Tree] = lambda params: params,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step to jit: `(state, batch) -> (new state, metrics)`.

    Gradients of a step reach through all its U segments, as far as what a mechanism carries is differentiable; never
    into the context that the step began with.

    Metrics: loss (nats per weighted token), loss_weight (the sum of the weights), gradient_norm, and what the layers
    report, averaged over segments and microbatches.

    Args:
      config: the model.
      optimizer: of its parameters.
      num_microbatches: parts of the batch whose gradients are computed one after the other, to save memory.
      hold: stops the gradient of parameters that are not trained.
      to_optimizer: lays out gradients and parameters over the devices as the optimizer's state is.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rngs = _step_rngs(state, num_rows=batch.tokens.shape[0])
        carried = Carried(state.context, state.buffers)
        gradient, carried, metrics = batch_gradient(config, state.params, batch, carried, rngs, num_microbatches, hold)

        with jax.named_scope("optimizer"):
            gradient = to_optimizer(gradient)
            params = to_optimizer(state.params)
            updates, opt_state = optimizer.update(gradient, state.opt_state, params)
            params = optax.apply_updates(params, updates)

        metrics["loss_weight"] = jnp.sum(batch.loss_weights)
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            buffers=carried.buffers,
            opt_state=opt_state,
            context=carried.context,
        )
        return new_state, metrics

    return train_step


def _step_rngs(state: TrainState, num_rows: int) -> Rngs:
    """Random numbers of a step: a function of the run's key and the step, so that a resumed run sees the same."""
    run_key = jax.random.wrap_key_data(state.rng)
    step_key = jax.random.fold_in(run_key, state.step)
    return Rngs(step_key, rows=jnp.arange(num_rows, dtype=jnp.int32))


def batch_gradient(
    config: LMConfig,
    params: Tree,
    batch: Batch,
    carried: Carried,
    rngs: Rngs,
    num_microbatches: int,
    hold: Callable[[Tree], Tree] = lambda params: params,
) -> tuple[Tree, Carried, Metrics]:
    """Gradient of the loss of a whole batch, what is carried to the next step, and metrics.

    With several microbatches, the rows of batch and context are split together and the gradients are added: the result
    equals that of the whole batch up to rounding. Only the buffers go from one microbatch to the next.
    """

    def held_loss(params: Tree, *rest: Any) -> tuple[Scalar, tuple[Carried, Metrics]]:
        return batch_loss(config, hold(params), *rest)

    loss_gradient = jax.grad(held_loss, has_aux=True)
    # Gradients of microbatches are averaged, so each loss is divided by its share of the weight of all rows.
    weight = jnp.maximum(jnp.sum(batch.loss_weights), 1.0) / num_microbatches
    taught = recall.teaching_weights(batch)
    if num_microbatches == 1:
        gradient, (carried, metrics) = loss_gradient(params, batch, carried, rngs, weight, taught)
        return gradient, carried, metrics

    def add_microbatch(running: tuple[Tree, Tree], microbatch: tuple) -> tuple[tuple[Tree, Tree], tuple]:
        total, buffers = running
        part, context, rows, taught = microbatch
        part_rngs = dataclasses.replace(rngs, rows=rows)
        gradient, (after, metrics) = loss_gradient(params, part, Carried(context, buffers), part_rngs, weight, taught)
        total = jax.tree.map(lambda total, part: total + part / num_microbatches, total, gradient)
        return (total, after.buffers), (after.context, metrics)

    microbatches = context_lib.split_rows((batch, carried.context, rngs.rows, taught), num_microbatches)
    zeros = jax.tree.map(jnp.zeros_like, params)
    (gradient, buffers), (contexts, metrics) = jax.lax.scan(add_microbatch, (zeros, carried.buffers), microbatches)
    carried = Carried(context_lib.join_rows(contexts), buffers)
    return gradient, carried, _mean_of_each(metrics)


def batch_loss(
    config: LMConfig,
    params: Tree,
    batch: Batch,
    carried: Carried,
    rngs: Rngs,
    weight: Scalar,
    taught: Float[Array, "B U T"] | None = None,
) -> tuple[Scalar, tuple[Carried, Metrics]]:
    """Loss of U consecutive segments of each row, context and buffers carried from each segment to the next.

    Rows are reset in here, inside the differentiated function: the state in which a mechanism begins a document may be
    a parameter.

    Args:
      config: the model.
      params: what is differentiated.
      batch: U segments.
      carried: from the step before.
      rngs: random numbers of the step.
      weight: what the nats are divided by.
      taught: see `Inputs`.

    Returns:
      The loss: nats divided by `weight`, plus the mean over segments of the auxiliary losses.
      And what is carried on, and metrics.
    """
    num_segments = batch.tokens.shape[1]

    def segment_loss(
        carried: Carried, of_segment: tuple[Batch, Float[Array, "B T"] | None, jax.Array]
    ) -> tuple[Carried, tuple[Scalar, Metrics]]:
        segment, taught, index = of_segment
        context = carried.context
        if config.recurrent_tokens:
            recurrent = config.recurrent_tokens.truncate(context[RECURRENT], index, num_segments)
            context = context | {RECURRENT: recurrent}
        output = language_model.apply(
            config,
            params,
            carried.buffers,
            Inputs(segment.tokens, segment.is_real, segment.start_of_document, taught),
            context,
            dataclasses.replace(rngs, key=jax.random.fold_in(rngs.key, index)),
            update_buffers=True,
        )
        assert output.context is not None, "a whole segment has a context for the next one"
        report = output.report

        # [B, T]
        token_nats = language_model.token_nats(config, params, output, segment.targets)
        nats = jnp.sum(token_nats * segment.loss_weights) / weight
        loss = nats + sum(report.losses.values()) / num_segments
        # The mean over segments of this `loss` is the sum of their nats.
        metrics = {"loss": nats * num_segments, **report.losses, **report.metrics}
        return Carried(output.context, output.buffers), (loss, metrics)

    if num_segments > 1:
        # The backward pass computes the activations of one segment at a time again: of a segment, only what it carries
        # on and the neighbours that it found are stored.
        policy = jax.checkpoint_policies.save_only_these_names(NEIGHBOURS)
        segment_loss = jax.checkpoint(segment_loss, policy=policy)
    # [B, U, ...] -> [U, B, ...]
    segments, taught = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), (batch, taught))
    inputs = (segments, taught, jnp.arange(num_segments))
    carried, (losses, metrics) = jax.lax.scan(segment_loss, carried, inputs, unroll=num_segments == 1)
    return losses.sum(), (carried, _mean_of_each(metrics))


def _mean_of_each(metrics: Metrics) -> Metrics:
    """Means of metrics over their first axis: segments, or microbatches."""
    return jax.tree.map(lambda values: values.mean(axis=0), metrics)
