"""Pictures of results."""

from __future__ import annotations

import io

from etils import epath

from memorizing.evaluate import Evaluation


def loss_by_position(evaluations: dict[str, Evaluation], path: epath.Path) -> None:
    """Draws loss in nats per token against position in the document, one line an evaluation, and writes it as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, evaluation in evaluations.items():
        scored = evaluation.tokens_by_position > 0
        loss = evaluation.nats_by_position[scored] / evaluation.tokens_by_position[scored]
        # A bin's point stands at its middle.
        starts = evaluation.bin_starts[scored]
        middles = [start * 1.5 if start else starts[1] / 2 if len(starts) > 1 else 1 for start in starts]
        axes.plot(middles, loss, marker="o", label=f"{name} (perplexity {evaluation.values()['perplexity']:.2f})")
    axes.set_xscale("log")
    axes.set_xlabel("position in the document (tokens)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Held-out loss against position in the document")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    path.write_bytes(buffer.getvalue())
