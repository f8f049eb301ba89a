"""Keeps a job running on queued resources: asks for machines, and starts the program on all hosts.

It does both again when the machines are taken away. A request goes through WAITING_FOR_RESOURCES, PROVISIONING and
ACTIVE, and when its machines are taken away through SUSPENDING to SUSPENDED, where it stays for ever: it is deleted and
asked for again.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import signal
import subprocess
import time

from . import tpu_vm
from .errors import LaunchError
from .job import Job
from .record import Record
from .restarts import FAILED, START_AGAIN, Outcome, outcome, run_with_restarts
from .tpu_vm import STATE_MARK, Zone

# Hosts of an ACTIVE request that cannot be reached so often in a row are taken to be broken.
_PATIENCE = 20
_DELETIONS = 3
_GONE = ("SUSPENDED", "FAILED")
_STATE_LINE = re.compile(rf"^{STATE_MARK} (\w+) (\d+)\s*$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Pace:
    """How often the supervisor looks, in seconds. Raises LaunchError for what is no time.

    Attributes:
      poll_s: between two looks at the request and at the hosts.
      grace_s: for the other hosts, when the program has ended with an error on one.
    """

    poll_s: float = 30.0
    grace_s: float = 180.0

    def __post_init__(self) -> None:
        if self.poll_s <= 0 or self.grace_s < 0:
            raise LaunchError(
                f"--poll={self.poll_s:g} --grace={self.grace_s:g}: expected seconds, the first more than 0"
            )


class CannotGoOn(Exception):
    """The command line of Google Cloud refuses what cannot be done without."""


def run(job: Job, zone: Zone, pace: Pace, keep: bool) -> int:
    """Supervises the job until it ends and returns its exit code. Found running, it is taken over.

    Args:
      keep: leave the machines when the job has ended, for whatever reason.

    Raises:
      LaunchError: a job of this name runs with other flags.
    """
    record = Record(job.name)
    # `memorizing launch stop` asks by SIGTERM: what a script starts in the background ignores Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with record.held():
        try:
            _check_takes_over(job, pace, record)
            record.save("tpu-vm", zone, job)
            supervisor = Supervisor(job, zone, pace, record)
            code = run_with_restarts(supervisor.attempt, job.restarts, record.report, pace.poll_s)
            if not keep:
                supervisor.delete()
            return code
        except CannotGoOn as error:
            # What cannot be seen may well be running.
            record.report(
                "gave up", because=str(error), note=f"what runs goes on; memorizing launch stop {job.name} ends it"
            )
            return FAILED
        except KeyboardInterrupt:
            record.report("supervisor stopped", note="the job runs on; the same command takes it over")
            return START_AGAIN


def _check_takes_over(job: Job, pace: Pace, record: Record) -> None:
    """Raises LaunchError where a job of this name runs that is another one, or has machines of another kind.

    It would go on as it was started, and what is given now would come into force when its machines are taken away.
    """
    if not record.is_known:
        return
    backend, place, before = record.load()
    if backend != "tpu-vm" or dataclasses.replace(before, restarts=job.restarts) == job:
        return
    kind = (job.slice, job.slices)
    if Supervisor(before, Zone(**place), pace, record).is_in_the_way((before.slice, before.slices) != kind):
        raise LaunchError(
            f"--name={job.name}: it runs with other flags; the same command takes it over, and `memorizing launch stop "
            f"{job.name}` ends it"
        )


class Supervisor:
    """One job on queued resources."""

    def __init__(self, job: Job, zone: Zone, pace: Pace, record: Record):
        self._job = job
        self._zone = zone
        self._pace = pace
        self._record = record
        self._last_state: str | None = ""

    def attempt(self, number: int) -> Outcome:
        """Gets machines, runs the program on all of them, and tells how it ended."""
        if not self._machines():
            return Outcome.FAILED
        if number == 1 and set(self._programs() or []) == {("running", 0)}:
            self._record.report("taken over", hosts=self._job.hosts)
        elif not self._start():
            return self._unless_lost(Outcome.FAILED)
        ended = self._watch()
        return ended if ended is not Outcome.FAILED else self._unless_lost(ended)

    def is_in_the_way(self, of_other_machines: bool) -> bool:
        """Whether another job cannot begin on its machines: they are of another kind, or its program may still run."""
        state = self._state()
        if state is None or state in _GONE:
            return False
        programs = self._programs() if state == "ACTIVE" else []
        return of_other_machines or programs is None or ("running", 0) in programs

    def delete(self) -> None:
        """Gives the machines back. Raises CannotGoOn if that is refused again and again: they would be paid for."""
        for _ in range(_DELETIONS):
            deleted = self._run(tpu_vm.delete_command(self._job, self._zone))
            if not deleted.returncode or "NOT_FOUND" in deleted.stderr:
                return
            time.sleep(self._pace.poll_s)
        raise CannotGoOn(f"the machines cannot be given back: {_last_line(deleted.stderr)}")

    def _machines(self) -> bool:
        """Waits until the request is ACTIVE, making or renewing it. False if it failed."""
        created = False
        while True:
            state = self._state()
            if state == "ACTIVE":
                return True
            if state is None:
                made = self._run(tpu_vm.create_command(self._job, self._zone))
                if made.returncode:
                    raise CannotGoOn(f"the machines cannot be asked for: {_last_line(made.stderr)}")
                created = True
            elif state in _GONE:
                self.delete()
                if created and state == "FAILED":
                    return False
            time.sleep(self._pace.poll_s)

    def _start(self) -> bool:
        """Starts the program on every host; False if it could not be on one of them."""
        for script in (tpu_vm.pull_script(self._job), tpu_vm.start_script(self._job)):
            for node in tpu_vm.nodes(self._job):
                started = self._run(tpu_vm.on_hosts(node, self._zone, script))
                if started.returncode:
                    self._record.report("cannot start", node=node, because=_last_line(started.stderr))
                    return False
        self._record.report("started", hosts=self._job.hosts)
        return True

    def _watch(self) -> Outcome:
        """Looks at every host until the program has ended on all, or until waiting for the rest has no point."""
        unreachable = 0
        deadline = None
        while True:
            time.sleep(self._pace.poll_s)
            if self._state() != "ACTIVE":
                return Outcome.MACHINES_LOST
            programs = self._programs()
            if programs is None:
                unreachable += 1
                if unreachable > _PATIENCE:
                    self._record.report("hosts cannot be reached", looks=unreachable)
                    self.delete()
                    return Outcome.MACHINES_LOST
                continue
            unreachable = 0
            codes = [code for status, code in programs if status != "running"]
            if any(codes) and deadline is None:
                deadline = time.monotonic() + self._pace.grace_s
            if len(codes) == len(programs) or (deadline is not None and time.monotonic() > deadline):
                self._record.report("exit codes", codes=codes, running=len(programs) - len(codes))
                self._collect_logs()
                return outcome(codes)

    def _unless_lost(self, ended: Outcome) -> Outcome:
        """Machines that are taken away may kill the program before the request says so."""
        time.sleep(self._pace.poll_s)
        return ended if self._state() == "ACTIVE" else Outcome.MACHINES_LOST

    def _state(self) -> str | None:
        """State of the request; None if there is none. A look that fails for another reason is repeated."""
        for _ in range(_PATIENCE):
            described = _call(tpu_vm.describe_command(self._job, self._zone))
            missing = described.returncode != 0 and "NOT_FOUND" in described.stderr
            if missing or described.returncode == 0:
                state = None if missing else described.stdout.strip()
                if state != self._last_state:
                    self._record.report("request", state=state or "none yet")
                self._last_state = state
                return state
            time.sleep(self._pace.poll_s)
        raise CannotGoOn(f"the request cannot be looked at: {_last_line(described.stderr)}")

    def _programs(self) -> list[tuple[str, int]] | None:
        """Status and exit code of the program on every host; None if a host cannot be reached.

        A container that is missing counts as failed.
        """
        found = []
        for node in tpu_vm.nodes(self._job):
            asked = _call(tpu_vm.on_hosts(node, self._zone, tpu_vm.state_script(self._job)))
            found += _STATE_LINE.findall(asked.stdout)
        if len(found) != self._job.hosts:
            self._record.report("no answer", answered=len(found), hosts=self._job.hosts)
            return None
        return [_program(status, int(code)) for status, code in found]

    def _collect_logs(self) -> None:
        folder = self._record.attempt_folder()
        for index, node in enumerate(tpu_vm.nodes(self._job)):
            printed = _call(tpu_vm.on_hosts(node, self._zone, tpu_vm.collect_script(self._job)))
            (folder / f"slice-{index}.log").write_text(printed.stdout)
        self._record.report("output kept", folder=str(folder))

    def _run(self, command: list[str]) -> subprocess.CompletedProcess:
        print(f"$ {shlex.join(command)}", flush=True)
        return _call(command)


def _program(status: str, code: int) -> tuple[str, int]:
    if status in ("exited", "dead"):
        return "exited", code
    return ("missing", FAILED) if status == "missing" else ("running", 0)


def _call(command: list[str]) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise LaunchError(
            f"{command[0]} is not installed here; without --apply the commands are only printed"
        ) from None


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no reason given")
