"""The command `bench`: measures what the documentation's figures claim, on this machine."""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
from collections.abc import Sequence

from memorizing.benchmarks import measure
from memorizing.errors import UserError

# Name of a benchmark: its module, and what it measures.
BENCHMARKS = {
    "search": ("memorizing.benchmarks.search", "retrieval alone, beside faiss and PyTorch"),
    "step": ("memorizing.benchmarks.step", "the training step with and without external memories"),
    "tpu": ("memorizing.benchmarks.estimated.tpu", "the same on slices of TPUs, as the TPU compiler estimates it"),
    "growth": ("memorizing.benchmarks.estimated.growth", "the same as memories, rows and devices grow"),
    "accelerator": ("memorizing.benchmarks.accelerator", "steps, search and reading in one go within some minutes"),
    "text": ("memorizing.benchmarks.reading.text", "tokens a second that a model reads and writes"),
    "stream": ("memorizing.benchmarks.reading.stream", "a stream of a million tokens: memory, and time per segment"),
    "heads": ("memorizing.benchmarks.reading.heads", "what the memory of each key head of a run is worth"),
    "scaling": ("memorizing.benchmarks.scaling", "an attention layer against the length of a segment"),
    "activations": ("memorizing.benchmarks.activations", "memory and time of ways not to store activations"),
    "future": ("memorizing.benchmarks.future", "how much what a position sees depends on later tokens"),
    "proofs": ("memorizing.benchmarks.trained.proofs", "tasks that show that mechanisms do what their papers say"),
    "mechanisms": (
        "memorizing.benchmarks.trained.mechanisms",
        "the leaderboard: every mechanism on recall and on text",
    ),
    "data": ("memorizing.benchmarks.data", "tokens a second that a host's stream hands out"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags, those of all benchmarks."""
    parser.description = __doc__
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, (module, summary) in BENCHMARKS.items():
        implementation = importlib.import_module(module)
        benchmark = benchmarks.add_parser(
            name,
            help=summary,
            description=implementation.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        implementation.add_arguments(benchmark)
        benchmark.add_argument("--output", metavar="FILE.json", help="where to write the figures and the machine")
        benchmark.set_defaults(measure=implementation.run)


def run(options: argparse.Namespace, bindings: Sequence[str]) -> int:
    """Runs a benchmark, prints its table, and writes its figures if asked to."""
    output = pathlib.Path(options.output) if options.output else None
    if output is not None and not output.parent.is_dir():
        raise UserError(f"--output={output}: there is no folder {output.parent}")
    record = {"benchmark": options.benchmark, **measure.machine()}
    print(f"{record['date']}, {record['processor']}, {record['cores']} cores, load {record['load']}", flush=True)
    record["results"] = options.measure(options, list(bindings))
    if output:
        output.write_text(json.dumps(record, indent=2) + "\n")
        print(f"written to {output}")
    return 0
