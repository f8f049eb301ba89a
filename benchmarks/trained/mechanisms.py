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
from collections.abc import Sequence
from typing import Any

from memorizing.benchmarks import measure
from memorizing.benchmarks.trained import leaderboard, trainings
from memorizing.benchmarks.trained.cells import ENTRIES, PAIRS, TASKS, Cell, settings, size_within
from memorizing.config.runs import open_run
from memorizing.errors import MOST, Range, UserError

# What cells that run side by side are given, a core each.
ONE_CORE = {
    "MEMORIZING_CPU_DEVICES": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}


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
    rows = leaderboard.chosen(found)
    page = leaderboard.markdown(rows)
    (folder / "mechanisms.md").write_text(page)
    if rows:
        (folder / "mechanisms.png").write_bytes(leaderboard.picture(rows))
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
            if cell.task == "recall" and not _suite(workdir).exists():
                asked = ["--suite=mqar", f"--lengths={options.lengths}", f"--samples={options.samples}"]
                trainings.evaluate(workdir, asked, environment, log)
        except trainings.Failed as error:
            raise UserError(f"{error}; see {log_file}") from None
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
        "bytes_a_row": open_run(str(workdir)).experiment.model.state_bytes(TASKS["text"].segment_length),
        "loss": evaluation["as trained"]["loss"],
        "cleared": cleared and cleared["loss"],
    }
