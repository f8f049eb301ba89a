"""Forward and backward of one attention layer against the length of a segment: full attention beside mechanisms.

Every mechanism is configured for each length as its example in `memorizing plan --flops` is: strides, clusters and
chunks grow as their papers let them. CPU seconds of the whole process count, so that other work of the machine hardly
does; the exponent is fitted over the upper half of the lengths. With --slice nothing is measured: the same program in
bfloat16 takes what the TPU compiler estimates for one device of that slice.

  --mechanisms=sparse,Reformer,routing   names of examples; full attention is always there
  --max_full=8192                        full attention needs about 12 T^2 bytes a head
  --record=FILE.json                     what stands there is not measured again, so that a run that was stopped goes on
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from memorizing.benchmarks import measure
from memorizing.context import Layout, Segment
from memorizing.cost import pricing
from memorizing.cost.plan import chip_of, slice_devices
from memorizing.errors import MOST, Range, UserError
from memorizing.evaluation import plots
from memorizing.models import attention as attention_lib
from memorizing.models.attention.base import Attention, LayerDims
from memorizing.runtime import tables

# Seconds of each length, by mechanism.
Curves = dict[str, dict[int, float]]


class Unit(NamedTuple):
    """How seconds are told.

    Attributes:
      name: of the unit.
      of_what: whose they are.
      per_second: how many make a second.
    """

    name: str
    of_what: str
    per_second: float

    def tell(self, seconds: float) -> str:
        """A time in this unit."""
        return f"{self.per_second * seconds:.3f} {self.name}"


class Record:
    """Figures in a file, which are there as soon as they are measured.

    Args:
      path: of the file; None to keep nothing.
      settings: figures of others are not those.
    """

    def __init__(self, path: pathlib.Path | None, settings: str) -> None:
        self._path = path
        self._settings = settings
        self._figures: dict[str, float] = {}
        if path and path.exists():
            try:
                self._figures = json.loads(path.read_text())
            except ValueError as error:
                raise UserError(f"--record={path} holds no figures of this benchmark: name another file") from error

    def seconds(self, name: str, length: int) -> float | None:
        """What was measured before, if it was."""
        return self._figures.get(self._key(name, length))

    def add(self, name: str, length: int, seconds: float) -> None:
        """Keeps a figure."""
        self._figures[self._key(name, length)] = seconds
        if self._path:
            self._path.write_text(json.dumps(self._figures, indent=2) + "\n")

    def _key(self, name: str, length: int) -> str:
        return f"{name}, {length} positions, {self._settings}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    parser.add_argument(
        "--lengths", default="1024,2048,4096,8192,16384,32768", metavar="T,...", help="(default: %(default)s)"
    )
    parser.add_argument("--mechanisms", default="sparse,Reformer,routing", metavar="NAME,...", help="(%(default)s)")
    parser.add_argument(
        "--max_full", type=Range(0, MOST).of(int), default=16384, metavar="T", help="of full attention (%(default)s)"
    )
    parser.add_argument(
        "--heads", type=Range(2, MOST).of(int), default=2, metavar="N", help="of width 64 (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=Range(1, MOST).of(int), default=3, metavar="N", help="runs of each (default: %(default)s)"
    )
    parser.add_argument(
        "--slice", metavar="SLICE", help="v5e:4x8, ...: what a device of it takes, by its compiler; nothing is measured"
    )
    parser.add_argument("--record", metavar="FILE.json", help="where each figure is kept as soon as it is measured")
    parser.add_argument("--picture", metavar="FILE.png", help="where to draw the curves")


def run(options: argparse.Namespace, bindings: list[str]) -> dict[str, Any]:
    """Measures or estimates, prints a table, and returns the figures."""
    if bindings:
        raise UserError(f"bench scaling takes no bindings, but was given --gin.{bindings[0]}")
    lengths = measure.sizes("--lengths", options.lengths, least=16)
    names = options.mechanisms.split(",")
    if options.slice:
        seconds_of = functools.partial(estimated_seconds, topology=options.slice)
        unit = Unit("ms", f"of a device of {options.slice}, estimated", 1000)
    else:
        seconds_of = functools.partial(measured_seconds, rounds=options.rounds)
        unit = Unit("s", "of CPU time", 1)
    settings = f"{options.heads} heads, {options.slice or f'{options.rounds} rounds'}"
    record = Record(pathlib.Path(options.record) if options.record else None, settings)
    curves: Curves = {"full": {}} | {name: {} for name in names}
    for length in lengths:
        variants: dict[str, Attention] = {"full": attention_lib.DEFAULT} if length <= options.max_full else {}
        variants |= {name: example(name, length) for name in names}
        for name, mechanism in variants.items():
            seconds = record.seconds(name, length)
            if seconds is None:
                seconds = seconds_of(mechanism, length, options.heads)
                record.add(name, length, seconds)
            curves[name][length] = seconds
            print(f"{length:,} {name}: {unit.tell(seconds)} {unit.of_what}", flush=True)
    result = {name: {"seconds": curve, "exponent": exponent(curve)} for name, curve in curves.items()}
    print(f"\n{_table(curves, unit)}")
    if options.picture:
        draw(curves, unit, pathlib.Path(options.picture))
    return result


def example(name: str, length: int) -> Attention:
    """The example of this name, for segments of a length.

    Raises:
      UserError: no mechanism has an example of this name.
    """
    examples = [each for each in (mechanism.example(length) for mechanism in attention_lib.MECHANISMS) if each]
    for each in examples:
        if each.name == name:
            return each.attention
    known = ", ".join(each.name for each in examples)
    raise UserError(f"--mechanisms={name}: expected names of {known}")


class LayerStep(NamedTuple):
    """A layer of one row, forward and backward.

    Attributes:
      gradient: `(variables, x) -> their gradients`, compiled when it is called.
      init: `(key, x) -> variables`, likewise.
      x: shape and dtype of the input.
    """

    gradient: Any
    init: Any
    x: jax.ShapeDtypeStruct


def step_of(mechanism: Attention, length: int, num_heads: int, dtype: str) -> LayerStep:
    """What is measured."""
    width = 64 * num_heads
    dims = LayerDims(width, num_heads, 64, 4 * width, 0.0, 8.0, jnp.dtype(dtype), positions="none")
    layer = mechanism.layer(dims)
    segment = Segment(jnp.ones((1, length), bool), Layout(length))
    state = mechanism.init_state(dims, 1, length)

    def loss(variables: Any, x: jax.Array) -> jax.Array:
        y, _, report = layer.apply(variables, x, segment, state)
        return jnp.sum(jnp.square(y)) + sum(report.losses.values())

    return LayerStep(
        gradient=jax.jit(jax.grad(loss, argnums=(0, 1))),
        init=jax.jit(lambda key, x: layer.init(key, x, segment, state)),
        x=jax.ShapeDtypeStruct((1, length, width), dtype),
    )


def measured_seconds(mechanism: Attention, length: int, num_heads: int, rounds: int) -> float:
    """What it takes here."""
    step = step_of(mechanism, length, num_heads, "float32")
    x = jnp.asarray(np.random.default_rng(0).normal(size=step.x.shape), step.x.dtype)
    variables = step.init(jax.random.key(0), x)
    compiled = step.gradient.lower(variables, x).compile()
    return cpu_seconds(lambda: jax.block_until_ready(compiled(variables, x)), rounds)


def cpu_seconds(step: Callable[[], object], rounds: int) -> float:
    """Median of the seconds that all threads of the process compute; a first run is not counted."""
    step()
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def estimated_seconds(mechanism: Attention, length: int, num_heads: int, topology: str) -> float:
    """What the TPU compiler expects of a device of a slice; see `memorizing.cost.pricing`."""
    device = slice_devices(topology, 1)[0]
    chip = chip_of(topology, device.device_kind)
    step = step_of(mechanism, length, num_heads, "bfloat16")
    arguments = jax.eval_shape(step.init, jax.random.key(0), step.x), step.x
    sharding = SingleDeviceSharding(device)
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments)
    compiled = step.gradient.lower(*placed).compile(pricing.COMPILER_OPTIONS)
    return pricing.seconds(pricing.read(compiled).usual, chip)


def exponent(curve: dict[int, float]) -> float | None:
    """Of the power of the length that fits best over its upper half; None for fewer than two lengths."""
    lengths = sorted(curve)
    upper = lengths[len(lengths) // 2 :] if len(lengths) > 3 else lengths
    if len(upper) < 2:
        return None
    slope, _ = np.polyfit(np.log(upper), np.log([curve[length] for length in upper]), 1)
    return float(slope)


def draw(curves: Curves, unit: Unit, path: pathlib.Path) -> None:
    """Writes the curves as a picture, both axes logarithmic."""
    figure = plots.blank(7, 4.5)
    axes = figure.subplots()
    for name, curve in curves.items():
        slope = exponent(curve)
        label = name if slope is None else f"{name}, exponent {slope:.2f}"
        axes.plot(list(curve), [unit.per_second * each for each in curve.values()], marker="o", label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="positions of a segment",
        ylabel=f"{unit.name} {unit.of_what}",
        title="one layer, forward and backward",
    )
    lengths = sorted({length for curve in curves.values() for length in curve})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def _table(curves: Curves, unit: Unit) -> str:
    lengths = sorted({length for curve in curves.values() for length in curve})
    rows = [["positions", *(f"{name}" for name in curves)]]
    for length in lengths:
        cells = [unit.tell(curve[length]) if length in curve else "" for curve in curves.values()]
        rows.append([f"{length:,}", *cells])
    exponents = [exponent(curve) for curve in curves.values()]
    rows.append(["exponent", *("" if slope is None else f"{slope:.2f}" for slope in exponents)])
    for length in lengths:
        full = curves["full"].get(length)
        if full is not None:
            rows.append([f"full / it at {length:,}", *(f"{full / curve[length]:.1f}" for curve in curves.values())])
    return tables.align(rows)
