"""The training loop and what its hooks rely on: the order of things, and metrics that are read one step late."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from memorizing.runtime.events import EventLog
from memorizing.runtime.metrics import Progress
from memorizing.training.experiment import BatchConfig, LoopConfig
from memorizing.training.hooks import CheckpointHook, MetricsHook
from memorizing.training.loop import Hook, NonFiniteLoss, Preempted, make_tick, train
from memorizing.training.optimizer import AdamW


class Recorder(Hook):
    """Notes when it is called."""

    def __init__(self, name: str, calls: list) -> None:
        self._name = name
        self._calls = calls

    def at_start(self) -> None:
        self._calls.append(f"{self._name} starts")

    def before_step(self, step: int) -> None:
        self._calls.append(f"{self._name} before {step}")

    def after_step(self, step: int, metrics: Any) -> None:
        self._calls.append(f"{self._name} after {step}: {metrics}")

    def at_end(self) -> None:
        self._calls.append(f"{self._name} ends")


def run(first_step: int, num_steps: int, calls: list, tick: Callable[[], None]) -> SimpleNamespace:
    """Steps that only note what they do: the state counts the updates, the batches are named by their step."""

    def read(step: int) -> str:
        calls.append(f"read {step}")
        return f"batch {step}"

    def update(state: int, batch: str) -> tuple[int, str]:
        calls.append(f"update with {batch}")
        return state + 1, f"metrics of {batch}"

    training = SimpleNamespace(state=first_step, first_step=first_step, batches=SimpleNamespace(next=read))
    hooks = [Recorder("A", calls), Recorder("B", calls), Hook()]
    train(training, SimpleNamespace(step=update), num_steps, hooks, tick)
    return training


def test_a_step_is_tick_batch_update_and_then_the_hooks():
    calls: list[str] = []
    training = run(4, 6, calls, lambda: calls.append("tick"))
    assert training.state == 6
    step_5, step_6 = (
        [
            "tick",
            f"A before {step}",
            f"B before {step}",
            f"read {step}",
            f"update with batch {step}",
            f"A after {step}: metrics of batch {step}",
            f"B after {step}: metrics of batch {step}",
        ]
        for step in (5, 6)
    )
    assert calls == ["A starts", "B starts", *step_5, *step_6, "A ends", "B ends"]


def test_a_run_that_is_at_its_end_only_ends():
    calls: list[str] = []
    assert run(6, 6, calls, lambda: calls.append("tick")).state == 6
    assert calls == ["A starts", "B starts", "A ends", "B ends"]


def test_a_run_that_is_told_to_stop_reads_no_further_batch():
    """What is saved then is the state and the position after the same step."""
    calls: list[str] = []
    events = SimpleNamespace(write=lambda event, **fields: calls.append(f"{event} {fields}"))

    def save() -> int:
        calls.append("save")
        return 1

    stop = SimpleNamespace(reached=lambda: "update with batch 1" in calls)
    watchdog = SimpleNamespace(beat=lambda: calls.append("beat"))

    def check_lock() -> None:
        calls.append("lock")

    with pytest.raises(Preempted, match="saved at step 1"):
        run(0, 3, calls, make_tick(watchdog, stop, events, check_lock, save))
    assert calls[2] == "beat" and calls[-5:] == [
        "B after 1: metrics of batch 1",
        "beat",
        "lock",
        "save",
        "preemption {'step': 1}",
    ]
    assert "read 2" not in calls


class Value:
    """A metric on a device: notes that somebody waits for it."""

    def __init__(self, value: float, step: int, reads: list[int]) -> None:
        self._value = value
        self._step = step
        self._reads = reads

    def __float__(self) -> float:
        self._reads.append(self._step)
        return self._value


def metrics_of(step: int, reads: list[int], loss: float = 1.0) -> dict[str, Value]:
    return {"loss": Value(loss, step, reads), "gradient_norm": Value(1.0, step, reads)}


def metrics_hook(checkpointer: SimpleNamespace) -> MetricsHook:
    """Of a run that goes on from step 10 and logs nothing before step 1000 but its first step."""
    loop = LoopConfig(num_steps=2000, log_every=1000)
    experiment = SimpleNamespace(loop=loop, batch=BatchConfig(), optimizer=AdamW())
    return MetricsHook(experiment, 10, None, Progress(10, 100), None, checkpointer, lambda _: {})


def test_metrics_are_read_one_step_late():
    reads: list[int] = []
    hook = metrics_hook(SimpleNamespace(steps=[]))
    hook.after_step(12, metrics_of(12, reads))
    assert reads == [] and not hook.has_progressed
    hook.after_step(13, metrics_of(13, reads))
    assert reads == [12, 12] and hook.has_progressed
    hook.flush()
    hook.flush()
    assert reads == [12, 12, 13, 13]


def test_a_step_is_saved_only_once_its_loss_is_known_to_be_finite():
    saved, reads = [10], []
    checkpointer = SimpleNamespace(steps=saved, save=lambda state, position: saved.append(state))
    metrics = metrics_hook(checkpointer)
    training = SimpleNamespace(step=12, state=12, batches=SimpleNamespace(position=dict))
    checks = []
    hook = CheckpointHook(training, checkpointer, 4, metrics, EventLog(None), check_lock=lambda: checks.append(1))

    metrics.after_step(12, metrics_of(12, reads))
    hook.after_step(12, {})
    assert saved == [10, 12] and reads == [12, 12] and checks == [1]
    # Between two checkpoints nothing is waited for.
    training.step = training.state = 14
    metrics.after_step(14, metrics_of(14, reads, loss=math.nan))
    hook.after_step(14, {})
    assert saved == [10, 12] and reads == [12, 12]
    with pytest.raises(NonFiniteLoss, match=r"step 14: the loss is nan .* the last good checkpoint is that of step 12"):
        hook.at_end()
    assert saved == [10, 12]
