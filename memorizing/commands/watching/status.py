"""The command `status`: how a run is doing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from memorizing.commands.watching import figures
from memorizing.errors import UserError
from memorizing.runtime.events import goodput_of
from memorizing.runtime.tables import align
from memorizing.runtime.watching.records import RunRecords, number, read_run
from memorizing.runtime.watching.status import Status, status_of
from memorizing.runtime.workdir import resolve

DEFAULT_WORKDIR = "runs/demo"

DESCRIPTION = """\
Says how a run is doing: its state, the newest figures, the newest checkpoint, and where its time went. It reads a few small files and changes nothing: also while the run trains.

  memorizing status                       the demo's run
  memorizing status runs/first
  memorizing status gs://BUCKET/first

The state is one of: training (a process writes into the folder), finished, stopped (it was told to, or killed: the same command goes on), failed, not started.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.description = DESCRIPTION
    add_workdir(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def add_workdir(parser: argparse.ArgumentParser) -> None:
    """Adds the folder of the run, which may be left out."""
    parser.add_argument(
        "workdir",
        nargs="?",
        default=DEFAULT_WORKDIR,
        metavar="WORKDIR",
        help=f"folder of the run (default: {DEFAULT_WORKDIR})",
    )


def run(options: argparse.Namespace, bindings: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    if bindings:
        raise UserError("status: shows a run as it is, and takes no --gin.NAME=VALUE")
    records = read_run(resolve(options.workdir))
    status = status_of(records)
    if options.json:
        print(json.dumps({"workdir": str(records.workdir), **status.as_json(), "damage": records.damage}, indent=2))
    else:
        print(_text(options.workdir, records, status))
    return 0


def _text(name: str, records: RunRecords, status: Status) -> str:
    """The figures, a line each, and below them what is damaged."""
    why = f" ({status.why})" if status.why else ""
    rows = [
        ["step", figures.step(status)],
        ["loss", figures.loss(status.loss)],
        ["held out", _held_out(records)],
        ["speed", _speed(status)],
        ["memory", figures.memory(status)],
        ["time left", figures.left(status)],
        ["checkpoints", ", ".join(map(str, records.checkpoints))],
        ["data", str(records.identity.get("data", ""))],
        ["time", str(goodput_of(records.events)).removeprefix("time ") if records.events else ""],
    ]
    known = [row for row in rows if row[1]]
    lines = [f"{name}: {status.state}{why}", *align(known, left=2).splitlines()]
    return "\n".join([*lines, *(f"damaged: {what}" for what in records.damage)])


def _held_out(records: RunRecords) -> str:
    """The newest evaluation."""
    evaluations = records.lines("evaluation")
    if not evaluations:
        return ""
    last = evaluations[-1]
    forms = {"loss": "loss {:.4f}", "perplexity": "perplexity {:.3f}", "bits_per_byte": "{:.4f} bits per byte"}
    values = {name: number(last.get(name)) for name in forms}
    parts = [forms[name].format(value) for name, value in values.items() if value is not None]
    return f"{', '.join(parts)} (step {last['step']})"


def _speed(status: Status) -> str:
    if status.step_seconds is None:
        return ""
    return f"{figures.speed(status)} tokens/s, {status.step_seconds:.3f} s/step"
