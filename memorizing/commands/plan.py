"""The command `plan`: what a run will cost, before it runs.

`--topology` compiles it for TPUs, `--flops` counts on paper.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import jax

from memorizing.commands import experiment_flags
from memorizing.config.loading import load_experiment
from memorizing.cost import flops_report
from memorizing.errors import Range, UserError
from memorizing.runtime.progress import bar

# The paper's setting, on its pod of 32 cores.
DEFAULT_RUN = "runs/table4_context512_memory65536_xl512.gin"

DESCRIPTION = """\
Says what a run will need, before it runs.

  memorizing plan --topology=v3:4x4 --gin_file=NAME     compiles the training step for a slice of TPUs, here and without one (pip install 'memorizing[tpu]'):
                                                        memory of a device by kind, estimated time, collectives
  memorizing plan --flops                               FLOPs of a forward pass, against the length of the input
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.description = DESCRIPTION
    parser.add_argument(
        "--topology",
        metavar="GENERATION:SHAPE",
        help="a slice of TPUs: v3:4x4, v4:2x2x4, v5e:4x8, v5p:2x2x4, v6e:4x8, ...; "
        f"without --gin_file the run is {DEFAULT_RUN}",
    )
    parser.add_argument(
        "--slices", type=Range(1, 2**16).of(int), default=1, metavar="N", help="so many of these slices (default: 1)"
    )
    parser.add_argument(
        "--flops",
        nargs="?",
        const="run",
        choices=("run", "opt"),
        help="count forward FLOPs against input length, for the run of --gin_file; --flops=opt: for the shapes of OPT, as in the RMT report",
    )
    experiment_flags.add_gin_file(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace, bindings: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    if (options.flops is None) == (options.topology is None):
        raise UserError(
            "plan: give either --topology=v3:4x4 to compile a run for that slice of TPUs, or --flops to count its FLOPs on paper"
        )
    print(_plan_topology(options, bindings) if options.topology else _plan_flops(options, bindings))
    return 0


def _plan_topology(options: argparse.Namespace, bindings: Sequence[str]) -> str:
    # The data is not opened: a cache need not be named.
    experiment, _ = load_experiment(options.gin_file or [DEFAULT_RUN], bindings, base="CACHE = None")
    # What runs here runs on the CPU, whatever else the machine has.
    jax.config.update("jax_platforms", "cpu")
    from memorizing.cost.plan import plan
    from memorizing.cost.plan_report import as_json, as_text

    with bar(f"compiling the training step for {options.topology}"):
        planned = plan(experiment, options.topology, options.slices)
    return json.dumps(as_json(planned), indent=2) if options.json else as_text(planned)


def _plan_flops(options: argparse.Namespace, bindings: Sequence[str]) -> str:
    if options.flops == "opt":
        if options.gin_file or bindings:
            raise UserError("--flops=opt is about the shapes of OPT: it takes no --gin_file and no --gin.NAME=VALUE")
        of_opt = flops_report.opt_flops()
        return json.dumps(of_opt, indent=2) if options.json else flops_report.opt_text(of_opt)
    # The data is not opened: a cache need not be named.
    experiment, _ = load_experiment(options.gin_file or [DEFAULT_RUN], bindings, base="CACHE = None")
    of_run = flops_report.run_flops(experiment.model, experiment.batch.segment_length)
    return json.dumps(of_run, indent=2) if options.json else flops_report.run_text(of_run)
