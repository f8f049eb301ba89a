"""The command `runs`: the runs of a folder side by side, and what differs in their configurations."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence

from etils import epath

from memorizing.commands.watching import figures
from memorizing.errors import UserError
from memorizing.runtime.tables import align
from memorizing.runtime.watching.records import RunRecords, is_run, read_run
from memorizing.runtime.watching.settings import differing, short_names, value_of
from memorizing.runtime.watching.status import Status, status_of
from memorizing.runtime.workdir import CHECKPOINTS, TENSORBOARD, resolve

DEFAULT_FOLDER = "runs"
# Runs lie in the folder, in folders of it, or in those of runs, as WORKDIR/without_memory does.
_DEPTH = 3
# Folders in those of runs that are large, and hold no runs.
_PARTS_OF_RUNS = (CHECKPOINTS, TENSORBOARD, "evaluation", "inspection", "profile", "wandb")
# Of a table that a terminal can show.
_SHOWN_SETTINGS = 6
_SHOWN_CHARACTERS = 28

DESCRIPTION = """\
Lists the runs in a folder: state, step, loss, speed, memory and newest checkpoint of each, and what differs in their configurations. It reads a few small files of each and changes nothing.

  memorizing runs                    those in the folder runs
  memorizing runs gs://BUCKET/runs
  memorizing runs --json             with every setting that differs, whole
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.description = DESCRIPTION
    parser.add_argument(
        "folder",
        nargs="?",
        default=DEFAULT_FOLDER,
        metavar="FOLDER",
        help=f"where the runs lie (default: {DEFAULT_FOLDER})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(options: argparse.Namespace, bindings: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    if bindings:
        raise UserError("runs: shows runs as they are, and takes no --gin.NAME=VALUE")
    folder = resolve(options.folder)
    if not folder.is_dir():
        raise UserError(f"{options.folder} is no folder")
    runs = {_name(path, folder): read_run(path) for path in sorted(_folders(folder, _DEPTH), key=str)}
    if not runs:
        raise UserError(f"there is no run in {options.folder}: a run is a folder that memorizing train has written")
    print(_as_json(runs) if options.json else _tables(runs))
    return 0


def _folders(folder: epath.Path, depth: int) -> Iterator[epath.Path]:
    """The folders of runs in a folder, itself and those in runs among them."""
    if is_run(folder):
        yield folder
    if depth:
        for child in folder.iterdir():
            # Hidden ones, such as those of version control, hold none.
            if not child.name.startswith(".") and child.name not in _PARTS_OF_RUNS and child.is_dir():
                yield from _folders(child, depth - 1)


def _name(path: epath.Path, folder: epath.Path) -> str:
    return path.name if path == folder else str(path.relative_to(folder))


def _settings(runs: dict[str, RunRecords]) -> dict[str, dict[str, str]]:
    """By run, the settings that differ, and its data where that does. Macros stand with their values."""
    of_runs = []
    for records in runs.values():
        named = {name: value_of(records.settings, name) or "" for name in records.settings}
        of_runs.append(named | ({"data": str(records.identity["data"])} if "data" in records.identity else {}))
    names = differing(of_runs)
    # What a macro says, its users say again.
    names = [name for name in names if not _only_names_another(name, names, runs)]
    return {run: {name: settings.get(name, "") for name in names} for run, settings in zip(runs, of_runs, strict=True)}


def _only_names_another(name: str, names: list[str], runs: dict[str, RunRecords]) -> bool:
    """Whether a setting is one and the same macro in all runs, which is listed itself."""
    values = {records.settings.get(name, "") for records in runs.values()}
    return len(values) == 1 and all(value.removeprefix("%") in names for value in values)


def _as_json(runs: dict[str, RunRecords]) -> str:
    settings = _settings(runs)
    return json.dumps(
        {
            name: status_of(records).as_json() | {"differs": settings[name], "damage": records.damage}
            for name, records in runs.items()
        },
        indent=2,
    )


def _tables(runs: dict[str, RunRecords]) -> str:
    rows = [["run", "state", "step", "loss", "held out", "tokens/s", "memory", "checkpoint"]]
    rows += [_row(name, status_of(records)) for name, records in runs.items()]
    # Columns in which there is nothing are left out.
    used = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    parts = [align([[row[i] for i in used] for row in rows], left=2)]
    settings = _settings(runs)
    names = list(next(iter(settings.values())))
    if names:
        parts.append(f"what differs in their configurations:\n{_difference_table(settings, names)}")
    damage = [f"damaged: {what}" for records in runs.values() for what in records.damage]
    return "\n\n".join([*parts, "\n".join(damage)] if damage else parts)


def _row(name: str, status: Status) -> list[str]:
    return [
        name,
        status.state,
        figures.step(status),
        figures.loss(status.loss),
        figures.loss(status.held_out),
        figures.speed(status),
        figures.memory(status),
        figures.checkpoint(status),
    ]


def _difference_table(settings: dict[str, dict[str, str]], names: list[str]) -> str:
    shown = names[:_SHOWN_SETTINGS]
    short = short_names(shown)
    rows = [["run", *(short[name] for name in shown)]]
    for run, values in settings.items():
        rows.append([run, *(_clipped(values[name]) for name in shown)])
    table = align(rows)
    hidden = len(names) - len(shown)
    return f"{table}\n... and {hidden} more settings: --json has all of them" if hidden else table


def _clipped(value: str) -> str:
    if not value:
        return "-"
    return value if len(value) <= _SHOWN_CHARACTERS else f"{value[: _SHOWN_CHARACTERS - 3]}..."
