"""The device mesh, and where each array lies on it.

Three mesh axes: `data` shards rows (of batches and contexts) and, if asked, parameters; `model` shards heads, MLP width and vocabulary; `memory` shards the slots of the
external memory. What is sharded is said by logical axis names, which parameters and states carry; the tables below are the only place that maps them to the mesh.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from memorizing.array_typing import AxesTree, Tree
from memorizing.errors import UserError

AXES = ("data", "model", "memory")

Rules = Mapping[str, str]

STATE_RULES: Rules = {"batch": "data", "heads": "model", "memory": "memory"}
REPLICATED_PARAMETERS: Rules = {"heads": "model", "mlp": "model", "vocab": "model"}
FSDP_PARAMETERS: Rules = REPLICATED_PARAMETERS | {"embed": "data"}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices as a grid.

    Attributes:
      data: devices over which rows are sharded; -1 takes all that the other axes leave.
      model: devices over which heads, MLP and vocabulary are sharded.
      memory: devices over which the slots of the external memory are sharded.
      parameters: 'replicated' over `data`, or 'fsdp' to shard them over it.
    """

    data: int = -1
    model: int = 1
    memory: int = 1
    parameters: Literal["replicated", "fsdp"] = "replicated"

    @property
    def parameter_rules(self) -> Rules:
        return FSDP_PARAMETERS if self.parameters == "fsdp" else REPLICATED_PARAMETERS

    def make_mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh over `devices` (default: all). Raises UserError if they do not fill the grid."""
        devices = jax.devices() if devices is None else devices
        shape = [getattr(self, axis) for axis in AXES]
        fixed = int(np.prod([size for size in shape if size != -1]))
        if any(size < 1 and size != -1 for size in shape) or shape[1:].count(-1) or len(devices) % fixed:
            raise UserError(self._does_not_fit(len(devices)))
        shape = [len(devices) // fixed if size == -1 else size for size in shape]
        if int(np.prod(shape)) != len(devices):
            raise UserError(self._does_not_fit(len(devices)))
        num_slices = len(set(map(_slice, devices)))
        if shape[0] % num_slices:
            raise UserError(
                f"MeshConfig.data = {shape[0]} is not a multiple of the {num_slices} TPU slices: model and memory have to lie within a slice"
            )
        return _make_mesh(shape, devices)

    def _does_not_fit(self, num_devices: int) -> str:
        return (
            f"MeshConfig.data = {self.data}, model = {self.model}, memory = {self.memory} does not fit {num_devices} devices: "
            "their product has to be the number of devices; data = -1 takes what the others leave"
        )


def _make_mesh(shape: Sequence[int], devices: Sequence[Any]) -> Mesh:
    """The mesh in an order that suits the network between the devices, and with the rows of each process, and of each TPU slice, consecutive."""
    slices = sorted({_slice(device) for device in devices})
    # Slices are joined by a slower network: only rows go over it.
    shape = (shape[0] // len(slices), *shape[1:])
    parts = [[device for device in devices if _slice(device) == index] for index in slices]
    types = (AxisType.Auto,) * len(AXES)
    grid = np.concatenate([jax.make_mesh(shape, AXES, axis_types=types, devices=part).devices for part in parts])
    owners = [min((_slice(device), device.process_index) for device in part.flat) for part in grid]
    order = sorted(range(len(owners)), key=owners.__getitem__)
    return Mesh(grid[order], AXES, axis_types=types)


def _slice(device: Any) -> int:
    """Which TPU slice a device belongs to."""
    return (getattr(device, "slice_index", 0) or 0) if device.platform == "tpu" else 0


def mesh_for_one_row(num_heads: int, memory_segments: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh that shares one row: heads over `model`, and over `memory` the slots, as far as both can be divided.

    Args:
      num_heads: N.
      memory_segments: slots of an external memory in segments, which stay whole; 0 without one.
      devices: to choose from (default: all); some may be left over.
    """
    devices = jax.devices() if devices is None else devices
    model = math.gcd(len(devices), num_heads)
    memory = math.gcd(len(devices) // model, memory_segments) if memory_segments else 1
    return MeshConfig(data=1, model=model, memory=memory).make_mesh(devices[: model * memory])


class RowPlacement:
    """Where the rows of batches lie: each process fills those of its own devices, and together they are one array.

    Attributes:
      sharding: of arrays with the row axis first.
      rows: those that this process has to fill (all of them where the mesh gives it devices of every row; none where it has no device of the mesh).
    """

    def __init__(self, mesh: Mesh, num_rows: int) -> None:
        self.sharding = NamedSharding(mesh, PartitionSpec("data"))
        self._num_rows = num_rows
        slices = [index[0] for index in self.sharding.addressable_devices_indices_map((num_rows,)).values()]
        bounds = [part.indices(num_rows) for part in slices]
        self.rows = range(
            min((first for first, _, _ in bounds), default=0), max((end for _, end, _ in bounds), default=0)
        )
        self._gather = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def put(self, tree: Tree) -> Tree:
        """Global arrays [B, ...] from this process's rows of them, numpy [len(rows), ...]."""

        def global_array(local: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                first, end, _ = index[0].indices(self._num_rows)
                return local[(slice(first - self.rows.start, end - self.rows.start), *index[1:])]

            return jax.make_array_from_callback((self._num_rows, *local.shape[1:]), self.sharding, part)

        return jax.tree.map(global_array, tree)

    def gather(self, tree: Tree) -> Tree:
        """The same arrays such that every process can read all rows. They may be numpy if there is one process."""
        return self._gather(tree) if jax.process_count() > 1 else tree


def from_host(array: np.ndarray, place: NamedSharding) -> jax.Array:
    """An array of which every process has all, laid out over the devices of all processes."""
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def use_cpu_cores(num_rows: int) -> None:
    """Lets JAX see every core of this machine as a CPU device (as many as divide the rows), if it has not been told how many to show.

    One device leaves most of a step to one core. Accelerators are not affected. Works only before JAX is first asked for devices.
    """
    if jax.config.jax_num_cpu_devices == -1 and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jax.config.update("jax_num_cpu_devices", math.gcd(cores, num_rows))


def check_divides(name: str, value: int, mesh: Mesh, axis: str) -> None:
    """Raises UserError unless the mesh axis divides the value of the gin binding `name`."""
    if value % mesh.shape[axis]:
        raise UserError(
            f"{name} = {value} is not a multiple of the {mesh.shape[axis]} devices on the mesh axis '{axis}': "
            f"change {name} or MeshConfig.{axis}"
        )


def named_sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int], rules: Rules) -> NamedSharding:
    """Where an array with these logical axes lies. A dimension that its mesh axis does not divide stays whole.

    Raises:
      ValueError: two dimensions would land on one mesh axis.
    """
    spec = [rules.get(name) if name else None for name in axes]
    spec = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, shape, strict=True)]
    used = [axis for axis in spec if axis]
    if len(set(used)) < len(used):
        raise ValueError(f"logical axes {tuple(axes)} map to {spec}: one mesh axis cannot shard two dimensions")
    return NamedSharding(mesh, PartitionSpec(*spec))


