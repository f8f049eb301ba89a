"""Draws what the tables of docs/results.md say that memories are worth, corpus by corpus, beside their controls.

python benchmarks/worth.py [--tables=docs/results.md] [--picture=docs/worth.png]

The tables are those that benchmarks/results.py writes; of several of one corpus the first counts.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import NamedTuple

from memorizing.evaluation import plots

# Of the tables: their names there, and in the picture.
ROWS = {
    "no memory, continuous cache, untrained": "untrained continuous cache on the model without a memory",
    "kNN layer, taught to look up": "kNN memory",
    "kNN layer, taught, and continuous cache": "kNN memory and continuous cache",
    "... with the memories of another document": "the same, with the memories of another document",
}
CORPORA = {"arxiv": "arXiv", "stdlib": "Python library", "isabelle": "Isabelle", "c4": "C4", "pg19": "PG-19"}
COLORS = ("#999999", "#56B4E9", "#0072B2", "#D55E00")


class Change(NamedTuple):
    """Perplexity against that of no memory, in percent.

    Attributes:
      mean: over seeds.
      spread: the largest less the smallest; 0 for a single seed.
    """

    mean: float
    spread: float


def changes_of(text: str) -> dict[str, dict[str, Change]]:
    """What the tables in a text say: `{corpus: {row: change}}`, of the corpora and rows that are drawn."""
    found: dict[str, dict[str, Change]] = {}
    # Of the table that is being read; None where it is none of these, or its corpus had one.
    rows: dict[str, Change] | None = None
    for line in text.splitlines():
        if not line.startswith("|"):
            rows = None
            continue
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[:2] == ["perplexity", "against no memory"]:
            is_new = name in CORPORA and name not in found
            rows = found.setdefault(name, {}) if is_new else None
        elif rows is not None and name in ROWS:
            rows[name] = _change(cells[1])
    return found


def _change(cell: str) -> Change:
    mean, *spread = re.findall(r"([-+]?[\d.]+)%", cell)
    return Change(float(mean), float(spread[0]) if spread else 0.0)


def draw(changes: Mapping[str, Mapping[str, Change]], path: pathlib.Path) -> None:
    """A group of bars for each corpus; what stands left of 0 is gained."""
    corpora = [name for name in CORPORA if name in changes]
    figure = plots.blank(8, 1 + 0.85 * len(corpora))
    axes = figure.add_subplot()
    height = 0.8 / len(ROWS)
    for index, (row, label) in enumerate(ROWS.items()):
        places = [corpora.index(name) + index * height for name in corpora if row in changes[name]]
        shown = [changes[name][row] for name in corpora if row in changes[name]]
        means = [change.mean for change in shown]
        spreads = [change.spread / 2 for change in shown]
        axes.barh(places, means, height, xerr=spreads, label=label, color=COLORS[index], ecolor="black", capsize=2)
    axes.set_yticks([place + 1.5 * height for place in range(len(corpora))], [CORPORA[name] for name in corpora])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("held-out perplexity, against the same model trained without a memory (%)")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=pathlib.Path, default=pathlib.Path("docs/results.md"))
    parser.add_argument("--picture", type=pathlib.Path, default=pathlib.Path("docs/worth.png"))
    options = parser.parse_args()
    changes = changes_of(options.tables.read_text())
    if not changes:
        sys.exit(f"{options.tables} has no table of benchmarks/results.py")
    draw(changes, options.picture)
    print(f"written to {options.picture}: {', '.join(changes)}")


if __name__ == "__main__":
    main()
