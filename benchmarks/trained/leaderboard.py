"""The page of the leaderboard: a table for each task and budget of bytes, and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from memorizing.benchmarks.trained.cells import NOTHING, TASKS
from memorizing.evaluation import plots


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
    """A PNG: what each mechanism reaches, the best on top; a panel for each task, a point for each budget of bytes."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    budgets = sorted({row.budget for row in rows})
    num_names = len({row.mechanism for row in rows})
    figure = plots.blank(7 * len(tasks), 1.2 + 0.27 * num_names)
    for panel, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        own = [row for row in rows if row.task == task]
        reached, label = _reached(own)
        names = list(dict.fromkeys(row.mechanism for row in sorted(own, key=reached, reverse=task == "recall")))
        for index, budget in enumerate(budgets):
            of_budget = [row for row in own if row.budget == budget]
            panel.errorbar(
                [reached(row) for row in of_budget],
                [names.index(row.mechanism) for row in of_budget],
                xerr=[np.ptp([reached(row._replace(cells=[cell])) for cell in row.cells]) / 2 for row in of_budget],
                linestyle="",
                label=f"at most {budget:,} bytes a row",
                **plots.style(index),
            )
        panel.set_yticks(range(len(names)), names)
        panel.invert_yaxis()
        panel.grid(alpha=0.3)
        panel.set_xlabel(label)
        panel.set_title(TASKS[task].title)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return plots.png(figure)


def _reached(rows: Sequence[Row]) -> tuple[Callable[[Row], float], str]:
    """What rows of a task are compared by, and what it is called."""
    if rows[0].task == "text":
        return lambda row: row.mean(_loss), "held-out loss (nats per token)"
    farthest = list(rows[0].cells[0]["recall"])[-1]
    return lambda row: row.mean(lambda cell: cell["recall"][farthest]), f"share of right answers, {farthest} segments"
