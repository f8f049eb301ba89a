"""How a run begins: from a checkpoint of its workdir, or from the start."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

from etils import epath

from memorizing.runtime import distributed
from memorizing.runtime.events import EventLog
from memorizing.runtime.progress import bar
from memorizing.training import transfer
from memorizing.training.batches import TrainingBatches, row_layout
from memorizing.training.checkpoint import Checkpointer
from memorizing.training.experiment import Experiment
from memorizing.training.program import Program
from memorizing.training.state import TrainState


@dataclasses.dataclass
class Training:
    """What the steps of a run change.

    Attributes:
      state: parameters, optimizer, step, randomness and context.
      batches: what is read, with the position of every row.
      first_step: the step that this process goes on from.
      is_continued: whether it goes on from a checkpoint of its own workdir.
    """

    state: TrainState
    batches: TrainingBatches
    first_step: int
    is_continued: bool

    @property
    def step(self) -> int:
        """Updates made so far. Waits for the device."""
        return int(self.state.step)


def restore_or_init(
    experiment: Experiment,
    program: Program,
    checkpointer: Checkpointer,
    events: EventLog,
    workdir: epath.Path,
    restore_step: int | None = None,
) -> Training:
    """State and batches as a checkpoint of the workdir has them, or fresh ones if there is none.

    Args:
      experiment: what is trained.
      program: of the experiment.
      checkpointer: of the workdir.
      events: where it is noted how long this took.
      workdir: the run's folder.
      restore_step: which checkpoint; None for the newest.

    Raises:
      UserError: a checkpoint cannot be used.
    """
    begin = time.monotonic()
    layout = row_layout(experiment.batch)
    seed = experiment.loop.seed
    open_batches = functools.partial(TrainingBatches, experiment.data, experiment.batch, program.placement)

    def has_same_layout(position: dict[str, Any]) -> bool:
        return all(position[name] == size for name, size in layout.items())

    with bar("reading the newest checkpoint, if there is one"):
        restored = checkpointer.restore(program.abstract_state, restore_step, has_same_layout)
    if restored is None:
        state = _init(experiment, program, events)
        step = int(state.step)
        return Training(state, open_batches(seed, step + 1), step, is_continued=False)

    state, position = restored
    step = int(state.step)
    events.write("restore", step=step, seconds=round(time.monotonic() - begin, 3))
    distributed.say(f"continuing from step {step} in {workdir}")
    if state.context is None:
        distributed.say(
            "this checkpoint has no context for these rows: memories are empty, every row starts a document"
        )
        state = state.replace(context=program.init_context())
        # Another order than the one that has been read.
        batches = open_batches(seed + step, step + 1)
    else:
        # The stage that the saved step belonged to; the next one, if it begins here, goes on from its position.
        batches = open_batches(position["seed"], max(step, 1))
        batches.move_to(position)
    return Training(state, batches, step, is_continued=True)


def _init(experiment: Experiment, program: Program, events: EventLog) -> TrainState:
    """A fresh state, with the parameters of another run where the experiment asks for them."""
    loop = experiment.loop
    with events.measure("init"), bar("compiling and making the initial state"):
        state = program.init()
        if loop.start_from:
            length = experiment.batch.segment_length
            state = transfer.start_from(loop.start_from, state, experiment.model, length, loop.start_optimizer)
            distributed.say(f"starting from {loop.start_from}, step {int(state.step)}")
    return state
