"""What the tests of the launcher share: the fakes on PATH, and the command line as a process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import fake_trainer

TESTS = pathlib.Path(__file__).parent
TRAINER = TESTS / "fake_trainer.py"
# Slices of few hosts.
FAKE_HOSTS = {"v4-16": 2, "v5p-16": 2}
# Everything that a shell, YAML, gin or Kubernetes could read as something else.
NASTY = """a 'b' "c" `d` $HOME $(HOME) $$ \\ @e %f #g !h ; & | > * ~ {i} é\t"""
NASTY_BINDINGS = [f"x.note={NASTY!r}", "y = @KNNAttention()", "z = 'two\n lines '", "empty=", " spaces  = 1 "]


@dataclasses.dataclass
class Workplace:
    """A folder with everything a launcher leaves behind, and stand-ins for the tools that it calls."""

    folder: pathlib.Path

    def __post_init__(self) -> None:
        binaries = self.folder / "bin"
        binaries.mkdir(parents=True)
        for tool in ("gcloud", "kubectl", "sudo", "docker"):
            script = binaries / tool
            # Only kubectl needs what is installed; the others start in no time.
            python = sys.executable if tool == "kubectl" else f"{sys.executable} -I -S"
            script.write_text(f'#!/bin/sh\nexec {python} {TESTS / "fake_cloud.py"} {tool} "$@"\n')
            script.chmod(0o755)
        python = binaries / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        self.cloud = self.folder / "cloud"
        self.cloud.mkdir()
        self.workdir = self.folder / "run"
        self.environment = os.environ | {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "MEMORIZING_JOBS": str(self.folder / "jobs"),
            "FAKE_CLOUD": str(self.cloud),
            "FAKE_COORDINATOR": f"127.0.0.1:{free_port()}",
            "FAKE_HOSTS": json.dumps(FAKE_HOSTS),
        }

    def start(self, *arguments: str, **options: object) -> subprocess.Popen:
        """`memorizing launch ARGUMENTS`, running."""
        return subprocess.Popen(
            [sys.executable, "-m", "memorizing", "launch", *arguments],
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )

    def launch(self, *arguments: str) -> subprocess.CompletedProcess:
        """`memorizing launch ARGUMENTS`, to its end."""
        process = self.start(*arguments)
        try:
            out, error = process.communicate(timeout=300)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, error)

    def trainer(self, steps: int, interrupt: str = "") -> list[str]:
        """Flags that run the fake trainer here."""
        return [
            *(f"--program=python {TRAINER}", "--", f"--workdir={self.workdir}"),
            *(f"--gin.steps={steps}", f"--gin.interrupt={interrupt}"),
        ]

    def calls(self, tool: str) -> list[list[str]]:
        """What a stand-in was called with, in order."""
        lines = (self.cloud / "calls.jsonl").read_text().splitlines()
        return [call[1:] for call in map(json.loads, lines) if call[0] == tool]

    def state(self, process: int) -> dict:
        return json.loads((self.workdir / f"state-{process}.json").read_text())

    def told(self, process: int) -> dict:
        """Arguments and environment that a process was last given."""
        return json.loads((self.workdir / f"told-{process}.json").read_text())

    def attempts(self, process: int = 0) -> int:
        return (self.workdir / f"attempts-{process}").stat().st_size

    def written(self) -> str:
        """Everything that the launcher wrote."""
        files = [path for path in (self.folder / "jobs").rglob("*") if path.is_file()]
        return "\n".join(path.read_text() for path in files)

    def assert_undisturbed(self, processes: int, steps: int) -> None:
        """Every process has the state of a run that nothing ever happened to."""
        for process in range(processes):
            assert self.state(process) == {"step": steps, "value": fake_trainer.final(steps)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


def exists_process(pid: int) -> bool:
    """Whether a process lives (a zombie does not)."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def has(tool: str) -> bool:
    """Whether the real tool is installed."""
    return shutil.which(tool) is not None
