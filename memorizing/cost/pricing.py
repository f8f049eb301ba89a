"""What a program for TPUs is estimated to take, by one rule for all of it. Nothing is measured.

An instruction takes the cycles that the compiler expects, as often as it runs, over the clock of the chip. Gathers,
scatters and sorts for which it names none, and what it says that it cannot tell, take the time to read and write their
results once at the bandwidth of the chip's memory, which single rows seldom reach. The matrix product of the
approximate search, which the compiler does not price with its partial reduction, takes what it says of the same product
with a maximum in its place. Kernels, of which the compiler names no cycles either, take their FLOPs at a share of the
chip's peak: the one that the schedules reach that it makes of them. Collectives are counted, not timed. What runs in
rare cases only is told apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from memorizing.cost import compiled_cost
from memorizing.cost.accelerators import Accelerator
from memorizing.cost.compiled_cost import Instruction
from memorizing.models.memory.search import RARE

# JAX cannot print programs in which a SparseCore (v5p, v6e) gathers: here the TensorCore does.
COMPILER_OPTIONS: dict[str, str | bool] = {"xla_tpu_offload_gather_to_sparsecore": "False"}


class Program(NamedTuple):
    """The instructions of a compiled program.

    Attributes:
      usual: those that run every time.
      rare: those of branches that hardly ever run.
    """

    usual: list[Instruction]
    rare: list[Instruction]

    @property
    def has_unpriced_product(self) -> bool:
        """Whether a matrix product is fused with the partial reduction of the approximate search."""
        return any(
            instruction.opcode == "fusion" and not instruction.cycles and "approx_top_k" in instruction.op_name
            for instruction in self.usual
        )


def read(compiled: jax.stages.Compiled) -> Program:
    """The instructions of a program that was compiled for a TPU."""
    instructions = compiled_cost.instructions(compiled.as_text() or "", RARE)
    return Program(
        usual=[instruction for instruction in instructions if not instruction.is_rare],
        rare=[instruction for instruction in instructions if instruction.is_rare],
    )


def seconds(instructions: list[Instruction], chip: Accelerator) -> float:
    """What instructions take on a device, without the product of an approximate search."""
    priced = compiled_cost.cycles(instructions) / chip.clock
    return priced + moving_seconds(instructions, chip) + kernel_seconds(instructions, chip)


def moving_seconds(instructions: list[Instruction], chip: Accelerator) -> float:
    """What gathers, scatters and sorts, and instructions that the compiler cannot tell the cycles of, take of it."""
    moved = sum(traffic.num_bytes for traffic in compiled_cost.moves(instructions).values())
    return 2 * moved * chip.devices_per_chip / chip.bandwidth


def kernel_seconds(instructions: list[Instruction], chip: Accelerator) -> float:
    """What kernels take of it. Raises ValueError where nothing is known of a chip's kernels."""
    flops = sum(instruction.kernel_flops * instruction.count for instruction in instructions)
    if not flops:
        return 0.0
    if not chip.kernel_share:
        raise ValueError("a program has kernels, of which no schedule is known for this chip")
    return flops * chip.devices_per_chip / (chip.peak_flops * chip.kernel_share)


def product_seconds(num_queries: int, num_slots: int, width: int, dtype: Any, device: Any, chip: Accelerator) -> float:
    """What the product of a head's queries and keys takes, fused with a maximum: all scores are seen, none is written.

    Args:
      num_queries, num_slots, width: T, M, H.
      dtype: of queries and keys.
      device: of a topology for which there is a compiler.
      chip: what it is.
    """

    def greatest(queries: jax.Array, keys: jax.Array) -> jax.Array:
        scores = jnp.einsum(
            "SH,TH->ST",
            keys,
            queries,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return scores.max(axis=0)

    sharding = SingleDeviceSharding(device)
    queries, keys = (
        jax.ShapeDtypeStruct((length, width), dtype, sharding=sharding) for length in (num_queries, num_slots)
    )
    return seconds(read(jax.jit(greatest).lower(queries, keys).compile(COMPILER_OPTIONS)).usual, chip)
