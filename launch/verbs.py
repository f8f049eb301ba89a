"""What can be done with a job that was launched from here: `status`, `logs` and `stop`, for every backend."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from . import gke, tpu_vm
from .errors import LaunchError
from .gke import Cluster
from .record import Record, known_jobs
from .restarts import DONE, FAILED
from .tpu_vm import Zone

_POLL_S = 0.2
_HISTORY = 10


def status(name: str | None) -> int:
    """Prints the state of a job; without a name, a line for each job."""
    if name is None:
        for known in known_jobs():
            record = Record(known)
            backend, _, _ = record.load()
            print(f"{known}: {backend}, {_last(record)}")
        return DONE
    record = Record(name)
    backend, place, job = record.load()
    holder = record.holder()
    if backend == "gke":
        return _show_all(gke.status_commands(job, Cluster(**place)))
    run_by = f"run by process {holder}" if holder else "nothing runs it here"
    print(f"{name}: {backend}, {run_by}; {record.folder}")
    for entry in record.history()[-_HISTORY:]:
        print(f"  {_line(entry)}")
    return _show(tpu_vm.describe_command(job, Zone(**place))) if backend == "tpu-vm" else DONE


def logs(name: str, process: int, lines: int, follow: bool) -> int:
    """Prints the last lines of a process's output, and goes on as more comes if told to, until Ctrl-C."""
    try:
        return _logs(name, process, lines, follow)
    except KeyboardInterrupt:
        return DONE


def _logs(name: str, process: int, lines: int, follow: bool) -> int:
    record = Record(name)
    backend, place, job = record.load()
    if backend == "gke":
        return _show(gke.logs_command(job, Cluster(**place), process, lines, follow))
    if backend == "local":
        return _print_log(record, f"process-{process}", lines, follow)
    node, worker = divmod(process, job.machine.hosts)
    if node >= job.slices:
        raise LaunchError(f"--process={process}: the job has {job.hosts} hosts, 0 to {job.hosts - 1}")
    script = tpu_vm.logs_script(job, lines, follow)
    command = tpu_vm.on_hosts(tpu_vm.nodes(job)[node], Zone(**place), script, str(worker))
    if _show(command) == DONE:
        return DONE
    return _print_log(record, f"slice-{node}", lines, follow=False)


def stop(name: str) -> int:
    """Lets a job save, ends it, and gives its machines back."""
    record = Record(name)
    backend, place, job = record.load()
    if backend == "gke":
        return _show(gke.stop_command(job, Cluster(**place)))
    if backend == "local":
        return _stop_here(record)
    # First the supervisor, which would start the program again.
    _stop_here(record)
    zone = Zone(**place)
    script = tpu_vm.stop_script(job)
    _show_all([tpu_vm.on_hosts(node, zone, script) for node in tpu_vm.nodes(job)])
    return _show(tpu_vm.delete_command(job, zone))


def _stop_here(record: Record) -> int:
    holder = record.holder()
    if holder is None:
        print(f"{record.name}: nothing runs it here")
        return DONE
    os.kill(holder, signal.SIGTERM)
    while record.holder() == holder:
        time.sleep(_POLL_S)
    print(f"{record.name}: {_last(record)}")
    return DONE


def _print_log(record: Record, process: str, lines: int, follow: bool) -> int:
    files = record.logs(process)
    if not files:
        raise LaunchError(f"job {record.name!r} has no log of {process} in {record.folder}")
    log = files[-1]
    position = _print_tail(log, lines)
    while follow and record.holder():
        latest = record.logs(process)[-1]
        if latest != log:
            # The next attempt has begun.
            log = latest
            position = 0
        with open(log, "rb") as file:
            file.seek(position)
            text = file.read()
        position += len(text)
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()
        time.sleep(_POLL_S)
    return DONE


def _print_tail(file: Path, lines: int) -> int:
    """Prints the last lines and returns how many bytes were read."""
    print(f"==> {file} <==")
    with open(file, "rb") as log:
        for line in deque(log, maxlen=lines):
            sys.stdout.write(line.decode(errors="replace"))
        sys.stdout.flush()
        return log.tell()


def _last(record: Record) -> str:
    history = record.history()
    return _line(history[-1]) if history else "no history here"


def _line(entry: dict) -> str:
    when = time.strftime("%d %b %H:%M:%S", time.localtime(entry["time"]))
    line = f"{when} {entry['event']}"
    facts = [f"{key} {value}" for key, value in entry.items() if key not in ("time", "event")]
    if facts:
        line += ": " + ", ".join(facts)
    return line


def _show_all(commands: list[list[str]]) -> int:
    return max([_show(command) for command in commands])


def _show(command: list[str]) -> int:
    """Prints a command and runs it. Returns 0, or 1 if it fails."""
    print(f"$ {shlex.join(command)}", flush=True)
    try:
        finished = subprocess.run(command, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise LaunchError(f"{command[0]} is not installed here") from None
    return DONE if finished.returncode == 0 else FAILED
