"""Optimizers and learning-rate schedules as frozen dataclasses that build optax transformations."""

from __future__ import annotations

import abc
import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from memorizing.array_typing import Tree
from memorizing.errors import Count, CountOrNone, Factor, FactorAboveZero, Range, UserError
from memorizing.models.stack.arrays import layer_name

# Of embeddings, heads and learned positions, as the entries of a model have them.
_TABLE = re.compile(r"(output_)?table(_\d+)?")
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
class ParameterGroup:
    """Parameters that are trained in another way than the others, or not at all.

    Attributes:
      pattern: a regular expression that is found in their names, as 'core/(alpha|beta)$' is in
        'layer_03/attention/core/beta'.
      learning_rate: factor of the optimizer's; 0 freezes them: they have no gradient, and the optimizer keeps nothing
        for them.
      decays: whether AdamW decays those of them whose role is to be decayed.
      is_optional: whether a model without such parameters is no mistake.
    """

    pattern: str = ""
    learning_rate: Factor = 1.0
    decays: bool = True
    is_optional: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"ParameterGroup.pattern = {self.pattern!r}: no regular expression ({error})") from None

    @property
    def is_frozen(self) -> bool:
        return self.learning_rate == 0


# Those that no group names.
_OTHERS = ParameterGroup()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerwiseOptimizer(abc.ABC):
    """Clips the gradient, and then treats every layer by itself.

    Attributes:
      max_gradient_norm: the gradient is scaled down to this global norm.
      groups: parameters with a learning rate of their own, or without decay; of several that fit, the first counts.
    """

    max_gradient_norm: FactorAboveZero = 1.0
    groups: tuple[ParameterGroup, ...] = ()

    @abc.abstractmethod
    def rule(self, group: ParameterGroup) -> optax.GradientTransformation:
        """The updates of one layer's parameters, given how they are trained."""

    def build(self, stacked: Collection[str] = ()) -> optax.GradientTransformation:
        """The transformation of updates; for `stacked` see `by_layer`."""
        clip = optax.clip_by_global_norm(self.max_gradient_norm)
        return optax.chain(clip, by_layer(self.rule, stacked, self.groups))


@dataclasses.dataclass(frozen=True)
class Adafactor(LayerwiseOptimizer):
    """Adafactor (Shazeer and Stern 2018) as the Memorizing Transformers paper uses it.

    Attributes:
      learning_rate: schedule; the update is also multiplied by the root mean square of the parameter.
      momentum: decay of the running mean of updates.
      decay_rate: exponent of the second moment's decay.
      max_gradient_norm, groups: see `LayerwiseOptimizer`.
    """

    learning_rate: Schedule = InverseSquareRoot()
    momentum: Decay = 0.9
    decay_rate: Decay = 0.8

    def rule(self, group: ParameterGroup) -> optax.GradientTransformation:
        learning_rate = _times(self.learning_rate, group.learning_rate)
        return optax.adafactor(learning_rate, momentum=self.momentum, decay_rate=self.decay_rate)


@dataclasses.dataclass(frozen=True)
class AdamW(LayerwiseOptimizer):
    """AdamW (Loshchilov and Hutter 2019).

    Decayed are the kernels of linear maps, the embedding, and learned positions. Scales, biases (T5's tables too),
    gates, Transformer-XL's u and v, and the initial memory tokens are not: to be small is nothing that they should
    strive for.

    Attributes:
      learning_rate: schedule.
      b1, b2: decay of the moments.
      weight_decay: factor of the decoupled decay, which the learning rate multiplies.
      max_gradient_norm, groups: see `LayerwiseOptimizer`.
    """

    learning_rate: Schedule = Cosine()
    b1: Decay = 0.9
    b2: Decay = 0.95
    weight_decay: Factor = 0.1

    def rule(self, group: ParameterGroup) -> optax.GradientTransformation:
        learning_rate = _times(self.learning_rate, group.learning_rate)
        weight_decay = self.weight_decay if group.decays else 0.0
        return optax.adamw(learning_rate, self.b1, self.b2, weight_decay=weight_decay, mask=_is_decayed)


Optimizer = Adafactor | AdamW


