"""The training step on slices of TPUs, with external memories of several sizes, as the TPU compiler estimates it.

Nothing is measured: see `memorizing plan`. Slices have 32 TensorCores. The run is the paper's: 200M parameters, 2^17
tokens a step in segments of 512, a Transformer-XL cache of 512. Every program takes a minute or two to compile.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax

from memorizing.benchmarks import measure
from memorizing.benchmarks.step import with_memory
from memorizing.commands import experiment_flags
from memorizing.commands.plan import DEFAULT_RUN
from memorizing.config.loading import load_experiment
from memorizing.cost.plan import DoesNotFit, plan
from memorizing.cost.plan_report import as_json
from memorizing.runtime import tables

SLICES = "v3:4x4,v4:2x2x4,v5e:4x8,v5p:2x2x4,v6e:4x8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    experiment_flags.add_gin_file(parser, DEFAULT_RUN)
    parser.add_argument("--slices", default=SLICES, metavar="SLICE,...", help="(default: %(default)s)")
    parser.add_argument(
        "--memory_sizes", default="0,8192,65536,262144", metavar="M,...", help="0: no memory (default: %(default)s)"
    )


def run(options: argparse.Namespace, bindings: list[str]) -> dict[str, Any]:
    """Compiles, prints a line for each program as it comes, and returns the figures."""
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
