"""Reversible residuals (Gomez et al. 2017; Kitaev et al. 2020, section 3): activations are computed back from outputs.

A layer has two streams, each as wide as the model:

  y1 = x1 + attention(x2)        x2 = y2 - MLP(y1)
  y2 = x2 + MLP(y1)              x1 = y1 - attention(x2)

The backward pass goes through the layers from the last to the first, computes the inputs of each from its outputs, and
needs no stored activations: what is kept does not grow with the number of layers. Random numbers are functions of the
layer and are drawn again; what a layer chose (hashes, clusters) is stored, since inputs come back up to rounding only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memorizing.array_typing import Activations, Tree
from memorizing.context import Segment


class Streams(NamedTuple):
    """The two streams of a layer's inputs or outputs, each [B, T, D]."""

    first: Activations
    second: Activations


class Halves(NamedTuple):
    """A layer as two pure functions, without their residuals.

    Attributes:
      attend: `(params, x, state, own, segment, choices) -> (y, outputs)`; gradient reaches parameters, x and state.
        `outputs.report.choices` is what the layer chose; given as `choices` it chooses the same, with None anew.
      feed_forward: `(params, x, own, segment) -> y`.
    """

    attend: Callable[..., tuple[Activations, Any]]
    feed_forward: Callable[..., Activations]


class ReversibleInputs(NamedTuple):
    """What a layer is given besides its streams; of layers that are scanned, with an axis of layers in front.

    Attributes:
      params, state: gradient reaches them.
      own: what else the layer has for itself, such as its buffers.
    """

    params: Tree
    state: Tree
    own: Tree


# By the names of the layers of one repetition.
Layers = dict[str, Halves]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def pass_layers(
    layers: Layers,
    unroll: int,
    x: Streams,
    inputs: dict[str, ReversibleInputs],
    segments: dict[str, Segment],
) -> tuple[Streams, dict[str, Any]]:
    """Passes through layers, once or over and over, and keeps nothing but the last outputs for the gradient.

    Args:
      layers: of one repetition, in their order.
      unroll: repetitions that a scan makes at a time, see `Remat`; their inputs have an axis of layers in front. 0 for
        a single repetition without that axis.
      x: input streams.
      inputs: of the layers, by name.
      segments: what all repetitions of a layer are told alike, by name.

    Returns:
      The output streams; and the other outputs of the layers by name, without what they chose.
    """
    y, outputs, _ = _forward(layers, unroll, x, inputs, segments)
    return y, outputs


def _forward(
    layers: Layers,
    unroll: int,
    x: Streams,
    inputs: dict[str, ReversibleInputs],
    segments: dict[str, Segment],
) -> tuple[Streams, dict[str, Any], dict[str, Tree]]:
    """The output streams, the other outputs, and what the layers chose."""

    def pass_repetition(x: Streams, of_repetition: dict[str, ReversibleInputs]) -> tuple[Streams, tuple]:
        outputs = {}
        choices = {}
        # A dictionary loses its order in a scan.
        for name in layers:
            params, state, own = of_repetition[name]
            change, of_layer = layers[name].attend(params, x.second, state, own, segments[name], None)
            first = x.first + change
            second = x.second + layers[name].feed_forward(params, first, own, segments[name])
            x = Streams(first, second)
            choices[name] = of_layer.report.choices
            report = dataclasses.replace(of_layer.report, choices={})
            outputs[name] = of_layer._replace(report=report)
        return x, (outputs, choices)

    y, (outputs, choices) = _repeat(pass_repetition, unroll, x, inputs)
    return y, outputs, choices


def _forward_for_gradient(
    layers: Layers,
    unroll: int,
    x: Streams,
    inputs: dict[str, ReversibleInputs],
    segments: dict[str, Segment],
) -> tuple[tuple[Streams, dict[str, Any]], tuple]:
    y, outputs, choices = _forward(layers, unroll, x, inputs, segments)
    return (y, outputs), (y, inputs, segments, choices)


def _backward(layers: Layers, unroll: int, kept: tuple, gradients: tuple) -> tuple:
    """Gradients to streams and inputs, from the last layer to the first."""
    y, inputs, segments, choices = kept
    of_y, of_outputs = gradients

    def pass_repetition(streams: tuple[Streams, Streams], of_repetition: tuple) -> tuple:
        inputs, choices, of_outputs = of_repetition
        of_inputs = {}
        for name in reversed(layers):
            streams, of_inputs[name] = layer_backward(
                layers[name], *streams, inputs[name], segments[name], choices[name], of_outputs[name]
            )
        return streams, of_inputs

    of_repetition = (inputs, choices, _without_integers(of_outputs))
    (_, of_x), of_inputs = _repeat(pass_repetition, unroll, (y, of_y), of_repetition, reverse=True)
    return of_x, of_inputs, None


pass_layers.defvjp(_forward_for_gradient, _backward)


def layer_backward(
    layer: Halves,
    y: Streams,
    of_y: Streams,
    inputs: ReversibleInputs,
    segment: Segment,
    choices: Tree,
    of_outputs: Tree,
) -> tuple[tuple[Streams, Streams], ReversibleInputs]:
    """A layer's input streams, computed back, with the gradient to them; and the gradient to its other inputs."""
    params, state, own = inputs

    def feed_forward(params: Tree, x: Activations) -> Activations:
        return layer.feed_forward(params, x, own, segment)

    def attend(params: Tree, x: Activations, state: Tree) -> tuple[Activations, Tree]:
        y, outputs = layer.attend(params, x, state, own, segment, choices)
        return y, outputs._replace(report=dataclasses.replace(outputs.report, choices={}))

    change, pull_back = jax.vjp(feed_forward, params, y.first)
    second = y.second - change
    of_params, of_first = pull_back(of_y.second)
    of_first = of_y.first + of_first

    (change, outputs), pull_back = jax.vjp(attend, params, second, state)
    first = y.first - change
    of_attention, of_second, of_state = pull_back((of_first, _with_integers(of_outputs, outputs)))

    x = Streams(first, second)
    of_x = Streams(of_first, of_y.second + of_second)
    of_params = jax.tree.map(jnp.add, of_params, of_attention)
    return (x, of_x), ReversibleInputs(of_params, _without_integers(of_state), None)


def _repeat(body: Callable, unroll: int, carry: Any, inputs: Any, reverse: bool = False) -> tuple[Any, Any]:
    """A scan of the body, or the body once."""
    return jax.lax.scan(body, carry, inputs, reverse=reverse, unroll=unroll) if unroll else body(carry, inputs)


def _without_integers(gradients: Tree) -> Tree:
    """Gradients with None in the place of those to integers, which are none and cannot be scanned."""
    return jax.tree.map(lambda leaf: None if leaf.dtype == jax.dtypes.float0 else leaf, gradients)


def _with_integers(gradients: Tree, outputs: Tree) -> Tree:
    """The inverse of `_without_integers`, from the outputs that the gradients belong to."""

    def fill(output: jax.Array, gradient: Any) -> Any:
        return np.zeros(output.shape, jax.dtypes.float0) if gradient is None else gradient

    leaves, structure = jax.tree.flatten(outputs)
    return structure.unflatten(map(fill, leaves, structure.flatten_up_to(gradients)))
