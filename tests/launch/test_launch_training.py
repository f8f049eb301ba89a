"""A real training run on two hosts, launched on stand-ins for Google's machines.

The machines are taken away and sent SIGTERM.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
from collections.abc import Callable

import numpy as np
import pytest
from etils import epath
from launching import Workplace, until

from memorizing.training.checkpoint import read_arrays

STEPS = 24
FLAGS = [
    "--gin_file=smoke",
    "--gin.LMConfig.num_layers=1",
    "--gin.LMConfig.attention_at=((0, @KNNAttention()),)",
    "--gin.LMConfig.embed_dim=16",
    "--gin.LMConfig.head_dim=8",
    "--gin.LMConfig.mlp_dim=32",
    "--gin.LMConfig.dropout=0.1",
    "--gin.KNNAttention.memory_size=16",
    "--gin.KNNAttention.num_neighbors=4",
    "--gin.BatchConfig.tokens_per_step=16",
    "--gin.BatchConfig.segment_length=4",
    "--gin.RepeatedPassages.num_documents=2",
    "--gin.RepeatedPassages.num_passages=3",
    "--gin.RepeatedPassages.passage_length=6",
    f"--gin.LoopConfig.num_steps={STEPS}",
    "--gin.LoopConfig.log_every=1",
    "--gin.LoopConfig.checkpoint_every=2",
]


def last_step(workdir: pathlib.Path) -> int:
    """The last step that was logged."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max([json.loads(line)["step"] for line in lines if line.endswith("\n")], default=0)


def saved(workdir: pathlib.Path) -> dict:
    """Checksums of all that was saved at the end, the memory included, and where every row stood."""
    return json.loads((workdir / "checkpoints" / str(STEPS) / "data" / "metadata").read_text())


@pytest.mark.nightly
def test_a_run_that_was_preempted_twice_has_the_parameters_of_one_that_never_was(tmp_path: pathlib.Path):
    """Bit for bit: its machines vanish once, and once a host is told to stop."""
    compiling = [
        "JAX_DISABLE_MOST_OPTIMIZATIONS=1",
        f"JAX_COMPILATION_CACHE_DIR={os.environ['JAX_COMPILATION_CACHE_DIR']}",
        f"XLA_FLAGS={os.environ.get('XLA_FLAGS', '')}",
    ]
    variables = [f"--env={variable}" for variable in compiling]
    here = Workplace(tmp_path / "undisturbed")
    ended = here.launch("local", "--hosts=2", "--devices=2", *variables, "--", *FLAGS, f"--workdir={here.workdir}")
    assert ended.returncode == 0, ended.stdout + ended.stderr

    google = Workplace(tmp_path / "preempted")
    running = google.start(
        *("tpu-vm", "--name=first", "--zone=europe-west4-a", "--image=memorizing:1", "--slice=v4-16", "--apply"),
        *("--poll=0.2", "--restarts=0", *variables, "--", *FLAGS, f"--workdir={google.workdir}"),
    )
    try:
        # A checkpoint may be half written then.
        wait(running, lambda: last_step(google.workdir) >= 5)
        (google.cloud / "machine_lost").touch()
        wait(running, lambda: "SUSPENDED" in google.written())
        wait(running, lambda: last_step(google.workdir) >= 11)
        os.kill(int((google.cloud / "hosts" / "1" / "pid").read_text()), signal.SIGTERM)
        out, error = running.communicate(timeout=300)
    finally:
        running.kill()
    assert running.returncode == 0, out + error
    assert "machines lost" in out and "codes [42, 42]" in out, out

    assert saved(google.workdir) == saved(here.workdir)
    expected, arrays = (read_arrays(epath.Path(place.workdir), STEPS) for place in (here, google))
    assert expected.keys() == arrays.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(array, arrays[path], err_msg=path)


def wait(running: object, condition: Callable[[], bool]) -> None:
    """Until something holds while the launcher runs."""
    until(lambda: running.poll() is not None or condition(), seconds=300)
    assert running.poll() is None, running.communicate()
