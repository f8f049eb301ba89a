"""One run at a time writes into a workdir.

Whoever wants to write puts a file of its own beside the others', looks who else has one, and only then counts as the
holder. This needs nothing of a file system but that a file which was written is listed: no locks, which network file
systems and object stores do not have, and no creation that only one process can succeed in.

The rules, for files `.lock-NUMBER`:

* who finds the file of a living holder gives up;
* of several that want to hold, the one of the smallest number waits until the others have given up;
* the file of a dead process is removed by whoever finds it. On the same machine the system knows who is dead. Of a
  process elsewhere the file changes every few seconds; if it has not for a minute, its process counts as dead;
* a process that finds its own file removed has been taken for dead, and must not write any more.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from etils import epath

from memorizing.errors import UserError
from memorizing.runtime.json_lines import is_remote

_PREFIX = ".lock-"
_TEXT_LENGTH = 1024
_BEAT_SECONDS = 10.0
_LIMIT_SECONDS = 60.0
_POLL_SECONDS = 0.05
_REMOTE_POLL_SECONDS = 1.0


class _Claim(NamedTuple):
    """The file of another process.

    Attributes:
      path: of the file.
      text: what is in it.
      record: the same, empty while it is being written.
    """

    path: epath.Path
    text: str
    record: dict[str, Any]

    def __str__(self) -> str:
        return f"process {self.record.get('pid', '?')} on {self.record.get('host', 'another machine')}"


class WorkdirLock:
    """The right to write into a workdir."""

    def __init__(
        self,
        workdir: epath.Path,
        machine: str | None = None,
        beat_seconds: float = _BEAT_SECONDS,
        limit_seconds: float = _LIMIT_SECONDS,
        say: Callable[[str], None] = lambda _: None,
        flag: str = "--workdir",
    ) -> None:
        """
        Args:
          workdir: the folder; it exists.
          machine: what tells this machine, with its numbers of processes, from others; None to ask the system.
          beat_seconds: how often a holder says that it lives.
          limit_seconds: silence after which a process on another machine counts as dead.
          say: told why this takes long, if it does.
          flag: that names the folder.
        """
        self._workdir = workdir
        self._flag = flag
        self._beat_seconds = beat_seconds
        self._limit_seconds = limit_seconds
        self._say = say
        self._is_remote = is_remote(workdir)
        self._path = workdir / f"{_PREFIX}{secrets.token_hex(8)}"
        self._record: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "machine": _machine() if machine is None else machine,
            "holds": False,
            "beat": 0,
        }
        # Files of other machines: what was in them at first, and what is in them since when.
        self._first_texts: dict[str, str] = {}
        self._seen: dict[str, tuple[str, float]] = {}
        # One write at a time, of this thread or of the one that beats.
        self._writing = threading.Lock()
        self._ending = threading.Event()
        self._last_beat = time.time()
        self._is_lost = False

    def acquire(self) -> None:
        """Becomes the holder.

        Raises:
          UserError: another process is, or is about to be.
          OSError: the folder cannot be written.
        """
        self._path.write_text(self._text())
        threading.Thread(target=self._beat, name="workdir", daemon=True).start()
        try:
            self._wait_for_others()
        except BaseException:
            self.release()
            raise
        self._record["holds"] = True
        self._write()

    def release(self) -> None:
        """Lets others write."""
        self._ending.set()
        with self._writing, contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def check(self) -> None:
        """To be called before every write that counts.

        Raises:
          UserError: another process has taken this one for dead.
        """
        # A process that was stopped for long may find another one in its place.
        if abs(time.time() - self._last_beat) > self._limit_seconds / 2:
            self._write()
        if self._is_lost:
            raise UserError(
                f"another process has taken over {self._workdir}, or has removed it, while this one was stopped: "
                "nothing more is written"
            )

    def _wait_for_others(self) -> None:
        has_said = False
        while others := self._living():
            for claim in others:
                is_first = claim.record.get("holds") or claim.path.name < self._path.name
                if is_first and self._is_known_to_live(claim):
                    raise UserError(
                        f"{claim} is writing into {self._workdir}: wait until it has ended, or choose another "
                        f"{self._flag}"
                    )
            if not has_said and not all(map(self._is_known_to_live, others)):
                has_said = True
                self._say(f"waiting up to {self._limit_seconds:g} s to see whether {others[0]} still writes there")
            time.sleep(_REMOTE_POLL_SECONDS if self._is_remote else min(_POLL_SECONDS, self._beat_seconds))

    def _living(self) -> list[_Claim]:
        """The files of other processes that are not known to be dead; those of dead ones are removed."""
        living = []
        for claim in self.others():
            if self._is_dead(claim):
                claim.path.unlink(missing_ok=True)
            else:
                living.append(claim)
        return living

    def others(self) -> list[_Claim]:
        """The files of other processes, dead ones' too."""
        claims = []
        for path in self._workdir.glob(f"{_PREFIX}*"):
            if path.name == self._path.name:
                continue
            try:
                text = path.read_text()
            except (OSError, UnicodeDecodeError):
                # It was removed in the meantime, or is being written.
                text = ""
            if text or path.exists():
                claims.append(_Claim(path, text, _parsed(text)))
        return claims

    def _is_dead(self, claim: _Claim) -> bool:
        if self.is_of_this_machine(claim):
            return _started(claim.record["pid"]) != claim.record["started"]
        now = time.monotonic()
        text, since = self._seen.setdefault(claim.path.name, (claim.text, now))
        if text != claim.text:
            # It has been seen to change.
            self._seen[claim.path.name] = (claim.text, now)
            since = now
        return now - since > self._limit_seconds

    def _is_known_to_live(self, claim: _Claim) -> bool:
        if self.is_of_this_machine(claim):
            return True
        first_text = self._first_texts.setdefault(claim.path.name, claim.text)
        return bool(claim.record) and claim.text != first_text

    def is_of_this_machine(self, claim: _Claim) -> bool:
        """Whether the system knows if that process lives."""
        machine = claim.record.get("machine")
        return machine is not None and machine == self._record["machine"] and claim.record.get("started") is not None

    def _beat(self) -> None:
        while not self._ending.wait(self._beat_seconds):
            # A full disk, or a network that is away: the next beat may reach it.
            with contextlib.suppress(OSError):
                self._write()

    def _write(self) -> None:
        """Says that this process lives, and looks whether it was taken for dead."""
        with self._writing:
            if self._ending.is_set() or self._is_lost:
                return
            self._record["beat"] += 1
            try:
                self._overwrite(self._text())
            except FileNotFoundError:
                self._is_lost = True
                return
            self._last_beat = time.time()
        if self._record["holds"]:
            self._is_lost |= any(claim.record.get("holds") for claim in self.others())

    def _text(self) -> str:
        return json.dumps(self._record).ljust(_TEXT_LENGTH)

    def _overwrite(self, text: str) -> None:
        """Writes the file anew. Raises FileNotFoundError if it is no longer there."""
        if self._is_remote:
            if not self._path.exists():
                raise FileNotFoundError(self._path)
            self._path.write_text(text)
        else:
            # Not "w", which would make it again. The text is always of the same length.
            with open(self._path, "r+") as file:
                file.write(text)


