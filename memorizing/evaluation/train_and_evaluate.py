"""A whole run: the training loop with its standard hooks, and the results in the workdir."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from memorizing import __version__
from memorizing.batch import DataSource, text_of
from memorizing.cost.accelerators import Utilization, memory_in_use
from memorizing.errors import EXIT_START_AGAIN, UserError, what_the_machine_lacks
from memorizing.evaluation import plots, report
from memorizing.evaluation.controls import ControlsHook
from memorizing.evaluation.evaluation_hook import EvaluationHook
from memorizing.evaluation.evaluator import Evaluation, Evaluator
from memorizing.evaluation.reading import num_rows_side_by_side
from memorizing.runtime import distributed, failures, workdir_lock
from memorizing.runtime.events import EventLog, goodput
from memorizing.runtime.failures import Interrupted, MachineFailed
from memorizing.runtime.json_lines import replace_bytes, replace_text
from memorizing.runtime.metrics import MetricWriter, Progress, Values
from memorizing.runtime.stopping import StopSignal
from memorizing.runtime.tracking import weights_and_biases
from memorizing.runtime.watchdog import HangDetector
from memorizing.runtime.workdir import EVENTS, not_yet_there, resolve, take_back
from memorizing.training.checkpoint import Checkpointer, saved_steps
from memorizing.training.experiment import Experiment
from memorizing.training.hooks import CheckpointHook, MetricsHook, ProfileHook
from memorizing.training.identity import open_workdir
from memorizing.training.loop import Hook, Preempted, make_tick, train
from memorizing.training.program import Program
from memorizing.training.start import Training, restore_or_init


def train_and_evaluate(
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
      UserError: the experiment does not fit the devices or the workdir, a checkpoint cannot be used, or another run is
        writing into the workdir.
      Preempted: on SIGTERM or Ctrl-C to any process, after a checkpoint.
      NonFiniteLoss: the loss, the gradient or a parameter is not finite; the newest checkpoint is from before.
      Interrupted: another process, a device or the network was lost.
      MachineFailed: there was no room, no memory or no permission.
    """
    loop = experiment.loop
    if loop.compilation_cache:
        cache = resolve(loop.compilation_cache)
        if cache.exists() and not cache.is_dir():
            raise UserError(f"LoopConfig.compilation_cache = {loop.compilation_cache!r} is no folder")
        jax.config.update("jax_compilation_cache_dir", str(cache))
    weights_and_biases.check(loop.wandb_project)
    mesh = experiment.make_mesh()
    experiment.check_data()
    # The first process holds the workdir for all of them.
    if distributed.is_primary():
        held = workdir_lock.held(resolve(workdir), distributed.say)
    else:
        held = contextlib.nullcontext(lambda: None)
    with held as check_lock, _nothing_left_if_refused(resolve(workdir), check_lock):
        folder = distributed.primary_first(lambda: open_workdir(workdir, experiment, config_text, restore_step))
        return _run(experiment, folder, mesh, check_lock, restore_step)


@contextlib.contextmanager
def _nothing_left_if_refused(workdir: epath.Path, check_lock: Callable[[], None]) -> Iterator[None]:
    """Takes back what was written where the user's mistake is found before anything was trained."""
    written = not_yet_there(workdir)
    try:
        yield
    except UserError:
        # Whoever has lost the workdir to another process leaves it alone.
        with contextlib.suppress(UserError):
            check_lock()
            if distributed.is_primary():
                take_back(workdir, written)
        raise


def _run(
    experiment: Experiment,
    folder: epath.Path,
    mesh: Mesh,
    check_lock: Callable[[], None],
    restore_step: int | None,
) -> dict[str, Evaluation]:
    """Trains and evaluates in a workdir that this run holds, as `check_lock` says."""
    events = EventLog(folder / EVENTS if distributed.is_primary() else None)
    events.write("start", version=__version__, **_machines())

    def end_hanging(reason: str) -> None:
        events.write("failure", reason=reason)
        failures.fail(EXIT_START_AGAIN, reason)

    loop = experiment.loop
    with jax.set_mesh(mesh), StopSignal() as stop, HangDetector(loop.hang_seconds, end_hanging) as watchdog:
        run = None
        try:
            run = _assemble(experiment, folder, mesh, check_lock, events, stop, watchdog, restore_step)
            train(run.training, run.program, loop.num_steps, run.hooks, run.tick)
            _write_results(run, experiment.data, folder, events)
        except BaseException as error:
            _end_early(run, error, events, folder)
            raise
        run.close()
        return run.evaluation.final


