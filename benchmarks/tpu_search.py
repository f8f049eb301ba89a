"""The search alone on one device of a slice of TPUs, as the TPU compiler estimates it: exact, approximate, and a bound.

64 heads, a device's share of the paper's step: 512 queries in each, keys of width 128 in bfloat16, the 32 best. Nothing
is measured: see `memorizing.cost.pricing`. The bound is the product of queries and keys, fused with a maximum: what a
search takes at least that looks at every key and computes it as XLA does.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from memorizing.benchmarks import measure
from memorizing.cost import pricing
from memorizing.cost.plan import chip_of, slice_devices
from memorizing.errors import MOST, Range, UserError
from memorizing.models.memory.search import ApproximateSearch, ExactSearch, Search
from memorizing.runtime import tables

HEADS = 64
# The heads of a row have its slots in common.
ROWS = 8
QUERIES = 512
WIDTH = 128
K = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    parser.add_argument("--slices", default="v3:2x2,v5e:2x2", metavar="SLICE,...", help="(default: %(default)s)")
    parser.add_argument("--slots", default="8192,65536,262144", metavar="M,...", help="(default: %(default)s)")
    parser.add_argument(
        "--slabs",
        type=Range(1, MOST).of(int),
        default=ExactSearch.slabs,
        metavar="S",
        help="of the exact search (default: %(default)s)",
    )


def run(options: argparse.Namespace, bindings: list[str]) -> dict[str, Any]:
    """Compiles, prints a line for each memory as it comes, and returns the figures in seconds and bytes."""
    if bindings:
        raise UserError(f"bench tpu-search takes no bindings, but was given --gin.{bindings[0]}")
    jax.config.update("jax_platforms", "cpu")
    sizes = measure.sizes("--slots", options.slots, least=K)
    rows = [["slice", "slots", "bound", "approximate", "exact", "exact / approximate", "exact / bound", "rare"]]
    results: dict[str, Any] = {}
    for topology in options.slices.split(","):
        device = slice_devices(topology, 1)[0]
        for num_slots in sizes:
            approximate = estimate(ApproximateSearch(), num_slots, device, topology)
            exact = estimate(ExactSearch(slabs=options.slabs), num_slots, device, topology)
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


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
