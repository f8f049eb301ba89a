"""Where metrics go: metrics.jsonl, TensorBoard event files and the terminal."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import jax
import numpy as np
from etils import epath

from memorizing.runtime.json_lines import JsonLines
from memorizing.runtime.tables import duration
from memorizing.runtime.workdir import METRIC_NAMES, METRICS

Values = dict[str, float]


def flatten(metrics: dict[str, jax.Array]) -> Values:
    """Host floats by name; an array becomes one value an element, named by its indices. Waits for the arrays."""
    values: Values = {}
    for name, array in jax.device_get(metrics).items():
        for index, value in np.ndenumerate(array):
            key = "/".join([name, *map(str, index)])
            values[key] = float(value)
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
        self._file: JsonLines | None = None
        self._events: Any = None
        self._written: set[tuple[int, str]] = set()
        if workdir is None:
            return
        # Not at the top: an import of a second, only needed where something is written.
        from tensorboardX import SummaryWriter

        self._file = JsonLines(workdir / METRICS, METRIC_NAMES, keep=lambda line: line["step"] <= resumed_step)
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
        self._num_steps = num_steps
        self._is_silent = is_silent
        self._last_step = first_step
        self._last_time = time.monotonic()
        self._live = sys.stdout.isatty()

    def rate(self, step: int, tokens_per_step: int) -> Values:
        """Speed since the last call."""
        now = time.monotonic()
        num_steps = max(step - self._last_step, 1)
        seconds = (now - self._last_time) / num_steps
        self._last_step = step
        self._last_time = now
        return {"step_seconds": seconds, "tokens_per_second": tokens_per_step / max(seconds, 1e-9)}

    def show(self, step: int, values: Values, is_first: bool) -> None:
        """Shows a step. The time of a first step is that of its compilation, and says nothing about the time left."""
        if self._is_silent:
            return
        loss = values["loss"]
        seconds = values["step_seconds"]
        parts = [f"step {step}/{self._num_steps}", f"loss {loss:.4f}", f"perplexity {perplexity(loss):.2f}"]
        if is_first:
            parts.append(f"compiled in {seconds:.1f} s")
        else:
            parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
            parts.append(f"{seconds:.3f} s/step")
            if "mfu" in values:
                parts.append(f"MFU {values['mfu']:.1%}")
            seconds_left = seconds * (self._num_steps - step)
            parts.append(f"{duration(seconds_left)} left")
        text = "  ".join(parts)
        if self._live:
            print(f"\r\x1b[K{text}", end="", flush=True)
        else:
            print(text, flush=True)

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        if not self._is_silent:
            print(f"\r\x1b[K{text}" if self._live else text, flush=True)

    def restart_clock(self, step: int) -> None:
        """To be called after a pause (evaluation, saving) that should not count as step time."""
        self._last_step = step
        self._last_time = time.monotonic()


def perplexity(nats: float) -> float:
    """exp(nats), infinite instead of an overflow."""
    return math.exp(nats) if nats < 700 else math.inf
