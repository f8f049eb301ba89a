"""Reading batches ahead in a thread, so that a step never waits for its batch."""

from __future__ import annotations

import queue
import threading
import weakref
from typing import Any

from memorizing.batch import Batch, BatchIterator


class ReadAhead:
    """The batches of another iterator, made before they are asked for; a `memorizing.batch.BatchIterator`.

    Its state is that after the last batch that was handed out, however many more have been read. An error of the
    iterator is raised in place of the batch that it prevented. The thread starts with the first batch and ends with
    `close`, with this object, or with the program.
    """

    def __init__(self, batches: BatchIterator, depth: int = 4) -> None:
        """
        Args:
          batches: to read; it belongs to this object from now on.
          depth: how many batches may wait.
        """
        self._batches = batches
        self._depth = depth
        self._state = batches.get_state()
        self._reading: _Reading | None = None

    def __iter__(self) -> ReadAhead:
        return self

    def __next__(self) -> Batch:
        if self._reading is None:
            self._reading = _Reading(self._batches, self._depth)
            weakref.finalize(self, self._reading.stop)
        batch, self._state = self._reading.take()
        return batch

    def get_state(self) -> dict[str, Any]:
        """See `BatchIterator`: where the last batch that was handed out ended."""
        return dict(self._state)

    def set_state(self, state: dict[str, Any]) -> None:
        """See `BatchIterator`."""
        self.close()
        self._batches.set_state(state)
        self._state = self._batches.get_state()

    def close(self) -> None:
        """Ends the thread. The next batch starts another one."""
        if self._reading is not None:
            self._reading.stop()
            self._reading = None
            # Back to the batch that follows the last one handed out.
            self._batches.set_state(self._state)


class _Reading:
    """A thread that reads until it is stopped or fails.

    It has no reference to its `ReadAhead`, so that this can be collected while the thread waits.
    """

    def __init__(self, batches: BatchIterator, depth: int) -> None:
        self._ready: queue.Queue[tuple[Batch, dict[str, Any]] | BaseException] = queue.Queue(depth)
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=_read, args=(batches, self._ready, self._stopping), name="read-ahead", daemon=True
        )
        self._thread.start()

    def take(self) -> tuple[Batch, dict[str, Any]]:
        """The next batch and the state after it."""
        if self._error is None:
            item = self._ready.get()
            if not isinstance(item, BaseException):
                return item
            self._error = item
        raise self._error

    def stop(self) -> None:
        self._stopping.set()
        # Room for the batch with which the thread may be waiting; then it sees that it has to stop.
        while not self._ready.empty():
            self._ready.get_nowait()
        self._thread.join()


def _read(batches: BatchIterator, ready: queue.Queue, stopping: threading.Event) -> None:
    try:
        while not stopping.is_set():
            batch = next(batches)
            ready.put((batch, batches.get_state()))
    except BaseException as error:
        ready.put(error)
