"""The command `plan`: what a run will cost, before it runs. `--flops` counts on paper."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from memorizing import flops_report
from memorizing.commands import experiment_flags
from memorizing.errors import UserError
from memorizing.gin_registry import load_experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
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
    if options.flops is None:
        raise UserError("plan: nothing to plan; give --flops to count the FLOPs of a run")
    print(_plan_flops(options, bindings))
    return 0


def _plan_flops(options: argparse.Namespace, bindings: Sequence[str]) -> str:
    if options.flops == "opt":
        if options.gin_file or bindings:
            raise UserError("--flops=opt is about the shapes of OPT: it takes no --gin_file and no --gin.NAME=VALUE")
        counts, text = flops_report.opt_flops(), flops_report.opt_text
    else:
        if not options.gin_file:
            raise UserError(
                "--gin_file is not given: name the run whose FLOPs to count, such as --gin_file=runs/smoke.gin"
            )
        experiment, _ = load_experiment(options.gin_file, bindings)
        counts = flops_report.run_flops(experiment.model, experiment.batch.segment_length)
        text = flops_report.run_text
    return json.dumps(counts, indent=2) if options.json else text(counts)
