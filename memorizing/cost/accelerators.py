"""How well a step uses the hardware: tokens a second and chip, model FLOPs utilisation, memory in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from memorizing.cost.flops import segment_flops
from memorizing.models.lm_config import LMConfig

# A backward pass costs as much as two forward passes.
_PASSES = 3


class Accelerator(NamedTuple):
    """What is sold as a chip.

    Attributes:
      peak_flops: FLOPs of one chip a second, in dense bfloat16 matrix products.
      devices_per_chip: how many devices JAX sees.
      clock: of the matrix units in Hz; 0 where it is not known.
      hbm_bytes: memory of a device; 0 where it is not known.
      bandwidth: bytes a second between a chip and its memory; 0 where it is not known.
      kernel_share: of the peak, that the kernels of the local attention reach, forward and backward, by the schedules
        that the compiler makes of them (`memorizing bench tpu --attention`); 0 where there are none.
    """

    peak_flops: float
    devices_per_chip: int = 1
    clock: float = 0.0
    hbm_bytes: int = 0
    bandwidth: float = 0.0
    kernel_share: float = 0.0


# By the beginning of `jax.Device.device_kind`, longer names first. From the makers' pages.
ACCELERATORS = {
    "TPU v2": Accelerator(46e12, 2),
    "TPU v3": Accelerator(123e12, 2, 940e6, 16 * 2**30, 900e9),
    "TPU v4": Accelerator(275e12, 1, 1050e6, 32 * 2**30, 1200e9, 0.50),
    "TPU v5 lite": Accelerator(197e12, 1, 1500e6, 16 * 2**30, 819e9, 0.76),
    "TPU v5e": Accelerator(197e12, 1, 1500e6, 16 * 2**30, 819e9, 0.76),
    "TPU v5": Accelerator(459e12, 1, 1750e6, 95 * 2**30, 2765e9, 0.73),
    "TPU v6": Accelerator(918e12, 1, 1750e6, 32 * 2**30, 1640e9, 0.27),
    "NVIDIA A100": Accelerator(312e12),
    "NVIDIA H100 PCIe": Accelerator(756e12),
    "NVIDIA H100": Accelerator(989e12),
    "NVIDIA H200": Accelerator(989e12),
}


def accelerator(device_kind: str) -> Accelerator | None:
    """The chip of a device, None if its figures are not known."""
    for name, chip in ACCELERATORS.items():
        if device_kind.startswith(name):
            return chip
    return None


class Utilization:
    """Speed of training in units of the hardware. Empty on CPUs, whose peak is not known."""

    def __init__(self, config: LMConfig, segment_length: int, devices: Sequence[Any]) -> None:
        """
        Args:
          config: the model.
          segment_length: T.
          devices: those of the run, of one kind.
        """
        self._chip = accelerator(devices[0].device_kind)
        self._is_cpu = devices[0].platform == "cpu"
        self._num_chips = len(devices) / (self._chip.devices_per_chip if self._chip else 1)
        try:
            self._model, self._memory = training_flops(config, segment_length)
        except NotImplementedError:
            # A mechanism that somebody added without its FLOPs.
            self._chip = None

    def values(self, tokens_per_second: float) -> dict[str, float]:
        """Tokens a second as `tokens_per_second_per_chip`, and, where the chip's peak is known, as shares of that peak.

        `mfu` counts the FLOPs of the model without its external memories, `mfu_memory` those of the memories.
        """
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

    Recomputed activations do not count. A memory counts once: nothing is differentiated with respect to what is stored
    or found, and the attention to the k neighbours costs little beside the search.
    """
    forward = segment_flops(config.without_memory(), segment_length)
    with_memory = segment_flops(config, segment_length)
    model = _PASSES * forward / segment_length
    memory = (with_memory - forward) / segment_length
    return model, memory


def memory_in_use(devices: Sequence[Any]) -> dict[str, float]:
    """Memory of the fullest of these devices: `hbm_gib` now, and `hbm_peak_gib` at most since the start.

    Empty where devices do not tell.
    """
    stats_of_devices = [device.memory_stats() for device in devices]
    known = [stats for stats in stats_of_devices if stats]
    values = {}
    for name, key in (("hbm_gib", "bytes_in_use"), ("hbm_peak_gib", "peak_bytes_in_use")):
        if known and all(key in stats for stats in known):
            values[name] = max(stats[key] for stats in known) / 2**30
    return values
