"""Where metrics go: metrics.jsonl, TensorBoard event files and the terminal."""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

import jax
import numpy as np
from etils import epath

Values = dict[str, float]


def flatten(metrics: dict[str, jax.Array]) -> Values:
    """Host floats by name; an array becomes one value an element, named by its indices. Blocks until the arrays are there."""
    values: Values = {}
    for name, array in jax.device_get(metrics).items():
        for index, value in np.ndenumerate(array):
            values["/".join([name, *map(str, index)])] = float(value)
    return values


class MetricWriter:
    """Appends to `workdir/metrics.jsonl` and to TensorBoard event files beside it. A run that goes on from a step forgets what was written beyond it."""

    def __init__(self, workdir: epath.Path, resumed_step: int) -> None:
        # Not at the top: an import of a second, only needed where something is written.
        from tensorboardX import SummaryWriter

        self._path = workdir / "metrics.jsonl"
        self._lines = [line for line in self._read_lines() if line["step"] <= resumed_step]
        self._written = {(line["step"], line["kind"]) for line in self._lines}
        self._rewrite()
        self._events = SummaryWriter(logdir=str(workdir / "events"), purge_step=resumed_step + 1)

    def write(self, step: int, kind: str, values: Values) -> None:
        """One line `{"step": ..., "kind": ..., name: value, ...}`; `kind` ('train', 'evaluation') prefixes the names in TensorBoard."""
        # A run that goes on from its last step evaluates it again.
        if (step, kind) in self._written:
            return
        self._written.add((step, kind))
        line = {"step": step, "kind": kind, **values}
        # Appending needs a local file; other file systems get the whole file again.
        if "://" in str(self._path):
            self._lines.append(line)
            self._rewrite()
        else:
            with open(self._path, "a") as file:
                file.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._events.close()

    def _rewrite(self) -> None:
        replace_text(self._path, "".join(json.dumps(line) + "\n" for line in self._lines))

    def _read_lines(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        lines = []
        for text in self._path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break  # The process was killed while it wrote this line.
        return lines


def replace_text(path: epath.Path, text: str) -> None:
    """Writes a file such that it is there as a whole, the old one or the new one, whenever the process is killed."""
    unfinished = path.parent / f".{path.name}.unfinished"
    unfinished.write_text(text)
    unfinished.replace(path)


class Progress:
    """Step, loss, perplexity, tokens/s, step time and time left: a live line on a terminal, a plain line now and then in a log."""

    def __init__(self, first_step: int, num_steps: int) -> None:
        self._num_steps = num_steps
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
        text = (
            f"step {step}/{self._num_steps}  loss {values['loss']:.4f}  perplexity {perplexity(values['loss']):.2f}  "
        )
        if is_first:
            text += f"compiled in {values['step_seconds']:.1f} s"
        else:
            text += (
                f"{values['tokens_per_second']:,.0f} tokens/s  {values['step_seconds']:.3f} s/step  "
                f"{_duration(values['step_seconds'] * (self._num_steps - step))} left"
            )
        if self._live:
            print(f"\r\x1b[K{text}", end="", flush=True)
        else:
            print(text, flush=True)

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        print(f"\r\x1b[K{text}" if self._live else text, flush=True)

    def restart_clock(self, step: int) -> None:
        """After a pause (evaluation, saving) that should not count as step time."""
        self._last = (step, time.monotonic())


def perplexity(nats: float) -> float:
    """exp(nats), infinite instead of an overflow."""
    return math.exp(nats) if nats < 700 else math.inf


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
