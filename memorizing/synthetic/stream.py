"""The training stream of a synthetic task.

Row r of R reads the samples r, r + R, r + 2R, ..., segment after segment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from memorizing.batch import Batch


class SampleStream:
    """A `memorizing.batch.BatchIterator` over samples.

    All samples have the same number of segments, so one position serves all rows.
    """

    def __init__(
        self,
        load: Callable[[int], Any],
        identity: dict[str, Any],
        sample_segments: int,
        num_rows: int,
        rows: range,
        num_segments: int,
        segment_length: int,
    ) -> None:
        """Starts at the first sample.

        Args:
          load: gives a sample by its index: the fields of `Batch` but for `start_of_document`, each
            [sample_segments, T].
          identity: of the samples, JSON-able; a state of others is refused.
          sample_segments: segments of a sample.
          num_rows: R, rows of all hosts.
          rows: this host's share of `range(num_rows)`.
          num_segments: U, segments of a row in a batch.
          segment_length: T.
        """
        self._load = load
        self._identity = identity
        self._sample_segments = sample_segments
        self._layout = {"num_rows": num_rows, "segment_length": segment_length}
        self._rows = rows
        self._num_segments = num_segments
        self._move_to(0, 0)

    def __iter__(self) -> SampleStream:
        return self

    def __next__(self) -> Batch:
        segments = [self._next_segment() for _ in range(self._num_segments)]
        return Batch(*(np.stack(field, axis=1) for field in zip(*segments, strict=True)))

    def get_state(self) -> dict[str, Any]:
        """See `BatchIterator`: index of the first row's sample, and the segment of it that comes next."""
        return self._identity | self._layout | {"first_sample": self._first_sample, "segment": self._segment}

    def set_state(self, state: dict[str, Any]) -> None:
        """See `BatchIterator`.

        Between two samples, another number of rows or another segment length may go on from here.

        Raises:
          ValueError: the state is of other samples, or inside samples of another layout.
        """
        is_inside_a_sample = state.get("segment") != 0
        expected = self._identity | (self._layout if is_inside_a_sample else {})
        for name, value in expected.items():
            if state.get(name) != value:
                raise ValueError(
                    f"this position belongs to another stream: its {name} is {state.get(name)!r}, here it is {value!r}"
                )
        self._move_to(state["first_sample"], state["segment"])

    def _move_to(self, first_sample: int, segment: int) -> None:
        self._first_sample = first_sample
        self._segment = segment
        # The rows' current samples, each field [B, sample_segments, T]: made when their first segment is wanted.
        self._fields: list[np.ndarray] | None = None

    def _next_segment(self) -> Batch:
        if self._fields is None:
            samples = [self._load(self._first_sample + row) for row in self._rows]
            self._fields = [np.stack(field) for field in zip(*samples, strict=True)]
        parts = [field[:, self._segment] for field in self._fields]  # each [B, T]
        start_of_document = np.full(len(self._rows), self._segment == 0)  # [B]
        batch = Batch(*parts, start_of_document=start_of_document)
        if self._segment + 1 < self._sample_segments:
            self._segment += 1
        else:
            self._move_to(self._first_sample + self._layout["num_rows"], 0)
        return batch
