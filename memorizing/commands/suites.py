"""`evaluate --suite`: recall suites on a finished run."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from memorizing.commands import experiment_flags
from memorizing.commands.results import write_files
from memorizing.errors import Range, UserError
from memorizing.evaluation.evaluator import Evaluator
from memorizing.evaluation.finished_run import FinishedRun
from memorizing.evaluation.reading import num_rows_side_by_side
from memorizing.evaluation.suites import controls, long_ppl, summary
from memorizing.evaluation.suites.run import Line, run_exercise
from memorizing.runtime import sharding
from memorizing.runtime.tables import align
from memorizing.synthetic.recall import catalogue

LONGEST = 2**20
# The memory of another document takes another one.
SAMPLES = Range(2, 2**20)
LONG_PPL = "long_ppl"
DEFAULT_SAMPLES = 32
DEFAULT_LONGEST_WINDOW = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of suites to those of `evaluate`."""
    suites = ", ".join([*catalogue.SUITES, LONG_PPL])
    parser.add_argument("--suite", metavar="NAME,...", help=f"recall suites instead: {suites}")
    parser.add_argument(
        "--lengths", metavar="U,U,...", help="with --suite: lengths of its samples in segments (default: 2,4,8,16)"
    )
    parser.add_argument(
        "--samples",
        type=SAMPLES.of(int),
        metavar="N",
        help="with --suite: of each task at each length (default: 32)",
    )
    parser.add_argument(
        "--generate",
        action="store_true",
        help="with --suite: continue prompts as well, for the benchmarks' own scores of generated text",
    )
    parser.add_argument(
        "--key_tokens",
        metavar="FILE",
        help="with --suite=long_ppl: key tokens that another run has chosen (default: those that this run's memory helps)",
    )
    parser.add_argument(
        "--longest_window",
        type=experiment_flags.SIDE_BY_SIDE.of(int),
        metavar="N",
        help="with --suite: samples of up to so many tokens are also read in one window (default: 2048)",
    )


def flags_given(options: argparse.Namespace) -> list[str]:
    """The flags of suites that were given, `--suite` apart."""
    names = ("lengths", "samples", "generate", "key_tokens", "longest_window")
    return [f"--{name}" for name in names if getattr(options, name)]


def run(finished: FinishedRun, options: argparse.Namespace, origin: dict[str, Any], folder: epath.Path) -> str:
    """Runs suites and returns what to print.

    Args:
      finished: who is asked.
      options: of the command.
      origin: what results say that they came from.
      folder: where they go.

    Raises:
      UserError: a suite that is none, or none for this run.
    """
    names = [name.strip() for name in options.suite.split(",")]
    experiment = finished.experiment
    finished.check_data()
    if names == [LONG_PPL]:
        needless = [flag for flag in flags_given(options) if flag != "--key_tokens"]
        if needless:
            raise UserError(f"{needless[0]} is not for --suite={LONG_PPL}, which reads whole documents: leave it out")
        return _long_ppl(finished, options, origin, folder)
    if LONG_PPL in names:
        raise UserError(f"--suite={options.suite}: {LONG_PPL} reads the run's own documents and stands alone")
    if options.key_tokens:
        raise UserError(f"--key_tokens={options.key_tokens} is for --suite={LONG_PPL}")
    if options.generate and jax.process_count() > 1:
        raise UserError("--generate continues prompts in one process: leave it out, or start a single one")
    reader = catalogue.Reader(experiment.data, experiment.model.vocab_size, experiment.batch.segment_length)
    samples = options.samples or DEFAULT_SAMPLES
    exercises = catalogue.exercises(names, reader, _lengths(options.lengths), samples)
    lines = _run_all(finished, exercises, options, origin)
    stem = f"suite_{'_'.join(names)}"
    return f"\n{summary.table(lines)}\n\nwritten to {folder}: {_write(folder, stem, lines)}"


