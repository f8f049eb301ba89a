"""Live bars on a terminal for what takes long: what is done, how much of it, and the time left. Elsewhere nothing.

All bars of a process are lines of one display, so that an evaluation within a training has its own below the other's.
Lines that are printed meanwhile stand above them.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
from collections.abc import Iterator

import rich.console
import rich.progress
import rich.text

from memorizing.runtime import distributed


class Bar:
    """A bar, or nothing where there is no terminal. It is there until it is closed."""

    def __init__(self, what: str, total: float | None = None) -> None:
        """
        Args:
          what: is done.
          total: of how much; None where that is not known.
        """
        self._display = _display if is_live() else None
        self._task = self._display.add(what, total) if self._display else None

    @property
    def is_live(self) -> bool:
        """Whether anybody can see it."""
        return self._display is not None

    def describe(self, what: str, total: float | None = None) -> None:
        """Says what is done now. With `total` it begins anew: of how much."""
        if self._display:
            self._display.update(self._task, what, total)

    def advance(self, more: float = 1) -> None:
        """Adds to what is done."""
        if self._display:
            self._display.advance(self._task, more)

    def close(self) -> None:
        """Takes the bar away."""
        if self._display:
            self._display.remove(self._task)
            self._display = None


@contextlib.contextmanager
def bar(what: str, total: float | None = None) -> Iterator[Bar]:
    """A bar while the block runs; see `Bar`."""
    opened = Bar(what, total)
    try:
        yield opened
    finally:
        opened.close()


def is_live() -> bool:
    """Whether bars are shown: by one process, on a terminal."""
    return distributed.is_primary() and sys.stdout.isatty()


class _TimeLeft(rich.progress.TimeRemainingColumn):
    """'0:01:20 left', and nothing where that is not known: `left` alone would stand behind the time that has passed."""

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        time_left = super().render(task)
        return time_left.append(" left") if time_left.plain else time_left


class _Display:
    """The bars that are open, on standard output."""

    def __init__(self) -> None:
        self._shown: rich.progress.Progress | None = None

    def add(self, what: str, total: float | None) -> rich.progress.TaskID:
        if self._shown is None:
            self._shown = self._started()
        return self._shown.add_task(what, total=total)

    def update(self, task: rich.progress.TaskID | None, what: str, total: float | None) -> None:
        if self._shown and task is not None:
            if total is not None:
                # The time that it took to compile says nothing of the time left.
                self._shown.reset(task, total=total)
            self._shown.update(task, description=what)

    def advance(self, task: rich.progress.TaskID | None, more: float) -> None:
        if self._shown and task is not None:
            self._shown.advance(task, more)

    def remove(self, task: rich.progress.TaskID | None) -> None:
        if self._shown and task is not None:
            self._shown.remove_task(task)
            if not self._shown.tasks:
                self.stop()

    def stop(self) -> None:
        if self._shown:
            self._shown.stop()
            self._shown = None

    def _started(self) -> rich.progress.Progress:
        columns = (
            rich.progress.SpinnerColumn(),
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(bar_width=20),
            rich.progress.TaskProgressColumn(),
            rich.progress.TimeElapsedColumn(),
            _TimeLeft(),
        )
        console = rich.console.Console(file=sys.stdout)
        # What goes to standard error goes there, unless that is this terminal.
        shown = rich.progress.Progress(
            *columns, console=console, transient=True, redirect_stderr=sys.stderr.isatty(), refresh_per_second=4
        )
        shown.start()
        # A process that is killed could not bring it back.
        console.show_cursor(True)
        return shown


_display = _Display()
atexit.register(_display.stop)
