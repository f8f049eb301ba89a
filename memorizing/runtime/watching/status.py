"""How a run is doing: its state, and the newest figures that it has written."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from memorizing.runtime.json_lines import Line
from memorizing.runtime.watching.records import RunRecords, number
from memorizing.runtime.watching.settings import number_of

# What the last event of a run says of it where no process writes there.
State = Literal["training", "finished", "stopped", "failed", "not started"]
_ENDINGS: dict[str, State] = {"end": "finished", "preemption": "stopped", "failure": "failed"}


@dataclasses.dataclass(frozen=True)
class Status:
    """How a run is doing. What it has not written is None.

    Attributes:
      state: of the run.
      why: more about the state: which process writes, or why the run failed; may be empty.
      step, num_steps: of training: done, and to do.
      loss: of the last logged step, nats per token.
      held_out: the last loss on held-out documents, nats per token.
      tokens_per_second, step_seconds: of the last logged step that did not compile.
      memory_gib: most memory in use on a device since the start.
      checkpoint: the newest one's step.
      seconds_left: of training, at this speed; only while it trains.
    """

    state: State
    why: str
    step: int | None
    num_steps: int | None
    loss: float | None
    held_out: float | None
    tokens_per_second: float | None
    step_seconds: float | None
    memory_gib: float | None
    checkpoint: int | None
    seconds_left: float | None

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def status_of(run: RunRecords) -> Status:
    """How a run is doing."""
    state, why = _state(run)
    last = _last(run.lines("train"))
    running = _last(_without_compiling(run))
    num_steps = number_of(run.settings, "LoopConfig.num_steps")
    step_seconds = _number(running, "step_seconds")
    seconds_left = None
    if state == "training" and step_seconds is not None and num_steps is not None:
        seconds_left = step_seconds * max(num_steps - last["step"], 0)
    return Status(
        state,
        why,
        step=last.get("step"),
        num_steps=None if num_steps is None else int(num_steps),
        loss=_number(last, "loss"),
        held_out=_number(_last(run.lines("evaluation")), "loss"),
        tokens_per_second=_number(running, "tokens_per_second"),
        step_seconds=step_seconds,
        memory_gib=_number(running, "hbm_peak_gib"),
        checkpoint=run.checkpoints[-1] if run.checkpoints else None,
        seconds_left=seconds_left,
    )


def _state(run: RunRecords) -> tuple[State, str]:
    if run.writer is not None:
        return "training", run.writer
    if not run.events:
        return "not started", ""
    last = run.events[-1]
    state = _ENDINGS.get(last["event"])
    if state is None:
        return "stopped", f"killed after the event {last['event']!r}"
    return state, str(last.get("reason", ""))


def _without_compiling(run: RunRecords) -> list[Line]:
    """The metrics of training but for those of steps that compiled, whose times say nothing of the others'."""
    compiled = {event.get("step") for event in run.events if event["event"] == "compile"}
    return [line for line in run.lines("train") if line["step"] not in compiled]


def _last(lines: list[Line]) -> Line:
    return lines[-1] if lines else {}


def _number(line: Line, name: str) -> float | None:
    return number(line.get(name))
