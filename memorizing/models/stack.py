"""Layers in a repeating pattern, compiled once for all repetitions.

A stack of L layers follows a *pattern* of mechanisms, such as (A,), (strided, fixed) or (local, local, global), with
exceptions by index. Where the pattern repeats, the parameters and states of the layers at one place of it are stacked,
and one scan passes through the repetitions: its body is the pattern, whatever stands in it. Layers that repeat nothing,
or whose state is too large to be stacked, stand alone.

How layers are stacked is private to this module and to what holds such trees: every layer has one name, `layer_03`, and
`unstack` and `stack` convert between arrays of single layers and of groups. The initial parameters of a layer and its
random numbers depend on its index only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memorizing.array_typing import Activations, AxesTree, Tree
from memorizing.context import Decoding, Layout, Report, Segment
from memorizing.models.attention.base import Attention, LayerDims
from memorizing.models.block import Block
from memorizing.models.layers import rows_over_data
from memorizing.models.memory.external_memory import NEIGHBOURS


class LayerGroup(NamedTuple):
    """Layers with the same mechanism whose parameters and states lie in the same arrays.

    Attributes:
      attention: their mechanism.
      layers: their indices.
    """

    attention: Attention
    layers: range

    @property
    def name(self) -> str:
        """Of the entry in trees of parameters, buffers and states."""
        first, last, step = self.layers[0], self.layers[-1], self.layers.step
        if not self.is_stacked:
            return layer_name(first)
        return f"layers_{first:02d}_{last:02d}" + (f"_by_{step}" if step > 1 else "")

    @property
    def is_stacked(self) -> bool:
        return len(self.layers) > 1


class Run(NamedTuple):
    """Groups through which one scan passes, a layer of each in every repetition; or a layer that stands alone."""

    groups: tuple[LayerGroup, ...]

    @property
    def is_scanned(self) -> bool:
        return self.groups[0].is_stacked


class StackOutput(NamedTuple):
    """What the layers give.

    Attributes:
      x: [B, T, D].
      states, buffers: of every group by name; a state is None where the segment is not whole.
      report: losses, metrics and `retrieved` by layer, `kv_cache` by group.
    """

    x: Activations
    states: dict[str, Tree]
    buffers: dict[str, Tree]
    report: Report


@dataclasses.dataclass(frozen=True)
class Stack:
    """L layers.

    Attributes:
      num_layers: L.
      pattern: mechanisms of the layers, over and over.
      exceptions: pairs of a layer index, from 0, and its mechanism instead.
      dims: sizes and parts of each layer.
      remat: 'none', or 'layer' to recompute each layer for its gradient, all but the search of a memory.
    """

    num_layers: int
    pattern: tuple[Attention, ...]
    exceptions: tuple[tuple[int, Attention], ...]
    dims: LayerDims
    remat: Literal["none", "layer"] = "none"

    @functools.cached_property
    def mechanisms(self) -> tuple[Attention, ...]:
        """Of each layer."""
        exceptions = dict(self.exceptions)
        period = len(self.pattern)
        return tuple(exceptions.get(index, self.pattern[index % period]) for index in range(self.num_layers))

    @functools.cached_property
    def runs(self) -> tuple[Run, ...]:
        """From the first layer to the last."""
        runs, first, period = [], 0, len(self.pattern)
        while first < self.num_layers:
            block = self.mechanisms[first : first + period]
            end = first + period
            while self.mechanisms[end : end + period] == block and all(each.stackable for each in block):
                end += period
            if end > first + period:
                groups = [LayerGroup(each, range(first + i, end, period)) for i, each in enumerate(block)]
            else:
                groups, end = [LayerGroup(block[0], range(first, first + 1))], first + 1
            runs.append(Run(tuple(groups)))
            first = end
        return tuple(runs)

    @functools.cached_property
    def groups(self) -> tuple[LayerGroup, ...]:
        """All groups."""
        return tuple(group for run in self.runs for group in run.groups)

    @property
    def stacked_layers(self) -> dict[str, tuple[int, ...]]:
        """Of each group of several layers, by its name, their indices."""
        return {group.name: tuple(group.layers) for group in self.groups if group.is_stacked}

    def init(self, rng: jax.Array, num_rows: int, layout: Layout) -> dict[str, dict[str, Tree]]:
        """Parameters and buffers that still carry their logical axis names: `{"params": {group: ...}, "buffers": ...}`.

        They depend neither on rows nor on the layout, which only have to fit mesh and mechanisms.
        """
        variables: dict[str, dict[str, Tree]] = {"params": {}, "buffers": {}}
        for group in self.groups:
            init_layer = functools.partial(self._init_layer, group.attention, num_rows=num_rows, layout=layout)
            # [layers]
            keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(jnp.asarray(group.layers))
            created = _add_layer_axis(jax.vmap(init_layer)(keys)) if group.is_stacked else init_layer(keys[0])
            for collection, tree in created.items():
                variables[collection][group.name] = tree
        return variables

    def init_states(self, batch_size: int, segment_length: int) -> dict[str, Tree]:
        """The states of rows that have seen nothing, by group; those of several layers have the layers as axis 1."""

        def stacked(leaf: jax.Array, length: int) -> jax.Array:
            return jnp.broadcast_to(leaf[:, None], (leaf.shape[0], length, *leaf.shape[1:]))

        states = {}
        for group in self.groups:
            state = group.attention.init_state(self.dims, batch_size, segment_length)
            if group.is_stacked:
                state = jax.tree.map(functools.partial(stacked, length=len(group.layers)), state)
            states[group.name] = state
        return states

    def state_axes(self) -> dict[str, AxesTree]:
        """Logical axis names of every leaf of the states."""

        def is_names(value: Any) -> bool:
            return type(value) is tuple and len(value) > 0

        axes = {}
        for group in self.groups:
            names = group.attention.state_axes()
            if group.is_stacked:
                names = jax.tree.map(lambda names: (names[0], "layers", *names[1:]), names, is_leaf=is_names)
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
        output = StackOutput(x, {}, {}, Report(retrieved={}))
        for run in self.runs:
            x = rows_over_data(output.x)
            of_groups = [(_of_group(segment, group), group) for group in run.groups]
            inputs = {
                group.name: LayerInputs(params[group.name], buffers.get(group.name, {}), states[group.name], seen)
                for seen, group in of_groups
            }
            pass_run = self._scan_run if run.is_scanned else self._pass_layer
            x, outputs = pass_run(run, x, inputs, update_buffers)
            output = _add_run(output, run, x, outputs)
        return output

    def _init_layer(self, attention: Attention, key: jax.Array, num_rows: int, layout: Layout) -> dict[str, Tree]:
        x = jnp.zeros((num_rows, layout.size, self.dims.embed_dim), self.dims.dtype)
        segment = Segment(jnp.ones((num_rows, layout.size), bool), layout)
        state = attention.init_state(self.dims, num_rows, layout.length)
        return Block(attention, self.dims).init(key, x, segment, state)

    def _pass_layer(
        self, run: Run, x: Activations, inputs: dict[str, LayerInputs], update_buffers: bool
    ) -> tuple[Activations, dict[str, LayerOutputs]]:
        """A layer that stands alone."""
        (group,) = run.groups
        layer = self._layer(group.attention, update_buffers, is_scanned=False)
        with jax.named_scope(group.name):
            x, outputs = layer(x, inputs[group.name])
        return x, {group.name: outputs}

    def _scan_run(
        self, run: Run, x: Activations, inputs: dict[str, LayerInputs], update_buffers: bool
    ) -> tuple[Activations, dict[str, LayerOutputs]]:
        """Layers whose pattern repeats; the axis of layers is in front of everything that is scanned."""
        layers = {group.name: self._layer(group.attention, update_buffers, is_scanned=True) for group in run.groups}
        # What all layers are told alike is no part of the scan.
        common = {name: _without_own(each.segment) for name, each in inputs.items()}

        def pass_repetition(x: Activations, scanned: dict[str, tuple]) -> tuple[Activations, dict[str, LayerOutputs]]:
            outputs = {}
            for name, (params, buffers, state, own) in scanned.items():
                segment = _with_own(common[name], own)
                x, outputs[name] = layers[name](x, LayerInputs(params, buffers, state, segment))
            return x, outputs

        scanned = {
            name: (each.params, each.buffers, _layers_first(each.state), _own(each.segment))
            for name, each in inputs.items()
        }
        with jax.named_scope("_".join(group.name for group in run.groups)):
            x, outputs = jax.lax.scan(pass_repetition, x, scanned)
        return x, {name: each._replace(state=_rows_first(each.state)) for name, each in outputs.items()}

    def _layer(self, attention: Attention, update_buffers: bool, is_scanned: bool) -> Any:
        """A layer as a pure function `(x, LayerInputs) -> (x, LayerOutputs)`."""
        block = Block(attention, self.dims)

        def layer(x: Activations, inputs: LayerInputs) -> tuple[Activations, LayerOutputs]:
            variables = {"params": inputs.params, "buffers": inputs.buffers}
            mutable = ["buffers"] if update_buffers else []
            (x, state, report), changed = block.apply(variables, x, inputs.segment, inputs.state, mutable=mutable)
            buffers = jax.lax.stop_gradient(changed.get("buffers", inputs.buffers))
            return x, LayerOutputs(buffers, state, report)

        if self.remat == "none":
            return layer
        policy = jax.checkpoint_policies.save_only_these_names(NEIGHBOURS)
        # prevent_cse is not needed inside a scan, and would only slow it down.
        return jax.checkpoint(layer, policy=policy, prevent_cse=not is_scanned)


class LayerInputs(NamedTuple):
    """What a layer is given besides its activations; of a group, with an axis of layers."""

    params: Tree
    buffers: Tree
    state: Tree
    segment: Segment


class LayerOutputs(NamedTuple):
    """What a layer gives besides its activations; of a group, with an axis of layers."""

    buffers: Tree
    state: Tree
    report: Report


def layer_name(index: int) -> str:
    """The name of a layer wherever one is spoken of."""
    return f"layer_{index:02d}"


def unstack(arrays: Mapping[str, Any], stacked_layers: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Arrays of single layers by path, from arrays of groups: `params/layers_00_07/...` becomes `params/layer_00/...` etc.

    Args:
      arrays: by path; of a group of several layers with the layers as the first axis.
      stacked_layers: see `Stack.stacked_layers`.
    """
    single = {}
    for path, array in arrays.items():
        members = list(member_paths(path, stacked_layers))
        single |= dict(zip(members, array if members != [path] else [array], strict=True))
    return single