@contextlib.contextmanager
def held(workdir: epath.Path, say: Callable[[str], None], flag: str = "--workdir") -> Iterator[Callable[[], None]]:
    """Holds a workdir, which is made if there is none, and removed again if nothing was written to it.

    Args:
      workdir: the folder.
      say: told why this takes long, if it does.
      flag: that names the folder.

    Yields:
      `WorkdirLock.check`.

    Raises:
      UserError: another process is writing into it, or it cannot be written.
    """
    lock = WorkdirLock(workdir, say=say, flag=flag)
    is_new = not workdir.exists()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UserError(f"{flag}={workdir}: cannot be written ({error.strerror or error})") from error
    try:
        yield lock.check
    finally:
        lock.release()
        # An object store has no folders. As a rule this one is not empty.
        if is_new and not is_remote(workdir):
            with contextlib.suppress(OSError):
                os.rmdir(workdir)


def writer(workdir: epath.Path, limit_seconds: float = _LIMIT_SECONDS) -> str | None:
    """The process that writes into a workdir, in words; None if there is none.

    Looks only: nothing is waited for, and nothing is changed. Of a process on another machine counts when its file was
    last written, by the clocks of both machines.

    Args:
      workdir: the folder.
      limit_seconds: silence after which a process on another machine counts as dead.
    """
    lock = WorkdirLock(workdir)
    for claim in lock.others():
        if lock.is_of_this_machine(claim):
            lives = _started(claim.record["pid"]) == claim.record["started"]
        else:
            lives = _age(claim.path) <= limit_seconds
        if lives:
            return str(claim)
    return None


def _age(path: epath.Path) -> float:
    """Seconds since a file was written; infinite if it is no longer there."""
    try:
        # `stat` of a path asks who owns the file, whom a container may not know.
        written = path.stat().mtime if is_remote(path) else os.path.getmtime(path)
    except (OSError, RuntimeError):
        # RuntimeError: etils does not know the time that a store tells.
        return math.inf
    return time.time() - written


def _parsed(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _machine() -> str | None:
    """What tells this machine, since it was started, and its numbers of processes from others; None if unknown."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # A container has process numbers of its own.
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process of this machine was started; None if it is dead, or the system does not say."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # Behind the name, which may hold anything: the state, and 19 places further the time.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
