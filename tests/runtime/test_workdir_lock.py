"""One run at a time writes into a workdir: whoever comes second is told, whoever was killed is no obstacle.

On one machine the system says who is dead; of another machine it is the silence of its file. No test uses a lock of the
file system, and neither does the code.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import subprocess
import sys
import threading
import time

import lock_holder
import pytest
from etils import epath

from memorizing.errors import UserError
from memorizing.runtime import workdir_lock
from memorizing.runtime.workdir_lock import WorkdirLock, held

BEAT, LIMIT = 0.02, 0.3


def lock(folder: pathlib.Path, machine: str | None = None) -> WorkdirLock:
    """One that counts a silence of 0.3 s as death."""
    return WorkdirLock(epath.Path(folder), machine, beat_seconds=BEAT, limit_seconds=LIMIT)


def claims(folder: pathlib.Path) -> list[pathlib.Path]:
    return list(folder.glob(".lock-*"))


def test_who_comes_second_is_told_and_leaves_no_trace(tmp_path: pathlib.Path):
    with held(epath.Path(tmp_path), print) as check:
        (mine,) = claims(tmp_path)
        with pytest.raises(UserError, match=r"process \d+ on .* is writing into .*wait .*another --workdir"):
            lock(tmp_path).acquire()
        assert claims(tmp_path) == [mine]
        check()
    assert claims(tmp_path) == []
    with held(epath.Path(tmp_path), print):
        pass


@pytest.mark.parametrize("machine", [None, "another"])
def test_a_holder_on_another_machine_is_seen_to_live(tmp_path: pathlib.Path, machine: str | None):
    holder = lock(tmp_path, "one")
    holder.acquire()
    with pytest.raises(UserError, match="is writing into"):
        lock(tmp_path, machine).acquire()
    holder.check()
    holder.release()
    assert claims(tmp_path) == []


def test_the_file_of_a_dead_process_is_removed(tmp_path: pathlib.Path):
    """Killed on this machine: at once. A number that was given to another process since is no sign of life."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid, started in ((ended.pid, "1"), (1, "12345678")):
        record = {"host": "here", "pid": pid, "started": started, "machine": workdir_lock._machine(), "holds": True}
        (tmp_path / ".lock-0").write_text(json.dumps(record))
        begin = time.monotonic()
        with held(epath.Path(tmp_path), print):
            assert not (tmp_path / ".lock-0").exists()
        assert time.monotonic() - begin < LIMIT


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"holds": true, "machine": "another"}', '{"machine": null, "pid": "x"}']
)
def test_a_file_that_never_changes_counts_as_dead_after_a_while(tmp_path: pathlib.Path, text: str):
    (tmp_path / ".lock-0").write_text(text)
    said = []
    first = WorkdirLock(epath.Path(tmp_path), beat_seconds=BEAT, limit_seconds=LIMIT, say=said.append)
    first.acquire()
    first.check()
    assert len(said) == 1 and said[0].startswith("waiting up to 0.3 s to see whether process ")
    assert len(claims(tmp_path)) == 1
    first.release()


def test_who_was_taken_for_dead_writes_no_more(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """A process that is stopped cannot know it: it asks before it writes."""
    stopped = lock(tmp_path, "one")
    stopped._ending.wait = lambda _: time.sleep(60)  # It does not beat.
    stopped.acquire()
    other = lock(tmp_path, "another")
    other.acquire()
    with pytest.raises(UserError, match="another process has taken over"):
        stopped.check()
    assert len(claims(tmp_path)) == 1, "it made its file anew"
    other.check()
    other.release()


@pytest.mark.parametrize("machines", [[None] * 4, ["a", "b", "c", "d"], [None, None, "a", "b"]])
def test_of_several_that_come_at_once_exactly_one_holds(tmp_path: pathlib.Path, machines: list[str | None]):
    rng = random.Random(0)
    for _ in range(12):
        barrier = threading.Barrier(len(machines))
        held_by: list[WorkdirLock] = []

        def want(machine: str | None, delay: float, barrier=barrier, held_by=held_by) -> None:
            mine = lock(tmp_path, machine)
            barrier.wait()
            time.sleep(delay)
            try:
                mine.acquire()
            except UserError:
                return
            held_by.append(mine)

        delays = [rng.choice([0, rng.uniform(0, 0.01)]) for _ in machines]
        threads = [threading.Thread(target=want, args=pair) for pair in zip(machines, delays, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(held_by) == 1
        held_by[0].check()
        held_by[0].release()
        assert claims(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are made by fork")
@pytest.mark.parametrize("rounds", [20, pytest.param(200, marks=pytest.mark.nightly)])
def test_processes_that_come_and_are_killed_at_random_moments_never_hold_together(tmp_path: pathlib.Path, rounds: int):
    ended = subprocess.run([sys.executable, lock_holder.__file__, str(tmp_path), str(rounds)], capture_output=True)
    assert ended.returncode == 0, ended.stderr.decode()
