"""Whole commands with settings that are seldom tried end with a code of theirs, in time, without a traceback.

What is built, and what is only parsed, is tried more often in config/test_ranges.py. Sizes that a larger machine could
have are left out here: to try them would take such a machine.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import pathlib
import random
import re
import signal
from collections.abc import Iterator

import pytest
from settings_to_try import EXTREMES, ODD, fields, flags
from tiny_texts import finished_run

from memorizing import main
from memorizing.config.loading import load_experiment
from memorizing.errors import EXIT_FAILED, EXIT_START_AGAIN, EXIT_USER_ERROR

SECONDS = 300
VALUES = [*(str(value) for value in EXTREMES if not 7 < value < 10**23), *ODD]
SMALL = ("1", "2", "3", "0.5", "True")
TINY = (
    *("--gin.LMConfig.num_layers=1", "--gin.LMConfig.attention_at=()", "--gin.LMConfig.embed_dim=8"),
    *("--gin.LMConfig.head_dim=4", "--gin.LMConfig.mlp_dim=8", "--gin.RepeatedPassages.num_documents=2"),
)
# Commands, each with what makes it quick.
COMMANDS = {
    "train": ("--gin_file=smoke", *TINY, "--gin.LoopConfig.num_steps=1", "--workdir=trained"),
    "plan": ("--gin_file=smoke", *TINY, "--flops"),
    "evaluate": ("--workdir=run",),
    "inspect": ("--workdir=run",),
    "generate": ("--workdir=run", "--prompt=abc", "--num_tokens=2"),
    "export": ("--workdir=run", "--to=exported"),
    "status": ("run",),
    "runs": (".",),
    "report": ("run",),
    "prepare": ("--task=text_bytes", "--source=texts", "--output=cache", "--processes=1"),
    "gin": (),
}
TAKE_BINDINGS = ("train", "plan", "evaluate", "inspect", "generate")
# It builds what is configured, and takes milliseconds.
OFTEN = ("plan",) * 5
# What ends the process itself, as it should.
NOT_HERE = ("hang_seconds",)


class TookTooLong(BaseException):
    """Not caught by anything between."""


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def end(*_: object) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def some_arguments(number: int) -> Iterator[list[str]]:
    """Commands with one or two settings of theirs."""
    rng = random.Random(number)
    # What the run has, more often than everything else that could be configured.
    used = set(re.findall(r"^(\w+)\.\w+ =", load_experiment(["smoke"], [])[1], re.MULTILINE))
    known = [(cls.__name__, name) for cls, name, _ in fields() if name not in NOT_HERE]
    bindings = [[f"--gin.{cls}.{name}" for cls, name in known if (cls in used) == is_used] for is_used in (False, True)]
    flags_of = {name: [action.option_strings[-1] for at, action in flags() if at == name] for name in COMMANDS}
    for _ in range(number):
        command = rng.choice([*COMMANDS, *OFTEN])
        own = [name for name in flags_of[command] if name.startswith("--") and name != "--help"]
        chosen = []
        for _ in range(rng.choice([1, 1, 1, 2])):
            is_binding = command in TAKE_BINDINGS and rng.random() < 0.7
            value = rng.choice(rng.choice([VALUES, SMALL]))
            # A command without flags of its own takes a path or a name.
            chosen.append(
                f"{rng.choice(rng.choice(bindings) if is_binding else own)}={value}" if is_binding or own else value
            )
        yield [command, *COMMANDS[command], *chosen]


@pytest.mark.parametrize("number", [40, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_every_command_ends_with_a_code_and_a_line(
    number: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    finished_run(tmp_path / "run")
    (tmp_path / "texts").mkdir()
    for name in ("one", "two", "three"):
        (tmp_path / "texts" / f"{name}.txt").write_text(f"This is text {name}.\n" * 20)
    codes = []
    for arguments in some_arguments(number):
        printed, told = io.StringIO(), io.StringIO()
        try:
            with time_limit(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(told):
                codes.append(main._run(arguments))
        except BaseException as error:
            raise AssertionError(f"memorizing {' '.join(arguments)}") from error
        assert "Traceback" not in told.getvalue(), arguments
        if codes[-1] in (EXIT_USER_ERROR, EXIT_FAILED):
            assert told.getvalue().splitlines()[-1].startswith("memorizing: "), arguments
        assert multiprocessing.active_children() == [], arguments
    assert {*codes} <= {0, EXIT_FAILED, EXIT_USER_ERROR, EXIT_START_AGAIN}
    assert codes.count(EXIT_USER_ERROR) > number / 2 and codes.count(0) > number / 40
