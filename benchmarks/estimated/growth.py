"""The training step on slices of TPUs as memories, rows and devices grow, as the TPU compiler estimates it.

Nothing is measured: see `memorizing plan`. The run is the paper's with 200M parameters, segments of 512, a cache of 512
and a memory; each of three tables lets one number grow. Where a memory or a batch does not suit as many devices as have
their own rows, devices share heads (`model`) or slots (`memory`). Every program takes a minute or two to compile.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax

from memorizing.benchmarks.step import with_memory
from memorizing.commands import experiment_flags
from memorizing.config.loading import load_experiment
from memorizing.cost.plan import DoesNotFit, plan
from memorizing.cost.plan_report import as_json
from memorizing.evaluation import plots
from memorizing.runtime import tables
from memorizing.training.experiment import Experiment

DEFAULT_RUN = "runs/table4_context512_memory8192_xl512.gin"


class Case(NamedTuple):
    """One program.

    Attributes:
      slots: of a row's memory.
      rows: of the whole step.
      topology, slices: the devices.
      model, memory: devices that share the heads and the slots of a row.
    """

    slots: int = 8192
    rows: int = 256
    topology: str = "v5e:4x8"
    slices: int = 1
    model: int = 1
    memory: int = 1


CASES = {
    "slots": [
        Case(),
        Case(slots=65_536),
        Case(slots=262_144),
        Case(slots=1_048_576),
        Case(slots=1_048_576, rows=64, memory=4),
    ],
    "rows": [
        Case(rows=1, model=8, memory=4),
        Case(rows=8, memory=4),
        Case(rows=32),
        Case(),
        Case(rows=1024),
    ],
    "devices": [
        Case(rows=64, topology="v5e:2x4"),
        Case(),
        Case(rows=1024, topology="v5e:8x16"),
        Case(rows=2048, topology="v5e:16x16"),
        Case(rows=4096, topology="v5e:16x16", slices=2),
    ],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    experiment_flags.add_gin_file(parser, DEFAULT_RUN)
    parser.add_argument(
        "--of", choices=CASES, nargs="+", default=list(CASES), help="what grows (default: one after the other)"
    )
    parser.add_argument("--picture", metavar="FILE.png", help="where to draw time and memory")


def run(options: argparse.Namespace, bindings: list[str]) -> dict[str, Any]:
    """Compiles, prints a line for each program as it comes, and returns the figures."""
    experiment, _ = load_experiment(options.gin_file or [DEFAULT_RUN], bindings, base="CACHE = None")
    jax.config.update("jax_platforms", "cpu")
    # Some programs belong to several tables.
    planned: dict[Case, dict[str, Any]] = {}
    results: dict[str, Any] = {}
    for name in options.of:
        heading = [name, "rows", "slots", "devices", "share heads", "share slots", "step, estimated", "HBM a device"]
        rows = [[*heading, "collectives", "compiled in"]]
        for case in CASES[name]:
            if case not in planned:
                planned[case] = _plan(experiment, case)
            row = _row(name, case, planned[case])
            rows.append(row)
            print("  ".join(row), flush=True)
        results[name] = [case._asdict() | planned[case] for case in CASES[name]]
        print(f"\n{tables.align(rows, left=0)}\n", flush=True)
    if options.picture:
        draw(results, pathlib.Path(options.picture))
    return results


def _plan(experiment: Experiment, case: Case) -> dict[str, Any]:
    """Figures of a case; those of one that does not fit are why, and perhaps how much it takes."""
    experiment = with_memory(experiment, case.slots)
    batch = dataclasses.replace(
        experiment.batch, tokens_per_step=case.rows * experiment.batch.segment_length * experiment.batch.num_segments
    )
    mesh = dataclasses.replace(experiment.mesh, data=-1, model=case.model, memory=case.memory)
    try:
        return as_json(plan(dataclasses.replace(experiment, batch=batch, mesh=mesh), case.topology, case.slices))
    except DoesNotFit as error:
        return {"fits": False, "reason": str(error)}


def _row(name: str, case: Case, planned: dict[str, Any]) -> list[str]:
    if "seconds" not in planned:
        told = ["does not fit", "", "", ""]
        num_devices = ""
    else:
        num_devices = f"{planned['num_devices']}"
        moved = sum(traffic["num_bytes"] for traffic in planned["collectives"].values())
        hbm = f"{planned['hbm_total'] / 2**30:.2f} of {planned['hbm_limit'] / 2**30:.0f} GiB"
        told = [
            f"{1e3 * planned['seconds']:.1f} ms",
            hbm if planned["fits"] else f"{hbm}: too much",
            f"{moved / 2**30:.2f} GiB",
            f"{planned['compile_seconds']:.0f} s",
        ]
    grows = {"slots": f"{case.slots:,}", "rows": f"{case.rows:,}", "devices": num_devices}[name]
    return [grows, f"{case.rows:,}", f"{case.slots:,}", num_devices, f"{case.model}", f"{case.memory}", *told]


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    """Time of a step and memory of a device against what grows, a column for each table."""
    figure = plots.blank(3.5 * len(results), 5)
    axes = figure.subplots(2, len(results), squeeze=False)
    columns = {"slots": "slots", "rows": "rows", "devices": "num_devices"}
    for (time, memory), (name, cases) in zip(axes.T, results.items(), strict=True):
        shown = [case for case in cases if case["fits"]]
        numbers = [case[columns[name]] for case in shown]
        time.plot(numbers, [1e3 * case["seconds"] for case in shown], **plots.style(0))
        memory.plot(numbers, [case["hbm_total"] / 2**30 for case in shown], **plots.style(1))
        memory.axhline(shown[0]["hbm_limit"] / 2**30, color="black", linewidth=0.8, linestyle="--")
        time.set(ylabel="milliseconds a step, estimated")
        memory.set(ylabel="GiB of a device", xlabel={"slots": "slots of a row"}.get(name, name))
        for each in (time, memory):
            each.margins(y=0.1)
            each.set_xscale("log")
            each.set_ylim(bottom=0)
            each.grid(alpha=0.3)
            each.set_xticks(numbers, [f"{number // 1024}K" if number >= 8192 else f"{number:,}" for number in numbers])
            each.minorticks_off()
        shared = [
            f"{case[name]:,}: {case['rows']} rows, slots over {case['memory']} devices"
            for case in shown
            if name == "slots" and case["memory"] > 1
        ]
        time.text(0.97, 0.05, "\n".join(shared), transform=time.transAxes, ha="right", fontsize=8)
    figure.savefig(path, dpi=100)
