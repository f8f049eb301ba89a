"""What evaluations say: as a JSON-able summary, and as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memorizing.evaluation import bootstrap
from memorizing.evaluation.evaluator import Evaluation
from memorizing.runtime.metrics import perplexity
from memorizing.runtime.tables import align

Summary = dict[str, Any]


def summarize(evaluations: Mapping[str, Evaluation], reference: str, keys: Sequence[str] | None, seed: int) -> Summary:
    """Everything that evaluations of one corpus tell.

    Args:
      evaluations: by name, of the same documents.
      reference: name of the one that the others are held against, document by document.
      keys: names of all held-out documents, or None where they have none.
      seed: of the bootstrap.

    Returns:
      JSON-able: `documents`, one entry each, and `evaluations` by name. Losses are nats per token; an interval is `[low, high]`, or None where there are too few documents.
    """
    base = evaluations[reference]
    documents = {
        "index": base.documents.tolist(),
        "key": [keys[index] for index in base.documents] if keys else None,
        "tokens": base.tokens.tolist(),
        "bytes": _listed(base.document_bytes),
        "words": _listed(base.document_words),
    }
    return {
        "bootstrap": {"over": "documents", "samples": bootstrap.SAMPLES, "level": bootstrap.LEVEL, "seed": seed},
        "documents": documents,
        "reference": reference,
        "evaluations": {
            name: _figures(each, seed) | {"against_reference": difference(each, base, seed)}
            for name, each in evaluations.items()
        },
    }


def difference(first: Evaluation, second: Evaluation, seed: int) -> Summary:
    """Loss of the first less loss of the second on the same documents, with the interval of the paired difference."""
    nats, tokens = first.nats - second.nats, second.tokens
    return {
        "loss": float(nats.sum() / max(tokens.sum(), 1)),
        "interval": _interval(nats, tokens, seed),
        "by_document": (nats / np.maximum(tokens, 1)).tolist(),
        "documents_better": int(np.sum(nats < 0)),
        "documents_worse": int(np.sum(nats > 0)),
    }


def tables(summary: Summary) -> str:
    """The summary for a terminal: a line an evaluation, then losses by position in the document."""
    documents, evaluations = summary["documents"], summary["evaluations"]
    tokens = sum(documents["tokens"])
    lines = [
        f"held-out documents, each once, whole, from an empty memory: {len(documents['tokens'])}, {tokens:,} tokens"
    ]
    return "\n".join([*lines, "", _overall(evaluations, summary["reference"]), "", _by_position(evaluations)])


def comparison_table(names: tuple[str, str], comparison: Summary) -> str:
    """Two runs document by document, the largest differences first."""
    keys = comparison["documents"]["key"] or [str(index) for index in comparison["documents"]["index"]]
    losses = [[run["by_document"] for run in comparison["runs"].values()][i] for i in (0, 1)]
    differences = comparison["difference"]
    order = np.argsort(-np.abs(differences["by_document"]))
    rows = [["document", "tokens", "A", "B", "A - B"]]
    for i in order[:20]:
        figures = [f"{loss[i]:.4f}" for loss in losses] + [f"{differences['by_document'][i]:+.4f}"]
        rows.append([keys[i][-60:], f"{comparison['documents']['tokens'][i]:,}", *figures])
    total = [f"{run['loss']:.4f}" for run in comparison["runs"].values()] + [f"{differences['loss']:+.4f}"]
    rows.append(["all", f"{sum(comparison['documents']['tokens']):,}", *total])
    more = f"\n... and {len(order) - 20} more documents" if len(order) > 20 else ""
    return (
        f"A: {names[0]}\nB: {names[1]}\nloss in nats per token, documents by their difference:\n{align(rows)}{more}\n"
        f"difference {differences['loss']:+.4f} {_bracketed(differences['interval'])}: A is better on {differences['documents_better']} documents, "
        f"B on {differences['documents_worse']}"
    )


def _figures(evaluation: Evaluation, seed: int) -> Summary:
    nats, tokens = evaluation.nats, evaluation.tokens
    figures: Summary = {"loss": evaluation.loss, "loss_interval": _interval(nats, tokens, seed)}
    figures |= {name: value for name, value in evaluation.values().items() if name != "loss"}
    figures["perplexity_interval"] = _mapped(perplexity, figures["loss_interval"])
    if evaluation.document_bytes is not None:
        figures["bits_per_byte_interval"] = _interval(nats / math.log(2), evaluation.document_bytes, seed)
    if evaluation.document_words is not None:
        figures["word_perplexity_interval"] = _mapped(perplexity, _interval(nats, evaluation.document_words, seed))
    ends = bootstrap.ratio_interval(evaluation.cell_nats, evaluation.cell_tokens, seed)
    counts = np.maximum(evaluation.tokens_by_position, 1)
    figures["by_position"] = [
        {
            "from": int(start),
            "tokens": int(count),
            "documents": int(documents),
            "loss": float(loss),
            "interval": _ends(interval),
        }
        for start, count, documents, loss, interval in zip(
            evaluation.bin_starts,
            evaluation.tokens_by_position,
            np.sum(evaluation.cell_tokens > 0, axis=0),
            evaluation.nats_by_position / counts,
            ends.T,
            strict=True,
        )
    ]
    figures["by_document"] = (nats / np.maximum(tokens, 1)).tolist()
    return figures


def _overall(evaluations: Mapping[str, Summary], reference: str) -> str:
    rows = [["", "perplexity", "", "bits/byte", "word perplexity", f"loss - loss of {reference}", ""]]
    for name, figures in evaluations.items():
        against = figures["against_reference"]
        rows.append(
            [
                name,
                f"{figures['perplexity']:.3f}",
                _bracketed(figures["perplexity_interval"], "{:.3f}"),
                f"{figures['bits_per_byte']:.4f}" if "bits_per_byte" in figures else "",
                f"{figures['word_perplexity']:.2f}" if "word_perplexity" in figures else "",
                "" if name == reference else f"{against['loss']:+.4f}",
                "" if name == reference else _bracketed(against["interval"]),
            ]
        )
    used = [i for i in range(len(rows[0])) if i == 0 or any(row[i] for row in rows[1:])]
    return (
        align([[row[i] for i in used] for row in rows])
        + f"\n[ ]: {bootstrap.LEVEL:.0%} bootstrap interval over documents"
    )


def _by_position(evaluations: Mapping[str, Summary]) -> str:
    bins = next(iter(evaluations.values()))["by_position"]
    rows = [["loss by position", "documents", "tokens", *evaluations]]
    for i, place in enumerate(bins):
        end = f"{bins[i + 1]['from'] - 1:,}" if i + 1 < len(bins) else ""
        losses = [f"{figures['by_position'][i]['loss']:.4f}" for figures in evaluations.values()]
        rows.append([f"{place['from']:,} - {end}".rstrip(), f"{place['documents']:,}", f"{place['tokens']:,}", *losses])
    return align(rows)


def _interval(numerator: np.ndarray, denominator: np.ndarray, seed: int) -> list[float] | None:
    return _ends(bootstrap.ratio_interval(numerator, denominator, seed))


def _ends(interval: np.ndarray) -> list[float] | None:
    return None if np.isnan(interval).any() else [float(end) for end in interval]


def _mapped(function: Any, interval: list[float] | None) -> list[float] | None:
    return None if interval is None else [function(end) for end in interval]


def _bracketed(interval: list[float] | None, form: str = "{:+.4f}") -> str:
    return "" if interval is None else "[" + ", ".join(map(form.format, interval)) + "]"


def _listed(array: np.ndarray | None) -> list[int] | None:
    return None if array is None else array.tolist()