@dataclasses.dataclass(frozen=True)
class _Run:
    """The parts of a run while it lives."""

    program: Program
    training: Training
    tick: Callable[[], None]
    progress: Progress
    profile: ProfileHook
    metrics: MetricsHook
    checkpoint: CheckpointHook
    evaluation: EvaluationHook
    controls: ControlsHook

    @property
    def hooks(self) -> tuple[Hook, ...]:
        """In their order: a step is logged, then saved, then evaluated."""
        return (self.profile, self.metrics, self.checkpoint, self.evaluation, self.controls)

    def close(self) -> None:
        for hook in self.hooks:
            hook.close()


def _assemble(
    experiment: Experiment,
    workdir: epath.Path,
    mesh: Mesh,
    check_lock: Callable[[], None],
    events: EventLog,
    stop: StopSignal,
    watchdog: HangDetector,
    restore_step: int | None,
) -> _Run:
    """Restores or initialises, and builds the hooks."""
    loop = experiment.loop
    batch = experiment.batch
    is_primary = distributed.is_primary()
    stacked_layers = experiment.model.stack.stacked_layers
    checkpointer = Checkpointer(workdir, loop.keep_checkpoints, loop.save_context, stacked_layers)
    program = Program(experiment, mesh)
    training = restore_or_init(experiment, program, checkpointer, events, workdir, restore_step)
    writer = MetricWriter(workdir if is_primary else None, training.first_step, loop.wandb_project)
    progress = Progress(training.first_step, loop.num_steps, is_silent=not is_primary)
    utilization = Utilization(experiment.model, batch.segment_length, jax.devices())

    def device_values(tokens_per_second: float) -> Values:
        return utilization.values(tokens_per_second) | memory_in_use(jax.local_devices())

    profile = ProfileHook(training, loop.profile_steps, workdir)
    metrics = MetricsHook(experiment, training.first_step, writer, progress, events, checkpointer, device_values)
    checkpoint = CheckpointHook(training, checkpointer, loop.checkpoint_every, metrics, events, check_lock)
    tick = make_tick(watchdog, stop, events, check_lock, checkpoint.save_and_wait)
    num_rows = num_rows_side_by_side(experiment.data, batch.num_rows, mesh)
    evaluator = Evaluator(experiment.model, num_rows, batch.segment_length, mesh, tick)
    evaluation = EvaluationHook(experiment, training, evaluator, metrics, writer, progress, events)
    controls = ControlsHook(experiment, training, evaluator, progress, events)
    return _Run(program, training, tick, progress, profile, metrics, checkpoint, evaluation, controls)


def _write_results(run: _Run, data: DataSource, workdir: epath.Path, events: EventLog) -> None:
    """Leaves the final evaluations in the workdir, as figures and as a picture, and says where the time went."""
    evaluations = run.evaluation.final
    text = text_of(data)
    of_all = report.summarize(evaluations, "as trained", text.document_keys() if text else None, seed=0)
    summary: dict[str, Any] = {"step": run.training.step, "documents": of_all["documents"], **of_all["evaluations"]}
    if run.controls.accuracies is not None:
        summary["accuracy"] = run.controls.accuracies
    if distributed.is_primary():
        replace_bytes(workdir / "loss_by_position.png", plots.loss_by_position(evaluations))
        replace_text(workdir / "evaluation.json", json.dumps(summary, indent=2) + "\n")
        events.write("end", step=run.training.step)
        run.progress.say(str(goodput(workdir)))
    run.progress.say(f"written to {workdir}: checkpoints, metrics.jsonl, events, loss_by_position.png")


def _end_early(run: _Run | None, error: BaseException, events: EventLog, workdir: epath.Path) -> None:
    """Notes a failure and closes what can be closed.

    Raises:
      Interrupted: the error says that a process, a device or the network was lost.
      MachineFailed: the error says that there was no room, no memory or no permission.
    """
    has_failed = not isinstance(error, Preempted)
    lack = what_the_machine_lacks(error)
    # On a full disk this fails as what came before it did.
    with contextlib.suppress(*([Exception] if lack else [])):
        if has_failed:
            events.write("failure", reason=f"{type(error).__name__}: {error}"[:500])
    with contextlib.suppress(*([Exception] if lack else [])):
        # Closing waits for the other processes, which may be what has failed.
        if run and not (has_failed and jax.process_count() > 1):
            run.close()
    if lack:
        steps = saved_steps(workdir)
        advice = f"the last good checkpoint is that of step {steps[-1]}" if steps else "there is no checkpoint yet"
        raise MachineFailed(f"{lack}; {advice}") from error
    has_progressed = bool(run and run.metrics.has_progressed)
    if lost := failures.find_lost_infrastructure(error, has_progressed):
        raise Interrupted(f"interrupted, start it again: {lost}") from error


def _machines() -> dict[str, Any]:
    devices = jax.devices()
    return {"processes": jax.process_count(), "devices": len(devices), "device_kind": devices[0].device_kind}
