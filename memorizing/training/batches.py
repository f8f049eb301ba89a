"""The batches of a run: the training stream of its data, laid out on the devices, in the stages of its curriculum."""

from __future__ import annotations

from typing import Any

from memorizing.batch import Batch, BatchIterator, DataSource
from memorizing.runtime.sharding import RowPlacement
from memorizing.training.experiment import BatchConfig


class TrainingBatches:
    """One batch a step. Rows keep their positions where the curriculum changes the number of segments."""

    def __init__(self, data: DataSource, config: BatchConfig, placement: RowPlacement, seed: int, step: int) -> None:
        """
        Args:
          data: what is read.
          config: shape and curriculum of the batches.
          placement: where their rows lie.
          seed: of the order of documents.
          step: the one whose stage of the curriculum comes first.
        """
        self._data = data
        self._config = config
        self._placement = placement
        self._seed = seed
        self._num_segments = config.segments_at(step)
        self._stream = self._open()

    def next(self, step: int) -> Batch:
        """The batch of a step (counted from 1), on the devices."""
        num_segments = self._config.segments_at(step)
        if num_segments != self._num_segments:
            position = self._stream.get_state()
            self._num_segments = num_segments
            self._stream = self._open()
            self._stream.set_state(position)
        return self._placement.put(next(self._stream))

    def position(self) -> dict[str, Any]:
        """Where every row stands, JSON-able, with what it depends on: the layout of rows and the order of documents."""
        return row_layout(self._config) | {"seed": self._seed, "stream": self._stream.get_state()}

    def move_to(self, position: dict[str, Any]) -> None:
        """Continues from a position that was returned for the same layout and seed."""
        self._stream.set_state(position["stream"])

    def _open(self) -> BatchIterator:
        return self._data.train_batches(
            num_rows=self._config.num_rows,
            rows=self._placement.rows,
            num_segments=self._num_segments,
            segment_length=self._config.segment_length,
            seed=self._seed,
        )


def row_layout(config: BatchConfig) -> dict[str, int]:
    """What two runs need to have in common so that the rows and contexts of a checkpoint mean the same in both."""
    return {"num_rows": config.num_rows, "segment_length": config.segment_length}
