"""The device mesh, and where each array lies on it.

Three mesh axes: `data` shards rows (of batches and contexts) and, if asked, parameters; `model` shards heads, MLP width
and vocabulary; `memory` shards the slots of the external memory. Parameters and states carry logical axis names; the
tables below are the only place that maps these to the mesh.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from memorizing.array_typing import AxesTree, Tree
from memorizing.errors import MOST, Count, Range, UserError

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
      optimizer: where the optimizer's state lies and its update is computed: 'replicated' over `data` with the
        parameters, or 'sharded' over it, each device its part (ZeRO-1, Rajbhandari et al. 2020).
    """

    data: Annotated[int, Range(-1, MOST)] = -1
    model: Count = 1
    memory: Count = 1
    parameters: Literal["replicated", "fsdp"] = "replicated"
    optimizer: Literal["replicated", "sharded"] = "replicated"

    @property
    def parameter_rules(self) -> Rules:
        return FSDP_PARAMETERS if self.parameters == "fsdp" else REPLICATED_PARAMETERS

    def optimizer_shardings(self, parameters: Tree, shardings: Tree) -> Tree:
        """Where the optimizer works on parameters that lie as `shardings` say."""
        if self.optimizer == "replicated":
            return shardings
        return jax.tree.map(lambda leaf, place: over_data(place, leaf.shape), parameters, shardings)

    def make_mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh over `devices` (default: all). Raises UserError if they do not fill the grid."""
        devices = jax.devices() if devices is None else devices
        num_devices = len(devices)
        shape = self._shape(num_devices)
        if shape is None:
            raise UserError(
                f"MeshConfig.data = {self.data}, model = {self.model}, memory = {self.memory} does not fit "
                f"{num_devices} devices: their product has to be the number of devices; "
                "data = -1 takes what the others leave"
            )
        num_slices = len(set(map(_slice, devices)))
        if shape[0] % num_slices:
            raise UserError(
                f"MeshConfig.data = {shape[0]} is not a multiple of the {num_slices} TPU slices: "
                "model and memory have to lie within a slice"
            )
        return _make_mesh(shape, devices)

    def _shape(self, num_devices: int) -> tuple[int, int, int] | None:
        """Sizes of the mesh axes; None if they do not fit the devices."""
        if self.model < 1 or self.memory < 1:
            return None
        in_a_row = self.model * self.memory
        data = num_devices // in_a_row if self.data == -1 else self.data
        if data * in_a_row != num_devices:
            return None
        return data, self.model, self.memory


def _make_mesh(shape: Sequence[int], devices: Sequence[Any]) -> Mesh:
    """The mesh in an order that suits the network between the devices.

    Along `data`, the devices of each process, and of each TPU slice, are consecutive.
    """
    types = (AxisType.Auto,) * len(AXES)
    slices = sorted({_slice(device) for device in devices})
    # Slices are joined by a slower network: only the axis `data` crosses it.
    shape_of_slice = (shape[0] // len(slices), *shape[1:])
    grids = []
    for index in slices:
        members = [device for device in devices if _slice(device) == index]
        mesh = jax.make_mesh(shape_of_slice, AXES, axis_types=types, devices=members)
        grids.append(mesh.devices)
    # [data, model, memory]
    grid = np.concatenate(grids)
    owners = [min((_slice(device), device.process_index) for device in part.flat) for part in grid]
    order = sorted(range(len(owners)), key=owners.__getitem__)
    return Mesh(grid[order], AXES, axis_types=types)


def _slice(device: Any) -> int:
    """Which TPU slice a device belongs to."""
    if device.platform != "tpu":
        return 0
    return getattr(device, "slice_index", 0) or 0


def mesh_for_one_row(num_heads: int, memory_segments: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh that shares one row: heads over `model`, and over `memory` the slots, as far as both can be divided.

    Args:
      num_heads: of keys and values, which query heads share: K.
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
      rows: those that this process has to fill: all of them where the mesh gives it devices of every row, none where it
        has no device of the mesh.
    """

    def __init__(self, mesh: Mesh, num_rows: int) -> None:
        self.sharding = NamedSharding(mesh, PartitionSpec("data"))
        self._num_rows = num_rows
        firsts = []
        ends = []
        for index in self.sharding.addressable_devices_indices_map((num_rows,)).values():
            assert index is not None, "every device of this process has an index"
            first, end, _ = index[0].indices(num_rows)
            firsts.append(first)
            ends.append(end)
        self.rows = range(min(firsts, default=0), max(ends, default=0))
        self._gather = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def put(self, tree: Tree) -> Tree:
        """Global arrays [B, ...] from this process's rows of them, numpy [len(rows), ...]."""

        def global_array(local: np.ndarray) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                rows, *rest = index
                first, end, _ = rows.indices(self._num_rows)
                local_rows = slice(first - self.rows.start, end - self.rows.start)
                return local[(local_rows, *rest)]

            shape = (self._num_rows, *local.shape[1:])
            return jax.make_array_from_callback(shape, self.sharding, part)

        return jax.tree.map(global_array, tree)

    def gather(self, tree: Tree) -> Tree:
        """The same arrays with all rows in every process. They may be numpy if there is one process."""
        return self._gather(tree) if jax.process_count() > 1 else tree


