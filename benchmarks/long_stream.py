"""One stream of 1,048,576 tokens: time per segment and peak memory must not depend on how much has been read.

python benchmarks/long_stream.py [--gin_file=rmt_curriculum] [--tokens=1048576] [--output=FILE.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import resource
import time
from collections.abc import Iterator

import jax
import numpy as np

from memorizing.batch import EvaluationBatch
from memorizing.evaluate import Evaluator
from memorizing.gin_registry import load_experiment
from memorizing.train_state import init_train_state


class Timed:
    """A data source that notes when each segment was asked for."""

    def __init__(self, source: object) -> None:
        self._source, self.times = source, []
        self.document_bytes = None

    def evaluation_batches(self, num_rows: int, segment_length: int) -> Iterator[EvaluationBatch]:
        for batch in self._source.evaluation_batches(num_rows, segment_length):
            self.times.append(time.perf_counter())
            yield batch


def peak_mebibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gin_file", default="rmt_curriculum")
    parser.add_argument("--tokens", type=int, default=1_048_576)
    parser.add_argument("--output")
    options = parser.parse_args()
    experiment, _ = load_experiment([options.gin_file], [])
    length = experiment.batch.segment_length
    optimizer = experiment.optimizer.build()
    params = jax.jit(lambda: init_train_state(experiment.model, optimizer, 1, length, 0).params)()
    mesh = experiment.mesh.make_mesh(jax.devices()[:1])

    def read(evaluator: Evaluator, num_segments: int) -> np.ndarray:
        source = Timed(dataclasses.replace(experiment.data, eval_segments=num_segments, num_eval_samples=1))
        evaluator.run(params, source)
        return np.diff(source.times)

    with jax.set_mesh(mesh):
        evaluator = Evaluator(experiment.model, 1, length, mesh)
        read(evaluator, 8)
        memory_8 = peak_mebibytes()
        seconds = read(evaluator, options.tokens // length)
    tenths = [float(np.median(part)) * 1e3 for part in np.array_split(seconds, 10)]
    result = {
        "tokens": options.tokens,
        "segments": len(seconds) + 1,
        "peak_mebibytes_after_8_segments": memory_8,
        "peak_mebibytes_at_the_end": peak_mebibytes(),
        "median_milliseconds_per_segment_by_tenth": tenths,
        "machine": platform.platform(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }
    print(f"{options.tokens:,} tokens in {result['segments']:,} segments of {length}")
    print(f"peak memory after 8 segments {memory_8:.0f} MiB, at the end {result['peak_mebibytes_at_the_end']:.0f} MiB")
    print("median ms a segment, by tenth of the stream: " + " ".join(f"{value:.2f}" for value in tenths))
    if options.output:
        with open(options.output, "w") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
