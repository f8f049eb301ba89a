"""What a run says about itself: where its time went, what the hardware got out of it, and why it ended."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import threading
import time
from types import SimpleNamespace

import jax
import pytest
from etils import epath

from memorizing.cost.accelerators import Utilization, memory_in_use, training_flops
from memorizing.errors import UserError
from memorizing.models.attention.knn import KNNAttention
from memorizing.models.attention.xl import XLAttention
from memorizing.models.lm_config import LMConfig
from memorizing.runtime import failures
from memorizing.runtime.events import EventLog, goodput
from memorizing.runtime.stopping import StopSignal
from memorizing.runtime.watchdog import HangDetector

# Events and the time they are told of.


def write(path: pathlib.Path, *events: dict) -> None:
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


def event(time: float, name: str, **fields: float) -> dict:
    return {"time": time, "event": name, **fields}


def test_goodput_tells_every_second_once(tmp_path: pathlib.Path):
    """Three starts: the first is killed after step 30, with 25 saved; the second makes no step; the third finishes."""
    write(
        tmp_path / "events.jsonl",
        event(100, "start"),
        event(110, "init", seconds=5),
        event(130, "compile", step=1, count=1, seconds=20),
        event(140, "steps", step=10, count=9, seconds=10),
        event(160, "steps", step=20, count=10, seconds=18),
        event(160, "save", step=20, seconds=2),
        event(180, "steps", step=30, count=10, seconds=20),
        # Killed; ten minutes until there are machines.
        event(770, "start"),
        event(775, "failure"),
        event(780, "start"),
        event(785, "restore", step=25, seconds=4),
        event(800, "compile", step=26, count=1, seconds=15),
        event(850, "steps", step=50, count=24, seconds=48),
        event(860, "evaluation", step=50, seconds=10),
        event(861, "end", step=50),
    )
    spent = goodput(epath.Path(tmp_path))
    assert spent.starts == 3
    assert spent.seconds == pytest.approx(
        {
            "steps": 10 + 18 + 10 + 48,
            "redone": 10,
            "compile": 35,
            "restore": 4,
            "save": 2,
            "evaluation": 10,
            # A fresh state and what is not told: of 80 s, of 5 and of 81.
            "other": (80 - 70) + 5 + (81 - 77),
            "stopped": 590 + 5,
        }
    )
    assert spent.total == 861 - 100
    assert spent.share == pytest.approx(86 / 761)
    assert str(spent).startswith("time 0:12:41 over 3 starts: training 11.3%, training that was lost 1.3%, compiling")


def test_a_run_without_events_spent_nothing(tmp_path: pathlib.Path):
    spent = goodput(epath.Path(tmp_path))
    assert (spent.starts, spent.total, spent.share) == (0, 0, 0)


def test_what_is_measured_apart_is_no_time_of_steps(tmp_path: pathlib.Path):
    path = epath.Path(tmp_path) / "events.jsonl"
    # What a killed process left unfinished.
    path.write_text('{"time": 1, "event": "start"}\n{"time": 2, "ev')
    log = EventLog(path)
    log.lap()
    with log.measure("save", step=3):
        time.sleep(0.2)
    time.sleep(0.05)
    assert 0.05 <= log.lap() < 0.2
    with pytest.raises(ValueError), log.measure("evaluation"):
        raise ValueError
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "save"]
    assert events[1]["step"] == 3 and 0.2 <= events[1]["seconds"] < 1 and abs(events[1]["time"] - time.time()) < 60


def test_a_process_that_leaves_it_to_another_writes_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    log = EventLog(None)
    with log.measure("save"):
        log.write("start")
    assert list(tmp_path.iterdir()) == []


# The hardware.


def model(memory_size: int) -> LMConfig:
    """The paper's 200M model."""
    local = XLAttention(window=512)
    memory = ((8, KNNAttention(memory_size=memory_size, num_neighbors=32, local=local)),) if memory_size else ()
    return LMConfig(32000, 12, 1024, 8, 128, 4096, attention=local, attention_at=memory)


def devices(kind: str, count: int, platform: str = "tpu") -> list:
    return [SimpleNamespace(device_kind=kind, platform=platform) for _ in range(count)]


def test_training_flops_of_the_model_and_of_its_memory():
    """Of 2^17 tokens: 6 FLOPs a parameter and token and the attention to windows; 2 x width x memory for the search."""
    tokens = 2**17
    plain, nothing = training_flops(model(0), 512)
    assert nothing == 0
    parameters = 12 * (4 * 1024 * 1024 + 2 * 1024 * 4096) + 32000 * 1024
    # Scores and values of up to 1024 keys, forward and backward.
    attention = 12 * 3 * 2 * 2 * 1024 * 1024
    assert plain == pytest.approx(6 * parameters + attention, rel=0.02)
    for memory_size, search in ((8192, 2.2e12), (65536, 1.76e13), (262144, 7.0e13)):
        without, memory = training_flops(model(memory_size), 512)
        assert without == plain
        assert memory * tokens == pytest.approx(search, rel=0.03)


