"""The TPU slices that exist, in one table. Data only: nothing here runs anything.

Sources: Google Cloud's pages on TPU versions and on TPUs in GKE, and the table of machine types in the Google Cloud
SDK. The number in a name counts TensorCores up to v4 and for v5p, chips for v5e and v6e; a program sees `devices`.
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice: chips that one program drives together over the chips' own network.

    Attributes:
      name: as the Cloud TPU API calls it (`--accelerator-type`), such as 'v3-32'.
      generation: 'v3', 'v4', 'v5e', 'v5p' or 'v6e'.
      chips, cores: chips, and TensorCores on them.
      devices: what `jax.device_count()` returns; a device is a core on v3, and a chip elsewhere.
      hosts: machines, each of which runs one process.
      hbm_gb: memory of a device in GB (10^9 bytes as sold).
      gke_accelerator, gke_topology, gke_machine: node labels and machine type in GKE.
      runtime_version: image of the machines in the Cloud TPU API.
      compiler_topology: name of the slice for the TPU compiler (`jax.experimental.topologies`).
    """

    name: str
    generation: str
    chips: int
    cores: int
    devices: int
    hosts: int
    hbm_gb: int
    gke_accelerator: str
    gke_topology: str
    gke_machine: str
    runtime_version: str
    compiler_topology: str

    @property
    def chips_per_host(self) -> int:
        """Chips that a host drives."""
        return self.chips // self.hosts

    @property
    def devices_per_host(self) -> int:
        """Devices that a process sees as its own."""
        return self.devices // self.hosts


@dataclasses.dataclass(frozen=True)
class _Generation:
    name: str
    prefix: str
    cores_per_chip: int
    devices_per_chip: int
    counts_chips: bool
    hbm_gb: int
    accelerator: str
    runtime_version: str
    # Topologies of one host with their machine types, and those of many hosts of four chips each.
    single_host: dict[str, str]
    multi_host: str
    multi_host_machine: str
    single_host_accelerator: str | None = None


_GENERATIONS = (
    _Generation(
        "v3",
        "v3-",
        cores_per_chip=2,
        devices_per_chip=2,
        counts_chips=False,
        hbm_gb=16,
        accelerator="tpu-v3-slice",
        single_host_accelerator="tpu-v3-device",
        runtime_version="tpu-ubuntu2204-base",
        single_host={"2x2": "ct3-hightpu-4t"},
        multi_host="4x4 4x8 8x8 8x16 16x16 16x32 32x32",
        multi_host_machine="ct3p-hightpu-4t",
    ),
    _Generation(
        "v4",
        "v4-",
        cores_per_chip=2,
        devices_per_chip=1,
        counts_chips=False,
        hbm_gb=32,
        accelerator="tpu-v4-podslice",
        runtime_version="tpu-ubuntu2204-base",
        single_host={"2x2x1": "ct4p-hightpu-4t"},
        multi_host="2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8",
        multi_host_machine="ct4p-hightpu-4t",
    ),
    _Generation(
        "v5e",
        "v5litepod-",
        cores_per_chip=1,
        devices_per_chip=1,
        counts_chips=True,
        hbm_gb=16,
        accelerator="tpu-v5-lite-podslice",
        runtime_version="v2-alpha-tpuv5-lite",
        single_host={"1x1": "ct5lp-hightpu-1t", "2x2": "ct5lp-hightpu-4t", "2x4": "ct5lp-hightpu-8t"},
        multi_host="4x4 4x8 8x8 8x16 16x16",
        multi_host_machine="ct5lp-hightpu-4t",
    ),
    _Generation(
        "v5p",
        "v5p-",
        cores_per_chip=2,
        devices_per_chip=1,
        counts_chips=False,
        hbm_gb=95,
        accelerator="tpu-v5p-slice",
        runtime_version="v2-alpha-tpuv5",
        single_host={"2x2x1": "ct5p-hightpu-4t"},
        multi_host="2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8",
        multi_host_machine="ct5p-hightpu-4t",
    ),
    _Generation(
        "v6e",
        "v6e-",
        cores_per_chip=1,
        devices_per_chip=1,
        counts_chips=True,
        hbm_gb=32,
        accelerator="tpu-v6e-slice",
        runtime_version="v2-alpha-tpuv6e",
        single_host={"1x1": "ct6e-standard-1t", "2x2": "ct6e-standard-4t", "2x4": "ct6e-standard-8t"},
        multi_host="4x4 4x8 8x8 8x16 16x16",
        multi_host_machine="ct6e-standard-4t",
    ),
)
_CHIPS_PER_HOST = 4


def _slice(generation: _Generation, topology: str, machine: str, chips_per_host: int | None, accelerator: str) -> Slice:
    chips = math.prod(map(int, topology.split("x")))
    cores = chips * generation.cores_per_chip
    return Slice(
        name=f"{generation.prefix}{chips if generation.counts_chips else cores}",
        generation=generation.name,
        chips=chips,
        cores=cores,
        devices=chips * generation.devices_per_chip,
        hosts=chips // (chips_per_host or chips),
        hbm_gb=generation.hbm_gb,
        gke_accelerator=accelerator,
        gke_topology=topology,
        gke_machine=machine,
        runtime_version=generation.runtime_version,
        compiler_topology=f"{generation.name}:{topology}",
    )


def _slices(generation: _Generation) -> list[Slice]:
    lone = generation.single_host_accelerator or generation.accelerator
    return [
        *(_slice(generation, topology, machine, None, lone) for topology, machine in generation.single_host.items()),
        *(
            _slice(generation, topology, generation.multi_host_machine, _CHIPS_PER_HOST, generation.accelerator)
            for topology in generation.multi_host.split()
        ),
    ]


SLICES: dict[str, Slice] = {entry.name: entry for generation in _GENERATIONS for entry in _slices(generation)}
