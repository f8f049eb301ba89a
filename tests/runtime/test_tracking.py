"""Trackers of metrics beside metrics.jsonl."""

from __future__ import annotations

import importlib.util
import itertools
import pathlib
import struct
import sys
import time

import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event

from memorizing.errors import UserError
from memorizing.runtime.metrics import MetricWriter
from memorizing.runtime.tracking import weights_and_biases
from memorizing.runtime.workdir import write_config


def write(workdir: epath.Path, resumed_step: int, step: int) -> None:
    writer = MetricWriter(workdir, resumed_step, "reading")
    writer.write(step, "train", {"loss": 2.5, "layer_01/gate/0": 0.5})
    writer.close()


def shown(folder: pathlib.Path) -> list[tuple[int, float]]:
    """Step and value of what TensorBoard shows: a session that begins at a step hides what was written beyond it."""
    found: list[tuple[int, float]] = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        content = file.read_bytes()
        while content:
            # A record: its length, eight bytes, between two checksums of four.
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.HasField("session_log"):
                found = [(step, value) for step, value in found if step < event.step]
            found += [(event.step, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_shows_every_step_of_a_run_that_went_on_once(tmp_path: pathlib.Path, monkeypatch):
    """It was killed after step 30, and its last checkpoint is that of step 20."""
    # Files are named by the second in which they are opened.
    clock = itertools.count(1_800_000_000)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    for resumed_step, steps, loss in ((0, (10, 20, 30), 1.0), (20, (30, 40), 2.0)):
        writer = MetricWriter(epath.Path(tmp_path), resumed_step)
        for step in steps:
            writer.write(step, "train", {"loss": loss})
        writer.close()
    assert len(list((tmp_path / "events").iterdir())) == 2
    assert shown(tmp_path / "events") == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="Weights & Biases is not installed")
def test_weights_and_biases_gets_metrics_and_configuration_offline(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    """A run that goes on is the same run there, and nothing else of the machine is written."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    # What the library keeps for the user.
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "of_the_user"))
    # Its service may be slow to start on a busy machine.
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "300")
    monkeypatch.setenv("SOME_TOKEN", "do-not-tell-this")
    monkeypatch.setattr(sys, "argv", ["memorizing", "train"])
    workdir = epath.Path(tmp_path / "run")
    workdir.mkdir()
    write_config(workdir, "LoopConfig.num_steps = 77\n")
    write(workdir, 0, 10)
    write(workdir, 10, 20)
    files = [path for path in (tmp_path / "run" / "wandb").rglob("*.wandb")]
    assert len(files) == 2 and len({path.name for path in files}) == 1
    # Its service writes the last of it a moment after the run was ended.
    ends = time.monotonic() + 60
    while not all(b"train/layer_01/gate/0" in path.read_bytes() for path in files):
        assert time.monotonic() < ends, "the metrics are there"
        time.sleep(0.1)
    contents = [path.read_bytes() for path in files]
    assert b"LoopConfig.num_steps" in contents[0] and b"77" in contents[0]
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"do-not-tell-this" not in everything
    assert capfd.readouterr().out == ""


def test_without_its_library_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    weights_and_biases.check("")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb_project = 'reading'.*pip install 'memorizing\[wandb\]'"):
        weights_and_biases.check("reading")
    weights_and_biases.check("")