def from_host(array: np.ndarray, place: Sharding) -> jax.Array:
    """An array that every process holds whole, laid out over the devices of all processes."""
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def use_cpu_cores(num_rows: int) -> None:
    """Lets JAX see the cores of this machine as CPU devices, as many as divide the rows.

    One device leaves most of a step to one core. Does nothing if JAX was told how many devices to show. Accelerators
    are not affected. Works only before JAX is first asked for devices.
    """
    # JAX adds its options to the class at import.
    given = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    if given != -1 or "device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    num_cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        # Those that this process may use.
        num_cores = len(os.sched_getaffinity(0))
    jax.config.update("jax_num_cpu_devices", math.gcd(num_cores, num_rows))


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
    spec: list[str | None] = []
    for name, size in zip(axes, shape, strict=True):
        axis = rules.get(name) if name else None
        is_divisible = axis is not None and size % mesh.shape[axis] == 0
        spec.append(axis if is_divisible else None)
    used = [axis for axis in spec if axis]
    if len(set(used)) < len(used):
        raise ValueError(f"logical axes {tuple(axes)} map to {spec}: one mesh axis cannot shard two dimensions")
    return NamedSharding(mesh, PartitionSpec(*spec))


def over_data(sharding: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """The same sharding with the mesh axis `data` too, over the largest dimension that is whole and that it divides.

    Unchanged if `data` shards the array already, or divides no such dimension.
    """
    mesh = sharding.mesh
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    whole = [index for index, axis in enumerate(spec) if axis is None and shape[index] % mesh.shape["data"] == 0]
    if "data" in spec or not whole:
        return sharding
    spec[max(whole, key=lambda index: shape[index])] = "data"
    return NamedSharding(mesh, PartitionSpec(*spec))


def tree_shardings(mesh: Mesh, abstract: Tree, axes: AxesTree, rules: Rules) -> Tree:
    """`named_sharding` for every leaf of a tree of abstract arrays and the matching tree of logical axes."""
    return jax.tree.map(lambda leaf, names: named_sharding(mesh, names, leaf.shape, rules), abstract, axes)


def variable_shardings(mesh: Mesh, boxed: Tree, rules: Rules) -> Tree:
    """Shardings of parameters and buffers that still carry the logical names given at their creation.

    An array without names is replicated.
    """

    def of(leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        return named_sharding(mesh, leaf.names, leaf.value.shape, rules)

    return jax.tree.map(of, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def like_parameters(mesh: Mesh, tree: Tree, parameters: Tree, shardings: Tree) -> Tree:
    """Shardings for optimizer state: an array that belongs to a parameter lies where that lies, the rest is replicated.

    An array belongs to a parameter if its path contains the parameter's path and its shape is the same.
    """
    known = {}
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        known[jax.tree_util.keystr(path)] = (leaf.shape, sharding)

    def of(path: tuple, leaf: Any) -> NamedSharding:
        # The optimizer's own containers may stand before the parameter's path, and within it after the group of layers.
        for group in range(len(path)):
            for rest in range(group + 1, len(path)):
                parameter = (path[group], *path[rest:])
                shape, sharding = known.get(jax.tree_util.keystr(parameter), (None, None))
                if sharding is not None and shape == leaf.shape:
                    return sharding
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(of, tree)
