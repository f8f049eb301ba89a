"""Attention of a few queries to all positions of a segment: in a decode step, and for an inspector.

A mechanism that computes a whole segment in blocks or chunks says here, pair by pair, who sees whom.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from memorizing.array_typing import HeadScale
from memorizing.context import Attended
from memorizing.models import partial_softmax
from memorizing.models.partial_softmax import HIDDEN

# Queries whose weights for all positions are there at a time.
_QUERIES_AT_A_TIME = 64

# From positions [t] to float32 weights; 0 where a query does not see a key.
Weights = Callable[[Int[Array, "t"]], Float[Array, "B N t S"]]


def logits(
    queries: Float[Array, "B t N H"],
    keys: Float[Array, "B S N H"],
    by_distance: Float[Array, "N S"],
    scale: HeadScale,
    query: Int[Array, "t"],
) -> Float[Array, "B N t S"]:
    """scale * (q . k + bias) of some queries for all keys, float32.

    Args:
      queries, keys: the keys are those of positions 0 to S - 1.
      by_distance: bias of the logits at each distance back.
      scale: of the logits.
      query: positions of the queries.
    """
    distance = jnp.maximum(query[:, None] - jnp.arange(keys.shape[1])[None, :], 0)
    products = jnp.einsum("BTNH,BSNH->BNTS", queries, keys, preferred_element_type=jnp.float32)
    return (products + by_distance[:, distance][None]) * scale[None, :, None, None]


def attend(
    logits: Float[Array, "B N t S"],
    visible: Bool[Array, "#B #N t S"],
    values: Float[Array, "B S N H"],
) -> Float[Array, "B t N H"]:
    """softmax(logits) values of some queries, each over the positions that it sees."""
    heads_first = jnp.moveaxis(values, 2, 1)
    return jnp.moveaxis(partial_softmax.attend(logits, visible, heads_first).values, 1, 2)


def softmax(
    logits: Float[Array, "B N t S"],
    visible: Bool[Array, "#B #N t S"],
) -> Float[Array, "B N t S"]:
    """Weights of what each query sees; all 0 where that is nothing."""
    weights = jax.nn.softmax(jnp.where(visible, logits, HIDDEN), axis=-1)
    return jnp.where(visible, weights, 0)


def strongest(
    weights: Weights,
    length: int,
    num_shown: int,
    groups: Int[Array, "B T N g"],
    group_names: tuple[str, ...],
    heads: range,
) -> Attended:
    """The positions that get the most attention from each position of a segment.

    Args:
      weights: of some queries.
      length: T.
      num_shown: how many, at most.
      groups, group_names, heads: see `Attended`.
    """
    num_shown = min(num_shown, length)
    at_a_time = max(size for size in range(1, _QUERIES_AT_A_TIME + 1) if length % size == 0)

    def of_queries(query: Int[Array, "t"]) -> tuple[Float[Array, "B N t k"], Int[Array, "B N t k"]]:
        return jax.lax.top_k(weights(query), num_shown)

    parts = jnp.arange(length).reshape(-1, at_a_time)
    # [parts, B, N, t, k]
    greatest, positions = jax.lax.map(of_queries, parts)
    positions = jnp.where(greatest > 0, positions, -1)

    def by_position(x: jax.Array) -> jax.Array:
        ordered = jnp.moveaxis(x, (0, 3), (1, 2))
        return ordered.reshape(x.shape[1], length, *x.shape[2:3], num_shown)

    attended = Attended(by_position(positions), by_position(greatest), groups, group_names, heads)
    return jax.lax.stop_gradient(attended)
