"""Optimizers and learning-rate schedules as frozen dataclasses that build optax transformations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Annotated

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from memorizing.array_typing import Tree
from memorizing.errors import Count, CountOrNone, Factor, FactorAboveZero, Range, UserError

# Of running means: 1 would never forget.
Decay = Annotated[float, Range(0, 0.999_999_9)]


@dataclasses.dataclass(frozen=True)
class InverseSquareRoot:
    """peak * min(1, step / warmup_steps) / sqrt(max(step, warmup_steps)): the paper's schedule.

    Attributes:
      peak: factor of the whole schedule; with 1.0 and 1000 warm-up steps the greatest learning rate is 0.032.
      warmup_steps: steps of linear warm-up.
    """

    peak: FactorAboveZero = 1.0
    warmup_steps: CountOrNone = 1000

    def __call__(self, step: ArrayLike) -> jax.Array:
        warmup_steps = max(self.warmup_steps, 1)
        # Steps are counted from 1 here, so that the first one has a learning rate.
        count = jnp.asarray(step, jnp.float32) + 1
        warmup = jnp.minimum(1.0, count / warmup_steps)
        decay = jax.lax.rsqrt(jnp.maximum(count, warmup_steps))
        return self.peak * warmup * decay


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Linear warm-up to `peak`, then a cosine down to `final`.

    Attributes:
      peak, final: learning rates.
      warmup_steps: steps of linear warm-up.
      decay_steps: step at which `final` is reached, warm-up included.
    """

    peak: FactorAboveZero = 1e-3
    final: Factor = 1e-5
    warmup_steps: CountOrNone = 100
    decay_steps: Count = 10_000

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps < self.decay_steps:
            raise UserError(
                f"Cosine.warmup_steps = {self.warmup_steps}: it has to end before Cosine.decay_steps = "
                f"{self.decay_steps} (the run's STEPS)"
            )

    def __call__(self, step: ArrayLike) -> ArrayLike:
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=self.peak,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            end_value=self.final,
        )
        return schedule(jnp.asarray(step) + 1)


Schedule = InverseSquareRoot | Cosine


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Adafactor (Shazeer and Stern 2018) as the Memorizing Transformers paper uses it.

    Attributes:
      learning_rate: schedule; the update is also multiplied by the root mean square of the parameter.
      momentum: decay of the running mean of updates.
      decay_rate: exponent of the second moment's decay.
      max_gradient_norm: the gradient is scaled down to this global norm.
    """

    learning_rate: Schedule = InverseSquareRoot()
    momentum: Decay = 0.9
    decay_rate: Decay = 0.8
    max_gradient_norm: FactorAboveZero = 1.0

    def build(self, stacked: Collection[str] = ()) -> optax.GradientTransformation:
        """The transformation of updates; for `stacked` see `by_layer`."""
        clip = optax.clip_by_global_norm(self.max_gradient_norm)
        rule = optax.adafactor(self.learning_rate, momentum=self.momentum, decay_rate=self.decay_rate)
        return optax.chain(clip, by_layer(rule, stacked))


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov and Hutter 2019).

    Decayed are the kernels of linear maps and the embedding. Scales, biases (the tables of T5's too), gates,
    Transformer-XL's u and v, and the initial memory tokens are not: to be small is nothing that they should strive for.

    Attributes:
      learning_rate: schedule.
      b1, b2: decay of the moments.
      weight_decay: factor of the decoupled decay, which the learning rate multiplies.
      max_gradient_norm: the gradient is scaled down to this global norm.
    """

    learning_rate: Schedule = Cosine()
    b1: Decay = 0.9
    b2: Decay = 0.95
    weight_decay: Factor = 0.1
    max_gradient_norm: FactorAboveZero = 1.0

    def build(self, stacked: Collection[str] = ()) -> optax.GradientTransformation:
        """The transformation of updates; for `stacked` see `by_layer`."""
        clip = optax.clip_by_global_norm(self.max_gradient_norm)
        rule = optax.adamw(self.learning_rate, self.b1, self.b2, weight_decay=self.weight_decay, mask=_is_decayed)
        return optax.chain(clip, by_layer(rule, stacked))


Optimizer = Adafactor | AdamW


def by_layer(rule: optax.GradientTransformation, stacked: Collection[str]) -> optax.GradientTransformation:
    """Applies a rule to every layer by itself, also to layers whose parameters are stacked for a scan.

    Rules that look at a whole array (Adafactor's factors, its clipping and its parameter scale) would otherwise mix the
    layers of a group, and the result would depend on which layers happen to be stacked.

    The optimizer state is a dict by group; the arrays of a group of several layers have the axis of layers in front.

    Args:
      rule: for the parameters of one layer.
      stacked: names of the groups of several layers.
    """

    def over_layers(group: str, function: Callable) -> Callable:
        return jax.vmap(function) if group in stacked else function

    def init(params: Tree) -> Tree:
        return {group: over_layers(group, rule.init)(params[group]) for group in params}

    def update(updates: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        new_updates = {}
        new_state = {}
        for group in updates:
            update_group = over_layers(group, rule.update)
            new_updates[group], new_state[group] = update_group(updates[group], state[group], params[group])
        return new_updates, new_state

    return optax.GradientTransformation(init, update)


def _is_decayed(params: Tree) -> Tree:
    """Which parameters of a layer, or of the embedding, are matrices by their role: a rank says nothing of it."""

    def decays(path: tuple[jax.tree_util.DictKey, ...], _: jax.Array) -> bool:
        names = [key.key for key in path]
        return names[-1] == "kernel" or names in (["table"], ["output_table"])

    return jax.tree_util.tree_map_with_path(decays, params)
