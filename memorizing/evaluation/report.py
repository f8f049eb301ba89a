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

_SHOWN_DOCUMENTS = 20


def summarize(evaluations: Mapping[str, Evaluation], reference: str, keys: Sequence[str] | None, seed: int) -> Summary:
    """Everything that evaluations of one corpus tell.

    Args:
      evaluations: by name, of the same documents.
      reference: name of the one that the others are held against, document by document.
      keys: names of all held-out documents, or None where they have none.
      seed: of the bootstrap.

    Returns:
      JSON-able: `documents`, one entry each, and `evaluations` by name. Losses are nats per token; an interval is
      `[low, high]`, or None where there are too few documents.
    """
    base = evaluations[reference]
    documents = {
        "index": base.documents.tolist(),
        "key": [keys[index] for index in base.documents] if keys else None,
        "tokens": base.tokens.tolist(),
        "bytes": _listed(base.document_bytes),
        "words": _listed(base.document_words),
    }
    figures: dict[str, Summary] = {}
    for name, evaluation in evaluations.items():
        figures[name] = _figures(evaluation, seed)
        figures[name]["against_reference"] = difference(evaluation, base, seed)
    return {
        "bootstrap": {"over": "documents", "samples": bootstrap.SAMPLES, "level": bootstrap.LEVEL, "seed": seed},
        "documents": documents,
        "reference": reference,
        "evaluations": figures,
    }


def difference(first: Evaluation, second: Evaluation, seed: int) -> Summary:
    """Loss of the first less loss of the second on the same documents, with the interval of the paired difference."""
    nats = first.nats - second.nats  # [documents]
    tokens = second.tokens  # [documents]
    return {
        "loss": float(nats.sum() / max(tokens.sum(), 1)),
        "interval": _interval(nats, tokens, seed),
        "by_document": (nats / np.maximum(tokens, 1)).tolist(),
        "documents_better": int(np.sum(nats < 0)),
        "documents_worse": int(np.sum(nats > 0)),
    }


def tables(summary: Summary) -> str:
    """The summary for a terminal: a line an evaluation, then losses by position in the document."""
    tokens = summary["documents"]["tokens"]
    evaluations = summary["evaluations"]
    read = f"{len(tokens)}, {sum(tokens):,} tokens"
    parts = [
        f"held-out documents, each once, whole, from an empty memory: {read}",
        _overall(evaluations, summary["reference"]),
        _by_position(evaluations),
    ]
    return "\n\n".join(parts)


def comparison_table(names: tuple[str, str], comparison: Summary) -> str:
    """Two runs document by document, the largest differences first."""
    documents = comparison["documents"]
    keys = documents["key"] or [str(index) for index in documents["index"]]
    tokens = documents["tokens"]
    first, second = comparison["runs"].values()
    difference = comparison["difference"]
    rows = [["document", "tokens", "A", "B", "A - B"]]

    def add(name: str, num_tokens: int, of_first: float, of_second: float, less: float) -> None:
        rows.append([name, f"{num_tokens:,}", f"{of_first:.4f}", f"{of_second:.4f}", f"{less:+.4f}"])

    order = np.argsort(-np.abs(difference["by_document"]))
    for i in order[:_SHOWN_DOCUMENTS]:
        losses = first["by_document"][i], second["by_document"][i]
        add(keys[i][-60:], tokens[i], *losses, difference["by_document"][i])
    add("all", sum(tokens), first["loss"], second["loss"], difference["loss"])
    lines = [f"A: {names[0]}", f"B: {names[1]}", "loss in nats per token, documents by their difference:", align(rows)]
    if len(order) > _SHOWN_DOCUMENTS:
        lines.append(f"... and {len(order) - _SHOWN_DOCUMENTS} more documents")
    lines.append(
        f"difference {difference['loss']:+.4f} {_bracketed(difference['interval'])}: "
        f"A is better on {difference['documents_better']} documents, B on {difference['documents_worse']}"
    )
    return "\n".join(lines)


