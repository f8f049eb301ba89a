"""How much what a position sees depends on later tokens: of one layer of each mechanism that tells what it attended to.

Inputs are as texts are: vectors of words whose frequency falls as 1 / rank, with noise; weights are those of
initialisation, settings those of the examples of `memorizing plan --flops`. The second half is exchanged for other
words. Told are, of all positions of the first half and
all heads, the share whose set of visible positions changes, and the share of the attention that moves elsewhere. No
position ever sees a later one; of a strictly causal mechanism nothing changes.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memorizing.benchmarks import measure
from memorizing.context import Attended, Layout, Segment
from memorizing.errors import MOST, Range, UserError
from memorizing.models import attention as attention_lib
from memorizing.models.attention.base import Attention, LayerDims
from memorizing.runtime import tables

_DIMS = LayerDims(128, 4, 32, 512, 0.0, 8.0, jnp.dtype("float32"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    parser.add_argument("--lengths", default="256,512,1024", metavar="T,...", help="(default: %(default)s)")
    parser.add_argument(
        "--seeds", type=Range(1, MOST).of(int), default=3, metavar="N", help="draws of inputs (default: %(default)s)"
    )


def run(options: argparse.Namespace, bindings: list[str]) -> dict[str, Any]:
    """Measures, prints a table, and returns the figures."""
    if bindings:
        raise UserError(f"bench future takes no bindings, but was given --gin.{bindings[0]}")
    results: dict[str, dict[int, dict[str, float]]] = {}
    for length in measure.sizes("--lengths", options.lengths, least=16):
        for name, mechanism in telling(length).items():
            seen, moved = np.mean([changes(mechanism, length, seed) for seed in range(options.seeds)], axis=0)
            results.setdefault(name, {})[length] = {"seen": float(seen), "moved": float(moved)}
            print(f"{length:,} {name}: {seen:.1%} see other positions, {moved:.1%} of the attention moves", flush=True)
    print(f"\n{_table(results)}")
    return results


def telling(length: int) -> dict[str, Attention]:
    """Examples of mechanisms that tell what they attended to, in all their forms, by name."""
    found = {}
    for cls in attention_lib.MECHANISMS:
        example = cls.example(length)
        if example is None or not example.attention.tells_attention:
            continue
        fields = {field.name for field in dataclasses.fields(example.attention)}
        if "strictly_causal" not in fields:
            found[example.name] = example.attention
            continue
        for is_strict, form in ((False, "as published"), (True, "strictly causal")):
            mechanism = dataclasses.replace(example.attention, **{"strictly_causal": is_strict})
            found[f"{example.name}, {form}"] = mechanism
    return found


def changes(mechanism: Attention, length: int, seed: int) -> tuple[float, float]:
    """Shares of positions and heads before a change whose visible set changes, and of the attention that moves."""
    x, other = words(np.random.default_rng(seed), length)
    half = length // 2
    # The first half of both is the same.
    other[:, :half] = x[:, :half]
    layer = mechanism.layer(_DIMS)
    segment = Segment(jnp.ones((1, length), bool), Layout(length), num_shown=length)
    state = mechanism.init_state(_DIMS, 1, length)

    @jax.jit
    def attended(x: jax.Array, other: jax.Array) -> tuple:
        variables = layer.init(jax.random.key(seed), x, segment, state)
        told = [layer.apply(variables, each, segment, state)[2].attended for each in (x, other)]
        return tuple(told)

    before, after = jax.device_get(attended(x, other))
    seen = []
    moved = []
    for own, others in zip(before, after, strict=True):
        first, second = (by_position(each, length)[:half] for each in (own, others))
        seen.append(np.any((first > 0) != (second > 0), axis=-1))
        moved.append(np.abs(first - second).sum(axis=-1) / 2)
    return float(np.concatenate(seen, axis=1).mean()), float(np.concatenate(moved, axis=1).mean())


def words(rng: np.random.Generator, length: int, num_words: int = 1000) -> np.ndarray:
    """Two texts of one row as vectors, float32 [2, 1, T, D]."""
    frequencies = 1 / np.arange(1, num_words + 1)
    tokens = rng.choice(num_words, (2, 1, length), p=frequencies / frequencies.sum())
    vectors = rng.normal(size=(num_words, _DIMS.embed_dim))
    noise = rng.normal(size=(*tokens.shape, _DIMS.embed_dim))
    return (vectors[tokens] + 0.5 * noise).astype(np.float32)


def by_position(attended: Attended, length: int) -> np.ndarray:
    """The weights of all positions, [T, N, S], of the first row."""
    positions, weights = attended.positions[0], attended.weights[0]
    dense = np.zeros((*positions.shape[:2], length + 1), np.float32)
    # What is not there has a place of its own, which is cut off.
    np.put_along_axis(dense, np.where(positions >= 0, positions, length), weights, axis=-1)
    return dense[..., :length]


def _table(results: dict[str, dict[int, dict[str, float]]]) -> str:
    lengths = sorted({length for by_length in results.values() for length in by_length})
    rows = [["", *(f"{length:,} positions" for length in lengths)]]
    for name, by_length in results.items():
        cells = [f"{by_length[each]['seen']:.1%}, {by_length[each]['moved']:.1%}" for each in lengths]
        rows.append([name, *cells])
    return tables.align(rows)