def unstack_paths(paths: Iterable[str], stacked_layers: Mapping[str, Sequence[int]]) -> list[str]:
    """`unstack` of paths alone."""
    return [member for path in paths for member in member_paths(path, stacked_layers)]


def member_paths(path: str, stacked_layers: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """The paths of the single layers whose arrays are stacked in the array of this path; the path itself if none are."""
    parts = path.split("/")
    group = next((part for part in parts if part in stacked_layers), None)
    if group is None:
        yield path
        return
    for index in stacked_layers[group]:
        yield "/".join(layer_name(index) if part == group else part for part in parts)


def stack(path: str, single: Mapping[str, np.ndarray], stacked_layers: Mapping[str, Sequence[int]]) -> np.ndarray:
    """The array of a path, from arrays of single layers. Raises KeyError with the path that is missing."""
    members = [single[member] for member in member_paths(path, stacked_layers)]
    return np.stack(members) if any(part in stacked_layers for part in path.split("/")) else members[0]


def _of_group(segment: Segment, group: LayerGroup) -> Segment:
    """What the layers of a group know of a segment; what is their own has an axis of layers in front if they are several."""
    decoding, rngs = segment.decoding, segment.rngs
    if decoding is not None and decoding.kv_cache is not None:
        decoding = decoding.replace(kv_cache=decoding.kv_cache[group.name])
    if rngs is not None and group.is_stacked:
        keys = jax.vmap(lambda index: rngs.of_layer(index).key)(jnp.asarray(group.layers))
        rngs = rngs.replace(key=keys)
    elif rngs is not None:
        rngs = rngs.of_layer(group.layers[0])
    return segment.replace(decoding=decoding, rngs=rngs)


def _own(segment: Segment) -> tuple[Any, Any]:
    """What each layer of a group knows for itself: its KV cache and its random numbers."""
    cache = segment.decoding.kv_cache if segment.decoding is not None else None
    return cache, segment.rngs.key if segment.rngs is not None else None


def _without_own(segment: Segment) -> Segment:
    decoding = Decoding(segment.decoding.position) if segment.decoding is not None else None
    rngs = segment.rngs.replace(key=None) if segment.rngs is not None else None
    return segment.replace(decoding=decoding, rngs=rngs)


def _with_own(segment: Segment, own: tuple[Any, Any]) -> Segment:
    cache, key = own
    decoding = segment.decoding.replace(kv_cache=cache) if segment.decoding is not None else None
    rngs = segment.rngs.replace(key=key) if segment.rngs is not None else None
    return segment.replace(decoding=decoding, rngs=rngs)


def _layers_first(state: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), state)


