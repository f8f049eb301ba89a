"""Where metrics go: metrics.jsonl, TensorBoard event files and the terminal."""

from __future__ import annotations

import math
import sys
import time

import jax
import numpy as np
from etils import epath

from memorizing.runtime.json_lines import JsonLines
from memorizing.runtime.tables import duration

Values = dict[str, float]


def flatten(metrics: dict[str, jax.Array]) -> Values:
    """Host floats by name; an array becomes one value an element, named by its indices. Waits for the arrays."""
    values: Values = {}
    for name, array in jax.device_get(metrics).items():
        for index, value in np.ndenumerate(array):
            values["/".join([name, *map(str, index)])] = float(value)
    return values


class MetricWriter:
    """Appends to `workdir/metrics.jsonl` and to TensorBoard event files beside it.

    A run that goes on from a step drops what was written beyond it.
    """

    def __init__(self, workdir: epath.Path | None, resumed_step: int) -> None:
        """
        Args:
          workdir: the run's folder; None for a process that writes nothing.
          resumed_step: from which the run goes on.
        """
        self._file, self._events, self._written = None, None, set()
        if workdir is None:
            return
        # Not at the top: an import of a second, only needed where something is written.
        from tensorboardX import SummaryWriter

        self._file = JsonLines(workdir / "metrics.jsonl", keep=lambda line: line["step"] <= resumed_step)
        self._written = {(line["step"], line["kind"]) for line in self._file.lines}
        self._events = SummaryWriter(logdir=str(workdir / "events"), purge_step=resumed_step + 1)

    def has(self, step: int, kind: str) -> bool:
        """Whether this was written, now or before the run went on."""
        return (step, kind) in self._written

    def write(self, step: int, kind: str, values: Values) -> None:
        """Writes one line `{"step": ..., "kind": ..., name: value, ...}`.

        Args:
          step: that the values belong to. What was written before of the same step and kind is not written again.
          kind: 'train', 'evaluation', ...; prefixes the names in TensorBoard.
          values: by name.
        """
        # A run that goes on from its last step evaluates it again.
        if self._file is None or self.has(step, kind):
            return
        self._written.add((step, kind))
        self._file.append({"step": step, "kind": kind, **values})
        for name, value in values.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        if self._events:
            self._events.close()


class Progress:
    """Step, loss, perplexity, tokens/s, step time and time left.

    A live line on a terminal, a plain line now and then in a log.
    """

    # Not rich's progress bar: in a log, where most runs are read, it prints nothing until it ends.

    def __init__(self, first_step: int, num_steps: int, is_silent: bool = False) -> None:
        """
        Args:
          first_step: from which the run goes on.
          num_steps: at which it ends.
          is_silent: prints nothing, for a process that leaves it to another one.
        """
        self._num_steps, self._is_silent = num_steps, is_silent
        self._last = (first_step, time.monotonic())
        self._live = sys.stdout.isatty()

    def rate(self, step: int, tokens_per_step: int) -> Values:
        """Speed since the last call."""
        (last_step, last_time), now = self._last, time.monotonic()
        self._last = (step, now)
        seconds = (now - last_time) / max(step - last_step, 1)
        return {"step_seconds": seconds, "tokens_per_second": tokens_per_step / max(seconds, 1e-9)}

    def show(self, step: int, values: Values, is_first: bool) -> None:
        """Shows a step; the first of a run takes as long as its compilation, and foretells nothing."""
        if self._is_silent:
            return
        text = (
            f"step {step}/{self._num_steps}  loss {values['loss']:.4f}  perplexity {perplexity(values['loss']):.2f}  "
        )
        if is_first:
            text += f"compiled in {values['step_seconds']:.1f} s"
        else:
            text += (
                f"{values['tokens_per_second']:,.0f} tokens/s  {values['step_seconds']:.3f} s/step  "
                + (f"MFU {values['mfu']:.1%}  " if "mfu" in values else "")
                + f"{duration(values['step_seconds'] * (self._num_steps - step))} left"
            )
        if self._live:
            print(f"\r\x1b[K{text}", end="", flush=True)
        else:
            print(text, flush=True)

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        if not self._is_silent:
            print(f"\r\x1b[K{text}" if self._live else text, flush=True)

    def restart_clock(self, step: int) -> None:
        """After a pause (evaluation, saving) that should not count as step time."""
        self._last = (step, time.monotonic())


def perplexity(nats: float) -> float:
    """exp(nats), infinite instead of an overflow."""
    return math.exp(nats) if nats < 700 else math.inf
