"""`memorizing launch tpu-vm`: the command lines are right, and machines that are taken away are asked for again.

The program ends as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import FAKE_HOSTS, NASTY_BINDINGS, Workplace, has, until

from memorizing.launch import gke, supervisor, tpu_vm
from memorizing.launch.errors import LaunchError
from memorizing.launch.job import Job, Secret
from memorizing.launch.record import Record
from memorizing.launch.restarts import Outcome, outcome, run_with_restarts
from memorizing.launch.slices import SLICES
from memorizing.launch.tpu_vm import Zone

STEPS = 30
IMAGE = "us-docker.pkg.dev/project/repository/memorizing:1"
ZONE = Zone("europe-west4-a", "my-project")
# Whatever a process can be given as an argument.
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def job(**fields: object) -> Job:
    return Job(**{"name": "first", "slice": "v3-32", "image": IMAGE, "workdir": "gs://bucket/first"} | fields)


def commands(described: Job) -> list[list[str]]:
    """Every command line of gcloud that can be run for a job."""
    scripts = [
        tpu_vm.pull_script(described),
        tpu_vm.start_script(described),
        tpu_vm.state_script(described),
        tpu_vm.collect_script(described),
        tpu_vm.logs_script(described, 100, follow=True),
        tpu_vm.stop_script(described),
    ]
    return [
        tpu_vm.create_command(described, ZONE),
        tpu_vm.describe_command(described, ZONE),
        tpu_vm.delete_command(described, ZONE),
        *(tpu_vm.on_hosts(node, ZONE, script) for node in tpu_vm.nodes(described) for script in scripts),
        gke.node_pool_command(described),
    ]


@pytest.mark.skipif(not has("gcloud"), reason="the Google Cloud SDK is not installed")
def test_command_lines_pass_the_linter_of_gcloud(tmp_path: pathlib.Path):
    """A flag that does not exist is found; nothing is sent anywhere."""
    several = job(slice="v5litepod-32", slices=2, spot=False, secrets=(Secret("WANDB_API_KEY", "wandb"),))
    fetch = ["gcloud", "secrets", "versions", "access", "latest", "--secret=wandb"]
    login = ["gcloud", "auth", "configure-docker", "us-docker.pkg.dev", "--quiet"]
    # The linter cannot read a shell script in a flag.
    ours = [
        [re.sub(r"(?s)^--command=.*", "--command=true", word) for word in command]
        for command in (*commands(job()), *commands(several))
    ]
    good = [*ours, fetch, login]
    wrong = [*tpu_vm.create_command(job(), ZONE), "--best-effort"]
    listed = tmp_path / "commands.json"
    listed.write_text(json.dumps([{"command_string": shlex.join(command)} for command in [*good, wrong]]))
    linted = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={listed}"],
        env=os.environ | {"CLOUDSDK_CONFIG": str(tmp_path / "config"), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"},
        capture_output=True,
        text=True,
    )
    found = {entry["command_string"]: entry for entry in json.loads(linted.stdout)}
    for command in good:
        assert found[shlex.join(command)]["success"], found[shlex.join(command)]["error_message"]
    assert not found[shlex.join(wrong)]["success"]


@settings(max_examples=50)
@given(bindings=st.lists(TEXTS, max_size=4), note=TEXTS)
def test_arguments_and_variables_arrive_as_they_are(bindings: list[str], note: str):
    """Through the shell of a host, as gcloud and ssh hand a command to it."""
    described = job(bindings=tuple(bindings), environment=(("NOTE", note),))
    command = tpu_vm.on_hosts("first", ZONE, tpu_vm.start_script(described))[-1].removeprefix("--command=")
    handed_over = " ".join(command.split(" "))
    shown = f"sudo() {{ [ $2 = rm ] || printf '%s\\0' \"$@\"; }}\n{handed_over}"
    printed = subprocess.run(["bash", "-c", shown], capture_output=True).stdout.decode().split("\0")[:-1]
    assert printed[:2] == ["docker", "run"]
    image = printed.index(IMAGE)
    assert printed[image + 1 :] == described.command()
    assert f"--env=NOTE={note}" in printed[:image]


@settings(max_examples=20)
@given(bindings=st.lists(TEXTS, max_size=3))
def test_what_is_printed_is_what_runs(bindings: list[str]):
    """The plan is text for a shell: run, it makes the very command lines of the supervisor."""
    described = job(bindings=tuple(bindings))
    plan = tpu_vm.plan(described, ZONE, poll_s=30, keep=False)
    shown = f"gcloud() {{ printf '%s\\0' gcloud \"$@\" END; }}\n{plan}"
    printed = subprocess.run(["bash", "-c", shown], capture_output=True).stdout.decode()
    ran = [line.split("\0") for line in printed.split("\0END\0")[:-1]]
    for command in ran:
        assert command in commands(described)
    assert len(ran) == 6


def test_several_slices_are_one_request():
    described = job(slice="v5litepod-16", slices=2)
    created = tpu_vm.create_command(described, ZONE)
    assert {"--node-count=2", "--node-prefix=first"} <= set(created)
    assert tpu_vm.nodes(described) == ["first-0", "first-1"]


@pytest.mark.parametrize("wrong", [{"zone": "here; rm"}, {"zone": "europe-west4-a", "project": "$(id)"}])
def test_names_of_places_are_checked(wrong: dict[str, str]):
    with pytest.raises(LaunchError):
        Zone(**wrong)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], Outcome.DONE),
        ([42, 42], Outcome.START_AGAIN),
        ([42, 0], Outcome.START_AGAIN),
        # A machine went, the others saved.
        ([42, 137], Outcome.START_AGAIN),
        ([42, -9], Outcome.START_AGAIN),
        # One crashed, the others saw a lost neighbour.
        ([1, 42], Outcome.FAILED),
        ([1, 134], Outcome.FAILED),
        ([137, 0], Outcome.FAILED),
        ([2, 1], Outcome.MISTAKE),
    ],
)
def test_the_outcome_of_an_attempt(codes: list[int], expected: Outcome):
    assert outcome(codes) is expected
    assert outcome(codes[::-1]) is expected


@given(st.lists(st.sampled_from(list(Outcome))), st.integers(0, 5))
def test_only_failures_count(outcomes: list[Outcome], restarts: int):
    """The loop ends at the first success or mistake, or at one failure more than is allowed; nothing else ends it."""
    script = [*outcomes, Outcome.DONE]
    attempts = []

    def attempt(number: int) -> Outcome:
        attempts.append(number)
        return script[number - 1]

    code = run_with_restarts(attempt, restarts, lambda *_, **__: None)
    seen = script[: len(attempts)]
    assert attempts == list(range(1, len(attempts) + 1))
    assert not {Outcome.DONE, Outcome.MISTAKE} & set(seen[:-1])
    failures = seen.count(Outcome.FAILED)
    assert failures <= restarts + 1
    assert code == {Outcome.DONE: 0, Outcome.MISTAKE: 2}.get(seen[-1], 1)
    assert (code == 1) == (failures == restarts + 1)


class Script:
    """Answers the supervisor in place of Google.

    It is given what `describe` says in turn (None: there is no such request), and what the hosts say. The last answer
    is repeated.
    """

    def __init__(self, states: list[str | None], programs: list[str], fails: tuple[str, ...] = ()):
        self.states, self.programs, self.fails = states, programs, fails
        self.done: list[str] = []

    def __call__(self, command: list[str]) -> subprocess.CompletedProcess:
        what = next((verb for verb in ("create", "describe", "delete") if verb in command), "ssh")
        script = command[-1]
        if what == "ssh":
            what = next(verb for verb in ("pull", "run", "inspect", "logs") if f"docker {verb}" in script)
        if what == "describe":
            state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
            error = {None: "ERROR: NOT_FOUND: none", "offline": "ERROR: no network"}.get(state, "")
            return subprocess.CompletedProcess(command, bool(error), state or "", error)
        if what == "inspect":
            text = self.programs.pop(0) if len(self.programs) > 1 else self.programs[0]
            return subprocess.CompletedProcess(
                command, 0, "".join(f"memorizing-state {line}\n" for line in text.split(", ") if line), ""
            )
        self.done.append(what)
        return subprocess.CompletedProcess(command, what in self.fails, "", f"ERROR: {what} is refused")


RUNNING = ", ".join(["running 0"] * 4)
DONE = ", ".join(["exited 0"] * 4)


@pytest.mark.parametrize(
    ("states", "programs", "fails", "code", "done"),
    [
        # Nothing happens, first from nothing, then taken over.
        ([None, "ACTIVE"], [RUNNING, RUNNING, DONE], (), 0, "create logs delete"),
        (["ACTIVE"], [RUNNING, DONE], (), 0, "logs delete"),
        # A request of an earlier day is renewed; one that fails counts.
        (["SUSPENDED", None, "ACTIVE"], ["", DONE], (), 0, "delete create pull run logs delete"),
        ([None, "PROVISIONING", "FAILED", None, "FAILED"], [""], (), 1, "create delete create delete delete"),
        # Looks that fail are repeated; a supervisor that stays blind leaves what runs alone.
        (["offline", "offline", "ACTIVE"], [RUNNING, DONE], (), 0, "logs delete"),
        (["ACTIVE", "offline"], [RUNNING], (), 1, ""),
        # What cannot be asked for, and what cannot be started.
        ([None], [""], ("create",), 1, "create"),
        (["ACTIVE"], [""], ("pull",), 1, "pull pull delete"),
        # Machines that cannot be given back are tried again, and not forgotten.
        (["ACTIVE"], [RUNNING, DONE], ("delete",), 1, "logs delete delete delete"),
        # A host that does not answer for long is broken: its machines are replaced.
        (["ACTIVE"], [RUNNING, *["running 0, running 0, running 0"] * 21, DONE], (), 0, "delete pull run logs delete"),
        # The program is killed because the machines go.
        (
            ["ACTIVE"] * 3 + ["SUSPENDED", None, "ACTIVE"],
            [RUNNING, "exited 137, running 0, exited 137, exited 143", DONE],
            (),
            0,
            "logs delete create pull run logs delete",
        ),
        # A container that was removed behind our back is a failure.
        (["ACTIVE"], [RUNNING, "missing 0, exited 0, exited 0, exited 0", DONE], (), 0, "logs pull run logs delete"),
    ],
)
def test_the_supervisor(
    states: list[str | None],
    programs: list[str],
    fails: tuple[str, ...],
    code: int,
    done: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
):
    script = Script(list(states), list(programs), fails)
    monkeypatch.setenv("MEMORIZING_JOBS", str(tmp_path))
    monkeypatch.setattr(supervisor, "_call", script)
    assert supervisor.run(job(restarts=1), ZONE, supervisor.Pace(1e-4, 0.0), keep=False) == code
    assert " ".join(script.done) == done


@pytest.fixture
def google(tmp_path: pathlib.Path) -> Workplace:
    return Workplace(tmp_path)


FLAGS = ["tpu-vm", "--name=first", "--zone=europe-west4-a", f"--image={IMAGE}", "--apply", "--poll=0.2"]


def test_a_preempted_job_ends_like_an_undisturbed_one(google: Workplace):
    """Machines taken away, twice, SIGTERM and a kill.

    The machines are asked for again, the program starts on all of them, and only the kill counts.
    """
    strikes = "1:1:5:LOST 2:0:10:SIGTERM 3:1:15:LOST 4:0:20:SIGKILL"
    ended = google.launch(
        *(*FLAGS, "--slice=v4-16", "--restarts=1", "--grace=1", "--secret=NOTE=my-note"),
        *google.trainer(STEPS, strikes),
        *(f"--gin.{binding}" for binding in NASTY_BINDINGS),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    google.assert_undisturbed(FAKE_HOSTS["v4-16"], STEPS)
    verbs = [call[3] for call in google.calls("gcloud") if call[2] == "queued-resources"]
    assert (verbs.count("create"), verbs.count("delete")) == (3, 3)
    told = google.told(1)
    assert told["arguments"][-len(NASTY_BINDINGS) :] == [f"--gin.{binding}" for binding in NASTY_BINDINGS]
    assert told["environment"]["MEMORIZING_DISTRIBUTED"] == "1"
    assert told["environment"]["JAX_COORDINATOR_PORT"] == "8476"
    # The secret reaches the program, and nothing else.
    assert told["environment"]["NOTE"] == "value of my-note"
    calls = (google.cloud / "calls.jsonl").read_text()
    assert "value of my-note" not in ended.stdout + ended.stderr + google.written() + calls
    # What the hosts printed outlives them.
    assert "process 1, attempt 5" in google.launch("logs", "first").stdout


def test_several_slices_run_as_one_job(google: Workplace):
    ended = google.launch(*FLAGS, "--slice=v5p-16", "--slices=2", *google.trainer(STEPS, "1:3:5:LOST"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    google.assert_undisturbed(4, STEPS)


def test_a_mistake_ends_the_job_and_gives_the_machines_back(google: Workplace):
    ended = google.launch(*FLAGS, "--slice=v4-16", "--grace=1", *google.trainer(STEPS, "1:0:3:2 1:1:3:2"))
    assert ended.returncode == 2
    assert not (google.cloud / "request.json").exists()
    kept = google.launch(*FLAGS, "--slice=v4-16", "--grace=1", "--keep", *google.trainer(STEPS, "2:0:6:2 2:1:6:2"))
    assert kept.returncode == 2
    assert (google.cloud / "request.json").exists()


def test_failures_are_counted(google: Workplace):
    strikes = " ".join(f"{attempt}:1:{attempt}:1" for attempt in (1, 2, 3))
    ended = google.launch(*FLAGS, "--slice=v4-16", "--restarts=2", "--grace=0.5", *google.trainer(STEPS, strikes))
    assert ended.returncode == 1
    assert google.attempts() == 3


def test_a_supervisor_can_go_and_come_back(google: Workplace):
    """The job runs on meanwhile, and is taken over: it is not started again."""
    arguments = [*FLAGS, "--slice=v4-16", *google.trainer(300)]
    running = google.start(*arguments)
    until(lambda: (google.workdir / "state-0.json").exists())
    running.send_signal(signal.SIGINT)
    out, _ = running.communicate(timeout=300)
    assert running.returncode == 42 and "takes it over" in out
    ended = google.launch(*arguments)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "taken over" in ended.stdout
    google.assert_undisturbed(2, 300)
    assert google.attempts() == 1


@pytest.mark.parametrize(
    ("change", "program", "is_refused"),
    [
        ({"bindings": ("A.b=2",)}, RUNNING, True),
        ({"bindings": ("A.b=2",)}, DONE, False),
        ({"restarts": 3}, RUNNING, False),
        ({"slice": "v4-16"}, DONE, True),
    ],
)
def test_a_job_that_runs_with_other_flags_is_not_taken_over(
    change: dict[str, Any],
    program: str,
    is_refused: bool,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("MEMORIZING_JOBS", str(tmp_path))
    launched = job(restarts=1)
    Record(launched.name).save("tpu-vm", ZONE, launched)
    script = Script(["ACTIVE"], [program, program, DONE])
    monkeypatch.setattr(supervisor, "_call", script)
    begin = functools.partial(
        supervisor.run, dataclasses.replace(launched, **change), ZONE, supervisor.Pace(1e-4, 0.0), keep=True
    )
    if is_refused:
        with pytest.raises(LaunchError, match=r"runs with other flags.*launch stop"):
            begin()
        assert script.done == [] and Record(launched.name).load()[2] == launched
    else:
        assert begin() == 0


def test_stopping_a_job_lets_it_save_and_gives_the_machines_back(google: Workplace):
    # As a script starts it in the background: Ctrl-C is ignored.
    background = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    running = google.start(*FLAGS, "--slice=v4-16", *google.trainer(100_000), **background)
    until(lambda: all((google.workdir / f"state-{process}.json").exists() for process in range(2)))
    status = google.launch("status", "first")
    assert "run by process" in status.stdout and "ACTIVE" in status.stdout
    assert google.launch("stop", "first").returncode == 0
    running.communicate(timeout=300)
    assert running.returncode == 42
    stopped = [call for call in google.calls("docker") if call[0] == "stop"]
    assert len(stopped) == 2
    assert not (google.cloud / "request.json").exists()
    assert google.attempts() == 1


def test_without_apply_nothing_is_run_or_written(google: Workplace):
    printed = google.launch(
        *("tpu-vm", "--name=first", "--zone=europe-west4-a", f"--image={IMAGE}", "--slice=v4-16"),
        *("--", "--gin_file=smoke", "--workdir=gs://bucket/first"),
    )
    assert printed.returncode == 0, printed.stderr
    assert "gcloud compute tpus queued-resources create first" in printed.stdout
    assert not (google.cloud / "calls.jsonl").exists() and not (google.folder / "jobs").exists()


def test_the_table_of_slices(google: Workplace):
    """The rows that pods of 32 cores or chips have in Google's documentation."""
    expected = {
        "v3-32": (16, 32, 4, 16),
        "v4-32": (16, 16, 4, 32),
        "v5litepod-32": (32, 32, 8, 16),
        "v5p-32": (16, 16, 4, 95),
        "v6e-32": (32, 32, 8, 32),
    }
    for name, row in expected.items():
        entry = SLICES[name]
        assert (entry.chips, entry.devices, entry.hosts, entry.hbm_gb) == row
    printed = google.launch("slices").stdout
    for name in SLICES:
        assert re.search(rf"^{name} ", printed, re.MULTILINE)
