"""What the gradient of a deep model keeps: memory and time of ways not to store activations, against depth.

Temporary memory is the compiled program's own account: what is neither an argument nor a result. Plain layers store
everything; `remat` stores a layer's input and computes the rest again; of blocks of layers it stores only the first
input; reversible layers store nothing. CPU seconds are of the whole process.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memorizing.batch import Batch
from memorizing.benchmarks import measure
from memorizing.benchmarks.scaling import cpu_seconds
from memorizing.context import Rngs
from memorizing.errors import MOST, Range, UserError
from memorizing.models.lm_config import LMConfig
from memorizing.runtime import tables
from memorizing.training.state import init_variables
from memorizing.training.step import Carried, batch_gradient


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    parser.add_argument("--layers", default="6,12,24", metavar="L,...", help="(default: %(default)s)")
    parser.add_argument(
        "--length", type=Range(1, MOST).of(int), default=256, metavar="T", help="of the segment (default: %(default)s)"
    )
    parser.add_argument(
        "--width", type=Range(32, MOST).of(int), default=128, metavar="D", help="of the model (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds",
        type=Range(0, MOST).of(int),
        default=3,
        metavar="N",
        help="runs of each (default: %(default)s); 0 for memory alone",
    )


def run(options: argparse.Namespace, bindings: list[str]) -> dict[str, Any]:
    """Measures, prints a table, and returns the figures."""
    if bindings:
        raise UserError(f"bench activations takes no bindings, but was given --gin.{bindings[0]}")
    results: dict[str, dict[int, dict[str, float]]] = {}
    for num_layers in measure.sizes("--layers", options.layers, least=1):
        base = LMConfig(
            vocab_size=256,
            num_layers=num_layers,
            embed_dim=options.width,
            num_heads=options.width // 32,
            head_dim=32,
            mlp_dim=4 * options.width,
            dropout=0.1,
        )
        for name, config in ways(base).items():
            memory, step = compiled(config, options.length)
            figures = {"mebibytes": memory / 2**20}
            if options.rounds:
                figures["seconds"] = cpu_seconds(step, options.rounds)
            results.setdefault(name, {})[num_layers] = figures
            print(f"{num_layers} layers, {name}: {figures['mebibytes']:,.1f} MiB", flush=True)
    print(f"\n{_table(results)}")
    return results


def ways(base: LMConfig) -> dict[str, LMConfig]:
    """The model with each way to keep activations, by name."""
    root = max(1, round(base.num_layers**0.5))

    def changed(**fields: Any) -> LMConfig:
        return dataclasses.replace(base, **fields)

    return {
        "plain": base,
        "remat = 'dots'": changed(remat="dots"),
        "remat = 'layer'": changed(remat="layer"),
        "remat = 'layer', remat_every = root of L": changed(remat="layer", remat_every=root),
        "residuals = 'reversible'": changed(residuals="reversible"),
    }


def compiled(config: LMConfig, length: int) -> tuple[int, Callable[[], Any]]:
    """Temporary bytes of a gradient of 4 rows of one segment, and a function that computes it."""
    shape = (4, 1, length)
    tokens, targets = np.random.default_rng(0).integers(1, config.vocab_size, (2, *shape), np.int32)
    is_real = np.ones(shape, bool)
    batch = Batch(tokens, targets, is_real.astype(np.float32), is_real, np.ones(shape[:2], bool))
    init = jax.jit(lambda: init_variables(config, 4, length, jax.random.key(0)))
    context = config.init_context(4, length)

    def gradient(params: Any, carried: Carried, batch: Batch) -> Any:
        rngs = Rngs(jax.random.key(1), jnp.arange(4))
        return batch_gradient(config, params, batch, carried, rngs, 1)[0]

    shapes = jax.eval_shape(init)
    program = jax.jit(gradient).lower(shapes["params"], Carried(context, shapes["buffers"]), batch).compile()
    memory = program.memory_analysis().temp_size_in_bytes

    @functools.cache
    def variables() -> Any:
        return init()

    def step() -> None:
        carried = Carried(context, variables()["buffers"])
        jax.block_until_ready(program(variables()["params"], carried, batch))

    return memory, step


def _table(results: dict[str, dict[int, dict[str, float]]]) -> str:
    depths = list(next(iter(results.values())))
    plain = results["plain"]
    timed = depths if "seconds" in plain[depths[0]] else []
    rows = [["", *(f"{depth} layers" for depth in depths), *(f"time at {depth}" for depth in timed)]]
    for name, by_depth in results.items():
        memory = [f"{figures['mebibytes']:,.1f} MiB" for figures in by_depth.values()]
        ratios = [f"{by_depth[depth]['seconds'] / plain[depth]['seconds']:.2f}" for depth in timed]
        rows.append([name, *memory, *ratios])
    return tables.align(rows)
