"""How a run spent its time, over all its starts: `workdir/events.jsonl`, and the share that went into training.

An event is `{"time": seconds since 1970, "event": name, ...}`; one that took time has "seconds" and is written when it
ends. The names:

  start       a process began: version, processes, devices, device_kind
  init        a fresh state was made
  restore     a checkpoint was read: step
  compile     the first step of a program: step
  steps       steps since the last such event: step (the last of them), count, tokens
  save        a checkpoint was started, or waited for: step
  evaluation  held-out documents were read: step
  preemption  told to stop, saved: step
  failure     it ended otherwise: reason
  end         it is done: step
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from memorizing.runtime.json_lines import JsonLines, Line, read_lines
from memorizing.runtime.tables import duration
from memorizing.runtime.workdir import EVENTS

# What every event has.
_NAMES = ("time", "event")

# Kinds of time in the order in which they are printed, with their names for people.
_KINDS = {
    "steps": "training",
    "redone": "training that was lost",
    "compile": "compiling",
    "restore": "restoring",
    "save": "saving",
    "evaluation": "evaluation",
    "other": "starting up and other",
    "stopped": "between two starts",
}


class EventLog:
    """Appends the events of one start of a run."""

    def __init__(self, path: epath.Path | None) -> None:
        """
        Args:
          path: of the file; None for a process that writes none.
        """
        self._file = JsonLines(path, _NAMES) if path else None
        # When the current lap began, and how much of it was measured as something else.
        self._lap_begin = time.monotonic()
        self._measured = 0.0

    def write(self, event: str, **fields: Any) -> None:
        """Appends an event."""
        if self._file:
            self._file.append({"time": round(time.time(), 3), "event": event, **fields})

    @contextlib.contextmanager
    def measure(self, event: str, **fields: Any) -> Iterator[None]:
        """Appends an event with the seconds that the block took, if it ends well. They do not count for steps."""
        begin = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - begin
            self._measured += seconds
        self.write(event, **fields, seconds=round(seconds, 3))

    def lap(self) -> float:
        """Seconds since the last call that were not measured as something else."""
        now = time.monotonic()
        seconds = now - self._lap_begin - self._measured
        self._lap_begin = now
        self._measured = 0.0
        return seconds


@dataclasses.dataclass(frozen=True)
class Goodput:
    """How a run spent its time, from its first start to its last event.

    Attributes:
      starts: how often the run was started.
      seconds: by kind: 'steps' (whose result was kept), 'redone' (steps that a later start had to do again),
        'compile', 'restore', 'save', 'evaluation', 'other', and 'stopped' (from the last event of a process to the
        start of the next).
    """

    starts: int
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds altogether."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """The part of the time in which training made progress."""
        return self.seconds["steps"] / max(self.total, 1e-9)

    @property
    def named(self) -> dict[str, float]:
        """Seconds by kind, as people call it."""
        return {_KINDS[kind]: seconds for kind, seconds in self.seconds.items()}

    def __str__(self) -> str:
        starts = "" if self.starts == 1 else f" over {self.starts} starts"
        parts = []
        for kind, seconds in self.seconds.items():
            share = seconds / max(self.total, 1e-9)
            # A share that would be printed as 0.0% is left out.
            if kind == "steps" or seconds >= 0.0005 * self.total:
                parts.append(f"{_KINDS[kind]} {share:.1%}")
        return f"time {duration(self.total)}{starts}: {', '.join(parts)}"


def goodput(workdir: epath.Path) -> Goodput:
    """How the run in a workdir has spent its time so far; all zero if it has no events."""
    return goodput_of(read_events(workdir))


def read_events(workdir: epath.Path) -> list[Line]:
    """The events of a run, oldest first; none if it has none. Raises UserError where the file is damaged."""
    return read_lines(workdir / EVENTS, _NAMES)


def goodput_of(events: Sequence[Line]) -> Goodput:
    """The same from the events of a run."""
    starts = _starts(events)
    seconds = dict.fromkeys(_KINDS, 0.0)
    for index, events in enumerate(starts):
        begin = _begin(events)
        end = events[-1]["time"]
        # Steps beyond the one that a later start went on from were lost.
        last_saved_step = min(map(_first_step, starts[index + 1 :]), default=math.inf)
        known = 0.0
        for event in events:
            taken = float(event.get("seconds", 0.0))
            known += taken
            kind = event["event"] if event["event"] in _KINDS else "other"
            lost = _share_beyond(event, last_saved_step) if kind == "steps" else 0.0
            seconds[kind] += (1 - lost) * taken
            seconds["redone"] += lost * taken
        seconds["other"] += max(end - begin - known, 0.0)
        if index > 0:
            previous_end = starts[index - 1][-1]["time"]
            seconds["stopped"] += max(begin - previous_end, 0.0)
    return Goodput(len(starts), seconds)


def _starts(events: Sequence[Line]) -> list[list[Line]]:
    """The events of each process."""
    starts: list[list[Line]] = []
    for event in events:
        if event["event"] == "start" or not starts:
            starts.append([])
        starts[-1].append(event)
    return starts


def _begin(events: Sequence[Line]) -> float:
    """When a process began: before its first event, by the seconds of that event."""
    return events[0]["time"] - float(events[0].get("seconds", 0.0))


def _first_step(events: Sequence[Line]) -> float:
    """The step from which a process went on; infinite if it ended before it knew."""
    for event in events:
        if event["event"] in ("init", "restore"):
            return event.get("step", 0)
    return math.inf


def _share_beyond(event: Line, step: float) -> float:
    """The part of the steps of an event that came after a step."""
    count = event.get("count", 0)
    beyond = min(max(event.get("step", 0) - step, 0), count)
    return beyond / max(count, 1)
