"""A plan as text and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from memorizing.cost.compiled_cost import Traffic
from memorizing.cost.plan import Plan
from memorizing.runtime.tables import align, with_unit

_GIB = 2**30


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything that a plan says, in bytes and seconds."""
    return dataclasses.asdict(plan) | {"fits": plan.fits, "mfu": plan.mfu}


def as_text(plan: Plan) -> str:
    """A plan for people to read."""
    slices = f"{plan.num_slices} slices of " if plan.num_slices > 1 else ""
    tokens = plan.tokens_per_step // plan.num_rows * plan.rows_per_device
    header = (
        f"{slices}{plan.topology}: {plan.num_devices} devices ({plan.device_kind}), "
        f"{plan.num_rows} rows and {plan.tokens_per_step:,} tokens a step, "
        f"{plan.rows_per_device} rows and {tokens:,} tokens a device; compiled in {plan.compile_seconds:.0f} s"
    )
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    memory = [(f"  {kind}", _gib(size)) for kind, size in plan.hbm.items()]
    memory.append(("  all, by the compiler's account", _gib(plan.hbm_total)))
    memory.append((f"  of a device ({verdict})", _gib(plan.hbm_limit)))
    share = plan.memory_seconds / plan.seconds
    times = [
        ("  step", f"{plan.seconds * 1e3:.1f} ms"),
        ("  of it the external memory", f"{plan.memory_seconds * 1e3:.1f} ms ({share:.1%})"),
        ("  of it gathers, scatters and sorts", f"{plan.moving_seconds * 1e3:.1f} ms, at the memory's bandwidth"),
        ("  tokens a second", f"{plan.tokens_per_step / plan.seconds:,.0f}"),
        ("  FLOPs of the model a step", with_unit(plan.model_flops)),
        ("  FLOPs of the memory a step", with_unit(plan.memory_flops)),
        ("  MFU, the memory's FLOPs apart", f"{plan.mfu:.1%}"),
    ]
    if plan.rare_seconds:
        times.insert(2, ("  more, where many slots are equal", f"{plan.rare_seconds * 1e3:.1f} ms at most"))
    parts = [
        header,
        f"memory of a device:\n{align(memory)}",
        f"time, ESTIMATED from the compiler's cycles, never measured:\n{align(times)}",
        f"gathers, scatters, sorts and others without a price of the compiler's, in this time by their bytes:\n{_table(plan.moves)}",
        f"collectives, not in this time, with the bytes of the results on a device:\n{_table(plan.collectives)}",
    ]
    if plan.advice:
        lines = ["it does not fit; what would help, the largest gain first:", *plan.advice]
        parts.append("\n  ".join(lines))
    return "\n\n".join(parts)


def _table(traffic: dict[str, Traffic]) -> str:
    """How often each kind runs in a step, and the bytes of its results."""
    rows = [
        (f"  {kind}", f"{of_kind.count}", f"{of_kind.num_bytes / _GIB:.3f} GiB") for kind, of_kind in traffic.items()
    ]
    return align(rows or [("  none", "", "")])


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
