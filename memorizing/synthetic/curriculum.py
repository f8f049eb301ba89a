"""A curriculum: easier forms of a task first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from memorizing.batch import Batch, BatchIterator, EvaluationBatch
from memorizing.errors import CountOrNone, UserError
from memorizing.synthetic.task import SyntheticTask


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """A `memorizing.batch.DataSource`: training goes from task to task, held-out samples are those of the last one.

    Attributes:
      stages: pairs of a batch, counted from 0 and growing, and the task from that batch on. Batches are steps.
    """

    stages: tuple[tuple[CountOrNone, SyntheticTask], ...]
    document_bytes: None = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.stages]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise UserError(f"Curriculum.stages: starts at the batches {starts}; expected 0 first, then growing ones")
        sizes = [task.vocab_size for _, task in self.stages]
        if len(set(sizes)) > 1:
            raise UserError(f"Curriculum.stages: the tasks have {sizes} token ids; expected as many in all of them")

    @property
    def task(self) -> SyntheticTask:
        """What is learned in the end."""
        return self.stages[-1][1]

    @property
    def vocab_size(self) -> int:
        return self.task.vocab_size

    @property
    def start_id(self) -> int:
        return self.task.start_id

    @property
    def chance(self) -> float:
        return self.task.chance

    @property
    def num_eval_documents(self) -> int:
        return self.task.num_eval_documents

    @property
    def identity(self) -> str:
        return "; ".join(f"from {start}: {task.identity}" for start, task in self.stages)

    def reaching(self, num_segments: int) -> SyntheticTask:
        """See `SyntheticTask`."""
        return self.task.reaching(num_segments)

    def train_batches(
        self, num_rows: int, rows: range, num_segments: int, segment_length: int, seed: int
    ) -> CurriculumStream:
        """See `DataSource`."""

        def open_task(task: SyntheticTask) -> BatchIterator:
            return task.train_batches(num_rows, rows, num_segments, segment_length, seed)

        return CurriculumStream(self.stages, open_task)

    def evaluation_batches(
        self, num_rows: int, segment_length: int, rows: range | None = None
    ) -> Iterator[EvaluationBatch]:
        """See `DataSource`."""
        return self.task.evaluation_batches(num_rows, segment_length, rows)


class CurriculumStream:
    """A `memorizing.batch.BatchIterator` over the streams of tasks, each from its start."""

    def __init__(
        self, stages: tuple[tuple[int, SyntheticTask], ...], open_task: Callable[[SyntheticTask], BatchIterator]
    ) -> None:
        self._starts = np.array([start for start, _ in stages])
        self._tasks = [task for _, task in stages]
        self._open = open_task
        self._move_to(0)

    def __iter__(self) -> CurriculumStream:
        return self

    def __next__(self) -> Batch:
        batch = next(self._stream)
        self._batches += 1
        if self._batches in self._starts:
            self._move_to(self._batches)
        return batch

    def get_state(self) -> dict[str, Any]:
        """See `BatchIterator`: batches handed out, and the position in the stream of the task that comes next."""
        return {"batches": self._batches, "stream": self._stream.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """See `BatchIterator`.

        Raises:
          ValueError: the state is of another stream.
        """
        if state.keys() != {"batches", "stream"}:
            raise ValueError(f"this position belongs to another stream, with {', '.join(state)}: not to a curriculum")
        self._move_to(state["batches"])
        self._stream.set_state(state["stream"])

    def _move_to(self, batches: int) -> None:
        """To the beginning of the task that hands out this batch."""
        self._batches = batches
        stage = int(np.searchsorted(self._starts, batches, side="right")) - 1
        self._stream = self._open(self._tasks[stage])