def _run_all(
    finished: FinishedRun,
    exercises: Sequence[catalogue.Exercise],
    options: argparse.Namespace,
    origin: dict[str, Any],
) -> list[Line]:
    experiment = finished.experiment
    mesh = experiment.mesh.make_mesh()
    sharding.check_divides("LMConfig.num_heads", experiment.model.num_heads, mesh, "model")
    num_rows = num_rows_side_by_side(exercises[0].source, options.rows or experiment.batch.num_rows, mesh)
    settings = controls.settings_of(experiment)
    if any(setting.name == controls.SHUFFLED for setting in settings):
        # A row takes over what its neighbour carries: alone it would be its own neighbour.
        num_rows = max(num_rows, 2 * mesh.shape["data"])
    length = experiment.batch.segment_length
    evaluators = controls.Evaluators(num_rows, length, mesh, options.longest_window or DEFAULT_LONGEST_WINDOW)
    origin = origin | {"seed": options.seed}
    lines: list[Line] = []
    with jax.set_mesh(mesh):
        params, buffers = finished.variables_on(mesh)
        for exercise in exercises:
            started = time.monotonic()
            found = run_exercise(
                exercise, settings, evaluators, params, buffers, length, options.seed, options.generate
            )
            lines += [origin | line for line in found]
            seconds = time.monotonic() - started
            what = ", ".join(f"{value} {name}" for name, value in exercise.settings.items())
            print(f"{exercise.task}, {what}  ({seconds:.1f} s)", flush=True)
    return lines


def _long_ppl(finished: FinishedRun, options: argparse.Namespace, origin: dict[str, Any], folder: epath.Path) -> str:
    """Self-LongPPL on the run's held-out documents."""
    experiment = finished.experiment
    data = experiment.data
    # Where every segment is scored, states that go from row to row at each come home.
    left_out = {controls.SHUFFLED} | ({controls.ANOTHERS} if data.num_eval_documents < 2 else set())
    settings = [
        setting
        for setting in controls.settings_of(experiment)
        if not setting.is_one_window and setting.name not in left_out
    ]
    chosen = long_ppl.read_key_tokens(options.key_tokens, data.identity) if options.key_tokens else None
    mesh = experiment.mesh.make_mesh()
    num_rows = num_rows_side_by_side(data, options.rows or experiment.batch.num_rows, mesh)
    losses = {}
    with jax.set_mesh(mesh):
        params, buffers = finished.variables_on(mesh)
        for setting in settings:
            evaluator = Evaluator(setting.model, num_rows, experiment.batch.segment_length, mesh)
            read = evaluator.read(params, buffers, data, setting.ablation)
            losses[setting.name] = long_ppl.losses_of(read)
            print(f"{setting.name}: read", flush=True)
    as_trained, without, *_ = losses.values()
    key_tokens = chosen or long_ppl.choose(without, as_trained, data.identity, origin)
    found = {name: long_ppl.figures(each, key_tokens, options.seed) for name, each in losses.items()}
    content = origin | {"chosen_by": key_tokens.chosen_by, "settings": found}
    files = {"long_ppl.json": (json.dumps(content, indent=2) + "\n").encode()}
    if not chosen:
        files["key_tokens.json"] = key_tokens.to_json().encode()
    by = "this run" if not chosen else str(key_tokens.chosen_by.get("workdir"))
    share = next(iter(found.values()))["share"]
    head = f"perplexity of {key_tokens.number:,} key tokens ({share:.2%} of all), chosen by {by}:"
    rows = align(long_ppl.table(found))
    return f"\n{head}\n{rows}\n\nwritten to {folder}: {write_files(folder, files)}"


def _lengths(text: str | None) -> list[int]:
    lengths = [length.strip() for length in (text or "2,4,8,16").split(",")]
    if not all(length.isdecimal() and len(length) < 9 and 1 <= int(length) <= LONGEST for length in lengths):
        raise UserError(
            f"--lengths={text}: numbers of segments, from 1 to {LONGEST:,}, with commas between, such as 2,4,8,16"
        )
    return sorted({int(length) for length in lengths})


def _write(folder: epath.Path, stem: str, lines: Sequence[Line]) -> str:
    contents = {
        f"{stem}.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode(),
        f"{stem}.png": summary.depth_by_length(lines),
    }
    return write_files(folder, contents)
