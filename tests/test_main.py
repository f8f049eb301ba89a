"""What the command line does before any command."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from memorizing import main
from memorizing.errors import EXIT_START_AGAIN


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """A machine that has the TPU library and no other plugin of JAX; its devices are the files in the folder."""
    library = importlib.machinery.ModuleSpec("libtpu", None)
    installed = {"libtpu": library, "jax_plugins": None}
    monkeypatch.setattr(importlib.util, "find_spec", installed.get)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    monkeypatch.setattr(main, "TPU_DEVICES", (f"{tmp_path}/accel*", f"{tmp_path}/vfio/*"))
    return tmp_path


def test_the_tpu_library_is_not_asked_where_there_is_no_tpu(machine: pathlib.Path):
    environment: dict[str, str] = {}
    main.leave_out_absent_tpus(environment)
    assert environment == {"JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize("device", ["accel0", "vfio/0"])
def test_a_tpu_is_used(machine: pathlib.Path, device: str):
    path = machine / device
    path.parent.mkdir(exist_ok=True)
    path.touch()
    environment: dict[str, str] = {}
    main.leave_out_absent_tpus(environment)
    assert environment == {}


def test_the_platform_of_the_user_stays(machine: pathlib.Path):
    environment = {"JAX_PLATFORMS": "tpu"}
    main.leave_out_absent_tpus(environment)
    assert environment == {"JAX_PLATFORMS": "tpu"}


def test_another_accelerator_is_used(machine: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: (group,))
    environment: dict[str, str] = {}
    main.leave_out_absent_tpus(environment)
    assert environment == {}


# Told to stop before the run itself listens, as it imports what it needs.
STOPPED = """
import os, signal
from memorizing import main
main._run = lambda arguments: os.kill(os.getpid(), signal.SIGTERM)
main.main(["train"])
"""


def test_a_training_that_is_stopped_while_it_imports_asks_to_be_started_again():
    """Launchers take the system's own code for a failure."""
    assert subprocess.run([sys.executable, "-c", STOPPED]).returncode == EXIT_START_AGAIN


# Tells with which settings of the C library a command runs, and as which process.
TELLING = """
import os, sys
from memorizing import main
main.LARGE_PAGES = sys.argv.pop(1)
main._run = lambda arguments: print(os.environ.get(main.TUNABLES, ""), os.getpid(), *arguments)
main.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is one of Linux")
@pytest.mark.parametrize(
    ("setting", "before", "after"),
    [
        ("always [madvise] never", "", "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.check=0", "glibc.malloc.check=0:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", "", ""),
        ("always madvise [never]", "", ""),
        (None, "", ""),
    ],
)
def test_a_command_starts_with_large_pages_where_these_are_to_be_had(
    tmp_path: pathlib.Path, setting: str | None, before: str, after: str
):
    """Once, as the same process, with the same arguments; what the user has chosen stays."""
    pages = tmp_path / "enabled"
    if setting is not None:
        pages.write_text(setting)
    command = [sys.executable, "-c", TELLING, str(pages), "train", "--workdir=a b"]
    with subprocess.Popen(command, env=os.environ | {main.TUNABLES: before}, stdout=subprocess.PIPE, text=True) as told:
        assert told.communicate()[0].rstrip("\n") == f"{after} {told.pid} train --workdir=a b"


# Is stopped on its way from one program to the next.
STOPPED_BETWEEN = """
import os, signal, sys
from memorizing import main
main.LARGE_PAGES = sys.argv.pop(1)
main._run = lambda arguments: 0
if main.LARGE_PAGES_TUNABLE not in os.environ.get(main.TUNABLES, ""):
    execute = os.execv
    os.execv = lambda *given: (os.kill(os.getpid(), signal.SIGTERM), execute(*given))
main.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is one of Linux")
def test_a_stop_on_the_way_to_large_pages_is_heard(tmp_path: pathlib.Path):
    pages = tmp_path / "enabled"
    pages.write_text("always [madvise] never")
    command = [sys.executable, "-c", STOPPED_BETWEEN, str(pages), "train"]
    assert subprocess.run(command, env=os.environ | {main.TUNABLES: ""}).returncode == EXIT_START_AGAIN


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["train", "--workdri=a"],
            "unrecognized arguments: --workdri=a; did you mean --workdir? (see memorizing train --help)",
        ),
        (["status", "a", "b"], "unrecognized arguments: b (see memorizing status --help)"),
        (["generate", "--promt=a", "--x"], "--promt=a --x; did you mean --prompt? (see memorizing generate --help)"),
    ],
)
def test_a_flag_that_is_not_known_is_told_with_what_was_meant(
    capsys: pytest.CaptureFixture, given: list[str], message: str
):
    assert main._run(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