def by_layer(
    rule: Callable[[ParameterGroup], optax.GradientTransformation],
    stacked: Collection[str],
    groups: tuple[ParameterGroup, ...] = (),
) -> optax.GradientTransformation:
    """Applies a rule to every layer by itself, also to layers whose parameters are stacked for a scan.

    Rules that look at a whole array (Adafactor's factors, its clipping and its parameter scale) would otherwise mix the
    layers of a group, and the result would depend on which layers happen to be stacked.

    The optimizer state is a dict by group; the arrays of a group of several layers have the axis of layers in front.

    Args:
      rule: for the parameters of one layer, given how they are trained.
      stacked: names of the groups of several layers; with `groups`, a mapping to the layers' indices.
      groups: see `ParameterGroup`.
    """

    @functools.cache
    def rule_of(layers: str) -> optax.GradientTransformation:
        if not groups:
            return rule(_OTHERS)
        rules: dict[Hashable, optax.GradientTransformation] = {_label(groups, _OTHERS): rule(_OTHERS)}
        for group in groups:
            rules[_label(groups, group)] = optax.set_to_zero() if group.is_frozen else rule(group)

        def labels(params: Tree) -> Tree:
            of_params = _groups_of(groups, stacked, layers, params)
            return jax.tree.map(functools.partial(_label, groups), of_params)

        return optax.partition(rules, labels)

    def over_layers(layers: str, function: Callable) -> Callable:
        return jax.vmap(function) if layers in stacked else function

    def init(params: Tree) -> Tree:
        _check_groups(groups, stacked, params)
        return {layers: over_layers(layers, rule_of(layers).init)(params[layers]) for layers in params}

    def update(updates: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        new_updates = {}
        new_state = {}
        for layers in updates:
            update_layers = over_layers(layers, rule_of(layers).update)
            new_updates[layers], new_state[layers] = update_layers(updates[layers], state[layers], params[layers])
        return new_updates, new_state

    return optax.GradientTransformation(init, update)


def hold_frozen(params: Tree, groups: tuple[ParameterGroup, ...], stacked: Collection[str]) -> Tree:
    """The same parameters, of which those that are frozen get no gradient."""

    def hold(leaf: jax.Array, group: ParameterGroup) -> jax.Array:
        return jax.lax.stop_gradient(leaf) if group.is_frozen else leaf

    if not any(group.is_frozen for group in groups):
        return params
    return {
        layers: jax.tree.map(hold, tree, _groups_of(groups, stacked, layers, tree)) for layers, tree in params.items()
    }


def _groups_of(
    groups: tuple[ParameterGroup, ...],
    stacked: Collection[str],
    layers: str,
    params: Tree,
) -> Tree:
    """The group of each parameter of a layer, or of layers that are stacked."""
    members = [layers]
    if layers in stacked:
        assert isinstance(stacked, Mapping)
        members = [layer_name(index) for index in stacked[layers]]

    def of(path: tuple[Any, ...], _: jax.Array) -> ParameterGroup:
        rest = "/".join(key.key for key in path)
        found = [_group_of(groups, f"{member}/{rest}") for member in members]
        if len(set(found)) > 1:
            differs = next(index for index, group in enumerate(found) if group != found[0])
            raise UserError(
                f"ParameterGroup.pattern: {members[0]}/{rest} and {members[differs]}/{rest} lie in one array, and can only "
                "be trained alike; choose patterns that do not tell these layers apart"
            )
        return found[0]

    return jax.tree_util.tree_map_with_path(of, params)


def _group_of(groups: Sequence[ParameterGroup], name: str) -> ParameterGroup:
    """The first group that fits a parameter."""
    return next((group for group in groups if re.search(group.pattern, name)), _OTHERS)


def _label(groups: Sequence[ParameterGroup], group: ParameterGroup) -> str:
    """A name in trees of optimizer states."""
    return f"group_{groups.index(group)}" if group in groups else "others"


def _check_groups(groups: tuple[ParameterGroup, ...], stacked: Collection[str], params: Tree) -> None:
    """Raises UserError for a group without parameters."""
    if not groups:
        return
    found = set()
    for layers, tree in params.items():
        found |= {*jax.tree.leaves(_groups_of(groups, stacked, layers, tree))}
    for group in groups:
        if group not in found and not group.is_optional:
            raise UserError(
                f"ParameterGroup.pattern = {group.pattern!r}: no parameter has such a name that no group before it has; "
                "names are like layer_03/attention/query/kernel"
            )


def _times(schedule: Schedule, factor: float) -> Callable[[ArrayLike], ArrayLike]:
    """A schedule times a number."""
    if factor == 1:
        return schedule
    return lambda step: factor * schedule(step)


def _is_decayed(params: Tree) -> Tree:
    """Which parameters of a layer, or of the embedding, are matrices by their role: a rank says nothing of it."""

    def decays(path: tuple[Any, ...], _: jax.Array) -> bool:
        names = [key.key for key in path]
        return names[-1] == "kernel" or (len(names) == 1 and _TABLE.fullmatch(names[0]) is not None)

    return jax.tree_util.tree_map_with_path(decays, params)
