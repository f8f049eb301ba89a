"""The command `evaluate`: a finished run on whole held-out documents, with its own memory and with others.

Or two runs, document by document.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from memorizing.batch import text_of
from memorizing.commands import experiment_flags, suites
from memorizing.commands.documents import open_on_documents
from memorizing.commands.results import write_files
from memorizing.errors import MOST, UserError
from memorizing.evaluation import baselines, plots, report
from memorizing.evaluation.evaluator import Ablation, Evaluation, Evaluator
from memorizing.evaluation.finished_run import FinishedRun
from memorizing.evaluation.reading import num_rows_side_by_side
from memorizing.models.lm_config import LMConfig
from memorizing.runtime import sharding

FOLDER = "evaluation"

DESCRIPTION = """\
Evaluates a finished run on the held-out documents of its data: each once, whole, from an empty memory, the longest first.

  memorizing evaluate                                        the demo's run, with no memory, its own, and one of four times the size,
                                                             and the controls: the memory of another document, a continuous cache
  memorizing evaluate --workdir=DIR --memory_sizes=0,1536,8192,65536    the same weights with other memories, without training
  memorizing evaluate --compare RUN_A RUN_B                  two runs, document by document
  memorizing evaluate --workdir=DIR --documents=FOLDER       on documents of your own: text files, source code, JSON lines
  memorizing evaluate --workdir=DIR --gin.CachedCorpus.path=CACHE       on another corpus with the same vocabulary
  memorizing evaluate --workdir=DIR --suite=babilong,passkey --lengths=2,4,8    what is remembered, how far back, against which controls

Loss and perplexity are per token; bits per byte are of the text in UTF-8; perplexity per word is given for corpora of prose, whose words are what stands between white
space. Intervals resample documents. Results are written to WORKDIR/evaluation: JSON and pictures; those of documents of your own into a folder of its own in there.
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
    parser.add_argument(
        "--windows",
        metavar="W,W,...",
        help="in the place of any memory, a local attention that sees so many tokens before each segment (default: for a pretrained model, as many as it was trained with)",
    )
    parser.add_argument(
        "--documents",
        metavar="FOLDER",
        help="what to evaluate on instead: folders, files, patterns such as 'notes/**/*.md' or URLs, with commas between",
    )
    parser.add_argument("--compare", nargs=2, metavar=("RUN_A", "RUN_B"), help="workdirs of two runs of the same data")
    parser.add_argument(
        "--rows",
        type=experiment_flags.SIDE_BY_SIDE.of(int),
        metavar="N",
        help="documents read side by side (default: as in training)",
    )
    parser.add_argument(
        "--seed", type=experiment_flags.SEED.of(int), default=0, metavar="N", help="of the bootstrap (default: 0)"
    )
    suites.add_arguments(parser)


