"""Flags that say which experiment a command is about, the same in every command."""

from __future__ import annotations

import argparse
import importlib
import sys
from types import ModuleType

from memorizing.errors import MOST, Range, first_line

STEP = Range(0, MOST)
# Documents, samples, rows: what is kept side by side.
SIDE_BY_SIDE = Range(1, 2**20)
SEED = Range(0, 2**32 - 1)


def add_gin_file(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Adds `--gin_file`; bindings (`--gin.NAME=VALUE`) reach every command without being declared."""
    suffix = f" (default: {default})" if default else ""
    parser.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help=f"experiment: a path or the name of a shipped file; repeatable, later files win{suffix}",
    )


DEFAULT_WORKDIR = "runs/demo"


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds `--workdir` and `--step`, which name a checkpoint of a finished run, and `--import`, for what it needs.

    Without `--workdir` it is one of the demo's run (`DEFAULT_WORKDIR`).
    """
    parser.add_argument("--workdir", metavar="DIR", help=f"folder of the run (default: {DEFAULT_WORKDIR})")
    parser.add_argument("--step", type=STEP.of(int), metavar="STEP", help="checkpoint to use (default: the newest)")
    parser.add_argument(
        "--import",
        type=_import,
        action="append",
        dest="imported",
        metavar="MODULE",
        help="a module of yours that the run was trained with: a run's own configuration executes nothing (repeatable)",
    )


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise argparse.ArgumentTypeError(f"{name} cannot be imported ({first_line(error)})") from None


def use_devices(rows: int) -> None:
    """Makes the CPU cores devices, as many as divide this process's share of `rows`. Before anything else uses jax."""
    from memorizing.runtime import distributed
    from memorizing.runtime.sharding import use_cpu_cores

    sys.unraisablehook = _unless_loop_is_closed
    use_cpu_cores(max(rows // distributed.num_processes(), 1))


def _unless_loop_is_closed(unraisable: sys.UnraisableHookArgs) -> None:
    """Leaves out what threads of the checkpoint library say after a read that failed.

    The user is told of the failure itself.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
