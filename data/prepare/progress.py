"""Progress of the stages of preparing: a live bar on a terminal, elsewhere a plain line from time to time."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

_SECONDS_BETWEEN_LINES = 10.0


class PreparationProgress:
    """Shows one stage after another on standard output."""

    def __init__(self, console: rich.console.Console | None = None) -> None:
        self._console = console or rich.console.Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)

    def print(self, line: str) -> None:
        self._console.print(line)

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """A stage, while it runs.

        Args:
          name: what is done.
          total: number of documents that it will go through, where that is known.

        Yields:
          A function to call with the number of documents that were done since the last call.
        """
        start = time.monotonic()
        count = 0
        with self._live(name, total) as show:

            def advance(more: int) -> None:
                nonlocal count
                count += more
                show(count)

            yield advance
        done = f"{count:,} documents, " if count else ""
        self.print(f"{name}: {done}{time.monotonic() - start:.1f} s")

    @contextlib.contextmanager
    def _live(self, name: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Yields a function that shows how many documents are done."""
        if not self._console.is_terminal:
            yield self._lines(name, total)
            return
        columns = (
            rich.progress.SpinnerColumn(),
            *rich.progress.Progress.get_default_columns(),
            rich.progress.MofNCompleteColumn(),
        )
        with rich.progress.Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task(name, total=total)
            yield lambda count: bar.update(task, completed=count)

    def _lines(self, name: str, total: int | None) -> Callable[[int], None]:
        last = time.monotonic()

        def show(count: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                self.print(f"{name}: {count:,}{f' of {total:,}' if total else ''} documents")

        return show
