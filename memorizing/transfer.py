"""Starting from another run's checkpoint: into a larger memory, or from a model without a memory into one that has it (the paper's sections on both)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from memorizing.array_typing import Tree
from memorizing.checkpoint import FOLDER, paths, read_arrays
from memorizing.errors import UserError
from memorizing.sharding import from_host
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
    given = f"LoopConfig.start_from = {workdir!r}"
    folder = resolve(workdir)
    if not (folder / FOLDER).exists():
        raise UserError(f"{given}: there is no folder {folder / FOLDER}")
    saved = read_arrays(folder)
    names = ("params", "opt_state", "step") if with_optimizer else ("params",)
    fresh = {name: getattr(state, name) for name in names}
    filled = fit(fresh, saved, given, fresh_memory=True)
    return state.replace(**jax.tree.map(_place, filled, fresh))


def _place(array: np.ndarray | jax.Array, fresh: jax.Array) -> jax.Array:
    return array if array is fresh else from_host(np.asarray(array), fresh.sharding)


def fit(wanted: Tree, saved: Mapping[str, np.ndarray], given: str, fresh_memory: bool = False) -> Tree:
    """Saved arrays in the structure of a model, layers matched one by one, however either side stacks them.

    Args:
      wanted: `{"params": ..., ...}`, leaves with shape and dtype.
      saved: arrays by path, such as `params/embedder/table`.
      given: what the user gave, for the message.
      fresh_memory: whether what a memory adds may be missing; it is then left as it is in `wanted`.

    Raises:
      UserError: a parameter is missing, has another shape, or has no place in the model.
    """
    source = _single_layers(saved)
    known = {member for path in paths(wanted) for member in _members(path)}
    unused = sorted(path for path in source if path.startswith("params/") and path not in known)
    if unused:
        raise UserError(f"{given}: this model has no place for its {unused[0]}; is it another model?")

    def value(path: str, leaf: Any) -> Any:
        members = _members(path)
        arrays = [source.get(member) for member in members]
        if any(array is None for array in arrays):
            if fresh_memory and MEMORY_PARAMETER.search(path):
                return leaf
            missing = members[next(i for i, array in enumerate(arrays) if array is None)]
            raise UserError(f"{given}: its checkpoint has no {missing}; is it another model?")
        array = np.stack(arrays) if _STACK.search(path) else arrays[0]
        if array.shape != leaf.shape:
            raise UserError(
                f"{given}: {members[0]} has shape {arrays[0].shape} there, "
                f"but {leaf.shape[array.ndim - arrays[0].ndim :]} in this model"
            )
        return array.astype(leaf.dtype)

    leaves = paths(wanted)
    # Parameters first: their names say more to a user than the optimizer's.
    values = {
        path: value(path, leaves[path]) for path in sorted(leaves, key=lambda path: not path.startswith("params/"))
    }
    return jax.tree.unflatten(jax.tree.structure(wanted), [values[path] for path in leaves])


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
