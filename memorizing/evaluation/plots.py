"""Figures of results, as PNG.

Their colours can be told apart by colour-blind readers, and lines also differ in their markers.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from memorizing.evaluation import bootstrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from memorizing.evaluation.evaluator import Evaluation
    from memorizing.evaluation.inspection.lookups import Inspection, Lookups

# Okabe and Ito's palette, and a marker for each of its colours.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
# Lines that can be told apart in one picture.
MOST_LINES = 12


def loss_by_position(evaluations: Mapping[str, Evaluation], reference: str | None = None, seed: int = 0) -> bytes:
    """Loss in nats per token against position in the document, one line an evaluation.

    Below it stand the differences to one of them.

    Args:
      evaluations: by name, of the same documents.
      reference: name of the one that the others are held against; None for the first.
      seed: of the bootstrap over documents, which gives the differences their intervals.
    """
    reference = reference or next(iter(evaluations))
    base = evaluations[reference]
    figure, axes = _figure(2 if len(evaluations) > 1 else 1)
    # Where no token is scored there is nothing to show: of a made-up task only the answers are.
    seen = np.flatnonzero(base.tokens_by_position)
    middles = _middles(base.bin_starts)[seen]
    counts = base.tokens_by_position[seen]
    for index, (name, evaluation) in enumerate(evaluations.items()):
        label = f"{name} (perplexity {evaluation.values()['perplexity']:.2f})"
        losses = evaluation.nats_by_position[seen] / counts
        axes[0].plot(middles, losses, label=label, **style(index))
        if evaluation is not base:
            differences = (evaluation.cell_nats - base.cell_nats)[:, seen]  # [documents, bins]
            axes[1].plot(middles, differences.sum(axis=0) / counts, label=name, **style(index))
            low, high = bootstrap.ratio_interval(differences, base.cell_tokens[:, seen], seed)
            axes[1].fill_between(middles, low, high, alpha=0.15, color=_color(index), linewidth=0)
    axes[0].set_ylabel("loss (nats per token)")
    axes[0].set_title("Held-out loss against position in the document")
    # Losses fall with the position: where the legend hides nothing.
    axes[0].legend(fontsize="small", loc="upper right")
    for below in axes[1:]:
        below.axhline(0, color="gray", linewidth=0.8, linestyle="--")
        below.set_ylabel(f"less that of\n{reference}")
        below.legend(fontsize="small")
    for each in axes:
        each.set_xscale("log")
    axes[-1].set_xlabel("position in the document (tokens)")
    return png(figure)


def _middles(starts: np.ndarray) -> np.ndarray:
    """Where a bin's point stands: every bin but the first is as long as its start is large."""
    middles = starts * 1.5
    if len(starts) and starts[0] == 0:
        middles[0] = starts[1] / 2 if len(starts) > 1 else 1
    return middles


