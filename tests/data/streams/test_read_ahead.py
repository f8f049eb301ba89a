"""Reading ahead: the same batches, the state of what was handed out, errors in their place, and threads that end."""

import gc
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from memorizing.batch import Batch
from memorizing.data.streams.read_ahead import ReadAhead


class Counting:
    """Batches that are numbers, made slowly or not at all."""

    def __init__(self, fails_at=None, seconds=0.0):
        self.next, self.fails_at, self.seconds, self.threads = 0, fails_at, seconds, set()

    def __next__(self):
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        if self.next == self.fails_at:
            raise OSError("the disk is gone")
        self.next += 1
        return Batch(*[np.asarray(self.next - 1)] * 5)

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        if state["next"] < 0:
            raise ValueError("another stream")
        self.next = state["next"]


def numbers(batches, count):
    return [int(next(batches).tokens) for _ in range(count)]


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_state_is_that_of_what_was_handed_out():
    inner = Counting()
    ahead = ReadAhead(inner, depth=3)
    assert ahead.get_state() == {"next": 0}
    for index in range(10):
        assert numbers(ahead, 1) == [index]
        assert ahead.get_state() == {"next": index + 1}
    deadline = time.monotonic() + 10
    while inner.next < 14:  # Three wait, one is in hand.
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert ahead.get_state() == {"next": 10}
    ahead.set_state({"next": 5})
    assert ahead.get_state() == {"next": 5} and numbers(ahead, 3) == [5, 6, 7]
    ahead.close()
    # Nothing that was read in vain is lost.
    assert numbers(ahead, 2) == [8, 9]
    with pytest.raises(ValueError, match="another stream"):
        ahead.set_state({"next": -1})
    assert numbers(ahead, 2) == [10, 11]
    ahead.close()


def test_batches_are_made_in_the_thread_while_nobody_asks():
    inner = Counting(seconds=0.001)
    ahead = ReadAhead(inner, depth=8)
    assert numbers(ahead, 1) == [0]
    deadline = time.monotonic() + 10
    while inner.next < 10:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(0.05)
    # No further than it may.
    assert inner.next == 10 and inner.threads == {"read-ahead"}
    ahead.close()


def test_an_error_comes_where_the_batch_would_have_come():
    ahead = ReadAhead(Counting(fails_at=3))
    assert numbers(ahead, 3) == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(ahead)
    assert ahead.get_state() == {"next": 3}
    ahead.set_state({"next": 0})
    assert numbers(ahead, 2) == [0, 1]
    ahead.close()


def test_the_thread_ends_with_the_iterator():
    before = len(threads())
    ahead = ReadAhead(Counting())
    next(ahead)
    assert len(threads()) == before + 1
    del ahead
    gc.collect()
    assert len(threads()) == before


def test_the_program_ends_though_a_thread_reads():
    program = """
from memorizing.data.streams.read_ahead import ReadAhead
class Batches:
    def __next__(self): return 0
    def get_state(self): return {}
ahead = ReadAhead(Batches())
next(ahead)
print("done", flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")