def _rows_first(state: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), state)


def _add_layer_axis(variables: Tree) -> Tree:
    """Tells boxed arrays that a scan over layers made that layers are their first axis."""

    def named(box: Any) -> Any:
        return box.replace(names=("layers", *box.names)) if isinstance(box, nn.LogicallyPartitioned) else box

    return jax.tree.map(named, variables, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def _add_run(output: StackOutput, run: Run, x: Activations, outputs: dict[str, LayerOutputs]) -> StackOutput:
    """The output with that of one more run; what layers report gets their names."""
    report = output.report
    losses, metrics, retrieved = dict(report.losses), dict(report.metrics), dict(report.retrieved)
    kv_cache = dict(report.kv_cache)
    for group in run.groups:
        of_group = outputs[group.name].report
        kv_cache[group.name] = of_group.kv_cache
        for place, index in enumerate(group.layers):
            of_layer = jax.tree.map(lambda leaf, i=place: leaf[i], of_group) if group.is_stacked else of_group
            name = layer_name(index)
            losses |= {f"{name}/{key}": value for key, value in of_layer.losses.items()}
            metrics |= {f"{name}/{key}": value for key, value in of_layer.metrics.items()}
            if of_layer.retrieved is not None:
                retrieved[name] = of_layer.retrieved
    return StackOutput(
        x=x,
        states=output.states | {name: each.state for name, each in outputs.items()},
        buffers=output.buffers | {name: each.buffers for name, each in outputs.items() if each.buffers},
        report=Report(losses, metrics, kv_cache, retrieved),
    )