def _figures(evaluation: Evaluation, seed: int) -> Summary:
    nats = evaluation.nats  # [documents]
    tokens = evaluation.tokens  # [documents]
    loss_interval = _interval(nats, tokens, seed)
    figures: Summary = {"loss": evaluation.loss, "loss_interval": loss_interval}
    figures |= {name: value for name, value in evaluation.values().items() if name != "loss"}
    figures["perplexity_interval"] = _perplexities(loss_interval)
    if evaluation.document_bytes is not None:
        bits = nats / math.log(2)
        figures["bits_per_byte_interval"] = _interval(bits, evaluation.document_bytes, seed)
    if evaluation.document_words is not None:
        nats_per_word = _interval(nats, evaluation.document_words, seed)
        figures["word_perplexity_interval"] = _perplexities(nats_per_word)
    figures["by_position"] = _figures_by_position(evaluation, seed)
    figures["by_document"] = (nats / np.maximum(tokens, 1)).tolist()
    return figures


def _figures_by_position(evaluation: Evaluation, seed: int) -> list[Summary]:
    """One entry a bin of positions."""
    tokens = evaluation.tokens_by_position
    num_documents = np.sum(evaluation.cell_tokens > 0, axis=0)
    losses = evaluation.nats_by_position / np.maximum(tokens, 1)
    intervals = bootstrap.ratio_interval(evaluation.cell_nats, evaluation.cell_tokens, seed)  # [2, bins]
    figures = []
    for index, start in enumerate(evaluation.bin_starts.tolist()):
        figures.append(
            {
                "from": start,
                "tokens": int(tokens[index]),
                "documents": int(num_documents[index]),
                "loss": float(losses[index]),
                "interval": _ends(intervals[:, index]),
            }
        )
    return figures


def _overall(evaluations: Mapping[str, Summary], reference: str) -> str:
    rows = [["", "perplexity", "", "bits/byte", "word perplexity", f"loss - loss of {reference}", ""]]
    for name, figures in evaluations.items():
        row = [name, f"{figures['perplexity']:.3f}", _bracketed(figures["perplexity_interval"], "{:.3f}")]
        row.append(f"{figures['bits_per_byte']:.4f}" if "bits_per_byte" in figures else "")
        row.append(f"{figures['word_perplexity']:.2f}" if "word_perplexity" in figures else "")
        if name == reference:
            row += ["", ""]
        else:
            against = figures["against_reference"]
            row += [f"{against['loss']:+.4f}", _bracketed(against["interval"])]
        rows.append(row)
    # Columns in which there is nothing are left out.
    used = [i for i in range(len(rows[0])) if i == 0 or any(row[i] for row in rows[1:])]
    table = align([[row[i] for i in used] for row in rows])
    return f"{table}\n[ ]: {bootstrap.LEVEL:.0%} bootstrap interval over documents"


def _by_position(evaluations: Mapping[str, Summary]) -> str:
    bins = next(iter(evaluations.values()))["by_position"]
    rows = [["loss by position", "documents", "tokens", *evaluations]]
    for i, place in enumerate(bins):
        end = f"{bins[i + 1]['from'] - 1:,}" if i + 1 < len(bins) else ""
        positions = f"{place['from']:,} - {end}".rstrip()
        losses = [f"{figures['by_position'][i]['loss']:.4f}" for figures in evaluations.values()]
        rows.append([positions, f"{place['documents']:,}", f"{place['tokens']:,}", *losses])
    return align(rows)


def _interval(numerator: np.ndarray, denominator: np.ndarray, seed: int) -> list[float] | None:
    return _ends(bootstrap.ratio_interval(numerator, denominator, seed))


def _ends(interval: np.ndarray) -> list[float] | None:
    return None if np.isnan(interval).any() else [float(end) for end in interval]


def _perplexities(losses: list[float] | None) -> list[float] | None:
    return None if losses is None else [perplexity(loss) for loss in losses]


def _bracketed(interval: list[float] | None, form: str = "{:+.4f}") -> str:
    if interval is None:
        return ""
    low, high = interval
    return f"[{form.format(low)}, {form.format(high)}]"


def _listed(array: np.ndarray | None) -> list[int] | None:
    return None if array is None else array.tolist()