def test_utilization_is_a_share_of_the_chips_peak():
    """The paper's pod: 32 devices on 16 chips, 0.2 s a step without a memory."""
    values = Utilization(model(65536), 512, devices("TPU v3", 32)).values(2**17 / 0.2)
    plain, memory = training_flops(model(65536), 512)
    assert values["tokens_per_second_per_chip"] == 2**17 / 0.2 / 16
    assert values["mfu"] == pytest.approx(plain * 2**17 / 0.2 / (16 * 123e12))
    assert values["mfu_memory"] / values["mfu"] == pytest.approx(memory / plain)
    assert 0.3 < values["mfu"] < 0.5
    # A chip is a device on later generations; without a memory there is nothing to tell of one.
    assert "mfu_memory" not in Utilization(model(0), 512, devices("TPU v5 lite", 4)).values(1e6)
    assert Utilization(model(0), 512, devices("NVIDIA H100 80GB HBM3", 2, "gpu")).values(1e6)["mfu"] > 0


def test_no_utilization_where_the_peak_is_not_known():
    assert Utilization(model(0), 512, devices("cpu", 2, "cpu")).values(1e6) == {}
    assert Utilization(model(0), 512, devices("TPU v99", 4)).values(1e6) == {"tokens_per_second_per_chip": 2.5e5}


def test_memory_in_use_is_that_of_the_fullest_device():
    def device(stats: dict | None) -> SimpleNamespace:
        return SimpleNamespace(memory_stats=lambda: stats)

    full = device({"bytes_in_use": 3 * 2**30, "peak_bytes_in_use": 5 * 2**30})
    empty = device({"bytes_in_use": 0, "peak_bytes_in_use": 6 * 2**30})
    assert memory_in_use([empty, full]) == {"hbm_gib": 3.0, "hbm_peak_gib": 6.0}
    assert memory_in_use([device(None)]) == {}


# The end.


@pytest.mark.parametrize(
    ("error", "has_progressed", "is_lost"),
    [
        (jax.errors.JaxRuntimeError("UNAVAILABLE: the task has crashed"), False, True),
        (jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: barrier timed out"), False, True),
        (ConnectionResetError("storage"), False, True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), True, False),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes"), True, False),
        # Of a single process on a CPU nothing can be lost.
        (jax.errors.JaxRuntimeError("INTERNAL: something"), True, False),
        (ValueError("a bug"), True, False),
        (FileNotFoundError("no such file"), True, False),
    ],
)
def test_what_is_lost_is_told_apart_from_a_bug(error: Exception, has_progressed: bool, is_lost: bool):
    """Also behind an error that another library made of it."""
    assert bool(failures.find_lost_infrastructure(error, has_progressed)) == is_lost
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = error
    assert bool(failures.find_lost_infrastructure(wrapped, has_progressed)) == is_lost


def test_an_unclear_error_is_a_bug_until_a_step_was_finished(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(failures, "_can_lose_something", lambda: True)
    error = jax.errors.JaxRuntimeError("INTERNAL: core halted")
    assert failures.find_lost_infrastructure(error, has_progressed=True) is error
    assert failures.find_lost_infrastructure(error, has_progressed=False) is None


def test_a_process_alone_returns_or_raises(capsys: pytest.CaptureFixture):
    def fails_with(error: Exception):
        def run() -> int:
            raise error

        return run

    assert failures.end_together(lambda: 42) == 42
    assert failures.end_together(fails_with(failures.Interrupted("the device is gone"))) == 42
    assert "the device is gone" in capsys.readouterr().err
    for error in (ValueError("a bug"), UserError("a mistake")):
        with pytest.raises(type(error)):
            failures.end_together(fails_with(error))


def test_a_hang_is_told_once_and_a_beating_run_never(capfd: pytest.CaptureFixture):
    told, beating = [], []
    hung = threading.Event()

    def on_hang(reason: str) -> None:
        told.append(reason)
        hung.set()

    with HangDetector(1.0, beating.append) as other, HangDetector(0.2, on_hang):
        while not hung.wait(0.05):
            other.beat()
    assert told == ["no step was finished in 0.2 seconds"] and not beating
    assert "test_observability.py" in capfd.readouterr().err, "the stacks say where"


def test_no_limit_is_no_hang():
    before = threading.active_count()
    with HangDetector(0, pytest.fail):
        assert threading.active_count() == before


def test_a_signal_is_remembered_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert not stop.reached()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reached()
        # A second Ctrl-C means it.
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
