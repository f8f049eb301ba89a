"""The training step on slices of TPUs, with external memories of several sizes, as the TPU compiler estimates it.

Nothing is measured: see `memorizing plan`. Slices have 32 TensorCores. The run is the paper's: 200M parameters, 2^17
tokens a step in segments of 512, a Transformer-XL cache of 512. Every program takes a minute or two to compile.

With --search the search alone, on one device: 64 heads, its share of that step, with keys of width 128 in bfloat16; the
exact one, the approximate one, and a bound. The bound is the product of queries and keys, fused with a maximum: what a
search takes at least that looks at every key and computes it as XLA does.

With --attention the local attention alone, see `memorizing.benchmarks.estimated.attention`.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from memorizing.benchmarks import measure
from memorizing.benchmarks.estimated import attention
from memorizing.benchmarks.step import with_memory
from memorizing.commands import experiment_flags
from memorizing.commands.plan import DEFAULT_RUN
from memorizing.config.loading import load_experiment
from memorizing.cost import pricing
from memorizing.cost.plan import DoesNotFit, chip_of, plan, slice_devices
from memorizing.cost.plan_report import as_json
from memorizing.errors import UserError
from memorizing.models.memory.search import ApproximateSearch, ExactSearch, Search
from memorizing.runtime import tables

SLICES = "v3:4x4,v4:2x2x4,v5e:4x8,v5p:2x2x4,v6e:4x8"
# A search alone.
HEADS = 64
# The heads of a row have its slots in common.
ROWS = 8
QUERIES = 512
WIDTH = 128
K = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    experiment_flags.add_gin_file(parser, DEFAULT_RUN)
    parser.add_argument("--slices", default=SLICES, metavar="SLICE,...", help="(default: %(default)s)")
    parser.add_argument(
        "--memory_sizes", default="0,8192,65536,262144", metavar="M,...", help="0: no memory (default: %(default)s)"
    )
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--search", action="store_true", help="the search alone")
    alone.add_argument("--attention", action="store_true", help="the local attention alone")
    parser.add_argument(
        "--shape",
        default=",".join(map(str, attention.Shape())),
        metavar="ROWS,HEADS,QUERIES,KEYS,WIDTH",
        help="of the local attention (default: %(default)s)",
    )


def run(options: argparse.Namespace, bindings: list[str]) -> dict[str, Any]:
    """Compiles, prints a line for each program as it comes, and returns the figures."""
    if options.attention:
        _no_bindings("--attention", bindings)
        shape = measure.sizes("--shape", options.shape, least=1)
        if len(shape) != len(attention.Shape()):
            raise UserError(f"--shape={options.shape}: expected five numbers, ROWS,HEADS,QUERIES,KEYS,WIDTH")
        return attention.run(options.slices.split(","), attention.Shape(*shape))
    return _searches(options, bindings) if options.search else _steps(options, bindings)


def _steps(options: argparse.Namespace, bindings: list[str]) -> dict[str, Any]:
    """Of the whole step, with memories of every size on every slice."""
    experiment, _ = load_experiment(options.gin_file or [DEFAULT_RUN], bindings, base="CACHE = None")
    jax.config.update("jax_platforms", "cpu")
    # Ratios are to the smallest.
    sizes = sorted(measure.sizes("--memory_sizes", options.memory_sizes))
    heading = ["slice", "memory", "step, estimated", "ratio", "HBM a device", "MFU", "compiled in"]
    widths = [len(name) for name in heading]
    rows = [heading]
    results: dict[str, Any] = {}
    print("  ".join(heading))
    for topology in options.slices.split(","):
        base = None
        for size in sizes:
            row = [topology, f"{size:,}" if size else "none"]
            try:
                planned = plan(with_memory(experiment, size), topology)
            except DoesNotFit as error:
                results.setdefault(topology, {})[size] = {"fits": False, "reason": str(error)}
                row += ["does not fit", "", "", "", ""]
            else:
                base = base or planned.seconds
                results.setdefault(topology, {})[size] = as_json(planned) | {"ratio": planned.seconds / base}
                row += [
                    f"{1e3 * planned.seconds:.1f} ms",
                    f"{planned.seconds / base:.3f}",
                    f"{planned.hbm_total / 2**30:.2f} of {planned.hbm_limit / 2**30:.0f} GiB",
                    f"{planned.mfu:.1%}",
                    f"{planned.compile_seconds:.0f} s",
                ]
            rows.append(row)
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)), flush=True)
    print(f"\n{tables.align(rows, left=2)}")
    return results


def _searches(options: argparse.Namespace, bindings: list[str]) -> dict[str, Any]:
    """Of the search alone, in seconds and bytes."""
    _no_bindings("--search", bindings)
    jax.config.update("jax_platforms", "cpu")
    sizes = [size for size in measure.sizes("--memory_sizes", options.memory_sizes) if size]
    rows = [["slice", "slots", "bound", "approximate", "exact", "exact / approximate", "exact / bound", "rare"]]
    results: dict[str, Any] = {}
    for topology in options.slices.split(","):
        device = slice_devices(topology, 1)[0]
        for num_slots in sizes:
            approximate = estimate(ApproximateSearch(), num_slots, device, topology)
            exact = estimate(ExactSearch(), num_slots, device, topology)
            results.setdefault(topology, {})[num_slots] = {"approximate": approximate, "exact": exact}
            bound = exact["bound_seconds"]
            row = [
                topology,
                f"{num_slots:,}",
                _ms(bound),
                _ms(approximate["seconds"]),
                _ms(exact["seconds"]),
                f"{exact['seconds'] / approximate['seconds']:.2f}",
                f"{exact['seconds'] / bound:.2f}",
                _ms(exact["rare_seconds"]),
            ]
            rows.append(row)
            print("  ".join(row), flush=True)
    print(f"\n{tables.align(rows, left=1)}")
    return results


def estimate(search: Search, num_slots: int, device: Any, topology: str) -> dict[str, float]:
    """What a search of all heads takes and needs.

    Returns:
      seconds, moving_seconds, rare_seconds: see `memorizing.cost.plan.Plan`.
      bound_seconds: of the product alone.
      temporaries: bytes.
    """
    chip = chip_of(topology, device.device_kind)
    sharding = SingleDeviceSharding(device)

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    lowered = jax.jit(lambda queries, keys, valid: search.of_heads(queries, keys, valid, K)).lower(
        array((HEADS, QUERIES, WIDTH), jnp.bfloat16),
        array((HEADS, num_slots, WIDTH), jnp.bfloat16),
        array((ROWS, num_slots), jnp.bool_),
    )
    compiled = lowered.compile(pricing.COMPILER_OPTIONS)
    program = pricing.read(compiled)
    bound = HEADS * pricing.product_seconds(QUERIES, num_slots, WIDTH, jnp.bfloat16, device, chip)
    return {
        "seconds": pricing.seconds(program.usual, chip) + (bound if program.has_unpriced_product else 0.0),
        "moving_seconds": pricing.moving_seconds(program.usual, chip),
        "rare_seconds": pricing.seconds(program.rare, chip),
        "bound_seconds": bound,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    }


def _no_bindings(flag: str, bindings: list[str]) -> None:
    if bindings:
        raise UserError(f"bench tpu {flag} takes no bindings, but was given --gin.{bindings[0]}")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
