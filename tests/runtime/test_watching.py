"""Looking at runs: their state, their figures and their differences, beside a training and over damage."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import written_run
from etils import epath

from memorizing import main
from memorizing.runtime.watching.records import read_run
from memorizing.runtime.watching.settings import differing, number_of, settings_of, short_names, value_of
from memorizing.runtime.watching.status import Status, status_of
from memorizing.runtime.workdir_lock import held


def status(workdir: epath.Path) -> Status:
    return status_of(read_run(workdir))


def shown(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert main._run([*arguments]) == 0
    return capsys.readouterr().out


def test_the_newest_figures(tmp_path: pathlib.Path):
    found = status(written_run.write(tmp_path / "run"))
    assert (found.state, found.why, found.step, found.num_steps) == ("finished", "", 40, 40)
    assert found.loss == pytest.approx(8 / 40**0.5) and found.held_out == 2.5
    assert (found.tokens_per_second, found.step_seconds, found.memory_gib) == (1040.0, 0.5, 1.5)
    assert (found.checkpoint, found.seconds_left) == (40, None)


@pytest.mark.parametrize(
    ("end", "state", "why"),
    [
        ("end", "finished", ""),
        ("preemption", "stopped", ""),
        ("failure", "failed", "ValueError: <b>broken</b>"),
        ("", "stopped", "killed after the event 'steps'"),
    ],
)
def test_the_state_is_what_the_run_wrote_last(tmp_path: pathlib.Path, end: str, state: str, why: str):
    found = status(written_run.write(tmp_path / "run", steps=20, end=end))
    assert (found.state, found.why) == (state, why)


def test_a_run_trains_while_a_process_holds_its_folder(tmp_path: pathlib.Path):
    """Also one that went on after its end; the folder stays as it is."""
    workdir = written_run.write(tmp_path / "run", steps=20)
    with held(workdir, print):
        before = sorted(path.name for path in workdir.iterdir())
        found = status(workdir)
        assert sorted(path.name for path in workdir.iterdir()) == before
    assert found.state == "training" and found.why.startswith("process ")
    assert found.seconds_left == 20 * 0.5
    assert status(workdir).state == "finished"


def test_a_holder_elsewhere_counts_while_it_writes(tmp_path: pathlib.Path):
    workdir = written_run.write(tmp_path / "run")
    lock = pathlib.Path(workdir) / ".lock-elsewhere"
    lock.write_text(json.dumps({"host": "far", "pid": 7, "started": "1", "machine": "another", "holds": True}))
    assert status(workdir).why == "process 7 on far"
    long_ago = time.time() - 600
    os.utime(lock, (long_ago, long_ago))
    assert status(workdir).state == "finished"


def test_the_speed_of_a_step_that_compiled_is_none(tmp_path: pathlib.Path):
    found = status(written_run.write(tmp_path / "run", steps=1, end=""))
    assert found.step == 1 and found.tokens_per_second is None


@pytest.mark.parametrize(
    ("file", "text", "what"),
    [
        ("metrics.jsonl", '{"step": 1}\n', "metrics.jsonl is damaged in line 1"),
        ("metrics.jsonl", '{"step": "x", "kind": "train"}\n', "metrics.jsonl is damaged in line 1 (step is 'x')"),
        ("events.jsonl", "\xff\n", "events.jsonl is damaged in line 1"),
        ("events.jsonl", '{"time": "now", "event": "start"}\n', "events.jsonl is damaged in line 1 (time is 'now')"),
        ("events.jsonl", '{"time": 1e999, "event": "start"}\n', "events.jsonl is damaged in line 1 (time is 'inf')"),
        ("events.jsonl", '{"time": 1, "event": []}\n', "events.jsonl is damaged in line 1 (event is '[]')"),
        ("config.gin", "STEPS = 3\n", "config.gin is not as it was written"),
        ("experiment.json", "{}", "experiment.json is damaged"),
        ("experiment.json", "[" * 100_000, "experiment.json is damaged"),
        ("evaluation.json", "[1]", "evaluation.json is damaged"),
        ("checkpoints/40/data/metadata", "{}", "checkpoints/40 is not as it was saved"),
    ],
)
def test_what_is_damaged_is_told_in_a_line_and_the_rest_is_shown(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, file: str, text: str, what: str
):
    workdir = written_run.write(tmp_path / "run")
    (pathlib.Path(workdir) / file).write_text(text, encoding="latin-1")
    records = read_run(workdir)
    assert len(records.damage) == 1 and what in records.damage[0]
    for arguments in (["status", str(workdir)], ["runs", str(tmp_path)]):
        told = [line for line in shown(capsys, *arguments).splitlines() if line.startswith("damaged: ")]
        assert len(told) == 1 and what in told[0]
    if "checkpoints" in file:
        assert records.checkpoints == [10, 20, 30]


def test_runs_are_held_against_each_other(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    written_run.write(tmp_path / "small", size=64, steps=20, end="")
    written_run.write(tmp_path / "large")
    written_run.write(tmp_path / "large" / "without_memory", size=64)
    text = shown(capsys, "runs", str(tmp_path))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["run", "state", "step", "loss", "held", "out", "tokens/s", "memory", "checkpoint"]
    assert lines[1][:3] == ["large", "finished", "40/40"]
    assert lines[2][:2] == ["large/without_memory", "finished"]
    assert lines[3][:3] == ["small", "stopped", "20/40"]
    # What is the same in all runs, and what only repeats a macro, is left out.
    assert lines[6:] == [["run", "SIZE"], ["large", "2048"], ["large/without_memory", "64"], ["small", "64"]]
    whole = json.loads(shown(capsys, "runs", str(tmp_path), "--json"))
    assert whole["small"]["differs"] == {"SIZE": "64"} and whole["small"]["checkpoint"] == 20


def test_status_as_json(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    workdir = written_run.write(tmp_path / "run")
    found = json.loads(shown(capsys, "status", str(workdir), "--json"))
    assert found["state"] == "finished" and found["damage"] == [] and found["step"] == 40


@pytest.mark.parametrize("arguments", [["status", "{}"], ["runs", "{}"], ["runs", "{}/no"], ["report", "{}"]])
def test_where_there_is_no_run_a_line_says_so(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, arguments: list[str]
):
    assert main._run([argument.format(tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path) in error


def test_settings_are_read_as_text():
    settings = settings_of(written_run.CONFIG.format(size=7))
    assert settings["LoopConfig.profile_steps"] == "(3, 4)"
    assert value_of(settings, "KNNAttention.memory_size") == "7"
    assert number_of(settings, "LoopConfig.num_steps") == 40 and number_of(settings, "nothing") is None
    assert value_of({"A": "%B", "B": "%A"}, "A") in ("%A", "%B"), "a circle ends"
    assert differing([{"a": "1", "b": "2"}, {"a": "1"}]) == ["b"]
    assert short_names(["A.x", "B.x", "C.y"]) == {"A.x": "A.x", "B.x": "B.x", "C.y": "y"}


def test_looking_loads_no_jax_and_executes_nothing(tmp_path: pathlib.Path):
    workdir = written_run.write(tmp_path / "run")
    code = (
        "import sys, memorizing.main as main\n"
        f"main._run(['status', {str(workdir)!r}]); main._run(['runs', {str(tmp_path)!r}])\n"
        "print([name for name in ('jax', 'numpy', 'gin', 'memorizing.data') if name in sys.modules])\n"
        f"main._run(['report', {str(workdir)!r}])\n"
        "print([name for name in ('jax', 'flax', 'gin', 'memorizing.data') if name in sys.modules])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout.splitlines().count("[]") == 2, ended.stdout + ended.stderr
