"""Bars on a terminal, and nothing new in a log."""

from __future__ import annotations

import io
import re
import sys
import time
from types import SimpleNamespace

import pytest

from memorizing.evaluation.reading import ReadingBar
from memorizing.runtime.metrics import Progress
from memorizing.runtime.progress import bar

VALUES = {"loss": 3.5, "step_seconds": 0.5, "tokens_per_second": 7214.0}


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Makes standard output a terminal. Within a test: before it, pytest has still to put its own in place."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    return screen


def seen(terminal: Terminal) -> str:
    """What was on the terminal, without its control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())


def test_a_log_has_the_lines_that_it_always_had(capsys: pytest.CaptureFixture):
    progress = Progress(0, 400)
    progress.begin_compiling(1)
    progress.advance()
    progress.show(1, VALUES, is_first=True)
    with bar("reading held-out documents", 10) as shown:
        shown.advance(5)
        shown.describe("still reading", 20)
    progress.show(200, VALUES, is_first=False)
    progress.say("a line")
    progress.close()
    assert capsys.readouterr().out == (
        "step 1/400  loss 3.5000  perplexity 33.12  compiled in 0.5 s\n"
        "step 200/400  loss 3.5000  perplexity 33.12  7,214 tokens/s  0.500 s/step  0:01:40 left\n"
        "a line\n"
    )


def test_a_terminal_shows_what_is_compiled_the_figures_and_the_time_left(monkeypatch: pytest.MonkeyPatch):
    terminal = terminal_of(monkeypatch)
    progress = Progress(0, 4)
    progress.begin_compiling(1)
    time.sleep(0.4)
    assert "compiling the training step (step 1)" in seen(terminal)
    assert not re.search(r"\d left", seen(terminal)), "nothing is known yet"
    progress.advance()
    progress.advance()
    progress.show(2, VALUES, is_first=False)
    progress.say("held-out documents at step 2")
    time.sleep(0.4)
    text = seen(terminal)
    assert "step 2/4  loss 3.5000  perplexity 33.12  7,214 tokens/s" in text
    assert " 50%" in text and re.search(r"\d:\d\d:\d\d \d:\d\d:\d\d left", text)
    assert "held-out documents at step 2\n" in text
    progress.close()
    # The last of the bar is that it goes, and the cursor is there.
    assert terminal.getvalue().rfind("\x1b[?25h") > terminal.getvalue().rfind("\x1b[?25l")
    assert sys.stdout is terminal


def test_a_bar_in_a_bar_is_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch):
    terminal = terminal_of(monkeypatch)
    with bar("training [bold]", 2):
        with bar("compiling the evaluation") as inner:
            time.sleep(0.4)
            inner.describe("reading", 100)
            inner.advance(30)
        with pytest.raises(ValueError), bar("what fails"):
            raise ValueError
        assert sys.stdout is not terminal, "the outer one is still there"
    assert sys.stdout is terminal
    text = seen(terminal)
    assert "training [bold]" in text and "compiling the evaluation" in text


def test_a_process_that_leaves_it_to_another_shows_nothing(monkeypatch: pytest.MonkeyPatch):
    terminal = terminal_of(monkeypatch)
    progress = Progress(0, 4, is_silent=True)
    progress.begin_compiling(1)
    progress.advance()
    progress.show(1, VALUES, is_first=True)
    progress.say("a line")
    progress.close()
    assert terminal.getvalue() == ""


def test_the_second_reading_of_samples_has_a_time_left(monkeypatch: pytest.MonkeyPatch):
    """How many there are is known once they were read."""
    terminal = terminal_of(monkeypatch)
    samples, known = SimpleNamespace(identity="samples", num_eval_documents=2), {}
    with ReadingBar(samples, "samples", is_compiled=False, known=known) as reading:
        reading.has_read(40)
        reading.has_read(80)
    assert known == {"samples": 80}
    with ReadingBar(samples, "samples again", is_compiled=True, known=known) as reading:
        reading.has_read(20)
        reading.has_read(40)
        time.sleep(0.4)
    text = seen(terminal)
    assert "compiling the evaluation of samples" in text and "reading samples again" in text
    assert " 50%" in text and re.search(r"\d left", text)
