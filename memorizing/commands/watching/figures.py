"""The figures of runs as text, the same in every command; what is not known is empty."""

from __future__ import annotations

from memorizing.runtime.tables import duration
from memorizing.runtime.watching.status import Status


def step(status: Status) -> str:
    """'200/400'."""
    if status.step is None:
        return ""
    return f"{status.step}" if status.num_steps is None else f"{status.step}/{status.num_steps}"


def loss(nats: float | None) -> str:
    return "" if nats is None else f"{nats:.4f}"


def speed(status: Status) -> str:
    """Tokens a second."""
    return "" if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f}"


def memory(status: Status) -> str:
    return "" if status.memory_gib is None else f"{status.memory_gib:.2f} GiB"


def checkpoint(status: Status) -> str:
    return "" if status.checkpoint is None else str(status.checkpoint)


def left(status: Status) -> str:
    return "" if status.seconds_left is None else duration(status.seconds_left)
