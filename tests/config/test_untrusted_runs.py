"""To open somebody's run executes nothing that it names."""

from __future__ import annotations

import pathlib
import sys

import pytest
from etils import epath
from tiny_texts import expect_error

from memorizing import main
from memorizing.config.loading import load_experiment
from memorizing.errors import UserError
from memorizing.runtime.workdir import write_config

NAME = "module_of_a_stranger"


@pytest.fixture
def stranger(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """A module that Python would find, and the file that tells that it was executed."""
    trace = tmp_path / "executed"
    (tmp_path / f"{NAME}.py").write_text(f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield trace
    sys.modules.pop(NAME, None)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (f"import {NAME}", rf"imports {NAME}, .*--import={NAME}"),
        (f"import {NAME} as safe", f"imports {NAME}"),
        (f"from {NAME} import anything", f"imports {NAME}.anything"),
        (f"from __gin__ import dynamic_registration\nimport {NAME}", "imports __gin__.dynamic_registration"),
        (f"import memorizing.data.gin_registry\nimport {NAME}", f"imports {NAME}"),
        ("include 'other.gin'", "includes other.gin"),
        (f"LoopConfig.num_steps = @{NAME}.f()", "there is no"),
        ("LoopConfig.num_steps = __import__('os')", "cannot be read"),
        ("LoopConfig.num_steps = " + "(" * 1000, "cannot be read"),
    ],
)
def test_what_a_run_names_is_not_executed(
    stranger: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, lines: str, told: str
):
    """With a digest that is right: it says who changed a file by mistake, not who meant it."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (tmp_path / "other.gin").write_text(f"import {NAME}\n")
    write_config(epath.Path(workdir), lines + "\n")
    for command in ("evaluate", "inspect", "generate"):
        expect_error(capsys, [f"--workdir={workdir}"], told, command)
    assert not stranger.exists() and NAME not in sys.modules


def test_the_user_may_trust_a_module(stranger: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    write_config(epath.Path(tmp_path), f"import {NAME}\n")
    flags = ["evaluate", f"--workdir={tmp_path}"]
    assert main._run([*flags, f"--import={NAME}"]) == 2
    assert stranger.exists()
    assert "imports" not in capsys.readouterr().err
    assert main._run([*flags, "--import=module_that_is_not_there"]) == 2
    assert "module_that_is_not_there cannot be imported" in capsys.readouterr().err


def test_what_the_library_writes_is_read_again():
    _, text = load_experiment(["demo"], [])
    assert "import memorizing.data.gin_registry" in text
    assert load_experiment([], [], base=text)[1] == text
    with pytest.raises(UserError, match=f"imports {NAME}"):
        load_experiment([], [], base=f"{text}\nimport {NAME}\n")
