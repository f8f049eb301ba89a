"""What runs the work on the parts of a corpus: this process, several processes, or another system such as Beam."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, Protocol

from memorizing.data.errors import DataError
from memorizing.data.tasks.tensorflow_start import quiet_stderr

Advance = Callable[[], None]
# The work on a part: it writes its results to files, and calls the function that it is given after each document.
Work = Callable[[Any, Advance], None]

_SECONDS_BETWEEN_LOOKS = 0.2


class Workers(Protocol):
    """What does the work on all parts of a corpus."""

    def run(self, work: Work, parts: Sequence[Any], advance: Callable[[int], None]) -> None:
        """Does the work on every part, in any order.

        Args:
          work: can be pickled.
          parts: can be pickled.
          advance: called from time to time with the number of documents that were done since the last call.
        """


class Processes:
    """Processes on this machine.

    They are spawned, since TensorFlow does not survive a fork, and end when this process ends, however it ends.
    """

    def __init__(self, num_processes: int) -> None:
        if num_processes < 1:
            raise DataError(f"--processes={num_processes}: at least 1")
        self._num_processes = num_processes

    def run(self, work: Work, parts: Sequence[Any], advance: Callable[[int], None]) -> None:
        """See `Workers`."""
        num_processes = min(self._num_processes, len(parts))
        if num_processes <= 1:
            with quiet_stderr():
                for part in parts:
                    work(part, lambda: advance(1))
            return
        context = multiprocessing.get_context("spawn")
        done = context.Value("q", 0)
        with _pool(num_processes, context, done) as pool:
            futures = {pool.submit(_run, work, part) for part in parts}
            seen = 0
            while futures:
                finished, futures = concurrent.futures.wait(futures, _SECONDS_BETWEEN_LOOKS, "FIRST_COMPLETED")
                now = done.value
                advance(now - seen)
                seen = now
                try:
                    for future in finished:
                        future.result()
                except BrokenProcessPool:
                    raise DataError(
                        "a process was killed, perhaps because the memory was full; fewer --processes need less of it"
                    ) from None


def available_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _pool(num_processes: int, context: Any, done: Any) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    pool = concurrent.futures.ProcessPoolExecutor(num_processes, context, _start, (done,))
    try:
        yield pool
    except BaseException:
        # Nobody needs their results any more.
        for process in list(pool._processes.values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()


_done: Any = None


def _start(done: Any) -> None:
    """Runs first in every new process."""
    global _done
    _done = done
    # Ctrl-C reaches all processes of a terminal; the one that started this one will end it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _run(work: Work, part: Any) -> None:
    with quiet_stderr():
        work(part, _count)


def _count() -> None:
    with _done.get_lock():
        _done.value += 1
