"""The command `evaluate`: a finished run on whole held-out documents, with its own memory and with others, or two runs document by document."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from memorizing.batch import text_of
from memorizing.commands import experiment_flags
from memorizing.config.runs import open_run
from memorizing.errors import UserError
from memorizing.evaluation import plots
from memorizing.evaluation import report as evaluation_report
from memorizing.evaluation.evaluator import Ablation, Evaluation, Evaluator, num_rows_side_by_side
from memorizing.evaluation.finished_run import FinishedRun
from memorizing.models.language_model import LMConfig
from memorizing.models.memory.continuous_cache import ContinuousCache
from memorizing.runtime import sharding
from memorizing.runtime.json_lines import replace_text

FOLDER = "evaluation"

DESCRIPTION = """\
Evaluates a finished run on the held-out documents of its data: each once, whole, from an empty memory, the longest first.

  memorizing evaluate                                        the demo's run, with no memory, its own, and one of four times the size,
                                                             and the controls: the memory of another document, a continuous cache
  memorizing evaluate --workdir=DIR --memory_sizes=0,1536,8192,65536    the same weights with other memories, without training
  memorizing evaluate --compare RUN_A RUN_B                  two runs, document by document
  memorizing evaluate --workdir=DIR --gin.CachedCorpus.path=CACHE       on another corpus with the same vocabulary

Loss and perplexity are per token; bits per byte are of the text in UTF-8; perplexity per word is given for corpora of prose, whose words are what stands between white
space. Intervals resample documents. Results are written to WORKDIR/evaluation: JSON and pictures.
"""


class Setting(NamedTuple):
    """One thing to evaluate.

    Attributes:
      name: what it is called.
      memory_size: of its external memory in tokens, or None if the model has none.
      model, ablation: for the evaluator.
    """

    name: str
    memory_size: int | None
    model: LMConfig
    ablation: Ablation = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.description = DESCRIPTION
    experiment_flags.add_run(parser)
    parser.add_argument(
        "--memory_sizes",
        metavar="M,M,...",
        help="sizes of the external memory in tokens, 0 for none (default: 0, the run's own, and four times that if it takes less than 1 GB)",
    )
    parser.add_argument("--compare", nargs=2, metavar=("RUN_A", "RUN_B"), help="workdirs of two runs of the same data")
    parser.add_argument("--rows", type=int, metavar="N", help="documents read side by side (default: as in training)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap (default: 0)")


def run(options: argparse.Namespace, bindings: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    if options.rows is not None and options.rows < 1:
        raise UserError(f"--rows={options.rows}: at least 1")
    if options.compare and (options.memory_sizes or options.workdir):
        raise UserError(
            "--compare names the two runs itself and compares them as trained: leave out --workdir and --memory_sizes"
        )
    experiment_flags.use_devices(os.cpu_count() or 1)
    if options.compare:
        print(_compare(options, bindings))
    else:
        print(_evaluate(options, bindings))
    return 0


def _evaluate(options: argparse.Namespace, bindings: Sequence[str]) -> str:
    finished = open_run(options.workdir or experiment_flags.DEFAULT_WORKDIR, options.step, bindings)
    reference, settings = _settings(finished, options.memory_sizes)
    evaluations = _run_all(finished, settings, options.rows)
    text = text_of(finished.experiment.data)
    summary = _origin(finished) | evaluation_report.summarize(
        evaluations, reference, text.document_keys() if text else None, options.seed
    )
    sizes = {setting.name: setting.memory_size for setting in settings if setting.memory_size is not None}
    folder = finished.workdir / FOLDER
    pictures = {"loss_by_position.png": plots.loss_by_position(evaluations, reference, options.seed)}
    if len(sizes) > 1:
        losses = {size: summary["evaluations"][name]["against_reference"] for name, size in sizes.items()}
        pictures["loss_by_memory.png"] = plots.loss_by_memory(losses, sizes[reference], evaluations[reference].loss)
    names = _write(folder, "evaluation.json", summary, pictures)
    return f"\n{evaluation_report.tables(summary)}\n\nwritten to {folder}: {names}"


def _compare(options: argparse.Namespace, bindings: Sequence[str]) -> str:
    runs = [open_run(path, options.step, bindings) for path in options.compare]
    identities = [finished.experiment.data.identity for finished in runs]
    if identities[0] != identities[1]:
        raise UserError(
            f"--compare {' '.join(options.compare)}: documents are compared one by one, but the first run has the data "
            f"{identities[0]}, the second {identities[1]}"
        )
    evaluations = []
    for finished, path in zip(runs, options.compare, strict=True):
        as_trained = Setting(path, None, finished.experiment.model)
        evaluations += _run_all(finished, [as_trained], options.rows).values()
    text = text_of(runs[0].experiment.data)
    keys = text.document_keys() if text else None
    parts = [evaluation_report.summarize({"": each}, "", keys, options.seed) for each in evaluations]
    figures = [part["evaluations"][""] for part in parts]
    comparison = {
        "bootstrap": parts[0]["bootstrap"],
        "documents": parts[0]["documents"],
        "runs": {name: _origin(finished) | each for name, finished, each in zip("AB", runs, figures, strict=True)},
        "difference": evaluation_report.difference(*evaluations, options.seed),
    }
    name = f"compare_with_{runs[1].workdir.name}"
    picture = plots.documents_of_two_runs(*figures, comparison["documents"]["tokens"], tuple(options.compare))
    names = _write(runs[0].workdir / FOLDER, f"{name}.json", comparison, {f"{name}.png": picture})
    table = evaluation_report.comparison_table(tuple(options.compare), comparison)
    return f"\n{table}\n\nwritten to {runs[0].workdir / FOLDER}: {names}"


def _settings(finished: FinishedRun, memory_sizes: str | None) -> tuple[str, list[Setting]]:
    """What to evaluate, and the name of what it is held against: the run as it was trained."""
    model = finished.experiment.model
    if not model.has_memory:
        if memory_sizes:
            raise UserError(f"--memory_sizes={memory_sizes}: the model of {finished.workdir} has no external memory")
        reset = Setting("context reset every segment", None, model, "state_reset")
        return "as trained", [reset, Setting("as trained", None, model), *_continuous_cache(finished)]
    own = model.memory_size
    sizes = _parsed(memory_sizes) if memory_sizes else [0, *_larger(finished, own)]
    segment_length = finished.experiment.batch.segment_length
    others = [_with_memory(model, size, segment_length) for size in {*sizes} - {own}]
    reference = Setting(f"memory {own}", own, model)
    by_size = sorted([*others, reference], key=lambda setting: setting.memory_size)
    if memory_sizes:
        return reference.name, by_size
    if finished.experiment.data.num_eval_documents > 1:
        by_size.append(Setting("memory of another document", None, model, "memory_of_another_document"))
    return reference.name, [*by_size, *_continuous_cache(finished)]


def _continuous_cache(finished: FinishedRun) -> list[Setting]:
    """What a memory has to beat: the same weights with a cache that was not trained, in the place of their memory."""
    model, mesh = finished.experiment.model, finished.experiment.mesh
    if text_of(finished.experiment.data) is None or model.continuous_cache:
        return []
    # A whole number of segments on every device.
    unit = finished.experiment.batch.segment_length * mesh.memory
    baseline = ContinuousCache()
    size = max((model.memory_size or baseline.memory_size) // unit, 1) * unit
    cache = dataclasses.replace(baseline, memory_size=size)
    with_cache = dataclasses.replace(model, continuous_cache=cache)
    return [Setting("continuous cache", None, with_cache, "memory_of_layers_cleared")]


def _with_memory(model: LMConfig, size: int, segment_length: int) -> Setting:
    name = f"memory {size}"
    if size == 0:
        # A memory that is emptied before every segment: exactly the local attention.
        return Setting(name, 0, model.with_memory_size(segment_length), "memory_cleared")
    resized = model.with_memory_size(size)
    try:
        resized.check(segment_length)
    except UserError as error:
        raise UserError(f"--memory_sizes: {error}") from None
    return Setting(name, size, resized)


def _larger(finished: FinishedRun, own: int) -> list[int]:
    """Four times the run's own memory, unless that would take more than a gigabyte: who wants that asks for it."""
    model, batch = finished.experiment.model, finished.experiment.batch
    num_bytes = model.with_memory_size(4 * own).state_bytes(batch.segment_length) * batch.num_rows
    return [4 * own] if num_bytes <= 1 << 30 else []


