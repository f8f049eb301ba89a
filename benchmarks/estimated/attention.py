"""The local attention alone on one device: the plain form and the kernels, as the TPU compiler estimates them.

By default a device's share of the paper's step: 8 rows of 8 heads of width 128, segments of 512 and a cache of 512, in
bfloat16, forward and backward. The compiler names no cycles for kernels, but writes down the instructions that it makes
of them: a bundle of them takes a cycle. Waiting is not in it.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from memorizing.cost import pricing
from memorizing.cost.plan import chip_of, slice_devices
from memorizing.models import kernels, positions
from memorizing.models.attention import flash
from memorizing.models.attention.local import local_attention
from memorizing.models.masks import DistancesAndKeys, Visible
from memorizing.runtime import tables


class Shape(NamedTuple):
    """Of the arrays: rows, heads, queries and keys of a row, width of a head.

    Keys beyond the queries' own are carried in front of them, and get no gradient.
    """

    rows: int = 8
    heads: int = 8
    queries: int = 512
    keys: int = 1024
    width: int = 128

    @property
    def carried(self) -> int:
        """Keys of the cache."""
        return self.keys - self.queries

    @property
    def runs(self) -> int:
        """How often a core runs all that a kernel has; at a place of its grid only what is for the keys seen there."""
        blocks = kernels.count_blocks(self.queries, self.keys)
        return self.rows * self.heads * blocks // min(blocks, kernels.MOST_STRETCHES)


_BUNDLES = re.compile(r"total scheduled bundles:\s*(\d+)")


def run(slices: list[str], shape: Shape) -> dict[str, Any]:
    """Compiles, prints a line for each slice as it comes, and returns the figures."""
    jax.config.update("jax_platforms", "cpu")
    rows = [["slice", "plain", "with kernels", "of it the kernels", "of the chip's peak", "temporaries"]]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        # Read when the compiler is loaded.
        _add_arguments(f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=false")
        for topology in slices:
            found = results[topology] = estimate(topology, shape, pathlib.Path(folder))
            plain, by_kernels = found["plain"], found["kernels"]
            row = [topology, f"{1e3 * plain['seconds']:.2f} ms"]
            if found["kernel_share"]:
                row += [f"{1e3 * by_kernels['seconds']:.2f} ms", f"{1e3 * found['kernel_seconds']:.2f} ms"]
                row += [f"{found['kernel_share']:.2f}"]
            else:
                row += ["no kernels", "", ""]
            row += [f"{plain['temporaries'] >> 20} and {by_kernels['temporaries'] >> 20} MiB"]
            rows.append(row)
            print("  ".join(row), flush=True)
    print(f"\n{tables.align(rows, left=1)}")
    return results


def estimate(topology: str, shape: Shape, folder: pathlib.Path) -> dict[str, Any]:
    """Of both forms.

    Args:
      topology: of the slice; one of its devices computes.
      shape: what it computes.
      folder: where the compiler writes its schedules.

    Returns:
      plain, kernels: seconds, and bytes of temporaries.
      kernel_seconds: what the kernels take of it by their schedules; their share of the chip's peak is kernel_share.
    """
    device = slice_devices(topology, 1)[0]
    chip = chip_of(topology, device.device_kind)
    mesh = jax.sharding.Mesh(np.array([device]).reshape(1, 1, 1), ("data", "model", "memory"))
    with jax.set_mesh(mesh):
        plain = _compile(functools.partial(local_attention, num_carried=shape.carried), shape, device)
        before = set(folder.iterdir())
        # Also where they would not be used since they do not pay.
        with_kernels = functools.partial(flash.attention, "tpu", num_carried=shape.carried)
        by_kernels = _compile(with_kernels, shape, device) if flash.has_kernels(mesh.abstract_mesh) else plain
    bundles = sum(map(_bundles, sorted(set(folder.iterdir()) - before)))
    kernel_seconds = bundles * shape.runs / device.num_cores / chip.clock
    instructions = pricing.read(by_kernels).usual
    around = [instruction for instruction in instructions if not instruction.kernel_flops]
    kernel_flops = sum(instruction.kernel_flops * instruction.count for instruction in instructions)

    def told(seconds: float, compiled: jax.stages.Compiled) -> dict[str, Any]:
        return {"seconds": seconds, "temporaries": compiled.memory_analysis().temp_size_in_bytes}

    return {
        "plain": told(pricing.seconds(pricing.read(plain).usual, chip), plain),
        "kernels": told(pricing.seconds(around, chip) + kernel_seconds, by_kernels),
        "kernel_seconds": kernel_seconds,
        "kernel_share": kernel_flops / (kernel_seconds * chip.peak_flops) if kernel_seconds else 0.0,
    }


def _compile(attend: Callable[..., Any], shape: Shape, device: Any) -> jax.stages.Compiled:
    sharding = SingleDeviceSharding(device)
    rows, heads, queries, keys, width = shape

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def both(holds_key: jax.Array, gradient: jax.Array, *arrays: jax.Array) -> Any:
        causal = np.tri(queries, keys, shape.carried, dtype=bool)
        by_distance = DistancesAndKeys(positions.distances(queries, keys) >= 0, holds_key)
        visible = Visible(causal & holds_key[:, None], by_distance)
        # The values alone.
        out, pull_back = jax.vjp(lambda *arrays: attend(*arrays, visible)[0], *arrays)
        return out, pull_back(gradient)

    lowered = jax.jit(both).lower(
        array(rows, keys, dtype=jnp.bool_),
        array(rows, queries, heads, width),
        array(rows, queries, heads, width),
        array(rows, keys, heads, width),
        array(rows, keys, heads, width),
        array(heads, dtype=jnp.float32),
        array(heads, queries + keys - 1, dtype=jnp.float32),
    )
    return lowered.compile(pricing.COMPILER_OPTIONS)


def _bundles(file: pathlib.Path) -> int:
    """Of a kernel, if the file tells of its last schedule."""
    if "attention" not in file.name or "schedule-analysis_final_bundles" not in file.name:
        return 0
    found = _BUNDLES.search(file.read_text())
    return int(found[1]) if found else 0


def _add_arguments(arguments: str) -> None:
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {arguments}".strip()