def loss_by_memory(differences: Mapping[int, Mapping[str, Any]], trained: int, loss: float) -> bytes:
    """Loss of the same weights with several memories.

    Bars are intervals of the paired difference to the memory that they were trained with.

    Args:
      differences: by memory size: `loss`, the difference in nats per token, and its `interval` or None.
      trained: the size that the run was trained with.
      loss: with that.
    """
    figure, (axes,) = _figure()
    sizes = sorted(differences)
    values = [loss + differences[size]["loss"] for size in sizes]
    places = np.arange(len(sizes))
    axes.plot(places, values, **style(0))
    for place, size in zip(places, sizes, strict=True):
        if interval := differences[size]["interval"]:
            low, high = interval
            axes.vlines(place, loss + low, loss + high, color=COLORS[0], alpha=0.4, linewidth=5)
    axes.axhline(loss, color="gray", linewidth=0.8, linestyle="--", label=f"trained with {trained:,}")
    axes.set_xticks(places, [f"{size:,}" for size in sizes])
    axes.set_xlabel("memory (tokens)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("The same weights with other memories; bars: 95% of the paired difference")
    axes.legend()
    return png(figure)


def documents_of_two_runs(
    first: Mapping[str, Any], second: Mapping[str, Any], tokens: Sequence[int], names: tuple[str, str]
) -> bytes:
    """Loss of one run against loss of the other, a point a document, its area by its tokens."""
    figure, (axes,) = _figure()
    x = np.array(second["by_document"])
    y = np.array(first["by_document"])
    areas = 12 + 200 * np.array(tokens) / max(tokens)
    axes.scatter(x, y, s=areas, color=COLORS[0], alpha=0.6)
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axes.plot(ends, ends, color="gray", linewidth=0.8, linestyle="--", label="equal; below it A is better")
    axes.set_xlabel(f"B: {names[1]}, loss (nats per token)")
    axes.set_ylabel(f"A: {names[0]}, loss (nats per token)")
    axes.set_title("Two runs, document by document")
    axes.legend()
    return png(figure)


def style(index: int) -> dict[str, Any]:
    """Colour and marker of a line, by its number."""
    return {"color": _color(index), "marker": MARKERS[index % len(MARKERS)], "markersize": 5}


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def blank(width: float, height: float) -> Figure:
    """An empty figure of so many inches, which lays itself out and needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _figure(num_axes: int = 1) -> tuple[Figure, list[Axes]]:
    figure = blank(7, 2 + 2 * num_axes)
    axes = [figure.add_subplot(num_axes, 1, index + 1) for index in range(num_axes)]
    for each in axes:
        each.grid(alpha=0.3)
    return figure, axes


def sheet(num_panels: int) -> tuple[Figure, list[Axes]]:
    """A figure of small panels, four in a row."""
    columns = min(num_panels, 4)
    rows = -(-num_panels // columns)
    figure = blank(1 + 3 * columns, 1 + 2 * rows)
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(num_panels)]


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    return buffer.getvalue()


# Of an inspection.


def gain_by_position(inspection: Inspection) -> bytes:
    """The paper's figure 7: how much the larger memory helped each token, a dot a token, and its mean by position."""
    figure, (axes,) = _figure()
    gain = inspection.gain
    smaller, larger = inspection.memory_sizes
    positions = np.arange(len(gain))
    # The more dots there are, the fainter is each.
    opacity = max(0.05, min(1.0, 4000 / len(gain)))
    axes.scatter(positions, gain, s=2, color=COLORS[0], alpha=opacity, rasterized=True)
    bins = np.array_split(positions, min(60, len(gain)))
    middles = [each.mean() for each in bins]
    means = [gain[each].mean() for each in bins]
    axes.plot(middles, means, color=COLORS[1], linewidth=2, label=f"mean (of all: {gain.mean():+.4f})")
    label = "from here on the memories differ"
    axes.axvline(inspection.num_equal, color="gray", linestyle="--", linewidth=1, label=label)
    limit = max(float(np.quantile(np.abs(gain), 0.999)), 1e-3)
    outside = int(np.sum(np.abs(gain) > limit))
    axes.set_ylim(-limit, limit)
    note = f"; {outside} tokens lie outside" if outside else ""
    axes.set_xlabel(f"position in the document (tokens){note}")
    axes.set_ylabel("Δ (nats)")
    axes.set_title(f"Loss with memory {smaller:,} less loss with memory {larger:,}")
    axes.legend(loc="lower left")
    return png(figure)


def distances(inspection: Inspection) -> bytes:
    """How far back the retrieved neighbours lie, by layer, and how far back what was in the memory lay."""
    edges = _age_bins(inspection)
    shares = {each.layer: _share(_by_age(each.distances, edges)) for each in inspection.lookups}
    everything = {"everything in the memory": _share(_available(inspection, edges))}
    label, title = "share of the neighbours", "How far back the neighbours lie"
    if len(shares) > MOST_LINES:
        return _heat_map(shares | everything, edges, label, title)
    figure, (axes,) = _figure()
    for index, (layer, share) in enumerate(shares.items()):
        axes.stairs(share, edges, label=f"retrieved, {layer}", linewidth=2, color=_color(index))
    for name, share in everything.items():
        axes.stairs(share, edges, label=name, color="gray", linestyle="--")
    _ages(axes, label)
    axes.set_title(title)
    return png(figure)


def mass_by_age(inspection: Inspection) -> bytes:
    """Share of attention that goes to memories of an age, one line a head; of many heads, by layer."""
    edges = _age_bins(inspection)
    masses = {}
    for each in inspection.lookups:
        mass = _mass(each, edges)
        masses[each.layer] = {head: _share(mass[head]) for head in each.heads}
    label, title = "share of the attention", "Attention to the memory by age"
    if sum(map(len, masses.values())) > MOST_LINES:
        by_layer = {layer: np.mean(list(of_heads.values()), axis=0) for layer, of_heads in masses.items()}
        return _heat_map(by_layer, edges, f"{label}, mean over heads", title)
    figure, (axes,) = _figure()
    middles = np.sqrt(edges[1:] * edges[:-1])
    heads = [(f"{layer}, head {head}", share) for layer, of_heads in masses.items() for head, share in of_heads.items()]
    for index, (name, share) in enumerate(heads):
        axes.plot(middles, share, label=name, **style(index))
    _ages(axes, label, columns=1 + len(heads) // 7)
    axes.set_title(title)
    return png(figure)


def _heat_map(shares: Mapping[str, np.ndarray], edges: np.ndarray, label: str, title: str) -> bytes:
    """Shares by age, a row each: as lines so many could not be told apart."""
    rows = np.arange(len(shares) + 1)
    figure = blank(7, 1.5 + 0.2 * len(shares))
    axes = figure.add_subplot()
    mesh = axes.pcolormesh(edges, rows, np.stack(list(shares.values())), cmap="Blues", vmin=0)
    figure.colorbar(mesh, label=label)
    axes.set_yticks(rows[:-1] + 0.5, list(shares), fontsize="small")
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.set_xlabel("distance back (tokens)")
    axes.set_title(title)
    return png(figure)


def _mass(lookups: Lookups, edges: np.ndarray) -> np.ndarray:
    """Attention to each bin of ages, summed over the document, float64 [N, bins]."""
    mass = np.zeros((len(lookups.gate), len(edges) - 1))
    # In parts: the weights of a long document would take as much memory again as its scores.
    for first in range(0, len(lookups.scores), 4096):
        part = slice(first, first + 4096)
        weights = lookups.weights(part)  # [part, N, K]
        ages = lookups.distances[part]  # [part, N, K]
        for head, sums in enumerate(mass):
            sums += _by_age(ages[:, head], edges, weights[:, head])
    return mass


def _age_bins(inspection: Inspection) -> np.ndarray:
    """Edges of bins that double: 1, 2, 3-4, 5-8, ..."""
    oldest = max((int(lookups.distances.max(initial=1)) for lookups in inspection.lookups), default=1)
    exponents = np.arange(0, np.ceil(np.log2(oldest)) + 1)
    return np.array([0.5, *(2.0**exponents + 0.5)])


def _by_age(ages: np.ndarray, edges: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Counts, or sums of weights, of each bin; age 0 is no neighbour."""
    # The bin of every possible age, looked up: a histogram of 10^7 floats would take seconds.
    bin_of_age = np.digitize(np.arange(int(edges[-1]) + 1), edges)
    bins = bin_of_age[ages].reshape(-1)
    flat_weights = None if weights is None else weights.reshape(-1)
    sums = np.bincount(bins, flat_weights, minlength=len(edges))
    return sums[1 : len(edges)]


def _available(inspection: Inspection, edges: np.ndarray) -> np.ndarray:
    """How many slots of each age all queries together could look into."""
    _, memory_size = inspection.memory_sizes
    positions = np.arange(len(inspection.tokens))
    place_in_segment = positions % inspection.segment_length
    segment_start = positions - place_in_segment
    # Ages of the slots that each query sees: [tokens, 1].
    youngest = (place_in_segment + 1)[:, None]
    oldest = (place_in_segment + np.minimum(segment_start, memory_size))[:, None]
    # Whole ages of each bin: [bins].
    first = np.ceil(edges[:-1])
    last = np.floor(edges[1:])
    overlap = np.minimum(oldest, last) - np.maximum(youngest, first) + 1  # [tokens, bins]
    return np.maximum(overlap, 0).sum(axis=0)


def _share(counts: np.ndarray) -> np.ndarray:
    return counts / max(counts.sum(), 1e-30)


def _ages(axes: Axes, label: str, columns: int = 1) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlabel("distance back (tokens)")
    axes.set_ylabel(label)
    axes.legend(ncols=columns, fontsize="small", loc="upper left")
