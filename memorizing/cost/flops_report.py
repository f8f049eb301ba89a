"""Forward FLOPs against the length of the input, with and without each mechanism: what `memorizing plan --flops` prints."""

from __future__ import annotations

import dataclasses
from typing import Any

from memorizing.cost import flops
from memorizing.models.attention import MECHANISMS
from memorizing.models.language_model import LMConfig
from memorizing.models.recurrent_tokens import RecurrentTokens
from memorizing.runtime.tables import align, with_unit

LENGTHS = (512, 2048, 8192, 32768, 131072, 524288, 2048000)


def opt_flops() -> list[dict[str, Any]]:
    """The headline of the RMT report (Bulatov et al. 2023, figure 3): OPT with full attention, and with RMT in segments of 512 positions, memory tokens among them."""
    counts = []
    for name, (config, reported) in flops.OPT.items():
        full = flops.full_attention_flops(config, flops.REPORTED_LENGTH)
        segments = flops.forward_flops(config, flops.REPORTED_LENGTH, flops.REPORTED_SEGMENT)
        counts.append(
            {"model": name, "full_attention": full, "rmt": segments, "ratio": full / segments, "reported": reported}
        )
    return counts


def opt_text(counts: list[dict[str, Any]]) -> str:
    """`opt_flops` as text."""
    rows = [("model", "full attention", "RMT", "ratio", "reported", "difference")]
    for count in counts:
        amounts = (with_unit(count[key]) for key in ("full_attention", "rmt"))
        difference = f"{count['ratio'] / count['reported'] - 1:+.1%}"
        rows.append((count["model"], *amounts, f"{count['ratio']:.1f}", str(count["reported"]), difference))
    title = f"Forward FLOPs of OPT over {flops.REPORTED_LENGTH:,} tokens; RMT: segments of {flops.REPORTED_SEGMENT} positions, memory tokens included"
    return f"{title}\n\n{align(rows)}"


def run_flops(config: LMConfig, segment_length: int) -> dict[str, Any]:
    """FLOPs of a configuration against the length of the input, as it is and with one mechanism in place of its own.

    Returns:
      `segment_length`, `lengths`, and for each mechanism its name, what it is, and a count a length.
    """
    full = [flops.full_attention_flops(config, length) for length in LENGTHS]
    mechanisms = [{"name": "full", "meaning": "every position sees the whole input", "flops": full}]
    for name, meaning, variant in _variants(config, segment_length):
        counts = [flops.forward_flops(variant, length, segment_length) for length in LENGTHS]
        mechanisms.append({"name": name, "meaning": meaning, "flops": counts})
    return {"segment_length": segment_length, "lengths": list(LENGTHS), "mechanisms": mechanisms}


def _variants(config: LMConfig, segment_length: int) -> list[tuple[str, str, LMConfig]]:
    """Name, meaning and configuration of what is compared."""
    plain = config.without_context()
    # The paper's memory layer is the 9th of 12.
    layer = max(config.num_layers * 3 // 4 - 1, 0)
    variants = [("this run", "as configured", config), ("segments", "each alone, nothing carried", plain)]
    for mechanism in MECHANISMS:
        example = mechanism.example(segment_length)
        if example is None:
            continue
        if example.is_everywhere:
            variant, meaning = dataclasses.replace(plain, attention=example.attention), example.meaning
        else:
            variant = dataclasses.replace(plain, attention_at=((layer, example.attention),))
            meaning = f"{example.meaning} {layer}"
        variants.append((example.name, meaning, variant))
    recurrent = RecurrentTokens()
    meaning = f"{recurrent.num_tokens} memory tokens before and after each segment"
    return [*variants, ("RMT", meaning, dataclasses.replace(plain, recurrent_tokens=recurrent))]


def run_text(counts: dict[str, Any]) -> str:
    """`run_flops` as text: the counts, and how many times cheaper than full attention they are."""
    mechanisms, full = counts["mechanisms"], counts["mechanisms"][0]["flops"]
    meanings = align([(f"  {m['name']}", m["meaning"]) for m in mechanisms], left=2)
    header = ("tokens", *(m["name"] for m in mechanisms))
    amounts, ratios = [header], [header]
    for i, length in enumerate(counts["lengths"]):
        amounts.append((f"{length:,}", *(with_unit(m["flops"][i]) for m in mechanisms)))
        ratios.append((f"{length:,}", *(f"{full[i] / m['flops'][i]:.2f}" for m in mechanisms)))
    return (
        f"Forward FLOPs of one document in segments of {counts['segment_length']} tokens (G 1e9, T 1e12, P 1e15, E 1e18)\n\n"
        f"{meanings}\n\n{align(amounts)}\n\nFull attention / mechanism\n\n{align(ratios)}"
    )
