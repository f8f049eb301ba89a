"""From another's tensors to our parameters, one at a time, so that little more than the parameters is ever held."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Sharding

from memorizing.array_typing import Tree
from memorizing.errors import UserError
from memorizing.models import language_model
from memorizing.models.pretrained.tensors import Tensor, tensors_of
from memorizing.models.stack.arrays import member_paths
from memorizing.runtime import sharding
from memorizing.runtime.sharding import from_host
from memorizing.training.checkpoint import paths
from memorizing.training.experiment import Experiment
from memorizing.training.pretrained.source import Source


class _Part(NamedTuple):
    """A parameter of one layer, as a part of a tensor."""

    tensor: Tensor
    index: int

    def read(self, source: Source) -> np.ndarray:
        return self.tensor.split(source.read(self.tensor))[self.index]


def load_variables(source: Source, experiment: Experiment) -> tuple[Tree, Tree]:
    """Parameters, float32, and buffers of an experiment's model, sharded over its mesh.

    What a source does not have, such as the parameters of a memory, is as at the start of a training.

    Args:
      source: the model.
      experiment: whose model has the same architecture.

    Raises:
      UserError: source and configuration are different models, or a file is damaged.
    """
    config = experiment.model
    mesh = experiment.mesh.make_mesh()
    with jax.set_mesh(mesh):
        num_rows = mesh.shape["data"]
        init = functools.partial(language_model.init, config, num_rows, experiment.batch.segment_length)
        boxed = language_model.abstract_variables(config, num_rows, experiment.batch.segment_length)
        shardings = sharding.variable_shardings(mesh, boxed, experiment.mesh.parameter_rules)

        def place(leaf: jax.ShapeDtypeStruct, where: Sharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        abstract = jax.tree.map(place, nn.unbox(boxed), shardings)

        def initial(wanted: tuple[str, ...]) -> dict[str, jax.Array]:
            """Some leaves as they are at the start of a training; the others are not computed."""
            by_path = paths(nn.unbox(init(jax.random.key(experiment.loop.seed))))
            return {path: by_path[path] for path in wanted}

        params = _load(source, config.stack.stacked_layers, abstract["params"], initial)
        buffers = _fill(abstract["buffers"], "buffers", initial)
    return params, buffers


Initial = Callable[[tuple[str, ...]], dict[str, jax.Array]]


def _load(source: Source, stacked_layers: Mapping[str, Sequence[int]], abstract: Tree, initial: Initial) -> Tree:
    """The parameters, each read when it is its turn."""
    parts = {}
    for tensor in tensors_of(source.architecture):
        for index, path in enumerate(tensor.paths):
            parts[path] = _Part(tensor, index)
    leaves = paths({"params": abstract})
    members = {path: list(member_paths(path, stacked_layers)) for path in leaves}
    _check(source, {member for each in members.values() for member in each}, parts)

    own = tuple(path for path in leaves if members[path][0] not in parts)
    created = jax.jit(initial, static_argnums=0)(own) if own else {}
    loaded = []
    for path, leaf in leaves.items():
        if path in created:
            loaded.append(jax.device_put(created[path], leaf.sharding))
        else:
            array = _read(source, path, [parts[member] for member in members[path]], leaf)
            loaded.append(from_host(array, leaf.sharding))
            # It would stay until the next one is complete.
            del array
    return jax.tree.unflatten(jax.tree.structure(abstract), loaded)


def _fill(abstract: Tree, name: str, initial: Initial) -> Tree:
    """A collection as it is at the start of a training."""
    leaves = paths({name: abstract})
    if not leaves:
        return abstract
    created = jax.jit(initial, static_argnums=0)(tuple(leaves))
    placed = [jax.device_put(created[path], leaf.sharding) for path, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), placed)


def _check(source: Source, ours: set[str], parts: dict[str, _Part]) -> None:
    """Raises UserError where the configuration has no place for a parameter of the source."""
    for path in sorted(parts):
        if path not in ours:
            raise UserError(
                f"{source.name}: its {parts[path].tensor.name} has no place in this model ({path}): leave the parts and "
                "sizes of LMConfig as they are imported"
            )


def _read(source: Source, path: str, parts: list[_Part], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """A parameter of one layer, or of all layers of a group."""
    if len(parts) == 1 and parts[0].tensor.paths[parts[0].index] == path:
        array = np.asarray(parts[0].read(source), leaf.dtype)
        _check_shape(source, path, array.shape, leaf.shape)
        return array
    stacked = np.empty(leaf.shape, leaf.dtype)
    for index, part in enumerate(parts):
        array = part.read(source)
        _check_shape(source, path, array.shape, leaf.shape[1:])
        stacked[index] = array
    return stacked


def _check_shape(source: Source, path: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise UserError(
            f"{source.name}: {path} has the shape {found} there and {wanted} in this model: leave the sizes of LMConfig "
            "as they are imported"
        )