def run(options: argparse.Namespace, bindings: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    if options.compare and (options.memory_sizes or options.windows or options.workdir):
        raise UserError(
            "--compare names the two runs itself and compares them as trained: leave out --workdir, --memory_sizes and "
            "--windows"
        )
    if options.suite and (options.compare or options.memory_sizes or options.windows):
        raise UserError(
            "--suite asks one run as it was trained, and in its own controls: leave out --compare, --memory_sizes and "
            "--windows"
        )
    if not options.suite and (needless := suites.flags_given(options)):
        raise UserError(f"{needless[0]} goes with --suite: add one, or leave it out")
    experiment_flags.use_devices(os.cpu_count() or 1)
    if options.suite:
        finished = open_on_documents(options.workdir, options.step, options.documents, bindings)
        print(suites.run(finished, options, _origin(finished, bindings), _folder(finished, options.documents)))
        return 0
    print(_compare(options, bindings) if options.compare else _evaluate(options, bindings))
    return 0


def _evaluate(options: argparse.Namespace, bindings: Sequence[str]) -> str:
    finished = open_on_documents(options.workdir, options.step, options.documents, bindings)
    reference, settings = _settings(finished, options.memory_sizes)
    settings += _with_windows(finished, options.windows, options.memory_sizes)
    # Before anything is computed, since a damaged index refuses them.
    keys = _document_keys(finished)
    evaluations = _run_all(finished, settings, options.rows)
    summary = _origin(finished, bindings)
    summary |= report.summarize(evaluations, reference, keys, options.seed)
    pictures = {"loss_by_position.png": plots.loss_by_position(evaluations, reference, options.seed)}
    sizes = {setting.name: setting.memory_size for setting in settings if setting.memory_size is not None}
    if len(sizes) > 1:
        differences = {size: summary["evaluations"][name]["against_reference"] for name, size in sizes.items()}
        loss = evaluations[reference].loss
        pictures["loss_by_memory.png"] = plots.loss_by_memory(differences, sizes[reference], loss)
    folder = _folder(finished, options.documents)
    names = _write(folder, "evaluation.json", summary, pictures)
    return f"\n{report.tables(summary)}\n\nwritten to {folder}: {names}"


def _compare(options: argparse.Namespace, bindings: Sequence[str]) -> str:
    path_a, path_b = options.compare
    run_a = open_on_documents(path_a, options.step, options.documents, bindings)
    run_b = open_on_documents(path_b, options.step, options.documents, bindings)
    data_a = run_a.experiment.data.identity
    data_b = run_b.experiment.data.identity
    if data_a != data_b:
        raise UserError(
            f"--compare {path_a} {path_b}: documents are compared one by one, but the first run has the data "
            f"{data_a}, the second {data_b}"
        )
    keys = _document_keys(run_a)
    evaluation_a = _run_as_trained(run_a, path_a, options.rows)
    evaluation_b = _run_as_trained(run_b, path_b, options.rows)
    summary_a = report.summarize({"": evaluation_a}, "", keys, options.seed)
    summary_b = report.summarize({"": evaluation_b}, "", keys, options.seed)
    figures_a = summary_a["evaluations"][""]
    figures_b = summary_b["evaluations"][""]
    comparison = {
        "bootstrap": summary_a["bootstrap"],
        "documents": summary_a["documents"],
        "runs": {"A": _origin(run_a, bindings) | figures_a, "B": _origin(run_b, bindings) | figures_b},
        "difference": report.difference(evaluation_a, evaluation_b, options.seed),
    }
    tokens = summary_a["documents"]["tokens"]
    picture = plots.documents_of_two_runs(figures_a, figures_b, tokens, (path_a, path_b))
    folder = _folder(run_a, options.documents)
    name = f"compare_with_{run_b.workdir.name}"
    names = _write(folder, f"{name}.json", comparison, {f"{name}.png": picture})
    table = report.comparison_table((path_a, path_b), comparison)
    return f"\n{table}\n\nwritten to {folder}: {names}"


def _folder(finished: FinishedRun, documents: str | None) -> epath.Path:
    """Where results go: those of different documents into different folders."""
    folder = finished.workdir / FOLDER
    if documents is None:
        return folder
    name = re.sub(r"[^\w.-]+", "-", os.path.basename(documents.rstrip("/"))).strip("-")[-40:]
    digest = hashlib.sha256(finished.experiment.data.identity.encode()).hexdigest()[:8]
    return folder / f"{name or 'documents'}-{digest}"


def _document_keys(finished: FinishedRun) -> Sequence[str] | None:
    """Names of the held-out documents, or None where the data is no text."""
    text = text_of(finished.experiment.data)
    return text.document_keys() if text else None


def _settings(finished: FinishedRun, memory_sizes: str | None) -> tuple[str, list[Setting]]:
    """What to evaluate, and the name of what it is held against: the run as it was trained."""
    model = finished.experiment.model
    if not model.has_memory:
        if memory_sizes:
            raise UserError(f"--memory_sizes={memory_sizes}: the model of {finished.workdir} has no external memory")
        reset = Setting("context reset every segment", None, model, "state_reset")
        return "as trained", [reset, Setting("as trained", None, model), *_baseline(finished)]
    own = model.memory_size
    sizes = _parsed("memory_sizes", memory_sizes) if memory_sizes else [0, *_larger(finished, own)]
    segment_length = finished.experiment.batch.segment_length
    reference = Setting(f"memory {own}", own, model)
    settings = []
    for size in sorted({*sizes, own}):
        settings.append(reference if size == own else _with_memory(model, size, segment_length))
    if memory_sizes:
        return reference.name, settings
    if finished.experiment.data.num_eval_documents > 1:
        settings.append(Setting("memory of another document", None, model, "memory_of_another_document"))
    return reference.name, [*settings, *_baseline(finished)]


def _baseline(finished: FinishedRun) -> list[Setting]:
    """What a memory has to beat: the same weights with a cache that was not trained, in the place of their memory."""
    with_cache = baselines.with_continuous_cache(finished.experiment)
    if with_cache is None:
        return []
    return [Setting(baselines.CONTINUOUS_CACHE, None, with_cache, baselines.CACHE_ALONE)]


def _with_windows(finished: FinishedRun, windows: str | None, memory_sizes: str | None) -> list[Setting]:
    """What a memory could be replaced by: a local attention that sees further itself."""
    model = finished.experiment.model
    segment_length = finished.experiment.batch.segment_length
    if windows is None:
        most = max(model.trained_length - segment_length, 0)
        sizes = [_needed(finished, most)] if most and not memory_sizes else []
    else:
        sizes = _parsed("windows", windows)
    settings = []
    for size in sizes:
        try:
            wider = model.with_window(size)
        except UserError as error:
            raise UserError(f"--windows={windows}: {error}") from None
        if wider == model.with_window(size + 1):
            raise UserError(
                f"--windows={windows}: the layers of {finished.workdir} have no window in front of the segment; leave it out"
            )
        # As without a memory, but with the layers in the same groups.
        wider = wider.with_memory_size(segment_length)
        settings.append(Setting(f"window of {size}", None, wider, "memory_cleared"))
    return settings


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
    """Four times the run's own memory.

    None where its own already holds the longest document, or where the larger would take more than a gigabyte: who
    wants that asks for it.
    """
    if _needed(finished, own + 1) <= own:
        return []
    batch = finished.experiment.batch
    larger = finished.experiment.model.with_memory_size(4 * own)
    num_bytes = larger.state_bytes(batch.segment_length) * batch.num_rows
    return [4 * own] if num_bytes <= 1 << 30 else []


def _needed(finished: FinishedRun, most: int) -> int:
    """So many positions before a segment, or as many segments as the longest document has if these are fewer."""
    text = text_of(finished.experiment.data)
    if text is None:
        return most
    documents = range(finished.experiment.data.num_eval_documents)
    longest = max((len(text.document_tokens(index)) for index in documents), default=0)
    segment_length = finished.experiment.batch.segment_length
    return min(most, -(-longest // segment_length) * segment_length)


def _parsed(flag: str, given: str) -> list[int]:
    sizes = [size.strip() for size in given.split(",")]
    if not all(size.isdecimal() and len(size) < 20 and int(size) <= MOST for size in sizes):
        raise UserError(
            f"--{flag}={given}: numbers of tokens, at most {MOST:,}, with commas between, such as 0,1536,8192"
        )
    return [int(size) for size in sizes]


def _run_as_trained(finished: FinishedRun, path: str, rows: int | None) -> Evaluation:
    as_trained = Setting(path, None, finished.experiment.model)
    return _run_all(finished, [as_trained], rows)[path]


def _run_all(finished: FinishedRun, settings: Sequence[Setting], rows: int | None) -> dict[str, Evaluation]:
    experiment = finished.experiment
    finished.check_data()
    mesh = experiment.mesh.make_mesh()
    sharding.check_divides("LMConfig.num_heads", experiment.model.num_heads, mesh, "model")
    data = experiment.data
    num_rows = num_rows_side_by_side(data, rows or experiment.batch.num_rows, mesh)
    evaluations = {}
    with jax.set_mesh(mesh):
        params, buffers = finished.variables_on(mesh)
        for setting in settings:
            started = time.monotonic()
            evaluator = Evaluator(setting.model, num_rows, experiment.batch.segment_length, mesh)
            evaluation = evaluator.run(params, buffers, data, setting.ablation)
            evaluations[setting.name] = evaluation
            seconds = time.monotonic() - started
            print(f"{setting.name}: perplexity {evaluation.values()['perplexity']:.3f}  ({seconds:.1f} s)", flush=True)
    return evaluations


def _origin(finished: FinishedRun, bindings: Sequence[str]) -> dict[str, Any]:
    """What results came from; `bindings` are those beyond the run's own configuration."""
    return {
        "workdir": str(finished.workdir),
        "step": finished.step,
        "weights": finished.weights,
        "bindings": list(bindings),
        "data": finished.experiment.data.identity,
        "segment_length": finished.experiment.batch.segment_length,
    }


def _write(folder: epath.Path, name: str, content: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Writes results and returns their names."""
    return write_files(folder, {name: (json.dumps(content, indent=2) + "\n").encode(), **pictures})
