"""The leaderboard: every way of carrying context, with as many bytes of it, on recall and on text.

A cell is a small model with one mechanism, trained by `memorizing train` on one task with one learning rate and seed.
Every mechanism gets the largest size whose context of a row fits the budget. The learning rate of a row is the one with
the lowest loss in the last quarter of *training*: nothing is chosen on what is reported.

  recall   segmented MQAR: 16 keys and their values, asked for so many segments later, farther than in training too
  text     the standard library of the running Python, or --source; whole held-out documents

Cells that have ended are not trained again, those that were stopped go on. `mechanisms.md` and `mechanisms.png` in
--workdir are made from those that have ended, with --report_only without training any.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import os
import pathlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from memorizing.benchmarks import measure
from memorizing.benchmarks.trained import trainings
from memorizing.config.loading import load_experiment
from memorizing.config.runs import open_run
from memorizing.errors import MOST, Range, UserError
from memorizing.evaluation import plots

RUN = "mechanisms"
# What cells that run side by side are given, a core each.
ONE_CORE = {
    "MEMORIZING_CPU_DEVICES": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}


class Entry(NamedTuple):
    """A mechanism, or several together.

    Attributes:
      name: as the table shows it.
      bindings: over the run; {size} is what a budget of bytes decides, in tokens.
      files: of gin, over the run.
    """

    name: str
    bindings: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def is_sized(self) -> bool:
        return any("{size}" in binding for binding in self.bindings)


class Task(NamedTuple):
    """What cells are trained on.

    Attributes:
      title: as the table shows it.
      files: of gin, over the run.
      bindings: over the run.
    """

    title: str
    files: tuple[str, ...] = ()
    bindings: tuple[str, ...] = ()


_WINDOW = ("LOCAL=@XLAttention()", "XLAttention.window={size}")
_MEMORY = ("LMConfig.attention_at=((1, @KNNAttention()),)", "KNNAttention.memory_size={size}")
_TAUGHT = ("models/with_recall.gin",)
_CACHE = ("ContinuousCache.memory_size={size}", "ContinuousCache.mixing='learned'")
_WITH_CACHE = ("models/with_continuous_cache.gin",)
_TOKENS = ("LMConfig.recurrent_tokens=@RecurrentTokens()", "RecurrentTokens.num_tokens=10")

NOTHING = "nothing is carried"
ENTRIES = (
    Entry(NOTHING),
    Entry("window", _WINDOW),
    Entry("window and first positions", (*_WINDOW, "XLAttention.same_length=True", "XLAttention.num_sinks=8")),
    Entry(
        "adaptive span",
        (
            "LMConfig.attention=@AdaptiveSpanAttention()",
            "AdaptiveSpanAttention.window={size}",
            "AdaptiveSpanAttention.span_loss=1e-4",
        ),
    ),
    Entry("Transformer-XL", ("LMConfig.attention=@TransformerXLAttention()", "TransformerXLAttention.window={size}")),
    Entry(
        "Compressive Transformer",
        (
            "LMConfig.attention=@CompressiveAttention()",
            "CompressiveAttention.window={size}",
            "CompressiveAttention.compressed_size={size}",
            "CompressiveAttention.rate=4",
        ),
    ),
    Entry("memory tokens (RMT)", _TOKENS),
    Entry("memory tokens and window", (*_TOKENS, *_WINDOW)),
    Entry("kNN memory as in the paper", _MEMORY),
    Entry("kNN memory, taught", _MEMORY, _TAUGHT),
    Entry("continuous cache", _CACHE, _WITH_CACHE),
    Entry("kNN memory, taught, and continuous cache", (*_MEMORY, *_CACHE), (*_TAUGHT, *_WITH_CACHE)),
    Entry(
        "kNN memory, taught, over a window of a segment",
        (*_MEMORY, "LOCAL=@XLAttention()", "XLAttention.window={segment}"),
        _TAUGHT,
    ),
    Entry("Sparse Transformer", (), ("models/sparse_tiny.gin",)),
    Entry("Reformer, strictly causal", (), ("models/reformer_tiny.gin",)),
    Entry("Routing Transformer, strictly causal", (), ("models/routing_tiny.gin",)),
)
# What the files of a mechanism say of the size of the model.
_SIZE = ("LMConfig.num_layers=2", "VOCAB_SIZE={vocabulary}")

TASKS = {
    "recall": Task("segmented MQAR"),
    "text": Task(
        "text",
        ("tasks/stdlib.gin",),
        ("BatchConfig.segment_length=64", "BatchConfig.tokens_per_step=2048"),
    ),
}
_VOCABULARY = {"recall": 512, "text": 2048}
_SEGMENT = {"recall": 48, "text": 64}
# Of SegmentedMQAR in the run's file.
PAIRS = 16


class Cell(NamedTuple):
    """One training.

    Attributes:
      entry, task: indices into ENTRIES, names of TASKS.
      budget: bytes of context that a row may carry.
      rate: the greatest learning rate.
      seed: of the run.
      steps: of training.
    """

    entry: Entry
    task: str
    budget: int
    rate: float
    seed: int
    steps: int

    @property
    def folder_name(self) -> str:
        entry = "".join(letter if letter.isalnum() else "_" for letter in self.entry.name)
        budget = self.budget if self.entry.is_sized else 0
        return f"{self.task}-{entry}-{budget}-{self.rate:g}-{self.steps}-seed{self.seed}"


def settings(cell: Cell, size: int, source: str) -> tuple[list[str], list[str]]:
    """Files and bindings of a cell's run.

    Args:
      size: of the mechanism, in tokens.
      source: of the text.
    """
    task = TASKS[cell.task]
    names = {"size": size, "segment": _SEGMENT[cell.task], "vocabulary": _VOCABULARY[cell.task]}
    own = [binding.format(**names) for binding in (*_SIZE, *cell.entry.bindings)]
    common = [f"STEPS={cell.steps}", f"RATE={cell.rate}", f"SEED={cell.seed}"]
    if cell.task == "text":
        common.append(f"SOURCE={source}")
    return [RUN, *cell.entry.files, *task.files], [*task.bindings, *own, *common]


def size_within(cell: Cell, source: str) -> int:
    """The largest size, in whole segments, whose context of a row is within the budget; 0 for what has no size.

    Raises:
      UserError: the budget is too small for one segment.
    """
    if not cell.entry.is_sized:
        return 0

    unit = _SEGMENT[cell.task]

    def context_bytes(size: int) -> int:
        experiment, _ = load_experiment(*settings(cell, size, source))
        return experiment.model.state_bytes(unit)

    one, two = context_bytes(unit), context_bytes(2 * unit)
    if one > cell.budget:
        raise UserError(f"--budgets={cell.budget}: a segment of {cell.entry.name} alone takes {one:,} bytes a row")
    return unit * (1 + (cell.budget - one) // (two - one))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    parser.add_argument("--workdir", default="runs/mechanisms", metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--tasks", default=",".join(TASKS), metavar="NAME,...", help="(default: %(default)s)")
    parser.add_argument("--budgets", default="1048576", metavar="B,...", help="bytes a row (default: %(default)s)")
    parser.add_argument("--rates", default="3e-3,1e-2", metavar="R,...", help="learning rates (default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", metavar="N,...", help="(default: %(default)s)")
    parser.add_argument(
        "--steps", type=Range(100, MOST).of(int), default=400, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--lengths", default="2,18", metavar="U,...", help="recall: segments of a sample (%(default)s)")
    parser.add_argument("--samples", type=Range(1, MOST).of(int), default=64, metavar="N", help="(%(default)s)")
    parser.add_argument("--source", default="stdlib", metavar="SOURCE", help="of the text (default: %(default)s)")
    parser.add_argument("--only", metavar="TEXT", help="rows whose name has this in it")
    parser.add_argument(
        "--jobs", type=Range(1, MOST).of(int), default=os.cpu_count(), metavar="N", help="side by side (%(default)s)"
    )
    parser.add_argument("--report_only", action="store_true", help="make the page from what has ended")


def run(options: argparse.Namespace, bindings: list[str]) -> dict[str, Any]:
    """Trains what has not ended, writes the page, and returns the figures."""
    if bindings:
        raise UserError(f"bench mechanisms takes no bindings, but was given --gin.{bindings[0]}")
    cells = cells_of(options)
    folder = pathlib.Path(options.workdir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not options.report_only:
        _run_all(cells, folder, options)
    found = [figures for cell in cells if (figures := figures_of(cell, folder / cell.folder_name))]
    rows = chosen(found)
    page = markdown(rows)
    (folder / "mechanisms.md").write_text(page)
    if rows:
        (folder / "mechanisms.png").write_bytes(picture(rows))
    print(
        f"\n{page}\nwritten to {folder}: mechanisms.md, mechanisms.png; {len(found)} of {len(cells)} cells have ended"
    )
    return {"cells": found, "rows": rows}


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """All cells that the flags ask for: the first seed of all of them first.

    Raises:
      UserError: a flag that names nothing.
    """
    tasks = options.tasks.split(",")
    unknown = [name for name in tasks if name not in TASKS]
    if unknown:
        raise UserError(f"--tasks={options.tasks}: there is no task {unknown[0]}, but {', '.join(TASKS)}")
    entries = [entry for entry in ENTRIES if (options.only or "") in entry.name]
    if not entries:
        names = ", ".join(entry.name for entry in ENTRIES)
        raise UserError(f"--only={options.only}: in no name of {names}")
    try:
        rates = [float(rate) for rate in options.rates.split(",")]
    except ValueError:
        rates = [-1.0]
    if not all(0 < rate < 1 for rate in rates):
        raise UserError(f"--rates={options.rates}: numbers between 0 and 1 with commas between them, such as 3e-3,1e-2")
    measure.sizes("--lengths", options.lengths, least=2)
    budgets = measure.sizes("--budgets", options.budgets, least=1)
    seeds = measure.sizes("--seeds", options.seeds)
    cells = [
        Cell(entry, task, budget, rate, seed, options.steps)
        for seed, rate, task, entry, budget in itertools.product(seeds, rates, tasks, entries, budgets)
    ]
    # What has no size is the same with every budget.
    return list({cell.folder_name: cell for cell in cells}.values())


def _run_all(cells: Sequence[Cell], folder: pathlib.Path, options: argparse.Namespace) -> None:
    """Trains and evaluates the cells, several side by side.

    Raises:
      UserError: a cell cannot be built, or has failed; its log says why.
    """
    # Here, since gin's configuration is one for the whole process.
    sizes = {cell: size_within(cell, options.source) for cell in cells}
    first, *others = cells
    # The first makes the token cache.
    _run_cell(first, sizes[first], folder, options)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        running = [pool.submit(_run_cell, cell, sizes[cell], folder, options) for cell in others]
        try:
            for each in concurrent.futures.as_completed(running):
                each.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _run_cell(cell: Cell, size: int, folder: pathlib.Path, options: argparse.Namespace) -> None:
    workdir = folder / cell.folder_name
    environment = ONE_CORE | {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    files, bindings = settings(cell, size, options.source)
    flags = [*(f"--gin_file={file}" for file in files), *(f"--gin.{binding}" for binding in bindings)]
    log_file = folder / f"{cell.folder_name}.log"
    with log_file.open("a") as log:
        try:
            trainings.train(flags, workdir, cell.steps, environment, folder / "times.jsonl", log)
        except trainings.Failed as error:
            raise UserError(f"{error}; see {log_file}") from None
        if cell.task == "recall" and not _suite(workdir).exists():
            asked = ["--suite=mqar", f"--lengths={options.lengths}", f"--samples={options.samples}"]
            code = trainings.command(["evaluate", f"--workdir={workdir}", *asked], environment, log)
            if code != 0:
                raise UserError(f"{workdir.name}: memorizing evaluate ended with exit code {code}; see {log_file}")
    print(f"{cell.folder_name}: done", flush=True)


def _suite(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / "evaluation" / "suite_mqar.jsonl"


def figures_of(cell: Cell, workdir: pathlib.Path) -> dict[str, Any] | None:
    """What a cell has found; None before it has ended."""
    if trainings.finished_step(workdir) != cell.steps or (cell.task == "recall" and not _suite(workdir).exists()):
        return None
    steps = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if step["kind"] == "train"]
    last = steps[-max(len(steps) // 4, 1) :]
    figures = {
        "mechanism": cell.entry.name,
        "task": cell.task,
        "budget": cell.budget,
        "steps": cell.steps,
        "rate": cell.rate,
        "seed": cell.seed,
        "train_loss": statistics.fmean(step["loss"] for step in last),
        "microseconds_a_token": 1e6 / statistics.median(step["tokens_per_second"] for step in last),
    }
    return figures | (_recall(workdir) if cell.task == "recall" else _text(workdir))


def _recall(workdir: pathlib.Path) -> dict[str, Any]:
    """Shares of right answers by the number of segments, as trained and with nothing carried; bytes of a row."""
    lines = [json.loads(line) for line in _suite(workdir).read_text().splitlines()]
    own = [line for line in lines if line["pairs"] == PAIRS]
    by_length: dict[int, list[dict]] = {}
    for line in own:
        by_length.setdefault(line["segments"], []).append(line)
    return {
        "bytes_a_row": own[0]["bytes_carried"],
        "chance": own[0]["chance"],
        # The first setting of a length is as trained, the second without what is carried.
        "recall": {length: settings[0]["accuracy"] for length, settings in by_length.items()},
        "cleared": {length: settings[1]["accuracy"] for length, settings in by_length.items()},
    }


def _text(workdir: pathlib.Path) -> dict[str, Any]:
    """Held-out loss as trained and, of an external memory, with it cleared, and the bytes of a row."""
    evaluation = json.loads((workdir / trainings.RESULT).read_text())
    cleared = evaluation.get("memory cleared")
    return {
        "bytes_a_row": open_run(str(workdir)).experiment.model.state_bytes(_SEGMENT["text"]),
        "loss": evaluation["as trained"]["loss"],
        "cleared": cleared and cleared["loss"],
    }


class Row(NamedTuple):
    """A mechanism on one task with one budget, at the learning rate that training chose.

    Attributes:
      mechanism, task, budget, rate: of its cells.
      cells: the figures of each seed.
    """

    mechanism: str
    task: str
    budget: int
    rate: float
    cells: list[dict[str, Any]]

    def mean(self, figure: Callable[[dict[str, Any]], float]) -> float:
        """Over the seeds."""
        return statistics.fmean(map(figure, self.cells))

    def spread(self, figure: Callable[[dict[str, Any]], float]) -> float:
        """The largest less the smallest of the seeds."""
        return float(np.ptp([figure(cell) for cell in self.cells]))


def chosen(found: Iterable[dict[str, Any]]) -> list[Row]:
    """Of every mechanism, task and budget the learning rate whose training ended with the lowest loss."""
    by_row: dict[tuple, dict[float, list[dict]]] = {}
    for cell in found:
        rates = by_row.setdefault((cell["mechanism"], cell["task"], cell["budget"]), {})
        rates.setdefault(cell["rate"], []).append(cell)
    rows = []
    for key, rates in by_row.items():
        rate = min(rates, key=lambda rate: statistics.fmean(cell["train_loss"] for cell in rates[rate]))
        rows.append(Row(*key, rate, rates[rate]))
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """A table for each task and budget."""
    tables = []
    for task, budget in dict.fromkeys((row.task, row.budget) for row in rows):
        own = [row for row in rows if (row.task, row.budget) == (task, budget)]
        table = _recall_table(own) if task == "recall" else _text_table(own)
        head, *body = ["| " + " | ".join(cells) + " |" for cells in table]
        rule = "|" + "---|" * len(table[0])
        tables.append("\n".join([f"{TASKS[task].title}, at most {budget:,} bytes a row:", "", head, rule, *body]))
    note = (
        "Mean over seeds, in parentheses the largest less the smallest. "
        "Learning rates were chosen by the loss in training."
    )
    return "\n\n".join([*tables, note]) + "\n"


def _recall_table(rows: Sequence[Row]) -> list[list[str]]:
    lengths = list(rows[0].cells[0]["recall"])
    farthest = lengths[-1]
    best_first = sorted(rows, key=lambda row: -row.mean(lambda cell: cell["recall"][farthest]))
    asked = [f"recall, {length} segments" for length in lengths]
    table = [["mechanism", "bytes a row", *asked, "nothing carried", *_COMMON]]
    for row in best_first:
        shares = [_over_seeds(row, lambda cell, length=length: cell["recall"][length], ".3f") for length in lengths]
        cleared = _over_seeds(row, lambda cell: cell["cleared"][farthest], ".3f")
        table.append([row.mechanism, f"{row.cells[0]['bytes_a_row']:,}", *shares, cleared, *_common(row)])
    return table


def _text_table(rows: Sequence[Row]) -> list[list[str]]:
    base = next((row for row in rows if row.mechanism == NOTHING), None)
    best_first = sorted(rows, key=lambda row: row.mean(lambda cell: cell["loss"]))
    table = [["mechanism", "bytes a row", "loss", "less that of none", "memory cleared", *_COMMON]]
    for row in best_first:
        difference, cleared = "", ""
        if base and row is not base:
            difference = f"{row.mean(_loss) - base.mean(_loss):+.4f}"
        if row.cells[0]["cleared"]:
            cleared = _over_seeds(row, lambda cell: cell["cleared"], ".4f")
        figures = [_over_seeds(row, _loss, ".4f"), difference, cleared]
        table.append([row.mechanism, f"{row.cells[0]['bytes_a_row']:,}", *figures, *_common(row)])
    return table


_COMMON = ("learning rate", "microseconds a token", "seeds")


def _common(row: Row) -> list[str]:
    return [f"{row.rate:g}", f"{row.mean(lambda cell: cell['microseconds_a_token']):.0f}", str(len(row.cells))]


def _loss(cell: dict[str, Any]) -> float:
    return cell["loss"]


def _over_seeds(row: Row, figure: Callable[[dict[str, Any]], float], form: str) -> str:
    mean = format(row.mean(figure), form)
    return mean if len(row.cells) == 1 else f"{mean} ({format(row.spread(figure), form)})"


def picture(rows: Sequence[Row]) -> bytes:
    """A PNG: what each mechanism reaches against the bytes that a row carries, a panel for each task."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    names = list(dict.fromkeys(row.mechanism for row in rows))
    figure, panels = plots.sheet(len(tasks))
    for panel, task in zip(panels, tasks, strict=False):
        for name in names:
            own = sorted((row for row in rows if (row.task, row.mechanism) == (task, name)), key=_bytes)
            if task == "recall":
                farthest = list(own[0].cells[0]["recall"])[-1]
                reached = [row.mean(lambda cell, length=farthest: cell["recall"][length]) for row in own]
                panel.set_ylabel(f"share of right answers, {farthest} segments")
            else:
                reached = [row.mean(_loss) for row in own]
                panel.set_ylabel("held-out loss (nats per token)")
            panel.plot([_bytes(row) for row in own], reached, label=name, **plots.style(names.index(name)))
        panel.set_title(TASKS[task].title)
        panel.set_xscale("symlog", linthresh=1024)
        panel.set_xlabel("bytes that a row carries")
    panels[0].legend(fontsize="x-small")
    return plots.png(figure)


def _bytes(row: Row) -> int:
    return row.cells[0]["bytes_a_row"]
