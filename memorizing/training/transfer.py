"""Starting from another run's checkpoint: into a larger memory, or from a model without a memory into one that has it.

The paper has a section on each; a model may leave its memory behind as well. Parameters are matched layer by layer,
however either model stacks its layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memorizing.array_typing import Tree
from memorizing.errors import UserError
from memorizing.models import language_model
from memorizing.models.attention import MECHANISMS
from memorizing.models.attention.external import MemoryAttention
from memorizing.models.lm_config import RECURRENT, LMConfig
from memorizing.models.memory.continuous_cache import CONTINUOUS_CACHE
from memorizing.models.stack.arrays import member_paths, stack, unstack_paths
from memorizing.runtime import distributed
from memorizing.runtime.sharding import from_host
from memorizing.runtime.workdir import resolve
from memorizing.training.checkpoint import FOLDER, paths, read_arrays
from memorizing.training.state import TrainState


def start_from(
    workdir: str, state: TrainState, config: LMConfig, segment_length: int, with_optimizer: bool = True
) -> TrainState:
    """A fresh state with the parameters and buffers of the newest checkpoint of another run; contexts start empty.

    A memory, recurrent tokens or a continuous cache that this model does not have stay behind, which is said.

    Args:
      workdir: the other run's folder.
      state: a fresh state on its devices.
      config: its model.
      segment_length: of its training.
      with_optimizer: also takes over the optimizer state and the step, if there is one, so that the learning rate goes
        on where it was; else they start at 0.

    Raises:
      UserError: there is no checkpoint, or a parameter that is not the memory's is missing, has no place in the model
        or has another shape; the message names it.
    """
    given = f"LoopConfig.start_from = {workdir!r}"
    folder = resolve(workdir)
    if not (folder / FOLDER).exists():
        raise UserError(f"{given}: there is no folder {folder / FOLDER}")
    saved = read_arrays(folder)
    # An imported model has no optimizer.
    with_optimizer = with_optimizer and any(path.startswith("opt_state/") for path in saved)
    names = ("params", "buffers", "opt_state", "step") if with_optimizer else ("params", "buffers")
    fresh = {name: getattr(state, name) for name in names}
    own = memory_parameters(config, segment_length)
    left_behind = _left_behind(saved, config, own)
    if left_behind:
        distributed.say(f"going on without its memory: {', '.join(sorted(left_behind))} stay behind")
    taken = {path: array for path, array in saved.items() if path not in left_behind}
    filled = fit(fresh, taken, config.stack.stacked_layers, given, own)
    return dataclasses.replace(state, **jax.tree.map(_place, filled, fresh))


def _left_behind(saved: Collection[str], config: LMConfig, memory: Collection[str]) -> set[str]:
    """Saved parameters of what this model carries no context with: memories, recurrent tokens, a continuous cache.

    Args:
      saved: paths.
      config: the model.
      memory: parameters of its own memory.
    """
    parts = {RECURRENT: config.recurrent_tokens, CONTINUOUS_CACHE: config.continuous_cache}
    absent = tuple(f"params/{name}/" for name, part in parts.items() if part is None)
    memories = [mechanism for mechanism in MECHANISMS if issubclass(mechanism, MemoryAttention)]
    names = {f"/attention/core/{name}" for memory in memories for name in memory.own_parameters}
    own = {f"params/{parameter}" for parameter in memory}
    of_layers = {path for path in saved if path.startswith("params/") and path.endswith(tuple(names))} - own
    return of_layers | {path for path in saved if path.startswith(absent)}


def memory_parameters(config: LMConfig, segment_length: int) -> set[str]:
    """What a model with a memory, or with low-rank changes, has beyond the same model without.

    `layer_08/attention/core/gate`, for example.
    """

    # Rows that the mesh admits: parameters do not depend on them.
    mesh = jax.sharding.get_abstract_mesh()
    num_rows = 1 if mesh.empty else mesh.shape["data"]

    def names(config: LMConfig) -> set[str]:
        variables = nn.unbox(language_model.abstract_variables(config, num_rows, segment_length))
        return set(unstack_paths(paths(variables["params"]), config.stack.stacked_layers))

    bare = dataclasses.replace(config.without_memory(), lora=None)
    return names(config) - names(bare)


def merge_lora(config: LMConfig, params: Tree) -> tuple[LMConfig, Tree]:
    """The same model whose low-rank changes are part of its projections.

    Args:
      config: of the model.
      params: of the model, by group of layers.
    """
    lora = config.lora
    if lora is None:
        return config, params

    def change(down: jax.Array, up: jax.Array) -> jax.Array:
        return lora.scale * jnp.tensordot(down, up, axes=1)

    def merged(tree: Tree, is_stacked: bool) -> Tree:
        if not isinstance(tree, Mapping):
            return tree
        new = {name: merged(branch, is_stacked) for name, branch in tree.items() if not name.startswith("lora_")}
        if "lora_a" in tree:
            of_layers = jax.vmap(change) if is_stacked else change
            new["kernel"] = new["kernel"] + of_layers(tree["lora_a"], tree["lora_b"])
        return new

    stacked = config.stack.stacked_layers
    plain = {layers: merged(tree, layers in stacked) for layers, tree in params.items()}
    return dataclasses.replace(config, lora=None), plain


def fit(
    wanted: Tree,
    saved: Mapping[str, np.ndarray],
    stacked_layers: Mapping[str, Sequence[int]],
    given: str,
    may_be_missing: Collection[str] = (),
) -> Tree:
    """Saved arrays of single layers in the structure of a model.

    Args:
      wanted: `{"params": ..., ...}`; its leaves have a shape and a dtype.
      saved: arrays by path, such as `params/layer_03/mlp/up/kernel`.
      stacked_layers: of the model, see `Stack`.
      given: what the user gave, for the message.
      may_be_missing: parameters that are left as they are in `wanted` if they are not there.

    Raises:
      UserError: a parameter is missing, has another shape, or has no place in the model.
    """
    known = set(unstack_paths(paths(wanted), stacked_layers))
    unused = sorted(path for path in saved if path.startswith("params/") and path not in known)
    if unused:
        raise UserError(f"{given}: this model has no place for its {unused[0]}; is it another model?")

    def value(path: str, leaf: Any) -> Any:
        try:
            array = stack(path, saved, stacked_layers)
        except KeyError as error:
            (missing,) = error.args
            if any(_stands_for(missing, name) for name in may_be_missing):
                return leaf
            raise UserError(f"{given}: its checkpoint has no {missing}; is it another model?") from None
        if array.shape != leaf.shape:
            first = next(member_paths(path, stacked_layers))
            num_stacked = array.ndim - saved[first].ndim
            raise UserError(
                f"{given}: {first} has shape {saved[first].shape} there, but {leaf.shape[num_stacked:]} in this model"
            )
        return array.astype(leaf.dtype)

    leaves = paths(wanted)
    # Parameters first: their names say more to a user than the optimizer's.
    order = sorted(leaves, key=lambda path: not path.startswith("params/"))
    values = {path: value(path, leaves[path]) for path in order}
    return jax.tree.unflatten(jax.tree.structure(wanted), [values[path] for path in leaves])


def _stands_for(path: str, parameter: str) -> bool:
    """Whether a path is a parameter's, or of what an optimizer keeps for it: between layer and rest may lie its own."""
    layer, _, rest = parameter.partition("/")
    return layer in path.split("/") and path.endswith(f"/{rest}")


def _place(array: np.ndarray | jax.Array, fresh: jax.Array) -> jax.Array:
    return fresh if array is fresh else from_host(np.asarray(array), fresh.sharding)
