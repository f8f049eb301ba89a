"""Folders that are made in many steps: seen only when whole, gone on with after a kill, of one process at a time."""

import subprocess
import sys
import threading

import pytest

from memorizing.data.errors import DataError
from memorizing.data.tokens import staging

PLAN = {"made": "from this", "parts": [["a", "b"], ["c"]]}


def make(target, plan=PLAN, **options):
    return staging.staged(str(target), "last", plan, **options)


def test_a_folder_is_seen_when_it_is_whole(tmp_path):
    target = tmp_path / "sub" / "folder"
    with make(target) as folder:
        (folder.path / "last").write_text("x")
        (folder.work / "needed on the way").write_text("x")
        assert not target.exists()
    assert [entry.name for entry in target.iterdir()] == ["last"]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_whoever_was_stopped_goes_on(tmp_path, error):
    with pytest.raises(error), make(tmp_path / "folder") as folder:
        (folder.work / "part").write_text("done")
        raise error
    assert not (tmp_path / "folder").exists()
    with make(tmp_path / "folder") as folder:
        assert (folder.work / "part").read_text() == "done"
        (folder.path / "last").write_text("x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_mistake_of_the_user_leaves_nothing(tmp_path):
    with pytest.raises(DataError), make(tmp_path / "folder") as folder:
        (folder.work / "part").write_text("done")
        raise DataError("wrong")
    assert list(tmp_path.iterdir()) == []


def test_what_another_plan_began_is_thrown_away(tmp_path):
    with pytest.raises(KeyboardInterrupt), make(tmp_path / "folder") as folder:
        (folder.work / "part").write_text("done")
        (folder.path / "stray").write_text("done")
        raise KeyboardInterrupt
    with make(tmp_path / "folder", PLAN | {"made": "from that"}) as folder:
        assert not (folder.work / "part").exists()
        (folder.path / "last").write_text("x")
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["last"]


def test_a_folder_gives_way_only_when_asked_and_only_at_the_end(tmp_path):
    for content in ("first", "second"):
        with make(tmp_path / "folder") as folder:
            if content == "second":
                assert folder is None
            else:
                (folder.path / "last").write_text(content)
    assert (tmp_path / "folder" / "last").read_text() == "first"
    with make(tmp_path / "folder", replace=True) as folder:
        assert (tmp_path / "folder" / "last").read_text() == "first"
        (folder.path / "last").write_text("third")
    assert (tmp_path / "folder" / "last").read_text() == "third"
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_cannot_be_written_is_found_out_first(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*file/cache"), make(tmp_path / "file" / "cache"):
        pytest.fail("the work began")


def test_an_error_of_the_source_is_not_taken_for_one_of_the_folder(tmp_path):
    with pytest.raises(PermissionError), make(tmp_path / "folder"):
        raise PermissionError("the source")


def test_the_second_of_two_waits_and_finds_it_done(tmp_path):
    waiting, found = threading.Event(), []

    def second():
        with make(tmp_path / "folder", wait=waiting.set) as folder:
            found.append(folder)

    thread = threading.Thread(target=second)
    with make(tmp_path / "folder") as folder:
        thread.start()
        assert waiting.wait(10)
        (folder.path / "last").write_text("x")
        assert not found
    thread.join(10)
    assert found == [None]
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_the_second_of_two_goes_on_where_the_first_was_killed(tmp_path):
    program = f"""
import os, signal
from memorizing.data.tokens import staging
with staging.staged({str(tmp_path / "folder")!r}, "last", {PLAN!r}) as folder:
    (folder.work / "part").write_text("done")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    with make(tmp_path / "folder", wait=lambda: pytest.fail("nobody holds it")) as folder:
        assert (folder.work / "part").read_text() == "done"
        (folder.path / "last").write_text("x")


def test_scratch_is_gone_when_the_file_is_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), staging.scratch(str(tmp_path / "file"), PLAN) as folder:
        (folder.work / "part").write_text("done")
        raise KeyboardInterrupt
    with staging.scratch(str(tmp_path / "file"), PLAN) as folder:
        assert (folder.work / "part").exists()
        staging.save(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
