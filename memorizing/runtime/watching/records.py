"""What a run has left in its folder. Nothing is changed there, and nothing of it is executed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from etils import epath

from memorizing.errors import UserError, first_line, is_number
from memorizing.runtime import workdir_lock
from memorizing.runtime.events import read_events
from memorizing.runtime.json_lines import Line, read_lines
from memorizing.runtime.watching.settings import settings_of
from memorizing.runtime.workdir import (
    CHECKPOINTS,
    CONFIG,
    EVENTS,
    EXPERIMENT,
    METRIC_NAMES,
    METRICS,
    DamagedRecord,
    OtherFormat,
    checkpoint_record,
    is_complete,
    read_config,
    read_record,
    unseal,
)

# Where `train` and `evaluate` leave their results.
EVALUATIONS = ("evaluation.json", "evaluation/evaluation.json")
# A folder is that of a run if it has one of these.
MARKS = (CONFIG, EXPERIMENT, EVENTS)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class RunRecords:
    """The records of a run. What is damaged counts as missing, and is told.

    Attributes:
      workdir: the run's folder.
      settings: the values of its configuration as gin text, by name; see `settings_of`.
      identity: what makes it the experiment that it is, by name; see `memorizing.training.identity`.
      metrics: the lines of metrics.jsonl.
      events: those of events.jsonl.
      checkpoints: steps of which there is a complete checkpoint with a good record, ascending.
      evaluations: what the files of `EVALUATIONS` say, by their name.
      writer: the process that is writing into the folder, in words; None if there is none.
      damage: what is wrong, a line each.
    """

    workdir: epath.Path
    settings: dict[str, str]
    identity: dict[str, Any]
    metrics: list[Line]
    events: list[Line]
    checkpoints: list[int]
    evaluations: dict[str, dict[str, Any]]
    writer: str | None
    damage: tuple[str, ...]

    def lines(self, kind: str) -> list[Line]:
        """The metrics of a kind: 'train', 'evaluation', ..."""
        return [line for line in self.metrics if line["kind"] == kind]


def is_run(folder: epath.Path) -> bool:
    """Whether a folder is that of a run."""
    return any((folder / name).exists() for name in MARKS)


def read_run(workdir: epath.Path) -> RunRecords:
    """The records of the run in a folder.

    Raises:
      UserError: there is no run.
    """
    if not is_run(workdir):
        raise UserError(f"{workdir} is not the folder of a run: it has neither {', nor '.join(MARKS)}")
    damage: list[str] = []

    def read(name: str, of: Callable[[], T], default: T) -> T:
        """What is in a file, or the default where it is missing or damaged."""
        if not (workdir / name).exists():
            return default
        try:
            return of()
        except (UserError, OSError, UnicodeDecodeError) as error:
            damage.append(first_line(error))
            return default

    evaluations = {}
    for name in EVALUATIONS:
        path = workdir / name
        if content := read(name, lambda path=path: _json(path), {}):
            evaluations[name] = content
    return RunRecords(
        workdir,
        settings=read(CONFIG, lambda: settings_of(read_config(workdir)), {}),
        identity=read(EXPERIMENT, lambda: read_record(workdir / EXPERIMENT), {}),
        metrics=read(METRICS, lambda: _metrics(workdir / METRICS), []),
        events=read(EVENTS, lambda: _checked(workdir / EVENTS, read_events(workdir), _OF_EVENTS, "event"), []),
        checkpoints=_checkpoints(workdir / CHECKPOINTS, damage),
        evaluations=evaluations,
        writer=workdir_lock.writer(workdir),
        damage=tuple(damage),
    )


# Numbers of events, where an event has them.
_OF_EVENTS = ("time", "seconds", "step", "count", "tokens")


def number(value: Any) -> float | None:
    """A value that was read as a number; None where it is none, or one that no float holds."""
    try:
        return float(value) if is_number(value) else None
    except OverflowError:
        return None


def finite(value: Any) -> float | None:
    """The same, but for infinite ones."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def _metrics(path: epath.Path) -> list[Line]:
    return _checked(path, read_lines(path, METRIC_NAMES), ("step",), "kind")


def _checked(path: epath.Path, lines: list[Line], numbers: Sequence[str], text: str) -> list[Line]:
    """The lines of a file. Raises UserError where one has something else in the place of a finite number or text."""
    for index, line in enumerate(lines, start=1):
        wrong = [name for name in numbers if name in line and finite(line[name]) is None]
        wrong += [] if isinstance(line[text], str) else [text]
        if wrong:
            raise UserError(f"{path} is damaged in line {index} ({wrong[0]} is {str(line[wrong[0]])[:40]!r})")
    return lines


def _json(path: epath.Path) -> dict[str, Any]:
    """A result. Raises UserError unless it is an object in JSON."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: the command that wrote it writes it again")
    return content


def _checkpoints(folder: epath.Path, damage: list[str]) -> list[int]:
    """The steps that can be restored as far as their records tell; what is wrong with others is told."""
    steps = []
    for step in sorted(int(child.name) for child in folder.glob("*") if child.name.isdigit()):
        if not is_complete(folder, step):
            continue
        try:
            unseal(checkpoint_record(folder, step).read_text())
        except (DamagedRecord, UnicodeDecodeError):
            damage.append(f"checkpoint {folder / str(step)} is not as it was saved")
        except OtherFormat as error:
            damage.append(f"checkpoint {folder / str(step)} {error}")
        except OSError:
            # It is being written, or removed.
            continue
        else:
            steps.append(step)
    return steps
