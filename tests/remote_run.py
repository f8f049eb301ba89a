"""Everything that a run writes and reads, in an object store.

A program of its own, since the clients of a store read the environment.

    python remote_run.py gs://BUCKET/FOLDER

The last line is what was loaded that should not have been.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import urllib.parse
import urllib.request

import jax.numpy as jnp
import pytest
import written_run

from memorizing import main
from memorizing.errors import UserError
from memorizing.runtime.workdir import resolve
from memorizing.runtime.workdir_lock import held, writer
from memorizing.training.checkpoint import Checkpointer, saved_steps
from memorizing.training.state import TrainState


def state(step: int) -> TrainState:
    params = {"table": jnp.full((4, 2), step, jnp.float32)}
    return TrainState(jnp.int32(step), params, {}, {}, jnp.zeros(2, jnp.uint32), {"cache": jnp.ones((2, 3))})


def checkpoints(folder: str) -> None:
    """Two are saved, one of them not to its end; the other is found, and the lost one is saved again."""
    workdir = resolve(folder)
    checkpointer = Checkpointer(workdir, keep=2)
    for step in (1, 2):
        checkpointer.save(state(step), {"row": step})
        checkpointer.wait()
    checkpointer.close()
    assert saved_steps(workdir) == [1, 2]
    (workdir / "checkpoints" / "2" / "commit_success.txt").unlink()
    assert saved_steps(workdir) == [1]
    again = Checkpointer(workdir, keep=2)
    restored = again.restore(state(0))
    assert int(restored.state.step) == 1 and float(restored.state.params["table"][3, 1]) == 1
    assert restored.rows == {"row": 1}
    again.save(state(2), {"row": 2})
    again.save(state(3), {"row": 3})
    again.wait()
    again.close()
    assert saved_steps(workdir) == [2, 3], saved_steps(workdir)


def looking(folder: str) -> None:
    """A run is written, and looked at while it is held and afterwards."""
    workdir = written_run.write(resolve(f"{folder}/written"))
    (events,) = (workdir / "events").glob("events.out.tfevents.*")
    assert b"train/layer_01/gate/0" in events.read_bytes()
    with held(workdir, print):
        assert shown("status", str(workdir))["state"] == "training"
        with pytest.raises(UserError, match="is writing into"), held(workdir, print):
            pass
    assert shown("status", str(workdir))["state"] == "finished"
    # Of a process elsewhere, which no listing that was made before can know.
    write_elsewhere(f"{workdir}/.lock-elsewhere", json.dumps({"host": "far", "pid": 7, "holds": True}))
    assert writer(workdir) == "process 7 on far"
    (workdir / ".lock-elsewhere").unlink()
    assert shown("status", str(workdir))["checkpoint"] == 40
    assert {*shown("runs", folder)} == {"written"}
    # What another machine adds to what was listed and read: a run, and lines of one.
    write_elsewhere(f"{folder}/second/config.gin", "")
    grown = (workdir / "metrics.jsonl").read_text() + json.dumps({"step": 41, "kind": "train", "loss": 1.0}) + "\n"
    write_elsewhere(f"{workdir}/metrics.jsonl", grown)
    assert {*shown("runs", folder)} == {"written", "second"}
    assert shown("status", str(workdir))["step"] == 41
    assert main._run(["report", str(workdir)]) == 0
    assert "<svg" in (workdir / "report.html").read_text()


def write_elsewhere(path: str, text: str) -> None:
    """Writes an object without this process's clients."""
    bucket, _, name = path.removeprefix("gs://").partition("/")
    query = urllib.parse.urlencode({"uploadType": "media", "name": name})
    address = f"{os.environ['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/{bucket}/o?{query}"
    urllib.request.urlopen(urllib.request.Request(address, text.encode(), method="POST")).close()


def shown(command: str, path: str) -> dict:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main._run([command, path, "--json"]) == 0
    return json.loads(printed.getvalue())


if __name__ == "__main__":
    (given,) = sys.argv[1:]
    checkpoints(f"{given}/saved")
    looking(f"{given}/runs")
    print([name for name in ("tensorflow", "seqio", "memorizing.data") if name in sys.modules])