def _parsed(memory_sizes: str) -> list[int]:
    sizes = [size.strip() for size in memory_sizes.split(",")]
    if not all(size.isdecimal() for size in sizes):
        raise UserError(f"--memory_sizes={memory_sizes}: numbers of tokens with commas between, such as 0,1536,8192")
    return list(map(int, sizes))


def _run_all(finished: FinishedRun, settings: Sequence[Setting], rows: int | None) -> dict[str, Evaluation]:
    experiment = finished.experiment
    finished.check_data()
    mesh = experiment.mesh.make_mesh()
    sharding.check_divides("LMConfig.num_heads", experiment.model.num_heads, mesh, "model")
    data, length = experiment.data, experiment.batch.segment_length
    num_rows = num_rows_side_by_side(data, rows or experiment.batch.num_rows, mesh)
    evaluations = {}
    with jax.set_mesh(mesh):
        params, buffers = finished.variables_on(mesh)
        for setting in settings:
            started = time.monotonic()
            evaluation = Evaluator(setting.model, num_rows, length, mesh).run(params, buffers, data, setting.ablation)
            evaluations[setting.name] = evaluation
            seconds = time.monotonic() - started
            print(f"{setting.name}: perplexity {evaluation.values()['perplexity']:.3f}  ({seconds:.1f} s)", flush=True)
    return evaluations


def _origin(finished: FinishedRun) -> dict[str, Any]:
    return {
        "workdir": str(finished.workdir),
        "step": finished.step,
        "data": finished.experiment.data.identity,
        "segment_length": finished.experiment.batch.segment_length,
    }


def _write(folder: epath.Path, name: str, content: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Writes results and returns their names."""
    if jax.process_index() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_text(folder / name, json.dumps(content, indent=2) + "\n")
            for picture, png in pictures.items():
                (folder / picture).write_bytes(png)
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror or error})") from error
    return ", ".join([name, *pictures])
