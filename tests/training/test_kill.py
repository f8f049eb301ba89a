"""Runs that are killed, stopped, or go wrong, as processes of their own.

What a user relies on: start the same command again until it exits with 0, and the result equals, bit for bit, that of
an undisturbed run.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
from etils import epath

from memorizing import main
from memorizing.synthetic.repeated_passages import RepeatedPassagesStream
from memorizing.training.checkpoint import read_arrays

STEPS = 20
# A checkpoint every step: at any moment one is being written.
COMMAND = [
    "train",
    "--gin_file=smoke",
    "--gin.LMConfig.embed_dim=16",
    "--gin.LMConfig.head_dim=8",
    "--gin.LMConfig.mlp_dim=32",
    "--gin.LMConfig.dropout=0.1",
    "--gin.KNNAttention.memory_size=64",
    f"--gin.LoopConfig.num_steps={STEPS}",
    "--gin.LoopConfig.log_every=1",
    "--gin.LoopConfig.checkpoint_every=1",
    "--gin.LoopConfig.evaluate_every=8",
    "--gin.RepeatedPassages.num_documents=2",
    "--gin.RepeatedPassages.num_passages=3",
]


class Process:
    """`python -m memorizing` on a workdir."""

    def __init__(self, workdir: pathlib.Path, *arguments: str) -> None:
        self.workdir = workdir
        command = [sys.executable, "-m", "memorizing", *COMMAND, f"--workdir={workdir}", *arguments]
        # Compiling is most of such a short run.
        environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def end(self) -> tuple[int, str, str]:
        out, error = self.process.communicate(timeout=300)
        return self.process.returncode, out, error

    def kill_when(self, moment: Callable[[pathlib.Path], bool], signal_number: int = signal.SIGKILL) -> int:
        """Sends a signal at the first moment at which this holds of the workdir; returns the exit code."""
        while self.process.poll() is None and not moment(self.workdir):
            time.sleep(0.001)
        self.process.send_signal(signal_number)
        return self.end()[0]


def in_the_middle_of_a_save(workdir: pathlib.Path) -> bool:
    return any("tmp" in path.name for path in (workdir / "checkpoints").glob("*"))


def after_step(step: int, delay: float = 0.0) -> Callable[[pathlib.Path], bool]:
    def moment(workdir: pathlib.Path) -> bool:
        if not any(line["step"] >= step for line in metrics(workdir)):
            return False
        time.sleep(delay)
        return True

    return moment


def in_the_final_evaluation(workdir: pathlib.Path) -> bool:
    return any(line["kind"].startswith("evaluation") and line["step"] == STEPS for line in metrics(workdir))


def metrics(workdir: pathlib.Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    complete = []
    for line in lines:
        try:
            complete.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return complete


def record(workdir: pathlib.Path) -> dict:
    """Checksums of all that was saved with the last step, context included, and where every row stood."""
    return json.loads((workdir / "checkpoints" / str(STEPS) / "data" / "metadata").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, _, error = Process(workdir).end()
    assert code == 0, error
    return workdir


@pytest.mark.parametrize(
    "steps", [(7,), pytest.param((5, 7, 9, 12, 15, 18), marks=pytest.mark.nightly)], ids=["one", "several"]
)
def test_a_run_killed_at_any_moment_ends_as_the_one_never_killed(
    undisturbed: pathlib.Path, tmp_path: pathlib.Path, steps: tuple[int, ...]
):
    assert Process(tmp_path).kill_when(in_the_middle_of_a_save) == -signal.SIGKILL
    # Told to stop, it saves first and asks to be started again.
    assert Process(tmp_path).kill_when(after_step(3), signal.SIGTERM) == 42
    rng = random.Random(0)
    for step in steps:
        assert Process(tmp_path).kill_when(after_step(step, rng.uniform(0, 0.1))) == -signal.SIGKILL
    assert Process(tmp_path).kill_when(in_the_final_evaluation) == -signal.SIGKILL
    code, out, error = Process(tmp_path).end()
    assert code == 0, error
    assert f"continuing from step {STEPS}" in out

    assert record(tmp_path) == record(undisturbed)
    arrays, expected = read_arrays(epath.Path(tmp_path)), read_arrays(epath.Path(undisturbed))
    assert arrays.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(array, arrays[path], err_msg=path)

    lines, expected_lines = metrics(tmp_path), metrics(undisturbed)
    times = collections.Counter((line["step"], line["kind"]) for line in lines)
    assert set(times) == {(line["step"], line["kind"]) for line in expected_lines}
    assert {key: count for key, count in times.items() if count > 1} == {}, "logged more than once"
    for line, wanted in zip(lines, expected_lines, strict=True):
        assert (line["step"], line["loss"]) == (wanted["step"], wanted["loss"])


def test_a_second_training_is_refused_and_the_first_goes_on_undisturbed(
    undisturbed: pathlib.Path, tmp_path: pathlib.Path
):
    """Even while the first is stopped in the middle of a save. To read beside it is allowed."""
    first = Process(tmp_path)
    while not in_the_middle_of_a_save(tmp_path) and first.process.poll() is None:
        time.sleep(0.001)
    first.process.send_signal(signal.SIGSTOP)
    unfinished = {path.name for path in (tmp_path / "checkpoints").glob("*tmp*")}
    code, _, error = Process(tmp_path).end()
    assert code == 2
    assert re.fullmatch(rf"memorizing: process {first.process.pid} on \S+ is writing into .*another --workdir\n", error)
    assert {path.name for path in (tmp_path / "checkpoints").glob("*tmp*")} == unfinished
    first.process.send_signal(signal.SIGCONT)
    code, _, error = first.end()
    assert code == 0, error
    assert record(tmp_path) == record(undisturbed)
    times = collections.Counter((line["step"], line["kind"]) for line in metrics(tmp_path))
    assert set(times.values()) == {1}


@pytest.mark.nightly
def test_a_damaged_checkpoint_is_told_in_a_line_or_two(undisturbed: pathlib.Path, tmp_path: pathlib.Path):
    """Whatever the libraries below have to say about it."""
    workdir = tmp_path / "damaged"
    subprocess.run(["cp", "-r", str(undisturbed), str(workdir)], check=True)
    for file in (workdir / "checkpoints" / str(STEPS) / "state").rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    code, _, error = Process(workdir).end()
    assert code == 2
    assert f"--restore_step={STEPS - 1}" in error
    assert len(error.strip().splitlines()) <= 3 and "Traceback" not in error, error[:2000]
    # And what it advises works.
    code, out, error = Process(workdir, f"--restore_step={STEPS - 1}").end()
    assert code == 0, error
    assert f"continuing from step {STEPS - 1}" in out
    assert record(workdir) == record(undisturbed)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Exit 1 and a message that names the step: starting again is no cure."""
    healthy = RepeatedPassagesStream.__next__

    def poisoned(stream: RepeatedPassagesStream):
        batch = healthy(stream)
        # Batches are counted from 1: `next` moves on before it returns.
        is_poisoned = stream.get_state()["segment"] == 6
        return batch._replace(loss_weights=batch.loss_weights * (np.inf if is_poisoned else 1))

    monkeypatch.setattr(RepeatedPassagesStream, "__next__", poisoned)
    assert main._run([*COMMAND, f"--workdir={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert "step 6" in error and "Traceback" not in error
    arrays = read_arrays(epath.Path(tmp_path))
    assert arrays["step"] == 5
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert max(line["step"] for line in metrics(tmp_path)) == 5


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("decay", ["0.0", pytest.param("1e30", marks=pytest.mark.nightly)])
def test_an_absurd_learning_rate_is_a_failed_run(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, decay: str):
    """Also where the parameters overflow in an update whose loss and gradient are finite: they are not saved."""
    assert (
        main._run([*COMMAND, f"--workdir={tmp_path}", "--gin.Cosine.peak=1e30", f"--gin.AdamW.weight_decay={decay}"])
        == 1
    )
    error = capsys.readouterr().err
    assert "step " in error and "checkpoint" in error and len(error.splitlines()) <= 3
    if any((tmp_path / "checkpoints").glob("[0-9]*")):
        assert all(np.isfinite(array).all() for array in read_arrays(epath.Path(tmp_path)).values())
    if decay == "1e30":
        assert "is no longer finite" in error
