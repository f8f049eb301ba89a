"""Timing side by side, and what a figure was measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from memorizing.errors import UserError

_PACKAGES = ("memorizing", "jax", "jaxlib", "flax", "libtpu", "faiss-cpu", "torch")


def machine() -> dict[str, Any]:
    """Hardware, versions, date and how busy the machine is."""
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": {name: version for name, version in versions.items() if version},
    }


def sizes(flag: str, value: str, least: int = 0) -> list[int]:
    """The whole numbers of a flag such as `--memory_sizes=0,8192`.

    Raises:
      UserError: there is anything else, or less than `least`.
    """
    try:
        found = [int(size) for size in value.split(",")]
    except ValueError:
        found = [-1]
    if min(found) < 0:
        raise UserError(f"{flag}={value}: expected whole numbers with commas between them, such as 8192,65536")
    at_least(flag, min(found), least)
    return found


def at_least(flag: str, value: float, least: float) -> None:
    """Raises UserError if the value of a flag is less."""
    if not value >= least:
        raise UserError(f"{flag}={value}: at least {least}")


def interleaved(variants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run of each variant.

    The variants run in turn, so that other work of the machine falls on all of them alike. A first run of each is not
    counted.

    Args:
      variants: functions that return when their work is done.
      rounds: runs of each, at least 2: one has no quartiles.

    Raises:
      UserError: there are fewer.
    """
    at_least("--rounds", rounds, 2)
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: list[float], base: list[float]) -> float:
    """Median of the ratios of the rounds."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))


def quartiles(seconds: list[float]) -> tuple[float, float]:
    """The first and the third."""
    first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return first, third


def _processor() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        if line.startswith("model name"):
            _, _, name = line.partition(":")
            return name.strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
