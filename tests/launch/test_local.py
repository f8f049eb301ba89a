"""`memorizing launch local`: real processes under the contract of exit codes, killed, stopped and started again."""

from __future__ import annotations

import os
import pathlib
import signal
import sys

import pytest
from launching import NASTY, NASTY_BINDINGS, Workplace, exists_process, until

STEPS = 30


@pytest.fixture
def here(tmp_path: pathlib.Path) -> Workplace:
    return Workplace(tmp_path)


def test_processes_get_the_contract_and_their_arguments_untouched(here: Workplace):
    ended = here.launch(
        *("local", "--hosts=3", "--devices=4", f"--env=NOTE={NASTY}", *here.trainer(2), "--note", NASTY),
        *(f"--gin.{binding}" for binding in NASTY_BINDINGS),
    )
    assert ended.returncode == 0, ended.stderr
    coordinators = set()
    for process in range(3):
        told = here.told(process)
        assert told["arguments"][-len(NASTY_BINDINGS) :] == [f"--gin.{binding}" for binding in NASTY_BINDINGS]
        assert told["arguments"][2:4] == ["--note", NASTY]
        environment = told["environment"]
        assert environment["NOTE"] == NASTY
        assert environment["MEMORIZING_NUM_PROCESSES"] == "3"
        assert environment["MEMORIZING_CPU_DEVICES"] == "4"
        assert environment["JAX_PLATFORMS"] == "cpu"
        coordinators.add(environment["MEMORIZING_COORDINATOR"])
    assert len(coordinators) == 1 and coordinators.pop().startswith("127.0.0.1:")
    # The first process speaks for all; the others are found in their logs.
    assert "process 0, attempt 1, from step 0" in ended.stdout
    assert "process 1," not in ended.stdout
    assert "process 1, attempt 1, from step 0" in here.launch("logs", "local", "--process=1").stdout


def test_a_preempted_run_ends_like_an_undisturbed_one(here: Workplace):
    """One process is killed, one asked to stop, one fails: the same final state; the kill and the failure count."""
    strikes = "1:1:7:SIGKILL 2:0:12:SIGTERM 3:2:20:1"
    ended = here.launch("local", "--hosts=3", "--grace=1", "--restarts=2", *here.trainer(STEPS, strikes))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    here.assert_undisturbed(3, STEPS)
    assert here.attempts() == 4
    assert "saved, starts again" in ended.stdout


def test_failures_are_counted(here: Workplace):
    strikes = "1:1:3:1 2:0:6:SIGKILL 3:1:9:1"
    ended = here.launch("local", "--hosts=2", "--grace=1", "--restarts=1", *here.trainer(STEPS, strikes))
    assert ended.returncode == 1
    assert here.attempts() == 2
    # Run again, it goes on.
    ended = here.launch("local", "--hosts=2", "--grace=1", "--restarts=1", *here.trainer(STEPS, strikes))
    assert ended.returncode == 0
    here.assert_undisturbed(2, STEPS)


def test_a_mistake_ends_the_job_at_once(here: Workplace):
    ended = here.launch("local", "--hosts=2", "--grace=1", "--restarts=5", *here.trainer(STEPS, "1:1:3:2"))
    assert ended.returncode == 2
    assert here.attempts() == 1
    # What the process said that failed is shown, though it is not the first.
    assert "process 1, attempt 1, from step 0" in ended.stderr


def test_a_crash_takes_the_other_processes_along(here: Workplace):
    """The peers of a dead process wait for it for ever: they are ended."""
    program = (
        "import os, time; time.sleep(600 if os.environ['MEMORIZING_PROCESS_ID'] == '0' else 0); raise SystemExit(1)"
    )
    ended = here.launch("local", "--hosts=2", "--grace=1", "--program", f'"{sys.executable}" -c "{program}"')
    assert ended.returncode == 1
    assert "[-9, 1]" in ended.stdout


@pytest.mark.parametrize("how", ["ctrl-c", "terminated", "stop"])
def test_stopping_the_launcher_lets_all_processes_save(here: Workplace, how: str):
    running = here.start("local", "--name=first", "--hosts=2", *here.trainer(100_000))
    until(lambda: all((here.workdir / f"state-{process}.json").exists() for process in range(2)))
    assert "first: local, run by process" in here.launch("status", "first").stdout
    again = here.launch("local", "--name=first", "--program=true")
    assert again.returncode == 2 and "already running" in again.stderr
    if how == "stop":
        assert "stopped: outcome saved" in here.launch("stop", "first").stdout
    else:
        running.send_signal(signal.SIGINT if how == "ctrl-c" else signal.SIGTERM)
    out, _ = running.communicate(timeout=300)
    assert running.returncode == 42
    assert "[42, 42]" in out
    assert not any(exists_process(here.told(process)["pid"]) for process in range(2))
    assert "nothing runs it here" in here.launch("status", "first").stdout


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the processes of a launcher that was killed")
def test_no_process_outlives_a_launcher_that_was_killed(here: Workplace):
    """Else running it again would put two sets of processes on one workdir."""
    running = here.start("local", "--hosts=2", *here.trainer(100_000))
    until(lambda: all((here.workdir / f"told-{process}.json").exists() for process in range(2)))
    pids = [here.told(process)["pid"] for process in range(2)]
    assert all(map(exists_process, pids))
    running.kill()
    running.communicate()
    until(lambda: not any(map(exists_process, pids)))


def test_nothing_of_the_users_environment_is_written(here: Workplace):
    here.environment["WANDB_API_KEY"] = "a-secret-value"
    ended = here.launch("local", "--hosts=2", *here.trainer(2))
    assert here.told(0)["environment"]["WANDB_API_KEY"] == "a-secret-value"
    assert "a-secret-value" not in ended.stdout + ended.stderr + here.written()


def test_what_cannot_be_run(here: Workplace):
    for arguments, message in (
        (["--hosts=0"], "--hosts=0"),
        (["--name=Not_A_Label"], "not-a-label would do"),
        (["--program=/no/such/program"], "cannot be started"),
        (["--env=MY_TOKEN=1"], "--secret=MY_TOKEN=NAME"),
        (["--restarts=-1"], "--restarts=-1"),
    ):
        ended = here.launch("local", *arguments)
        assert ended.returncode == 2, arguments
        assert message in ended.stderr and "Traceback" not in ended.stderr
    ended = here.launch("status", "locl")
    assert ended.returncode == 2 and "no job 'locl' was launched from here" in ended.stderr
    assert os.listdir(here.folder / "jobs") == ["local"]
