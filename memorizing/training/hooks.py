"""The hooks of every training run: metrics, checkpoints, and a profile on request."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from etils import epath

from memorizing.runtime import distributed
from memorizing.runtime.events import EventLog
from memorizing.runtime.metrics import MetricWriter, Progress, Values, flatten, perplexity
from memorizing.runtime.progress import bar
from memorizing.training.checkpoint import Checkpointer, NotFinite
from memorizing.training.experiment import Experiment
from memorizing.training.loop import Hook, NonFiniteLoss
from memorizing.training.start import Training
from memorizing.training.step import Metrics


class MetricsHook(Hook):
    """Reads the metrics of each step one step late, while the devices work on the next, and logs them now and then.

    Attributes:
      has_progressed: whether a step of this process is known to have ended well.
    """

    def __init__(
        self,
        experiment: Experiment,
        first_step: int,
        writer: MetricWriter,
        progress: Progress,
        events: EventLog,
        checkpointer: Checkpointer,
        device_values: Callable[[float], Values],
    ) -> None:
        """
        Args:
          experiment: what is trained.
          first_step: the step that the run goes on from.
          writer, progress, events: where metrics, lines on the terminal, and times go.
          checkpointer: knows the last good checkpoint, for the message of a run that fails.
          device_values: from tokens a second, what the step is worth on these devices.
        """
        self.has_progressed = False
        self._loop = experiment.loop
        self._batch = experiment.batch
        self._learning_rate = jax.jit(experiment.optimizer.learning_rate)
        self._writer = writer
        self._progress = progress
        self._events = events
        self._checkpointer = checkpointer
        self._device_values = device_values
        # The step whose metrics are still to be read.
        self._pending: tuple[int, Metrics] | None = None
        # Steps that compile: their time says nothing of the others'.
        self._compiling = {first_step + 1}
        # The last step whose time was written down.
        self._timed_step = first_step

    def at_start(self) -> None:
        self._events.lap()

    def before_step(self, step: int) -> None:
        """Says that a stage of the curriculum begins. Its first step compiles."""
        num_segments = self._batch.segments_at(step)
        if step > 1 and num_segments != self._batch.segments_at(step - 1):
            self.flush()
            self.write_times("steps", step - 1)
            self._progress.say(f"from step {step} on: {num_segments} segments a row")
            self._progress.restart_clock(step - 1)
            self._compiling.add(step)
        if step in self._compiling:
            self._progress.begin_compiling(step)

    def after_step(self, step: int, metrics: Metrics) -> None:
        self.flush()
        self._pending = (step, metrics)

    def at_end(self) -> None:
        # The last step is read by the checkpoint that follows.
        self.flush()
        self._progress.close()

    def close(self) -> None:
        self._progress.close()
        self._writer.close()

    def flush(self) -> None:
        """Reads the metrics of the last step that was started, and logs them when it is time.

        Raises:
          NonFiniteLoss: the loss or the gradient is not finite.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        loss = float(metrics["loss"])
        norm = float(metrics["gradient_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"step {step}: the loss is {loss} and the norm of the gradient {norm}"
            raise NonFiniteLoss(what, self._checkpointer.steps)
        self.has_progressed = True
        self._progress.advance()
        if step % self._loop.log_every == 0 or step == self._loop.num_steps or step in self._compiling:
            self._log(step, flatten(metrics))

    def write_times(self, event: str, step: int) -> None:
        """Writes down how long the steps took since the last that was written down, up to this one."""
        steps = range(self._timed_step + 1, step + 1)
        seconds = self._events.lap()
        if steps:
            tokens = sum(map(self._batch.tokens_at, steps))
            self._events.write(event, step=step, count=len(steps), tokens=tokens, seconds=round(seconds, 3))
        self._timed_step = step

    def _log(self, step: int, values: Values) -> None:
        is_compiling = step in self._compiling
        values |= self._progress.rate(step, self._batch.tokens_at(step))
        values["learning_rate"] = float(self._learning_rate(step - 1))
        values["perplexity"] = perplexity(values["loss"])
        if not is_compiling:
            values |= self._device_values(values["tokens_per_second"])
        self.write_times("compile" if is_compiling else "steps", step)
        self._writer.write(step, "train", values)
        self._progress.show(step, values, is_compiling)


class CheckpointHook(Hook):
    """Saves the state and the positions of the rows every so many steps and at the end, if all of it is finite."""

    def __init__(
        self,
        training: Training,
        checkpointer: Checkpointer,
        every: int,
        metrics: MetricsHook,
        events: EventLog,
        check_lock: Callable[[], None],
    ) -> None:
        """
        Args:
          training: what is saved.
          checkpointer: of the workdir; closed with this.
          every: steps between two checkpoints; 0 for none before the end.
          metrics: know whether the last step was finite.
          events: where the times go.
          check_lock: raises if the workdir is no longer this run's.
        """
        self._check_lock = check_lock
        self._training = training
        self._checkpointer = checkpointer
        self._every = every
        self._metrics = metrics
        self._events = events

    def after_step(self, step: int, metrics: Metrics) -> None:
        if self._every and step % self._every == 0:
            self._save()

    def at_end(self) -> None:
        self.save_and_wait()

    def close(self) -> None:
        self._checkpointer.close()

    def save_and_wait(self) -> int:
        """Saves what is not saved yet, waits until it is complete on disk, and returns the step.

        Raises:
          NonFiniteLoss: there is something that is not finite.
        """
        self._save()
        step = self._training.step
        self._metrics.write_times("steps", step)
        with self._events.measure("save", step=step), bar(f"saving step {step}"):
            self._checkpointer.wait()
        return step

    def _save(self) -> None:
        self._metrics.flush()
        step = self._training.step
        if step in self._checkpointer.steps:
            return
        self._check_lock()
        with self._events.measure("save", step=step):
            try:
                self._checkpointer.save(self._training.state, self._training.batches.position())
            except NotFinite as error:
                raise NonFiniteLoss(str(error), self._checkpointer.steps) from None


class ProfileHook(Hook):
    """Has the profiler of the first process trace some steps, into `workdir/profile`."""

    def __init__(self, training: Training, steps: tuple[int, ...], workdir: epath.Path) -> None:
        """
        Args:
          training: whose steps are traced.
          steps: the first and the last of them; empty for none.
          workdir: the run's folder.
        """
        self._training = training
        self._steps = steps
        self._folder = workdir / "profile"
        self._is_tracing = False

    def before_step(self, step: int) -> None:
        if self._is_tracing and step > self._steps[1]:
            jax.block_until_ready(self._training.state.step)
            self.close()
        elif self._steps and step == self._steps[0] and distributed.is_primary():
            jax.profiler.start_trace(str(self._folder))
            self._is_tracing = True

    def close(self) -> None:
        if self._is_tracing:
            jax.profiler.stop_trace()
            self._is_tracing = False