def tree_shardings(mesh: Mesh, abstract: Tree, axes: AxesTree, rules: Rules) -> Tree:
    """`named_sharding` for every leaf of a tree of abstract arrays and the matching tree of logical axes."""
    return jax.tree.map(lambda leaf, names: named_sharding(mesh, names, leaf.shape, rules), abstract, axes)


def variable_shardings(mesh: Mesh, boxed: Tree, rules: Rules) -> Tree:
    """Shardings of parameters and buffers that still carry the logical names given at their creation; what has none is
    replicated."""

    def of(leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        return named_sharding(mesh, leaf.names, leaf.value.shape, rules)

    return jax.tree.map(of, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def like_parameters(mesh: Mesh, tree: Tree, parameters: Tree, shardings: Tree) -> Tree:
    """Shardings for optimizer state: what stands for a parameter lies where that lies, the rest is replicated.

    It stands for one if its path holds the parameter's and its shape is the same.
    """
    paths = {
        jax.tree_util.keystr(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(parameters), jax.tree.leaves(shardings), strict=True
        )
    }

    def of(path: tuple, leaf: Any) -> NamedSharding:
        # The optimizer's own containers may lie before the parameter's path and between its group of layers and the rest.
        for group in range(len(path)):
            for rest in range(group + 1, len(path)):
                shape, sharding = paths.get(jax.tree_util.keystr(path[group : group + 1] + path[rest:]), (None, None))
                if shape == leaf.shape:
                    return sharding
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(of, tree)
