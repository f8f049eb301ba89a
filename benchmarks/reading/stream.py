"""One stream of 1,048,576 tokens: neither memory nor time per segment depends on how much has been read.

A model that is not trained evaluates a document of that length. Every 128 segments it is interrupted, and a fresh
document of as many segments is read from an empty context: times are compared with those, since other work of the
machine falls on both alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from memorizing.array_typing import Tree
from memorizing.batch import DataSource, EvaluationBatch
from memorizing.commands import experiment_flags
from memorizing.config.loading import load_experiment
from memorizing.errors import MOST, Range, UserError
from memorizing.evaluation.evaluator import Evaluator
from memorizing.runtime import tables
from memorizing.training.experiment import Experiment
from memorizing.training.state import init_variables

DEFAULT_RUN = "rmt_curriculum"
BLOCK = 128
# The first segments of a block are not counted: the device is still busy with the segments before.
WARM_UP = 8


class InBlocks:
    """A data source that notes when the evaluation asks for each segment.

    Attributes:
      seconds: mean time per segment of each finished block of `BLOCK` segments, which are asked for a few at a time.
    """

    def __init__(self, source: DataSource, between: Callable[[], None] = lambda: None) -> None:
        """
        Args:
          source: what is read.
          between: called before each block.
        """
        self._source = source
        self._between = between
        self.document_bytes = None
        self.seconds: list[float] = []

    def evaluation_batches(self, num_rows: int, segment_length: int) -> Iterator[EvaluationBatch]:
        times: list[float] = []
        for batch in self._source.evaluation_batches(num_rows, segment_length):
            if not times:
                self._between()
            times.append(time.perf_counter())
            yield batch
            if len(times) == BLOCK:
                self.seconds.append((times[-1] - times[WARM_UP]) / (BLOCK - 1 - WARM_UP))
                times = []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    experiment_flags.add_gin_file(parser, DEFAULT_RUN)
    parser.add_argument(
        "--tokens", type=Range(1, MOST).of(int), default=1 << 20, metavar="N", help="length (default: %(default)s)"
    )


def run(options: argparse.Namespace, bindings: list[str]) -> dict[str, Any]:
    """Measures, prints a table, and returns the figures."""
    experiment, _ = load_experiment(options.gin_file or [DEFAULT_RUN], bindings)
    if not hasattr(experiment.data, "eval_segments"):
        raise UserError(
            f"bench stream needs data made of samples, such as that of {DEFAULT_RUN}; "
            f"{type(experiment.data).__name__} is none"
        )
    length = experiment.batch.segment_length
    num_segments = options.tokens // length
    if num_segments < 10 * BLOCK:
        raise UserError(
            f"--tokens={options.tokens}: at least {10 * BLOCK * length}, ten times {BLOCK} segments of {length}"
        )
    evaluator, variables = evaluator_of(experiment)

    def read(num_segments: int, between: Callable[[], None] = lambda: None) -> list[float]:
        source = InBlocks(stream(experiment.data, num_segments), between)
        # The evaluator asks a source for nothing else than what this one has.
        evaluator.run(*variables, source)  # pyright: ignore[reportArgumentType]
        return source.seconds

    read(8)
    after_8 = peak_mebibytes()
    fresh: list[float] = []
    seconds = read(num_segments, lambda: fresh.extend(read(BLOCK)))
    at_the_end = peak_mebibytes()
    tenths = []
    long_tenths = np.array_split(seconds, 10)
    fresh_tenths = np.array_split(fresh[: len(seconds)], 10)
    for long, short in zip(long_tenths, fresh_tenths, strict=True):
        tenths.append(
            {
                "milliseconds": 1e3 * statistics.median(long),
                "fresh_milliseconds": 1e3 * statistics.median(short),
                "ratio": statistics.median(long / short),
            }
        )
    growth = at_the_end / after_8 - 1
    print(f"{options.tokens:,} tokens in {num_segments:,} segments of {length}")
    print(f"peak memory after 8 segments {after_8:.0f} MiB, at the end {at_the_end:.0f} MiB ({growth:+.1%})")
    rows = [["tenth of the stream", *map(str, range(1, 11))]]
    for name, key, digits in (
        ("ms a segment", "milliseconds", 2),
        ("of a fresh stream", "fresh_milliseconds", 2),
        ("ratio", "ratio", 3),
    ):
        rows.append([name, *(f"{tenth[key]:.{digits}f}" for tenth in tenths)])
    print(tables.align(rows))
    return {
        "segments": num_segments,
        "mebibytes_after_8": after_8,
        "mebibytes_at_the_end": at_the_end,
        "tenths": tenths,
    }


def evaluator_of(experiment: Experiment) -> tuple[Evaluator, tuple[Tree, Tree]]:
    """What evaluates one row on one device, and parameters and buffers that are not trained."""
    length = experiment.batch.segment_length
    variables = jax.jit(lambda: init_variables(experiment.model, 1, length, jax.random.key(0)))()
    mesh = experiment.mesh.make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        return Evaluator(experiment.model, 1, length, mesh), (variables["params"], variables["buffers"])


def stream(task: Any, num_segments: int) -> DataSource:
    """One document of a synthetic task."""
    return dataclasses.replace(task, eval_segments=num_segments, num_eval_samples=1)


def peak_mebibytes() -> float:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
