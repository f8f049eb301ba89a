"""`evaluate --suite`: recall suites on a finished run."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import jax

from memorizing.commands import experiment_flags
from memorizing.commands.results import write_files
from memorizing.config.runs import open_run
from memorizing.errors import UserError
from memorizing.evaluation.evaluator import num_rows_side_by_side
from memorizing.evaluation.finished_run import FinishedRun
from memorizing.evaluation.suites import controls, summary
from memorizing.evaluation.suites.run import Line, run_exercise
from memorizing.runtime import sharding
from memorizing.synthetic.recall import catalogue

LONGEST = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of suites to those of `evaluate`."""
    suites = ", ".join([*catalogue.SUITES, LONG_PPL])
    parser.add_argument("--suite", metavar="NAME,...", help=f"recall suites instead: {suites}")
    parser.add_argument(
        "--lengths", metavar="U,U,...", help="with --suite: lengths of its samples in segments (default: 2,4,8,16)"
    )
    parser.add_argument(
        "--samples",
        type=experiment_flags.SIDE_BY_SIDE.of(int),
        default=32,
        metavar="N",
        help="with --suite: of each task at each length (default: 32)",
    )
    parser.add_argument(
        "--longest_window",
        type=experiment_flags.SIDE_BY_SIDE.of(int),
        default=2048,
        metavar="N",
        help="with --suite: samples of up to so many tokens are also read in one window (default: 2048)",
    )


LONG_PPL = "long_ppl"


def run(options: argparse.Namespace, bindings: Sequence[str], folder_name: str) -> str:
    """Runs suites and returns what to print.

    Raises:
      UserError: a suite that is none, or none for this run.
    """
    finished = open_run(options.workdir or experiment_flags.DEFAULT_WORKDIR, options.step, bindings)
    names = [name.strip() for name in options.suite.split(",")]
    experiment = finished.experiment
    finished.check_data()
    reader = catalogue.Reader(experiment.data, experiment.model.vocab_size, experiment.batch.segment_length)
    exercises = catalogue.exercises(names, reader, _lengths(options.lengths), options.samples)
    lines = _run_all(finished, exercises, options)
    folder = finished.workdir / folder_name
    stem = f"suite_{'_'.join(names)}"
    return f"\n{summary.table(lines)}\n\nwritten to {folder}: {_write(folder, stem, lines)}"


def _run_all(finished: FinishedRun, exercises: Sequence[catalogue.Exercise], options: argparse.Namespace) -> list[Line]:
    experiment = finished.experiment
    mesh = experiment.mesh.make_mesh()
    sharding.check_divides("LMConfig.num_heads", experiment.model.num_heads, mesh, "model")
    num_rows = num_rows_side_by_side(exercises[0].source, options.rows or experiment.batch.num_rows, mesh)
    length = experiment.batch.segment_length
    evaluators = controls.Evaluators(num_rows, length, mesh, options.longest_window)
    settings = controls.settings_of(experiment)
    origin = {"workdir": str(finished.workdir), "step": finished.step, "weights": finished.weights}
    origin |= {"segment_length": length, "seed": options.seed}
    lines: list[Line] = []
    with jax.set_mesh(mesh):
        params, buffers = finished.variables_on(mesh)
        for exercise in exercises:
            started = time.monotonic()
            found = run_exercise(exercise, settings, evaluators, params, buffers, length, options.seed)
            lines += [origin | line for line in found]
            seconds = time.monotonic() - started
            what = ", ".join(f"{value} {name}" for name, value in exercise.settings.items())
            print(f"{exercise.task}, {what}  ({seconds:.1f} s)", flush=True)
    return lines


def _lengths(text: str | None) -> list[int]:
    lengths = [length.strip() for length in (text or "2,4,8,16").split(",")]
    if not all(length.isdecimal() and len(length) < 9 and 1 <= int(length) <= LONGEST for length in lengths):
        raise UserError(
            f"--lengths={text}: numbers of segments, from 1 to {LONGEST:,}, with commas between, such as 2,4,8,16"
        )
    return sorted({int(length) for length in lengths})


def _write(folder: Any, stem: str, lines: Sequence[Line]) -> str:
    contents = {
        f"{stem}.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode(),
        f"{stem}.png": summary.depth_by_length(lines),
    }
    return write_files(folder, contents)
