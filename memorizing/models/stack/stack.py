"""Layers in a repeating pattern, compiled once for all repetitions.

A stack of L layers follows a *pattern* of mechanisms, such as (A,), (strided, fixed) or (local, local, global), with
exceptions by index. Where the pattern repeats, the parameters and states of the layers at one place of it are stacked,
and one scan passes through the repetitions: its body is the pattern, whatever stands in it. Layers that repeat nothing,
or whose state is too large to be stacked, stand alone.

How layers are stacked is known only here, and where trees of parameters and states are held. Every layer has one name,
`layer_03`; `unstack` and `stack` convert between arrays of single layers and of groups. The initial parameters of a
layer and its random numbers depend on its index only.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memorizing.array_typing import Activations, AxesTree, Tree
from memorizing.context import Layout, Report, Segment
from memorizing.models.attention.base import LayerDims, ResidualKind
from memorizing.models.layers import rows_over_data
from memorizing.models.memory.product_keys import ProductKeys
from memorizing.models.stack import reversible
from memorizing.models.stack.arrays import layer_name
from memorizing.models.stack.block import Block
from memorizing.models.stack.groups import LayerGroup, LayerPattern, Run
from memorizing.models.stack.inputs import LayerInputs, LayerOutputs, own_part, segment_of_group, with_own, without_own
from memorizing.models.stack.remat import Remat
from memorizing.models.stack.reversible import Halves, ReversibleInputs, Streams


class StackOutput(NamedTuple):
    """What the layers give.

    Attributes:
      x: [B, T, D].
      states, buffers: of every group by name; a state is None where the segment is not whole.
      report: losses, metrics, `retrieved` and `attended` by layer, `kv_cache` by group.
    """

    x: Activations
    states: dict[str, Tree]
    buffers: dict[str, Tree]
    report: Report


@dataclasses.dataclass(frozen=True)
class Stack(LayerPattern):
    """L layers.

    Attributes:
      num_layers, pattern, exceptions, product_keys_at: see `LayerPattern`.
      dims: sizes and parts of each layer.
      remat: what is computed again for the gradient.
      residuals: 'plain' and 'parallel' are the layers' own; 'reversible': two streams, whose activations are computed
        back from the outputs.
      product_keys: the memory that stands in the place of the MLP in layers with one.
    """

    dims: LayerDims
    remat: Remat = Remat()
    residuals: ResidualKind = "plain"
    product_keys: ProductKeys | None = None

    def block(self, group: LayerGroup) -> Block:
        """A layer of a group."""
        dims = self.dims
        if group.layers[0] in self.product_keys_at:
            dims = dataclasses.replace(dims, product_keys=self.product_keys)
        return Block(group.attention, dims)

    def init(self, rng: jax.Array, num_rows: int, layout: Layout) -> dict[str, dict[str, Tree]]:
        """Parameters and buffers that still carry their logical axis names: `{"params": {group: ...}, "buffers": ...}`.

        They depend neither on rows nor on the layout, which only have to fit mesh and mechanisms.
        """
        variables: dict[str, dict[str, Tree]] = {"params": {}, "buffers": {}}
        for group in self.groups:
            init_layer = functools.partial(_init_layer, self.block(group), num_rows, layout)
            # [layers]
            fold_in = functools.partial(jax.random.fold_in, rng)
            keys = jax.vmap(fold_in)(jnp.asarray(group.layers))
            if group.is_stacked:
                created = jax.vmap(init_layer)(keys)
                created = _add_layer_axis(created)
            else:
                created = init_layer(keys[0])
            for collection, tree in created.items():
                variables[collection][group.name] = tree
        return variables

    def init_states(self, batch_size: int, segment_length: int) -> dict[str, Tree]:
        """The states of rows that have seen nothing, by group; those of several layers have the layers as axis 1."""

        def repeat(leaf: jax.Array, num_layers: int) -> jax.Array:
            num_rows, *rest = leaf.shape
            return jnp.broadcast_to(leaf[:, None], (num_rows, num_layers, *rest))

        states = {}
        for group in self.groups:
            state = group.attention.init_state(self.dims, batch_size, segment_length)
            if group.is_stacked:
                repeat_leaf = functools.partial(repeat, num_layers=len(group.layers))
                state = jax.tree.map(repeat_leaf, state)
            states[group.name] = state
        return states

    def state_axes(self) -> dict[str, AxesTree]:
        """Logical axis names of every leaf of the states."""

        def is_names(value: Any) -> bool:
            # The empty tuple is a state without leaves.
            return type(value) is tuple and len(value) > 0

        def add_layers(names: tuple[str | None, ...]) -> tuple[str | None, ...]:
            rows, *rest = names
            return (rows, "layers", *rest)

        axes = {}
        for group in self.groups:
            names = group.attention.state_axes()
            if group.is_stacked:
                names = jax.tree.map(add_layers, names, is_leaf=is_names)
            axes[group.name] = names
        return axes

    def apply(
        self,
        params: Mapping[str, Tree],
        buffers: Mapping[str, Tree],
        x: Activations,
        segment: Segment,
        states: Mapping[str, Tree],
        update_buffers: bool,
    ) -> StackOutput:
        """Passes through all layers.

        Args:
          params, buffers, states: of every group by name.
          x: [B, T, D].
          segment: `rngs` of the whole segment; `decoding.kv_cache` by group.
          update_buffers: whether layers may change their buffers, as they do in training only.
        """
        output = StackOutput(x, states={}, buffers={}, report=Report(retrieved={}, attended={}))
        stream: Activations | Streams = Streams(x, x) if self.residuals == "reversible" else x
        for run in self.runs:
            stream = jax.tree.map(rows_over_data, stream)
            inputs = {}
            for group in run.groups:
                inputs[group.name] = LayerInputs(
                    params=params[group.name],
                    buffers=buffers.get(group.name, {}),
                    state=states[group.name],
                    segment=segment_of_group(segment, group),
                )
            if isinstance(stream, Streams):
                stream, outputs = self._pass_reversibly(run, stream, inputs, update_buffers)
            elif run.is_scanned:
                stream, outputs = self._scan_run(run, stream, inputs, update_buffers)
            else:
                stream, outputs = self._pass_layer(run, stream, inputs, update_buffers)
            output = _add_run(output, run, outputs)
        x = (stream.first + stream.second) / 2 if isinstance(stream, Streams) else stream
        return output._replace(x=x)

    def _pass_layer(
        self,
        run: Run,
        x: Activations,
        inputs: dict[str, LayerInputs],
        update_buffers: bool,
    ) -> tuple[Activations, dict[str, LayerOutputs]]:
        """Passes through a layer that stands alone."""
        (group,) = run.groups
        layer = self._layer(group, update_buffers, is_scanned=False)
        with jax.named_scope(run.name):
            x, outputs = layer(self._apart(x), inputs[group.name])
        return self._apart(x), {group.name: outputs}

    def _apart(self, x: Activations) -> Activations:
        """Activations between layers that stand alone, if a mechanism asks that these are compiled as in a scan.

        There every layer is a program of its own. Else XLA fuses what two layers do, and leaves out the rounding to
        bfloat16 between them.
        """
        is_asked = any(mechanism.is_compiled_apart for mechanism in self.mechanisms)
        return jax.lax.optimization_barrier(x) if is_asked else x

    def _scan_run(
        self,
        run: Run,
        x: Activations,
        inputs: dict[str, LayerInputs],
        update_buffers: bool,
    ) -> tuple[Activations, dict[str, LayerOutputs]]:
        """Passes through layers whose pattern repeats; the axis of layers is in front of everything that is scanned."""
        layers = {}
        # What all layers are told alike is no part of the scan.
        common = {}
        scanned = {}
        for group in run.groups:
            of_group = inputs[group.name]
            layers[group.name] = self._layer(group, update_buffers, is_scanned=True)
            common[group.name] = without_own(of_group.segment)
            scanned[group.name] = (
                of_group.params,
                of_group.buffers,
                _layers_first(of_group.state),
                own_part(of_group.segment),
            )

        def pass_repetition(
            x: Activations,
            of_repetition: dict[str, tuple],
        ) -> tuple[Activations, dict[str, LayerOutputs]]:
            outputs = {}
            for name, (params, buffers, state, own) in of_repetition.items():
                segment = with_own(common[name], own)
                of_layer = LayerInputs(params, buffers, state, segment)
                x, outputs[name] = layers[name](x, of_layer)
            return x, outputs

        with jax.named_scope(run.name):
            x, outputs = self.remat.scan(pass_repetition, x, scanned)
        for name, of_group in outputs.items():
            outputs[name] = of_group._replace(state=_rows_first(of_group.state))
        return x, outputs

    def _pass_reversibly(
        self,
        run: Run,
        x: Streams,
        inputs: dict[str, LayerInputs],
        update_buffers: bool,
    ) -> tuple[Streams, dict[str, LayerOutputs]]:
        """Passes through a run; of its activations, only its outputs are kept for the gradient."""
        layers = {}
        common = {}
        own = {}
        for group in run.groups:
            params, buffers, state, segment = inputs[group.name]
            state = _layers_first(state) if run.is_scanned else state
            layers[group.name] = self._halves(group, update_buffers)
            common[group.name] = without_own(segment)
            own[group.name] = ReversibleInputs(params, state, (buffers, own_part(segment)))

        with jax.named_scope(run.name):
            # `custom_vjp` hides the types.
            passed: Any = reversible.pass_layers(layers, self.remat.unroll if run.is_scanned else 0, x, own, common)
            x, outputs = passed
        if run.is_scanned:
            outputs = {name: each._replace(state=_rows_first(each.state)) for name, each in outputs.items()}
        return x, outputs

    def _halves(self, group: LayerGroup, update_buffers: bool) -> Halves:
        """A layer as two pure functions."""
        block = self.block(group)

        def attend(
            params: Tree, x: Activations, state: Tree, own: tuple, segment: Segment, choices: Tree
        ) -> tuple[Activations, LayerOutputs]:
            buffers, of_layer = own
            segment = dataclasses.replace(with_own(segment, of_layer), choices=choices)
            output, buffers = _apply(block, params, buffers, update_buffers, x, segment, state, method="attend")
            y, state, report = output
            return y, LayerOutputs(buffers, state, report)

        def feed_forward(params: Tree, x: Activations, own: tuple, segment: Segment) -> Activations:
            buffers, of_layer = own
            of_segment = with_own(segment, of_layer)
            y, _ = _apply(block, params, buffers, False, x, of_segment, method="feed_forward")
            return y

        return Halves(attend, feed_forward)

    def _layer(self, group: LayerGroup, update_buffers: bool, is_scanned: bool) -> Any:
        """A layer as a pure function `(x, LayerInputs) -> (x, LayerOutputs)`."""
        block = self.block(group)

        def layer(x: Activations, inputs: LayerInputs) -> tuple[Activations, LayerOutputs]:
            params, buffers, state, segment = inputs
            output, buffers = _apply(block, params, buffers, update_buffers, x, segment, state)
            x, state, report = output
            return x, LayerOutputs(buffers, state, report)

        return self.remat.of_layer(layer, is_scanned)


# Equal layers are traced once, however many a model has that stand alone.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _init_layer(block: Block, num_rows: int, layout: Layout, key: jax.Array) -> dict[str, Tree]:
    """Parameters and buffers of a layer."""
    dims = block.dims
    x = jnp.zeros((num_rows, layout.size, dims.embed_dim), dims.dtype)
    segment = Segment(
        is_real=jnp.ones((num_rows, layout.size), bool),
        layout=layout,
        tokens=jnp.zeros((num_rows, layout.length), jnp.int32),
        clock=jnp.zeros((), jnp.int32),
    )
    state = block.mechanism.init_state(dims, num_rows, layout.length)
    return dict(block.init(key, x, segment, state))


def _apply(
    block: Block,
    params: Tree,
    buffers: Tree,
    update_buffers: bool,
    *args: Any,
    method: str | None = None,
) -> tuple[Any, Tree]:
    """The output of a layer, or of a half of it, and its buffers afterwards, without gradient."""
    mutable = ["buffers"] if update_buffers else []
    variables = {"params": params, "buffers": buffers}
    output, changed = block.apply(variables, *args, mutable=mutable, method=method)
    return output, jax.lax.stop_gradient(changed.get("buffers", buffers))


def _layers_first(state: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), state)


def _rows_first(state: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), state)


def _add_layer_axis(variables: Tree) -> Tree:
    """Names the first axis of boxed arrays, which `vmap` over layers has made."""

    def is_box(leaf: Any) -> bool:
        return isinstance(leaf, nn.LogicallyPartitioned)

    def add_name(leaf: Any) -> Any:
        if not is_box(leaf):
            return leaf
        return leaf.replace(names=("layers", *leaf.names))

    return jax.tree.map(add_name, variables, is_leaf=is_box)


def _add_run(output: StackOutput, run: Run, outputs: dict[str, LayerOutputs]) -> StackOutput:
    """The output with what the layers of one more run give besides activations; their reports get their names."""
    states = dict(output.states)
    buffers = dict(output.buffers)
    report = output.report

    for group in run.groups:
        of_group = outputs[group.name]
        states[group.name] = of_group.state
        if of_group.buffers:
            buffers[group.name] = of_group.buffers
        kv_cache: dict[str, Any] = {**report.kv_cache, group.name: of_group.report.kv_cache}
        report = dataclasses.replace(report, kv_cache=kv_cache)
        for name, of_layer in _reports(group, of_group.report):
            report = report.with_part(name, of_layer)
    return StackOutput(output.x, states, buffers, report)


def _reports(group: LayerGroup, report: Report) -> Iterator[tuple[str, Report]]:
    """The report of each layer of a group, with the layer's name."""
    if not group.is_stacked:
        yield group.name, report
        return
    for place, index in enumerate(group.layers):
        of_layer = jax.tree.map(operator.itemgetter(place), report)
        yield layer_name(index), of_layer
