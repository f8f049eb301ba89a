"""Where metrics go: metrics.jsonl, TensorBoard, Weights & Biases on request, and the terminal."""

from __future__ import annotations

import math
import time

import jax
import numpy as np
from etils import epath

from memorizing.runtime.json_lines import JsonLines
from memorizing.runtime.progress import Bar
from memorizing.runtime.tables import duration
from memorizing.runtime.tracking.tensorboard import TensorBoard
from memorizing.runtime.tracking.weights_and_biases import WeightsAndBiases
from memorizing.runtime.watching.settings import settings_of
from memorizing.runtime.workdir import CONFIG, METRIC_NAMES, METRICS, TENSORBOARD, read_config

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
    """Appends to `workdir/metrics.jsonl`, to TensorBoard event files beside it, and to Weights & Biases on request.

    A run that goes on from a step drops what was written beyond it.
    """

    def __init__(self, workdir: epath.Path | None, resumed_step: int, wandb_project: str = "") -> None:
        """
        Args:
          workdir: the run's folder; None for a process that writes nothing.
          resumed_step: from which the run goes on.
          wandb_project: of Weights & Biases; empty for none.
        """
        self._file: JsonLines | None = None
        self._trackers: list[TensorBoard | WeightsAndBiases] = []
        self._written: set[tuple[int, str]] = set()
        if workdir is None:
            return
        self._file = JsonLines(workdir / METRICS, METRIC_NAMES, keep=lambda line: line["step"] <= resumed_step)
        self._written = {(line["step"], line["kind"]) for line in self._file.lines}
        self._trackers.append(TensorBoard(workdir / TENSORBOARD, resumed_step))
        if wandb_project:
            config = settings_of(read_config(workdir)) if (workdir / CONFIG).exists() else {}
            self._trackers.append(WeightsAndBiases(workdir, wandb_project, config))

    def has(self, step: int, kind: str) -> bool:
        """Whether this was written, now or before the run went on."""
        return (step, kind) in self._written

    def write(self, step: int, kind: str, values: Values) -> None:
        """Writes one line `{"step": ..., "kind": ..., name: value, ...}`.

        Args:
          step: that the values belong to. What was written before of the same step and kind is not written again.
          kind: 'train', 'evaluation', ...; prefixes the names in TensorBoard and Weights & Biases.
          values: by name.
        """
        # A run that goes on from its last step evaluates it again.
        if self._file is None or self.has(step, kind):
            return
        self._written.add((step, kind))
        self._file.append({"step": step, "kind": kind, **values})
        named = {f"{kind}/{name}": value for name, value in values.items()}
        for tracker in self._trackers:
            tracker.write(step, named)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


class Progress:
    """Step, loss, perplexity, tokens/s, step time and time left.

    A live bar on a terminal, a plain line now and then in a log.
    """

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
        self._bar = None if is_silent else Bar("training", num_steps - first_step)

    def rate(self, step: int, tokens_per_step: int) -> Values:
        """Speed since the last call."""
        now = time.monotonic()
        num_steps = max(step - self._last_step, 1)
        seconds = (now - self._last_time) / num_steps
        self._last_step = step
        self._last_time = now
        return {"step_seconds": seconds, "tokens_per_second": tokens_per_step / max(seconds, 1e-9)}

    def begin_compiling(self, step: int) -> None:
        """Says that the program of this step is compiled first."""
        if self._bar:
            self._bar.describe(f"compiling the training step (step {step})")

    def advance(self) -> None:
        """One more step is done."""
        if self._bar:
            self._bar.advance()

    def close(self) -> None:
        """Takes the live bar away."""
        if self._bar:
            self._bar.close()

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
        if self._bar and self._bar.is_live:
            # It shows the time left itself.
            self._bar.describe("  ".join(parts))
            return
        if not is_first:
            seconds_left = seconds * (self._num_steps - step)
            parts.append(f"{duration(seconds_left)} left")
        print("  ".join(parts), flush=True)

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        if not self._is_silent:
            print(text, flush=True)

    def restart_clock(self, step: int) -> None:
        """To be called after a pause (evaluation, saving) that should not count as step time."""
        self._last_step = step
        self._last_time = time.monotonic()


def perplexity(nats: float) -> float:
    """exp(nats), infinite instead of an overflow."""
    return math.exp(nats) if nats < 700 else math.inf
