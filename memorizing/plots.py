"""Pictures of results, as PNG. Colours are told apart by those who see few of them, and no line by its colour alone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from memorizing import bootstrap
from memorizing.evaluate import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, and a marker for each of its colours.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def loss_by_position(evaluations: Mapping[str, Evaluation], seed: int = 0) -> bytes:
    """Loss in nats per token against position in the document, one line an evaluation, with its bootstrap interval over documents."""
    figure, axes = _figure()
    for i, (name, evaluation) in enumerate(evaluations.items()):
        scored = evaluation.tokens_by_position > 0
        loss = evaluation.nats_by_position[scored] / evaluation.tokens_by_position[scored]
        low, high = bootstrap.ratio_interval(evaluation.cell_nats, evaluation.cell_tokens, seed)[:, scored]
        # A bin's point stands at its middle.
        starts = evaluation.bin_starts[scored]
        middles = [start * 1.5 if start else starts[1] / 2 if len(starts) > 1 else 1 for start in starts]
        label = f"{name} (perplexity {evaluation.values()['perplexity']:.2f})"
        axes.plot(middles, loss, label=label, **_style(i))
        if len(evaluations) == 1:
            axes.fill_between(middles, low, high, alpha=0.15, color=COLORS[i % len(COLORS)], linewidth=0)
    axes.set_xscale("log")
    axes.set_xlabel("position in the document (tokens)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Held-out loss against position in the document")
    axes.legend()
    return _png(figure)


def loss_by_memory(differences: Mapping[int, Mapping[str, Any]], trained: int, loss: float) -> bytes:
    """Loss of the same weights with several memories, with the interval of the paired difference to the memory that they were trained with.

    Args:
      differences: by memory size: `loss`, the difference in nats per token, and its `interval` or None.
      trained: the size that the run was trained with.
      loss: with that.
    """
    figure, axes = _figure()
    sizes = sorted(differences)
    values = [loss + differences[size]["loss"] for size in sizes]
    places = np.arange(len(sizes))
    axes.plot(places, values, **_style(0))
    for place, size in zip(places, sizes, strict=True):
        if interval := differences[size]["interval"]:
            axes.vlines(place, *(loss + end for end in interval), color=COLORS[0], alpha=0.4, linewidth=5)
    axes.axhline(loss, color="gray", linewidth=0.8, linestyle="--", label=f"trained with {trained:,}")
    axes.set_xticks(places, [f"{size:,}" for size in sizes])
    axes.set_xlabel("memory (tokens)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("The same weights with other memories; bars: 95% of the paired difference")
    axes.legend()
    return _png(figure)


def documents_of_two_runs(
    first: Mapping[str, Any], second: Mapping[str, Any], tokens: Sequence[int], names: tuple[str, str]
) -> bytes:
    """Loss of one run against loss of the other, a point a document, its area by its tokens."""
    figure, axes = _figure()
    x, y = np.array(second["by_document"]), np.array(first["by_document"])
    axes.scatter(x, y, s=12 + 200 * np.array(tokens) / max(tokens), color=COLORS[0], alpha=0.6)
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axes.plot(ends, ends, color="gray", linewidth=0.8, linestyle="--", label="equal; below it A is better")
    axes.set_xlabel(f"B: {names[1]}, loss (nats per token)")
    axes.set_ylabel(f"A: {names[0]}, loss (nats per token)")
    axes.set_title("Two runs, document by document")
    axes.legend()
    return _png(figure)


def _style(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 5}


def _figure() -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    return buffer.getvalue()
