"""The training step with external memories of several sizes against the same step without.

Memories are full, as they are for most of a run; programs run in turn, each on a state of its own. Any run will do:
--gin_file=runs/NAME.gin --gin.NAME=VALUE.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memorizing.batch import Batch
from memorizing.benchmarks import measure
from memorizing.commands import experiment_flags
from memorizing.config.loading import load_experiment
from memorizing.cost import accelerators
from memorizing.errors import MOST, Range
from memorizing.models.attention.base import normalize
from memorizing.models.lm_config import LMConfig
from memorizing.models.memory.external_memory import Memory
from memorizing.runtime import tables
from memorizing.training.experiment import Experiment
from memorizing.training.program import Program
from memorizing.training.state import TrainState

DEFAULT_RUN = "runs/benchmark.gin"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    experiment_flags.add_gin_file(parser, DEFAULT_RUN)
    parser.add_argument(
        "--memory_sizes", default="0,2048,8192,65536", metavar="M,...", help="0: no memory (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=Range(1, MOST).of(int), default=9, metavar="N", help="steps of each (default: %(default)s)"
    )


def run(options: argparse.Namespace, bindings: list[str]) -> dict[str, Any]:
    """Measures, prints a table, and returns the figures."""
    experiment, _ = load_experiment(options.gin_file or [DEFAULT_RUN], bindings, base="CACHE = None")
    experiment_flags.use_devices(experiment.batch.num_rows)
    sizes = measure.sizes("--memory_sizes", options.memory_sizes)
    experiments = {size: with_memory(experiment, size) for size in sizes}
    steps = {size: step_of(variant) for size, variant in experiments.items()}
    seconds = measure.interleaved(steps, options.rounds)
    base = seconds[min(seconds)]
    tokens = experiment.batch.tokens_at(1)
    devices = jax.devices()
    results = {}
    for size, of_size in seconds.items():
        median = statistics.median(of_size)
        model = experiments[size].model
        utilization = accelerators.Utilization(model, experiment.batch.segment_length, devices)
        results[size] = {
            "milliseconds": 1e3 * median,
            "quartiles": [1e3 * value for value in measure.quartiles(of_size)],
            "ratio": measure.ratio(of_size, base),
            "tokens_per_second": tokens / median,
            **utilization.values(tokens / median),
        }
    print(f"{len(devices)} {devices[0].device_kind}, {tokens:,} tokens a step\n{_table(results)}")
    return results


def with_memory(experiment: Experiment, size: int) -> Experiment:
    """The experiment with memories of this size, or without any."""
    model = experiment.model.with_memory_size(size) if size else experiment.model.without_memory()
    return dataclasses.replace(experiment, model=model)


def step_of(experiment: Experiment) -> Callable[[], None]:
    """A function that makes one training step with full memories and waits for it."""
    mesh = experiment.make_mesh()
    model = experiment.model
    batch = experiment.batch
    # [B, U, T]
    shape = (batch.num_rows, batch.num_segments, batch.segment_length)
    tokens, targets = np.random.default_rng(0).integers(1, model.vocab_size, (2, *shape), np.int32)
    host_batch = Batch(
        tokens=tokens,
        targets=targets,
        loss_weights=np.ones(shape, np.float32),
        is_real=np.ones(shape, bool),
        start_of_document=np.zeros(shape[:2], bool),
    )

    def fill(state: TrainState) -> TrainState:
        return dataclasses.replace(state, context=full(model, state.context))

    with jax.set_mesh(mesh):
        program = Program(experiment, mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
        state = jax.jit(fill, out_shardings=shardings)(program.init())
        device_batch = jax.device_put(host_batch, program.rows)
        compiled = program.step.lower(state, device_batch).compile()

    def step() -> None:
        nonlocal state
        state, metrics = compiled(state, device_batch)
        jax.block_until_ready((state.step, metrics))

    return step


def full(model: LMConfig, context: Any) -> Any:
    """The same context with every memory full of random keys."""

    def fill(memory: Memory) -> Memory:
        keys = jax.random.normal(jax.random.key(0), memory.keys.shape, memory.keys.dtype)
        values = None if memory.values is None else keys
        return dataclasses.replace(memory, keys=normalize(keys), values=values, valid=jnp.ones_like(memory.valid))

    return model.map_memories(context, fill)


def _table(results: dict[int, dict[str, Any]]) -> str:
    has_mfu = any("mfu" in row for row in results.values())
    header = ["memory", "step", "quartiles", "ratio", "tokens/s"]
    if has_mfu:
        header.append("MFU")
    rows = [header]
    for size, row in results.items():
        first, third = row["quartiles"]
        cells = [
            f"{size:,}" if size else "none",
            f"{row['milliseconds']:,.1f} ms",
            f"{first:,.1f}-{third:,.1f}",
            f"{row['ratio']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
        ]
        if has_mfu:
            cells.append(f"{row['mfu']:.1%}")
        rows.append(cells)
    return tables.align(rows)
