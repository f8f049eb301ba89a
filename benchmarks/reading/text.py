"""Tokens a second that a model reads and writes: a text of one document, and samples that go on from it.

The model is not trained, which takes as long. What is read is scored, segment by segment, as `evaluate` and `score` do,
each time from an empty memory; what is written is drawn token by token, as `generate` does. Reading and writing take
turns. The first time compiles.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from memorizing.benchmarks import measure
from memorizing.benchmarks.step import with_memory
from memorizing.commands import experiment_flags
from memorizing.config.loading import load_experiment
from memorizing.errors import MOST, Range
from memorizing.generation.decoding import TextDecoder
from memorizing.generation.programs import Decoder, Weights
from memorizing.generation.sampling import Sampling
from memorizing.runtime import tables
from memorizing.training.experiment import Experiment
from memorizing.training.state import init_variables

DEFAULT_RUN = "demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    experiment_flags.add_gin_file(parser, DEFAULT_RUN)
    parser.add_argument(
        "--read", type=Range(1, MOST).of(int), default=4096, metavar="N", help="tokens to read (default: %(default)s)"
    )
    parser.add_argument(
        "--written", type=Range(0, MOST).of(int), default=512, metavar="N", help="to write (default: %(default)s)"
    )
    parser.add_argument(
        "--memory_sizes", metavar="M,...", help="in turn with external memories of these sizes, 0 for none"
    )
    parser.add_argument(
        "--num_samples",
        type=experiment_flags.SIDE_BY_SIDE.of(int),
        default=1,
        metavar="N",
        help="samples, side by side (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=Range(2, MOST).of(int), default=9, metavar="N", help="runs of each (default: %(default)s)"
    )


def run(options: argparse.Namespace, bindings: list[str]) -> dict[str, Any]:
    """Measures, prints a table, and returns the figures."""
    experiment, _ = load_experiment(options.gin_file or [DEFAULT_RUN], bindings)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, experiment.model.vocab_size, (1, options.read), np.int32)
    anything = np.ones(experiment.model.vocab_size, bool)

    def write(text: TextDecoder) -> None:
        # A copy: what is written is forgotten.
        for _ in text.fork(options.num_samples).generate(options.written, Sampling(), 0, anything):
            pass

    def read(start: Callable[[], TextDecoder]) -> None:
        start().read(tokens)

    works: dict[str, Callable[[], None]] = {}
    sizes: dict[str, int] = {}
    for name, variant in _variants(experiment, options.memory_sizes).items():
        start_text = _texts_of(variant)
        works[f"read{name}"] = functools.partial(read, start_text)
        sizes[f"read{name}"] = options.read
        if options.written:
            works[f"written{name}"] = functools.partial(write, start_text())
            sizes[f"written{name}"] = options.written * options.num_samples
    cpu_seconds: dict[str, list[float]] = {name: [] for name in works}
    first_seconds = {}
    for name, work in works.items():
        start = time.perf_counter()
        work()
        first_seconds[name] = time.perf_counter() - start

    def timed(name: str) -> None:
        start = time.process_time()
        works[name]()
        cpu_seconds[name].append(time.process_time() - start)

    seconds = measure.interleaved({name: functools.partial(timed, name) for name in works}, options.rounds)
    results = {}
    for name, num_tokens in sizes.items():
        rates = [num_tokens / each for each in seconds[name]]
        # Against what does the same without a memory, or with the first of them.
        base = next(other for other in works if other.split(",")[0] == name.split(",")[0])
        results[name] = {
            "tokens_per_second": statistics.median(rates),
            "quartiles": measure.quartiles(rates),
            "tokens_per_cpu_second": statistics.median(num_tokens / each for each in cpu_seconds[name]),
            "first_seconds": first_seconds[name],
            "ratio": 1 / measure.ratio(seconds[name], seconds[base]),
        }
    print(_table(results))
    return results


def _table(results: dict[str, Any]) -> str:
    rows = [["", "tokens/s", "quartiles", "per CPU second", "first time", "ratio"]]
    for name, figures in results.items():
        first, third = figures["quartiles"]
        rows.append(
            [
                name,
                f"{figures['tokens_per_second']:,.0f}",
                f"{first:,.0f}-{third:,.0f}",
                f"{figures['tokens_per_cpu_second']:,.0f}",
                f"{figures['first_seconds']:.1f} s",
                f"{figures['ratio']:.2f}",
            ]
        )
    return tables.align(rows)


def _variants(experiment: Experiment, memory_sizes: str | None) -> dict[str, Experiment]:
    """What is measured, by the end of its name."""
    if memory_sizes is None:
        return {"": experiment}
    sizes = measure.sizes("--memory_sizes", memory_sizes)
    return {f", memory {size}" if size else ", no memory": with_memory(experiment, size) for size in sizes}


def _texts_of(experiment: Experiment) -> Callable[[], TextDecoder]:
    """What begins texts, of which nothing has been read, for a model that is not trained."""
    model, length = experiment.model, experiment.batch.segment_length
    variables = jax.jit(lambda: init_variables(model, 1, length, jax.random.key(0)))()
    decoder = Decoder(model, length)
    weights = Weights(variables["params"], variables["buffers"])
    return lambda: TextDecoder(decoder, weights, decoder.start(0))
