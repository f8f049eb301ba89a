"""What there is to measure on an accelerator, in one go and within so many minutes, the most wanted first.

One benchmark after the other, each in a process of its own; those that the time does not suffice for are left out:

  step_alone   the 200M step without a memory: time and MFU
  step         the same with exact memories of 8,192 and of 65,536 slots
  search       the exact search alone against the bare product, in bfloat16
  text         a model with the layers of Qwen3-0.6B and memories in three of them: 8,192 tokens read

--gin.NAME=VALUE goes to those that take a run, --only=search,text leaves the others out.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from memorizing.errors import MOST, Range, UserError


class Part(NamedTuple):
    """A benchmark.

    Attributes:
      name: of its files.
      command: its name and its flags.
      takes_run: whether bindings can change it.
    """

    name: str
    command: tuple[str, ...]
    takes_run: bool = True


_STEP = ("step", "--gin_file=table4_context512_memory65536_xl512", "--rounds=5")
# Rows as one of the paper's 32 devices has them, twice.
_ROWS = "--gin.BatchConfig.tokens_per_step=8192"
PARTS = (
    Part("step_alone", (*_STEP, _ROWS, "--memory_sizes=0")),
    Part("step", (*_STEP, _ROWS, "--memory_sizes=0,8192,65536")),
    Part("search", ("search", "--slots=8192,65536", "--head_dim=128", "--dtype=bfloat16", "--rounds=5"), False),
    Part(
        "text",
        (
            "text",
            "--gin_file=memory_in_qwen3_0_6b",
            # Weights are random: no such run is opened.
            "--gin.START_FROM=imported",
            "--gin.CACHE=None",
            "--read=8192",
            "--written=64",
            "--rounds=3",
        ),
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    parser.add_argument(
        "--minutes", type=Range(0, MOST).of(float), default=8.0, metavar="N", help="for all of them (default: 8)"
    )
    parser.add_argument(
        "--only", default=",".join(part.name for part in PARTS), metavar="NAME,...", help="(%(default)s)"
    )
    parser.add_argument(
        "--workdir",
        default="runs/accelerator",
        metavar="DIR",
        help="has NAME.json and NAME.log of each (default: %(default)s)",
    )


def run(options: argparse.Namespace, bindings: list[str]) -> dict[str, Any]:
    """Measures, and returns the figures of the benchmarks that have ended, by name."""
    parts = chosen(options.only)
    folder = pathlib.Path(options.workdir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    results = {}
    for part in parts:
        left = end - time.monotonic()
        flags = [f"--gin.{binding}" for binding in bindings] if part.takes_run else []
        what_happened = measure_in_process([*part.command, *flags], folder / part.name, left)
        print(
            f"\n{part.name}: {what_happened}\n{folder.joinpath(part.name).with_suffix('.log').read_text()}", flush=True
        )
        record = folder / f"{part.name}.json"
        if record.exists():
            results[part.name] = json.loads(record.read_text())
    return results


def chosen(only: str) -> list[Part]:
    """The parts of these names, in their own order.

    Raises:
      UserError: there is none of such a name.
    """
    names = only.split(",")
    known = [part.name for part in PARTS]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--only={only}: there is no {unknown[0]}, but {', '.join(known)}")
    return [part for part in PARTS if part.name in names]


def measure_in_process(command: Sequence[str], path: pathlib.Path, seconds: float) -> str:
    """Runs a benchmark, and says in a few words how it ended.

    Args:
      command: what follows `memorizing bench`.
      path: of its files, without their endings: what it prints, and its figures.
      seconds: after which it is stopped.
    """
    path.with_suffix(".json").unlink(missing_ok=True)
    with path.with_suffix(".log").open("w") as log:
        if seconds <= 0:
            return "no time left"
        process = [sys.executable, "-m", "memorizing", "bench", *command, f"--output={path.with_suffix('.json')}"]
        try:
            code = subprocess.run(process, stdout=log, stderr=subprocess.STDOUT, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
    return "done" if code == 0 else f"failed with exit code {code}"
