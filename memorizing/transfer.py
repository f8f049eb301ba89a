"""Starting from another run's checkpoint: into a larger memory, or from a model without a memory into one that has it (the paper's sections on both)."""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax
import numpy as np

from memorizing.array_typing import Tree
from memorizing.checkpoint import FOLDER, paths, read_arrays
from memorizing.errors import UserError
from memorizing.train_state import TrainState
from memorizing.workdir import resolve

# What a model with a memory has beyond the same model without: it starts fresh.
MEMORY_PARAMETER = re.compile(r"/core/gate$")

_STACK = re.compile(r"layers_(\d+)_(\d+)")


def start_from(workdir: str, state: TrainState, with_optimizer: bool = True) -> TrainState:
    """A fresh state with the parameters of the newest checkpoint of another run; contexts start empty.

    Layers are matched one by one, however either model stacks them.

    Args:
      workdir: the other run's folder.
      state: a fresh state on its devices.
      with_optimizer: also takes over the optimizer state and the step, so that the learning rate goes on where it was; else they start at 0.

    Raises:
      UserError: there is no checkpoint, or a parameter that is not the memory's is missing or has another shape; the message names it.
    """
    folder = resolve(workdir)
    if not (folder / FOLDER).exists():
        raise UserError(f"LoopConfig.start_from = {workdir!r}: there is no folder {folder / FOLDER}")
    saved = read_arrays(folder)
    source = _single_layers(saved)
    wanted = {member for path in paths(state.params) for member in _members(f"params/{path}")}
    unused = sorted(path for path in source if path.startswith("params/") and path not in wanted)
    if unused:
        raise UserError(
            f"LoopConfig.start_from = {workdir!r}: this model has no place for its {unused[0]}; is it another model?"
        )
    names = ("params", "opt_state", "step") if with_optimizer else ("params",)
    return state.replace(**{name: _fill(name, getattr(state, name), source, workdir) for name in names})


def _fill(name: str, wanted: Tree, source: Mapping[str, np.ndarray], workdir: str) -> Tree:
    def value(path: str, fresh: jax.Array) -> jax.Array:
        members = _members(path)
        arrays = [source.get(member) for member in members]
        if any(array is None for array in arrays):
            if MEMORY_PARAMETER.search(path):
                return fresh
            missing = members[next(i for i, array in enumerate(arrays) if array is None)]
            raise UserError(
                f"LoopConfig.start_from = {workdir!r}: its checkpoint has no {missing}; is it another model?"
            )
        array = np.stack(arrays) if _STACK.search(path) else arrays[0]
        if array.shape != fresh.shape:
            raise UserError(
                f"LoopConfig.start_from = {workdir!r}: {members[0]} has shape {arrays[0].shape} there, "
                f"but {fresh.shape[array.ndim - arrays[0].ndim :]} in this model"
            )
        return jax.device_put(array.astype(fresh.dtype), fresh.sharding)

    filled = [value(f"{name}/{path}".rstrip("/"), fresh) for path, fresh in paths(wanted).items()]
    return jax.tree.unflatten(jax.tree.structure(wanted), filled)


def _members(path: str) -> list[str]:
    """The paths of the single layers that a (perhaps stacked) array holds."""
    stack = _STACK.search(path)
    if not stack:
        return [path]
    first, last = map(int, stack.groups())
    return [path.replace(stack.group(), f"layer_{index:02d}") for index in range(first, last + 1)]


def _single_layers(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same arrays with every stack taken apart."""
    single: dict[str, np.ndarray] = {}
    for path, array in arrays.items():
        members = _members(path)
        single |= dict(zip(members, array if len(members) > 1 else [array], strict=True))
    return single
