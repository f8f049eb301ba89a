"""What a step is worth on the hardware: tokens a chip, model FLOPs utilisation, memory in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax

from memorizing.cost.flops import segment_flops
from memorizing.models.language_model import LMConfig

# A backward pass costs as much as two forward passes.
_PASSES = 3


class Accelerator(NamedTuple):
    """What is sold as a chip.

    Attributes:
      peak_flops: of one chip a second, dense bfloat16 matrix products.
      devices_per_chip: what JAX sees of it.
      clock: of the matrix units in Hz; for TPUs.
      hbm_bytes: memory of a device; for TPUs.
    """

    peak_flops: float
    devices_per_chip: int = 1
    clock: float | None = None
    hbm_bytes: int | None = None


# By the beginning of `jax.Device.device_kind`, longer names first. The makers' pages.
ACCELERATORS = {
    "TPU v2": Accelerator(46e12, 2),
    "TPU v3": Accelerator(123e12, 2, 940e6, 16 * 2**30),
    "TPU v4": Accelerator(275e12, 1, 1050e6, 32 * 2**30),
    "TPU v5 lite": Accelerator(197e12, 1, 1500e6, 16 * 2**30),
    "TPU v5e": Accelerator(197e12, 1, 1500e6, 16 * 2**30),
    "TPU v5": Accelerator(459e12, 1, 1750e6, 95 * 2**30),
    "TPU v6": Accelerator(918e12, 1, 1750e6, 32 * 2**30),
    "NVIDIA A100": Accelerator(312e12),
    "NVIDIA H100 PCIe": Accelerator(756e12),
    "NVIDIA H100": Accelerator(989e12),
    "NVIDIA H200": Accelerator(989e12),
}


def accelerator(device_kind: str) -> Accelerator | None:
    """The chip of a device, None if its figures are not known."""
    return next((chip for name, chip in ACCELERATORS.items() if device_kind.startswith(name)), None)


class Utilization:
    """Speed of training in units of the hardware. Empty on CPUs, whose peak nobody knows."""

    def __init__(self, config: LMConfig, segment_length: int, devices: Sequence[jax.Device]) -> None:
        self._chip = accelerator(devices[0].device_kind)
        self._is_cpu = devices[0].platform == "cpu"
        self._num_chips = len(devices) / (self._chip.devices_per_chip if self._chip else 1)
        try:
            self._model, self._memory = training_flops(config, segment_length)
        except NotImplementedError:
            # A mechanism of somebody's own, whose cost nobody has told.
            self._chip = None

    def values(self, tokens_per_second: float) -> dict[str, float]:
        """`tokens_per_second_per_chip`, and where the chip's peak is known `mfu`, without what the external memory costs, and `mfu_memory`, what it costs, as shares of that peak."""
        if self._is_cpu:
            return {}
        per_chip = tokens_per_second / self._num_chips
        values = {"tokens_per_second_per_chip": per_chip}
        if self._chip:
            values["mfu"] = per_chip * self._model / self._chip.peak_flops
            if self._memory:
                values["mfu_memory"] = per_chip * self._memory / self._chip.peak_flops
        return values


def training_flops(config: LMConfig, segment_length: int) -> tuple[float, float]:
    """FLOPs a token of training: of the model without its external memories, and of these.

    Recomputed activations do not count. A memory counts once: nothing is differentiated with respect to what is stored or found, and the attention to the k that were found
    is little beside the search.
    """
    forward = segment_flops(config.without_memory(), segment_length)
    with_memory = segment_flops(config, segment_length)
    return _PASSES * forward / segment_length, (with_memory - forward) / segment_length


def memory_in_use(devices: Sequence[jax.Device]) -> dict[str, float]:
    """`hbm_gib`, and `hbm_peak_gib` since the start, of the fullest of these devices; empty where devices do not tell."""
    told = [stats for device in devices if (stats := device.memory_stats())]
    names = {"hbm_gib": "bytes_in_use", "hbm_peak_gib": "peak_bytes_in_use"}
    return {
        name: max(stats[key] for stats in told) / 2**30
        for name, key in names.items()
        if told and all(key in stats for stats in told)
    }
