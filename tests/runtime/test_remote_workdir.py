"""A workdir in gs://, on a store of this machine: all that a run writes and reads there, without TensorFlow."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from fake_store import FakeStore

from memorizing import main
from memorizing.errors import UserError
from memorizing.runtime.workdir import resolve

TESTS = pathlib.Path(__file__).parents[1]
needs_gcsfs = pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is None, reason="what reads gs:// is not installed: pip install -e '.[gcs]'"
)


def start(store: FakeStore, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, **store.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_gcsfs
def test_every_writer_and_reader_of_a_run_works_there():
    """Checkpoints (one that was cut off), metrics, events, TensorBoard, lock, status, runs and report."""
    with FakeStore("bucket") as store:
        process = start(store, str(TESTS / "remote_run.py"), "gs://bucket/of/mine")
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert out.splitlines()[-1] == "[]"
    assert {name.split("/")[0] for name in store.objects} == {"of"}


@needs_gcsfs
@pytest.mark.nightly
def test_a_run_there_is_stopped_goes_on_and_is_evaluated():
    """SIGTERM after its first checkpoint saves and exits with 42; the same command then ends it."""
    flags = [
        "-m",
        "memorizing",
        "train",
        "--gin_file=smoke",
        "--workdir=gs://bucket/run",
        "--gin.LoopConfig.log_every=1",
    ]
    train = [*flags, "--gin.LoopConfig.num_steps=300", "--gin.LoopConfig.checkpoint_every=2"]
    with FakeStore("bucket") as store:
        process = start(store, *train)
        while "run/checkpoints/2/commit_success.txt" not in store.objects:
            assert process.poll() is None, process.communicate()[1][-3000:]
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 42, err[-3000:]
        stopped = int(out.rpartition("saved at step ")[2].split(";")[0])
        assert stopped < 300
        process = start(store, *flags, "--gin.LoopConfig.num_steps=300", "--gin.LoopConfig.checkpoint_every=0")
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-3000:]
        assert f"continuing from step {stopped} in gs://bucket/run" in out
        process = start(store, "-m", "memorizing", "evaluate", "--workdir=gs://bucket/run")
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-3000:]
        lines = [json.loads(line) for line in store.objects["run/metrics.jsonl"].content.splitlines()]
        assert [line["step"] for line in lines if line["kind"] == "train"] == [*range(1, 301)]
        assert "run/evaluation/evaluation.json" in store.objects and "run/evaluation.json" in store.objects
        assert not any(".lock-" in name for name in store.objects)


def test_a_library_that_is_missed_later_is_told_in_a_line():
    """Where another path than the workdir's, such as that of a token cache, lies there."""
    code = (
        "import importlib.util, sys\n"
        "importlib.util.find_spec, sys.modules['gcsfs'] = (lambda name: True), None\n"
        "from memorizing import main\n"
        "main.main(['status', 'gs://bucket/run'])"
    )
    environment = os.environ | {"EPATH_USE_TF": "false"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("\n") == 1 and "pip install 'memorizing[gcs]'" in ended.stderr


def test_where_it_cannot_be_read_a_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gs://bucket/run: .*gcsfs: pip install 'memorizing\[gcs\]'"):
        resolve("gs://bucket/run")
    assert main._run(["status", "s3://bucket/run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
