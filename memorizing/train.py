"""The training loop."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from memorizing import __version__, distributed, failures, plots, transfer
from memorizing import events as events_lib
from memorizing.accelerators import Utilization, memory_in_use
from memorizing.batch import BatchIterator
from memorizing.checkpoint import Checkpointer, NotFinite
from memorizing.errors import EXIT_START_AGAIN
from memorizing.evaluate import Ablation, Evaluation, Evaluator, accuracy_by_reach, num_rows_side_by_side
from memorizing.events import EventLog
from memorizing.experiment import Experiment
from memorizing.failures import Interrupted
from memorizing.metrics import MetricWriter, Progress, flatten, perplexity
from memorizing.program import Program
from memorizing.stopping import StopSignal
from memorizing.train_state import TrainState
from memorizing.train_step import Metrics
from memorizing.training.identity import open_workdir
from memorizing.watchdog import HangDetector
from memorizing.workdir import resolve


class Preempted(Exception):
    """The run was told to stop; it has saved, and the same command continues it."""


class NonFiniteLoss(Exception):
    """The loss, the gradient or a parameter is no longer a number."""


def train(
    experiment: Experiment, workdir: str, config_text: str = "", restore_step: int | None = None
) -> dict[str, Evaluation]:
    """Trains until the last step, from the newest checkpoint in `workdir` if there is one, and evaluates.

    Where there are several processes each of them calls this; the first one prints, and writes what is written once.

    Args:
      experiment: what to train.
      workdir: folder that receives everything the run produces; created if missing.
      config_text: the resolved configuration, written beside the results.
      restore_step: continues from this step instead of the newest.

    Returns:
      The final evaluations by name.

    Raises:
      UserError: the experiment does not fit the devices or the workdir, or a checkpoint cannot be used.
      Preempted: on SIGTERM or Ctrl-C to any process, after a checkpoint.
      NonFiniteLoss: the loss, the gradient or a parameter is not finite; the newest checkpoint is from before.
      Interrupted: another process, a device or the network was lost.
    """
    loop = experiment.loop
    if loop.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(resolve(loop.compilation_cache)))
    mesh = experiment.make_mesh()
    experiment.check_data()
    folder = distributed.primary_first(lambda: open_workdir(workdir, experiment, config_text))
    events = EventLog(folder / events_lib.FILE if distributed.is_primary() else None)
    events.write("start", version=__version__, **_machines())

    def end_hanging(reason: str) -> None:
        events.write("failure", reason=reason)
        failures.fail(EXIT_START_AGAIN, reason)

    with jax.set_mesh(mesh), StopSignal() as stop, HangDetector(loop.hang_seconds, end_hanging) as watchdog:
        run = None
        try:
            run = _Run(experiment, folder, mesh, restore_step, events, stop, watchdog)
            run.loop()
            evaluations = run.finish()
        except BaseException as error:
            failed = not isinstance(error, Preempted)
            if failed:
                events.write("failure", reason=f"{type(error).__name__}: {error}"[:500])
            # Closing waits for the other processes, which may be what has failed.
            if run and not (failed and jax.process_count() > 1):
                run.close()
            if lost := failures.find_lost_infrastructure(error, bool(run and run.has_progressed)):
                raise Interrupted(f"interrupted, start it again: {lost}") from error
            raise
        run.close()
        return evaluations


def _machines() -> dict[str, Any]:
    devices = jax.devices()
    return {"processes": jax.process_count(), "devices": len(devices), "device_kind": devices[0].device_kind}


class _Run:
    """The parts of a run while it lives."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: epath.Path,
        mesh: Mesh,
        restore_step: int | None,
        events: EventLog,
        stop: StopSignal,
        watchdog: HangDetector,
    ) -> None:
        loop, batch = experiment.loop, experiment.batch
        self.experiment, self.workdir = experiment, workdir
        self.events, self.stop, self.watchdog = events, stop, watchdog
        self.checkpointer = Checkpointer(workdir, loop.keep_checkpoints, loop.save_context)
        self.program = Program(experiment, mesh)
        self.stream_seed = loop.seed
        is_primary = distributed.is_primary()
        # What continues is a run of this workdir, not one that it starts from.
        self.continues = False
        self.state, self.stream = self._start(restore_step)
        self.first_step = self.accounted = int(self.state.step)
        num_rows = num_rows_side_by_side(experiment.data, batch.num_rows, mesh)
        self.evaluator = Evaluator(experiment.model, num_rows, batch.segment_length, mesh, self._tick)
        self.writer = MetricWriter(workdir if is_primary else None, self.first_step)
        self.progress = Progress(self.first_step, loop.num_steps, is_silent=not is_primary)
        self.learning_rate = jax.jit(experiment.optimizer.learning_rate)
        self.utilization = Utilization(experiment.model, batch.segment_length, jax.devices())
        self.pending: tuple[int, Metrics] | None = None
        # Steps that compile: their time says nothing of the others'.
        self.compiling = {self.first_step + 1}
        self.profiling = self.has_progressed = False
        events.lap()

    def loop(self) -> None:
        """NOTE: the order is part of the contract. The checkpoint of step n holds the state after n updates and the rows' positions after n batches."""
        loop = self.experiment.loop
        is_evaluated = self.writer.has(self.first_step, "evaluation")
        if self.continues and self._evaluates(self.first_step) and not distributed.from_primary(is_evaluated):
            # It was stopped before it had evaluated the step that it had saved.
            self._evaluate(self.first_step)
        for step in range(self.first_step + 1, loop.num_steps + 1):
            self._tick()
            self._profile(step)
            self._enter_stage(step)
            batch = self.program.placement.put(next(self.stream))
            self.state, metrics = self.program.step(self.state, batch)
            # Metrics are read one step late, while the device is busy with the next step.
            self._read_metrics()
            self.pending = (step, metrics)
            if loop.checkpoint_every and step % loop.checkpoint_every == 0:
                self.save()
            if self._evaluates(step):
                self._read_metrics()
                self._evaluate(step)
        self.save()

    def save(self) -> None:
        """Saves state and rows, once it is sure that they are finite."""
        self._read_metrics()
        step = int(self.state.step)
        if step in self.checkpointer.steps:
            return
        rows = self._row_layout() | {"seed": self.stream_seed, "stream": self.stream.get_state()}
        with self.events.measure("save", step=step):
            try:
                self.checkpointer.save(self.state, rows)
            except NotFinite as error:
                raise NonFiniteLoss(f"{error}; {self._last_good()}") from None

    def finish(self) -> dict[str, Evaluation]:
        """The final evaluation, with the memory and, where there is one, without it; the results are left in the workdir."""
        step, data = int(self.state.step), self.experiment.data
        self._account("steps", step)
        with self.events.measure("save", step=step):
            self.checkpointer.wait()
        evaluations = {"as trained": self._evaluate(step)}
        if self.experiment.model.has_memory:
            evaluations["memory cleared"] = self._evaluate(step, "memory_cleared")
        summary: dict[str, Any] = {name: evaluation.values() for name, evaluation in evaluations.items()}
        self.progress.say(_table(evaluations))
        if self.experiment.loop.evaluate_segments:
            reaches = self.experiment.loop.evaluate_segments
            with self.events.measure("evaluation", step=step):
                summary["accuracy"] = accuracy_by_reach(self._controls(max(reaches)), self.state.params, data, reaches)
            self.progress.say(_accuracy_table(summary["accuracy"], data.chance))
        if distributed.is_primary():
            (self.workdir / "loss_by_position.png").write_bytes(plots.loss_by_position(evaluations))
            (self.workdir / "evaluation.json").write_text(json.dumps({"step": step} | summary, indent=2) + "\n")
            self.events.write("end", step=step)
            self.progress.say(str(events_lib.goodput(self.workdir)))
        self.progress.say(f"written to {self.workdir}: checkpoints, metrics.jsonl, events, loss_by_position.png")
        return evaluations

    def _controls(self, reach: int) -> dict[str, tuple[Evaluator, Ablation]]:
        """The model as it is, and in every way that should keep it from an answer `reach` segments back."""
        model, evaluator = self.experiment.model, self.evaluator
        controls: dict[str, tuple[Evaluator, Ablation]] = {"as trained": (evaluator, "none")}
        if model.has_memory:
            num_segments = max(reach // 2, 1)
            smaller = evaluator.with_model(model.with_memory_size(num_segments * self.experiment.batch.segment_length))
            controls[f"memory of {num_segments} segments"] = (smaller, "none")
            controls["memory permuted"] = (evaluator, "memory_permuted")
            controls["memory cleared"] = (evaluator, "memory_cleared")
        controls["state reset"] = (evaluator, "state_reset")
        controls["state shuffled"] = (evaluator, "state_shuffled")
        return controls

    def close(self) -> None:
        self._stop_profiling()
        self.writer.close()
        self.checkpointer.close()

    def _tick(self) -> None:
        """Before every step, of training and of evaluation: one more is done; and here the run may be told to stop."""
        self.watchdog.beat()
        if self.stop.reached():
            self.save()
            step = int(self.state.step)
            self._account("steps", step)
            with self.events.measure("save", step=step):
                self.checkpointer.wait()
            self.events.write("preemption", step=step)
            raise Preempted(f"stopped and saved at step {step}; the same command continues from there")

    def _account(self, event: str, step: int) -> None:
        """Writes down how long the steps up to this one took."""
        tokens = sum(map(self.experiment.batch.tokens_at, range(self.accounted + 1, step + 1)))
        count, seconds = step - self.accounted, self.events.lap()
        if count > 0:
            self.events.write(event, step=step, count=count, tokens=tokens, seconds=round(seconds, 3))
        self.accounted = step

    def _read_metrics(self) -> None:
        """Reads the metrics of the last step that was started: stops the run if they are not finite, logs them when it is time."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteLoss(
                f"step {step}: the loss is {loss} and the norm of the gradient {norm}; {self._last_good()}"
            )
        self.has_progressed = True
        loop = self.experiment.loop
        if step % loop.log_every == 0 or step == loop.num_steps or step in self.compiling:
            tokens = self.experiment.batch.tokens_at(step)
            values = flatten(metrics) | self.progress.rate(step, tokens)
            values["learning_rate"] = float(self.learning_rate(step - 1))
            values["perplexity"] = perplexity(loss)
            if step not in self.compiling:
                values |= self.utilization.values(values["tokens_per_second"]) | memory_in_use(jax.local_devices())
            self._account("compile" if step in self.compiling else "steps", step)
            self.writer.write(step, "train", values)
            self.progress.show(step, values, step in self.compiling)

    def _last_good(self) -> str:
        kept = self.checkpointer.steps
        return f"the last good checkpoint is that of step {kept[-1]}" if kept else "there is no checkpoint yet"

    def _evaluates(self, step: int) -> bool:
        loop = self.experiment.loop
        return bool(loop.evaluate_every) and step % loop.evaluate_every == 0 and 0 < step < loop.num_steps

    def _evaluate(self, step: int, ablation: Ablation = "none") -> Evaluation:
        with self.events.measure("evaluation", step=step):
            evaluation = self.evaluator.run(self.state.params, self.experiment.data, ablation)
        values = evaluation.values()
        self.writer.write(step, "evaluation" if ablation == "none" else f"evaluation_{ablation}", values)
        if step < self.experiment.loop.num_steps:
            self.progress.say(f"held-out documents at step {step}: {_figures(values)}")
            self.progress.restart_clock(step)
        return evaluation

    def _row_layout(self) -> dict[str, int]:
        """What has to be equal for rows and contexts of a checkpoint to mean the same in this run."""
        batch = self.experiment.batch
        return {"num_rows": batch.num_rows, "segment_length": batch.segment_length}

    def _enter_stage(self, step: int) -> None:
        """Opens the stream anew, at its position, where the curriculum changes the number of segments."""
        batch = self.experiment.batch
        if step > 1 and batch.segments_at(step) != batch.segments_at(step - 1):
            self._read_metrics()
            self._account("steps", step - 1)
            position, self.stream = self.stream.get_state(), self._open_stream(step)
            self.stream.set_state(position)
            self.progress.say(f"from step {step} on: {batch.segments_at(step)} segments a row")
            self.progress.restart_clock(step - 1)
            self.compiling.add(step)

    def _start(self, restore_step: int | None) -> tuple[TrainState, BatchIterator]:
        """State and stream as the newest checkpoint has them, if there is one."""
        layout, loop, say = self._row_layout(), self.experiment.loop, distributed.say

        def same_rows(rows: dict[str, Any]) -> bool:
            return {name: rows[name] for name in layout} == layout

        begin = time.monotonic()
        restored = self.checkpointer.restore(self.program.abstract_state, restore_step, same_rows)
        if restored is None:
            with self.events.measure("init"):
                state = self.program.init()
                if loop.start_from:
                    state = transfer.start_from(loop.start_from, state, loop.start_optimizer)
                    say(f"starting from {loop.start_from}, step {int(state.step)}")
            return state, self._open_stream(int(state.step) + 1)
        self.continues, state = True, restored.state
        self.events.write("restore", step=int(state.step), seconds=round(time.monotonic() - begin, 3))
        say(f"continuing from step {int(state.step)} in {self.workdir}")
        if state.context is not None:
            self.stream_seed = restored.rows["seed"]
            # The stage that the saved step belonged to; the loop enters the next one if it begins here.
            stream = self._open_stream(max(int(state.step), 1))
            stream.set_state(restored.rows["stream"])
            return state, stream
        say("this checkpoint has no context for these rows: memories are empty, every row starts a document")
        # Another order than the one that has been read.
        self.stream_seed = loop.seed + int(state.step)
        return state.replace(context=self.program.init_context()), self._open_stream(int(state.step) + 1)

    def _open_stream(self, step: int) -> BatchIterator:
        batch = self.experiment.batch
        return self.experiment.data.train_batches(
            batch.num_rows, self.program.placement.rows, batch.segments_at(step), batch.segment_length, self.stream_seed
        )

    def _profile(self, step: int) -> None:
        """Starts and stops the profiler around the steps that were asked for."""
        loop = self.experiment.loop
        if self.profiling and step > loop.profile_steps[1]:
            jax.block_until_ready(self.state.step)
            self._stop_profiling()
        elif distributed.is_primary() and loop.profile_steps and step == loop.profile_steps[0]:
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self.profiling = True

    def _stop_profiling(self) -> None:
        if self.profiling:
            jax.profiler.stop_trace()
            self.profiling = False


def _figures(values: dict[str, float]) -> str:
    text = f"perplexity {values['perplexity']:.3f}"
    if "bits_per_byte" in values:
        text += f", {values['bits_per_byte']:.4f} bits per byte"
    return text


def _table(evaluations: dict[str, Evaluation]) -> str:
    lines = ["held-out documents, each once, whole:"]
    for name, evaluation in evaluations.items():
        lines.append(f"  {name + ':':<16}{_figures(evaluation.values())}")
    return "\n".join(lines)


def _accuracy_table(accuracies: dict[str, dict[int, dict[str, float]]], chance: float) -> str:
    reaches = next(iter(accuracies.values()))
    width = max(map(len, accuracies)) + 2
    measures = {"answers": "answers, whole", "tokens": f"words of answers (chance {chance:.3f})"}
    if all(cell["answers"] == cell["tokens"] for row in accuracies.values() for cell in row.values()):
        # Answers of one word.
        measures = {"answers": f"answers (chance {chance:.3f})"}
    lines = []
    for measure, what in measures.items():
        lines.append(f"share of right {what}, by the number of segments to reach over:")
        lines.append(f"  {'':<{width}}" + "".join(f"{reach:>8}" for reach in reaches))
        for name, by_reach in accuracies.items():
            cells = "".join(f"{accuracy[measure]:>8.3f}" for accuracy in by_reach.values())
            lines.append(f"  {name:<{width}}{cells}")
    return "\n".join(lines)
