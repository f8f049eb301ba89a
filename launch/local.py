"""The backend `local`: N processes on this machine, each with its own CPU devices.

Environment and exit codes mean the same as on a pod.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .errors import LaunchError
from .job import Job
from .record import Record
from .restarts import DONE, START_AGAIN, Outcome, outcome, run_with_restarts

_POLL_S = 0.1
# Peers of a process that crashed can save nothing: they get this long to notice and to end with its code.
_CRASH_GRACE_S = 5.0
_TOLD_LINES = 20
_PR_SET_PDEATHSIG = 1
# JAX's transport between processes tells of every connection, in lines that its threads tear apart.
_NOISE = (b"[Gloo]", b" is connected to ")


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Where a local job runs. Raises LaunchError for what cannot work.

    Attributes:
      hosts: number of processes.
      devices: CPU devices of each.
      grace_s: seconds that processes get to save when they are asked to stop.
    """

    hosts: int = 1
    devices: int = 1
    grace_s: float = 120.0

    def __post_init__(self) -> None:
        if self.hosts < 1 or self.devices < 1 or self.grace_s < 0:
            raise LaunchError(
                f"--hosts={self.hosts} --devices={self.devices} --grace={self.grace_s}: expected 1 or more hosts and "
                "devices, and a grace of 0 or more seconds"
            )


class Stopped(Exception):
    """The launcher was asked to stop, and every process has ended. Holds the outcome."""


def environment(job: Job, hosts: Hosts, process: int, port: int) -> dict[str, str]:
    """Environment variables of a process, besides those that it inherits. A single process has no coordinator."""
    others = {
        "MEMORIZING_COORDINATOR": f"127.0.0.1:{port}",
        "MEMORIZING_NUM_PROCESSES": str(hosts.hosts),
        "MEMORIZING_PROCESS_ID": str(process),
    }
    own = {"JAX_PLATFORMS": "cpu", "MEMORIZING_CPU_DEVICES": str(hosts.devices), "PYTHONUNBUFFERED": "1"}
    return dict(job.environment) | own | (others if hosts.hosts > 1 else {})


def run(job: Job, hosts: Hosts) -> int:
    """Runs the job here until it ends, and returns its exit code.

    Raises:
      LaunchError: a job of this name is running.
    """
    record = Record(job.name)
    with record.held():
        record.save("local", hosts, job)
        stop = StopRequest()
        try:
            return run_with_restarts(lambda _: _attempt(job, hosts, record, stop), job.restarts, record.report)
        except Stopped as stopped:
            ended = stopped.args[0]
            record.report("stopped", outcome="saved" if ended is Outcome.START_AGAIN else ended.value)
            return {Outcome.START_AGAIN: START_AGAIN, Outcome.DONE: DONE}.get(ended, 1)
        finally:
            stop.restore()


class StopRequest:
    """Remembers SIGTERM and Ctrl-C; `times` is how often they came."""

    def __init__(self) -> None:
        self.times = 0
        self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}

    def _remember(self, *_: object) -> None:
        self.times += 1

    def restore(self) -> None:
        """Restores the signal handlers from before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _attempt(job: Job, hosts: Hosts, record: Record, stop: StopRequest) -> Outcome:
    folder = record.attempt_folder()
    logs = [folder / f"process-{process}.log" for process in range(hosts.hosts)]
    port = _free_port()
    processes: list[subprocess.Popen] = []
    try:
        for process, log in enumerate(logs):
            processes.append(_start(job.command(), environment(job, hosts, process, port), log))
        record.report("started", processes=hosts.hosts, devices_each=hosts.devices, logs=str(folder))
        codes = _wait(processes, hosts.grace_s, stop, _follow(logs[0]))
    finally:
        _kill(processes)
    record.report("exit codes", codes=codes)
    ended = outcome(codes)
    if ended in (Outcome.FAILED, Outcome.MISTAKE):
        _tell(codes, logs)
    if stop.times:
        raise Stopped(ended)
    return ended


def _start(command: list[str], told: dict[str, str], log: Path) -> subprocess.Popen:
    try:
        with open(log, "wb") as output:
            # A session of its own: Ctrl-C reaches the launcher alone, which lets all processes save.
            return subprocess.Popen(
                command,
                env=os.environ | told,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_launcher if sys.platform == "linux" else None,
            )
    except OSError as error:
        raise LaunchError(f"{command[0]!r} cannot be started: {error.strerror}") from error


def _die_with_launcher() -> None:
    """Two sets of processes must never write to one workdir: none outlives a launcher that was killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(
    processes: list[subprocess.Popen], grace_s: float, stop: StopRequest, follow: Callable[[bool], None]
) -> list[int]:
    """Waits until all processes have ended, and returns their exit codes.

    When one ends with an error, the others get a little time, and then they are killed.
    """
    deadline = None
    asked = 0
    codes = [process.poll() for process in processes]
    while None in codes:
        follow(False)
        if stop.times > asked:
            asked = stop.times
            _signal(processes, signal.SIGTERM if asked == 1 else signal.SIGKILL)
            deadline = time.monotonic() + grace_s
        errors = [code for code in codes if code]
        if errors and deadline is None:
            all_saved = set(errors) == {START_AGAIN}
            deadline = time.monotonic() + (grace_s if all_saved else min(grace_s, _CRASH_GRACE_S))
        if deadline is not None and time.monotonic() > deadline:
            _kill(processes)
        time.sleep(_POLL_S)
        codes = [process.poll() for process in processes]
    follow(True)
    return [process.wait() for process in processes]


def _signal(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _kill(processes: list[subprocess.Popen]) -> None:
    _signal(processes, signal.SIGKILL)
    for process in processes:
        process.wait()


def _follow(log: Path) -> Callable[[bool], None]:
    """A function that prints what was added to the log since its last call.

    It prints whole lines, or everything when it is told that this is the end.
    """
    position = 0

    def follow(is_end: bool) -> None:
        nonlocal position
        with open(log, "rb") as file:
            file.seek(position)
            text = file.read()
        whole = text if is_end else text[: text.rfind(b"\n") + 1]
        position += len(whole)
        told = [line for line in whole.splitlines(keepends=True) if not line.startswith(_NOISE)]
        print(b"".join(told).decode(errors="replace"), end="", flush=True)

    return follow


def _tell(codes: list[int], logs: list[Path]) -> None:
    """Prints the last lines of the process that failed, unless its output was shown all along."""
    expected = (DONE, START_AGAIN, -signal.SIGKILL)
    failed = next((process for process, code in enumerate(codes) if code not in expected), 0)
    # The output of process 0 was printed as it came.
    if failed:
        print(f"the last lines of process {failed} ({logs[failed]}):", file=sys.stderr)
        for line in logs[failed].read_text(errors="replace").splitlines()[-_TOLD_LINES:]:
            print(f"  {line}", file=sys.stderr)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
