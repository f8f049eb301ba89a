"""The folder of a job on the machine that launched it: its specification, its history and its logs.

No value of a secret is written here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import LaunchError
from .job import Job, Secret, check_name, nearest


def jobs_folder() -> Path:
    """Where the folders of all jobs lie: $MEMORIZING_JOBS, or memorizing/jobs in the user's state folder."""
    given = os.environ.get("MEMORIZING_JOBS")
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(given).expanduser() if given else Path(state).expanduser() / "memorizing" / "jobs"


def known_jobs() -> list[str]:
    """Names of the jobs that were launched from here."""
    return sorted(path.parent.name for path in jobs_folder().glob("*/job.json"))


class Record:
    """The folder of one job."""

    def __init__(self, name: str):
        self.name = check_name(name)
        self.folder = jobs_folder() / name

    @property
    def is_known(self) -> bool:
        """Whether such a job was launched from here."""
        return (self.folder / "job.json").exists()

    def save(self, backend: str, place: Any, job: Job) -> None:
        """Writes what was launched and where; `place` is a dataclass."""
        self.folder.mkdir(parents=True, exist_ok=True)
        launched = {"backend": backend, "place": dataclasses.asdict(place), "job": dataclasses.asdict(job)}
        temporary = self.folder / "job.json.tmp"
        temporary.write_text(json.dumps(launched, indent=2))
        temporary.replace(self.folder / "job.json")

    def load(self) -> tuple[str, dict[str, Any], Job]:
        """Backend, place and job as they were saved. Raises LaunchError if no such job was launched from here."""
        try:
            launched = json.loads((self.folder / "job.json").read_text())
        except FileNotFoundError:
            known = known_jobs()
            raise LaunchError(
                f"no job {self.name!r} was launched from here{nearest(self.name, known)} "
                f"(known: {', '.join(known) or 'none'})"
            ) from None
        # JSON has lists where a job has tuples.
        fields: dict[str, Any] = {}
        for key, value in launched["job"].items():
            fields[key] = tuple(value) if isinstance(value, list) else value
        fields["environment"] = tuple(map(tuple, fields["environment"]))
        fields["secrets"] = tuple(Secret(**secret) for secret in fields["secrets"])
        return launched["backend"], launched["place"], Job(**fields)

    def report(self, event: str, **facts: object) -> None:
        """Prints what happened, with the time, and adds it to the history."""
        now = time.time()
        clock = time.strftime("%H:%M:%S", time.localtime(now))
        text = f"[{clock}] {self.name}: {event}"
        if facts:
            text += ": " + ", ".join(f"{key} {value}" for key, value in facts.items())
        print(text, flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "history.jsonl", "a") as history:
            history.write(json.dumps({"time": now, "event": event, **facts}) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """What was reported, oldest first."""
        path = self.folder / "history.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]

    def logs(self, process: str) -> list[Path]:
        """Files of a process of all attempts, oldest first."""
        attempts = sorted(self.folder.glob("attempt-*"), key=lambda path: path.stat().st_mtime_ns)
        paths = [attempt / f"{process}.log" for attempt in attempts]
        return [path for path in paths if path.exists()]

    def attempt_folder(self) -> Path:
        """A new folder for the logs of one attempt."""
        self.folder.mkdir(parents=True, exist_ok=True)
        numbers = [int(path.name.removeprefix("attempt-")) for path in self.folder.glob("attempt-*")]
        number = 1 + max(numbers, default=0)
        folder = self.folder / f"attempt-{number}"
        folder.mkdir()
        return folder

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While this process runs the job. Raises LaunchError if another one does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LaunchError(
                    f"job {self.name!r} is already running here (process {self.holder()}): "
                    f"memorizing launch stop {self.name}, or another --name"
                ) from None
            lock.seek(0)
            lock.truncate()
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def holder(self) -> int | None:
        """The process that runs the job here, or None. The lock is released when the process dies, however it dies."""
        try:
            with open(self.folder / "lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return None
        except BlockingIOError:
            return int((self.folder / "lock").read_text() or 0) or None
        return None
