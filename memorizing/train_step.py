"""One update, as a pure function of state and batch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from memorizing import context as context_lib
from memorizing.array_typing import Scalar, Tree
from memorizing.batch import Batch
from memorizing.context import Context
from memorizing.external_memory import NEIGHBOURS
from memorizing.losses import next_token_nats
from memorizing.model import RECURRENT, LanguageModel, LMConfig
from memorizing.train_state import TrainState

Metrics = dict[str, jax.Array]


def make_train_step(
    config: LMConfig, optimizer: optax.GradientTransformation, num_microbatches: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step to jit: `(state, batch) -> (new state, metrics)`.

    Gradients of a step reach through all its U segments, never into the context that it began with. With several microbatches, rows of batch and context are split together
    and the gradients added: the result is that of the whole batch to rounding.

    Metrics: loss (nats per weighted token), loss_weight (their number), gradient_norm, and what the layers report, averaged over segments and microbatches.
    """
    gradient_of_loss = jax.grad(functools.partial(_batch_loss, config), has_aux=True)

    def accumulate(
        params: Tree, batch: Batch, context: Context, rng: jax.Array
    ) -> tuple[Tree, tuple[Context, Metrics]]:
        # Losses of the parts are averaged, so each divides by its share of the weight of all rows.
        weight = jnp.maximum(jnp.sum(batch.loss_weights), 1.0) / num_microbatches
        if num_microbatches == 1:
            return gradient_of_loss(params, batch, context, rng, weight)

        def add(total: Tree, part: tuple) -> tuple[Tree, tuple[Context, Metrics]]:
            part_batch, part_context, index = part
            gradient, aux = gradient_of_loss(params, part_batch, part_context, jax.random.fold_in(rng, index), weight)
            return jax.tree.map(lambda a, b: a + b / num_microbatches, total, gradient), aux

        parts = context_lib.split_rows((batch, context), num_microbatches)
        start = jax.tree.map(jnp.zeros_like, params)
        gradient, (contexts, metrics) = jax.lax.scan(add, start, (*parts, jnp.arange(num_microbatches)))
        return gradient, (context_lib.join_rows(contexts), jax.tree.map(lambda values: values.mean(axis=0), metrics))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        gradient, (context, metrics) = accumulate(state.params, batch, state.context, rng)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics |= {"loss_weight": jnp.sum(batch.loss_weights), "gradient_norm": optax.tree.norm(gradient)}
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state, context=context), metrics

    return train_step


def _batch_loss(
    config: LMConfig, params: Tree, batch: Batch, context: Context, rng: jax.Array, weight: Scalar
) -> tuple[Scalar, tuple[Context, Metrics]]:
    """Loss of U consecutive segments a row, the context carried from each to the next: nats divided by `weight`, plus the auxiliary losses' mean over segments.

    The reset of rows happens in here, inside the differentiated function: what a mechanism begins a document with may be a parameter.
    """
    model = LanguageModel(config)
    num_segments = batch.tokens.shape[1]

    def segment_loss(context: Context, inputs: tuple) -> tuple[Context, tuple]:
        segment, key, index = inputs
        if config.recurrent_tokens:
            recurrent = config.recurrent_tokens.truncate(context[RECURRENT], index, num_segments)
            context = context | {RECURRENT: recurrent}
        output = model.apply(
            {"params": params},
            segment.tokens,
            segment.is_real,
            segment.start_of_document,
            context,
            rngs={"dropout": key} if config.dropout else {},
        )
        nats = jnp.sum(next_token_nats(output.logits, segment.targets) * segment.loss_weights) / weight
        report = output.report
        metrics = {"loss": nats * num_segments, **report.losses, **report.metrics}
        return output.context, (nats + sum(report.losses.values()) / num_segments, metrics)

    if num_segments > 1:
        # Activations of one segment at a time: only the carried context is kept for each.
        segment_loss = jax.checkpoint(segment_loss, policy=jax.checkpoint_policies.save_only_these_names(NEIGHBOURS))
    segments = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), batch)
    inputs = (segments, jax.random.split(rng, num_segments), jnp.arange(num_segments))
    context, (losses, metrics) = jax.lax.scan(segment_loss, context, inputs, unroll=num_segments == 1)
    return losses.sum(), (context, jax.tree.map(lambda values: values.mean(axis=0), metrics))
