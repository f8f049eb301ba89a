"""Forward FLOPs against the length of the input, with and without each mechanism: `memorizing plan --flops`."""

from __future__ import annotations

import dataclasses
from typing import Any

from memorizing.cost import flops
from memorizing.models.attention import MECHANISMS
from memorizing.models.lm_config import LMConfig
from memorizing.models.recurrent_tokens import RecurrentTokens
from memorizing.runtime.tables import align, with_unit

LENGTHS = (512, 2048, 8192, 32768, 131072, 524288, 2048000)


def opt_flops() -> list[dict[str, Any]]:
    """The main result of the RMT report (Bulatov et al. 2023, figure 3).

    OPT with full attention, and with RMT in segments of 512 positions, memory tokens among them.
    """
    counts = []
    for name, (config, reported) in flops.OPT.items():
        full = flops.full_attention_flops(config, flops.REPORTED_LENGTH)
        rmt = flops.forward_flops(config, flops.REPORTED_LENGTH, flops.REPORTED_SEGMENT)
        counts.append({"model": name, "full_attention": full, "rmt": rmt, "ratio": full / rmt, "reported": reported})
    return counts


def opt_text(counts: list[dict[str, Any]]) -> str:
    """`opt_flops` as text."""
    rows = [("model", "full attention", "RMT", "ratio", "reported", "difference")]
    for count in counts:
        ratio = count["ratio"]
        reported = count["reported"]
        full = with_unit(count["full_attention"])
        rmt = with_unit(count["rmt"])
        difference = ratio / reported - 1
        rows.append((count["model"], full, rmt, f"{ratio:.1f}", str(reported), f"{difference:+.1%}"))
    title = (
        f"Forward FLOPs of OPT over {flops.REPORTED_LENGTH:,} tokens; "
        f"RMT: segments of {flops.REPORTED_SEGMENT} positions, memory tokens included"
    )
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
            meaning = example.meaning
            variant = dataclasses.replace(plain, attention=example.attention)
        else:
            meaning = f"{example.meaning} {layer}"
            variant = dataclasses.replace(plain, attention_at=((layer, example.attention),))
        variants.append((example.name, meaning, variant))
    recurrent = RecurrentTokens()
    meaning = f"{recurrent.num_tokens} memory tokens before and after each segment"
    variant = dataclasses.replace(plain, recurrent_tokens=recurrent)
    variants.append(("RMT", meaning, variant))
    return variants


def run_text(counts: dict[str, Any]) -> str:
    """`run_flops` as text: the counts, and how many times cheaper than full attention they are."""
    mechanisms = counts["mechanisms"]
    meanings = [(f"  {mechanism['name']}", mechanism["meaning"]) for mechanism in mechanisms]
    header = ["tokens"]
    for mechanism in mechanisms:
        header.append(mechanism["name"])
    amounts = [header]
    ratios = [header]
    for i, length in enumerate(counts["lengths"]):
        # The first mechanism is full attention.
        at_length = [mechanism["flops"][i] for mechanism in mechanisms]
        full = at_length[0]
        amounts.append([f"{length:,}", *map(with_unit, at_length)])
        ratios.append([f"{length:,}", *(f"{full / each:.2f}" for each in at_length)])
    parts = [
        f"Forward FLOPs of one document in segments of {counts['segment_length']} tokens "
        "(G 1e9, T 1e12, P 1e15, E 1e18)",
        align(meanings, left=2),
        align(amounts),
        "Full attention / mechanism",
        align(ratios),
    ]
    return "\n\n".join(parts)
