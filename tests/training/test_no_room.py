"""A machine without room, memory or permission is told in one line, with the last good checkpoint; exit code 1."""

from __future__ import annotations

import errno
import os
import pathlib
import re

import jax
import pytest
from etils import epath

from memorizing import main
from memorizing.errors import UserError, what_the_machine_lacks
from memorizing.runtime.json_lines import JsonLines, replace_bytes
from memorizing.training.checkpoint import Checkpointer

COMMAND = [
    *("train", "--gin_file=smoke", "--gin.LMConfig.num_layers=1", "--gin.LMConfig.attention_at=()"),
    *("--gin.LMConfig.embed_dim=8", "--gin.LMConfig.head_dim=4", "--gin.LMConfig.mlp_dim=8"),
    *("--gin.LoopConfig.num_steps=4", "--gin.LoopConfig.checkpoint_every=2", "--gin.LoopConfig.log_every=1"),
]


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/mnt/full")


def told_by(capsys: pytest.CaptureFixture) -> str:
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and "Traceback" not in told, told
    return told


def test_a_full_disk_ends_a_run_in_one_line(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """In the second save, in the metrics, at the end; with what the failing run itself wants to write."""
    save = Checkpointer.save

    def save_once(checkpointer: Checkpointer, state, rows) -> None:
        # In a thread of Orbax it is told by another exception, which has the system's words.
        if checkpointer.steps:
            raise ValueError("RESOURCE_EXHAUSTED: writing chunk: No space left on device")
        save(checkpointer, state, rows)
        checkpointer.wait()

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", save_once)
        patch.setattr(JsonLines, "append", lambda file, line: full() if line.get("event") == "failure" else None)
        assert main._run([*COMMAND, f"--workdir={tmp_path}"]) == 1
    told = told_by(capsys)
    assert re.search(r"No space left on device.*the last good checkpoint is that of step 2$", told.strip()), told
    assert not list(tmp_path.glob(".lock-*"))

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "append", full)
        assert main._run([*COMMAND, f"--workdir={tmp_path}"]) == 1
    assert re.search(r"No space left on device: /mnt/full", told_by(capsys))
    # Once there is room again, the same command goes on.
    assert main._run([*COMMAND, f"--workdir={tmp_path}"]) == 0
    assert "continuing from step 2" in capsys.readouterr().out


def test_what_is_not_written_whole_is_not_there(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    path = epath.Path(tmp_path) / "evaluation.json"
    replace_bytes(path, b"old")
    write = type(path).write_bytes

    def write_half(where: epath.Path, content: bytes) -> None:
        write(where, content[:1])
        full()

    monkeypatch.setattr(type(path), "write_bytes", write_half)
    with pytest.raises(OSError, match="No space left"):
        replace_bytes(path, b"new")
    assert [child.name for child in tmp_path.iterdir()] == ["evaluation.json"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "quota exceeded"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "/root/x"), "Permission denied: /root/x"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "/x"), "Read-only file system: /x"),
        (OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/x"), "Stale file handle: /x"),
        (MemoryError(), "out of memory"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nMore."),
            "allocating 7 bytes",
        ),
        (ValueError("zarr: [OS error 122: Disk quota exceeded]"), "quota exceeded"),
    ],
)
def test_every_command_tells_what_the_machine_lacks(
    error: Exception, told: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    from memorizing.commands import evaluate

    def run(*_: object) -> int:
        raise error

    monkeypatch.setattr(evaluate, "run", run)
    assert main._run(["evaluate"]) == 1
    assert told in told_by(capsys)


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("x"), FileNotFoundError(2, "x"), UserError("y")])
def test_a_bug_is_no_lack(error: Exception):
    assert what_the_machine_lacks(error) is None


def test_what_says_itself_what_to_do_stays():
    error = UserError("y cannot be read: choose another")
    error.__cause__ = PermissionError(errno.EACCES, "Permission denied")
    assert what_the_machine_lacks(error) is None
