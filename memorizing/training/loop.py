"""The training loop. What else a run does beside training comes in as hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from memorizing.runtime.events import EventLog
from memorizing.runtime.stopping import StopSignal
from memorizing.runtime.watchdog import HangDetector
from memorizing.training.program import Program
from memorizing.training.start import Training
from memorizing.training.step import Metrics


class Preempted(Exception):
    """The run was told to stop; it has saved, and the same command continues it."""


class NonFiniteLoss(Exception):
    """The loss, the gradient or a parameter is no longer a number."""

    def __init__(self, what: str, saved_steps: Sequence[int]) -> None:
        if saved_steps:
            advice = f"the last good checkpoint is that of step {saved_steps[-1]}"
        else:
            advice = "there is no checkpoint yet"
        super().__init__(f"{what}; {advice}")


class Hook:
    """Something that a run does beside training. Steps count from 1. A method that is not overridden does nothing."""

    def at_start(self) -> None:
        """Before the first step of this process."""

    def before_step(self, step: int) -> None:
        """Before the batch of a step is read."""

    def after_step(self, step: int, metrics: Metrics) -> None:
        """After a step was given to the devices. They may still be at work: to read `metrics` is to wait for them."""

    def at_end(self) -> None:
        """After the last step."""

    def close(self) -> None:
        """When the run ends, well or not."""


def train(
    training: Training, program: Program, num_steps: int, hooks: Sequence[Hook], tick: Callable[[], None]
) -> None:
    """Trains until a step.

    NOTE: the order is part of the contract. The checkpoint of step n holds the state after n updates and the positions
    of the rows after n batches. Hooks are called in their order, each after the ones whose work it needs.

    Args:
      training: what to go on with; changed in place.
      program: the compiled step.
      num_steps: the last step.
      hooks: what is done beside training.
      tick: called before every step; it may raise `Preempted`.
    """
    for hook in hooks:
        hook.at_start()
    for step in range(training.first_step + 1, num_steps + 1):
        tick()
        for hook in hooks:
            hook.before_step(step)
        batch = training.batches.next(step)
        training.state, metrics = program.step(training.state, batch)
        for hook in hooks:
            hook.after_step(step, metrics)
    for hook in hooks:
        hook.at_end()


def make_tick(
    watchdog: HangDetector,
    stop: StopSignal,
    events: EventLog,
    check_lock: Callable[[], None],
    save: Callable[[], int],
) -> Callable[[], None]:
    """What is called before every step, of training and of evaluation. Only here a run notices that it is to stop.

    Args:
      watchdog: is told that one more step is done.
      stop: says whether to stop.
      events: where a stop is noted.
      check_lock: raises if the workdir is no longer this run's.
      save: saves, waits until that is on disk, and returns the step.
    """

    def tick() -> None:
        watchdog.beat()
        check_lock()
        if stop.reached():
            step = save()
            events.write("preemption", step=step)
            raise Preempted(f"stopped and saved at step {step}; the same command continues from there")

    return tick
