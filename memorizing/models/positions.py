"""Relative positions as pure functions: T5's buckets (Raffel et al. 2020, section 2.1), Transformer-XL's sinusoids and its shift (Dai et al. 2019, appendix B)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def distances(num_queries: int, num_keys: int) -> np.ndarray:
    """All distances, in tokens, from a query back to a key, where the keys end where the queries end: from -(T - 1), a later key, to S - 1. int [S + T - 1]."""
    return np.arange(-(num_queries - 1), num_keys)


def t5_buckets(distances: np.ndarray, num_buckets: int, max_distance: int, bidirectional: bool = False) -> np.ndarray:
    """Maps distances back in tokens to buckets: exact up to half the buckets, then logarithmic up to `max_distance`, the last bucket beyond it.

    Args:
      distances: int [any shape], query position minus key position.
      num_buckets: size of the table.
      max_distance: distance, in tokens, from which on all keys share the last bucket.
      bidirectional: whether later keys have half of the buckets to themselves; else they share the bucket of distance 0.

    Returns:
      int32 array of the same shape with values in [0, num_buckets).
    """
    if bidirectional:
        half = num_buckets // 2
        return np.where(distances < 0, half, 0).astype(np.int32) + t5_buckets(np.abs(distances), half, max_distance)
    distances = np.maximum(distances, 0)
    exact = num_buckets // 2
    ratio = np.log(np.maximum(distances, exact) / exact) / np.log(max_distance / exact)
    logarithmic = exact + (ratio * (num_buckets - exact)).astype(np.int32)
    return np.where(distances < exact, distances, np.minimum(logarithmic, num_buckets - 1)).astype(np.int32)


def by_key(by_distance: Float[Array, "*rows T R"], num_keys: int) -> Float[Array, "*rows T S"]:
    """Turns values by distance into values by key: row t's value for key s is its value for the distance from query t back to key s.

    Built by reshaping (the shift of Transformer-XL, appendix B), not by a gather, which accelerators do badly.

    Args:
      by_distance: each query's values in the order of `distances`, R = S + T - 1.
      num_keys: S.
    """
    *rows, num_queries, num_distances = by_distance.shape
    # Row t is its reversed values moved left by T - 1 - t. Rows of R + 1 values read as rows of R, from value T - 1 on, are moved so.
    reverse = jnp.pad(by_distance[..., ::-1], [(0, 0)] * (by_distance.ndim - 1) + [(0, 1)])
    sheet = reverse.reshape(*rows, -1)
    first = num_queries - 1
    sheet = sheet[..., first : first + num_queries * num_distances].reshape(*rows, num_queries, num_distances)
    return sheet[..., :num_keys]


def same_by_key(by_distance: Float[Array, "*rows R"], num_queries: int, num_keys: int) -> Float[Array, "*rows T S"]:
    """`by_key` for values that are the same for all queries.

    Args:
      by_distance: in the order of `distances`, R = S + T - 1.
      num_queries, num_keys: T, S.
    """
    # A row is the one `tile` rows before, `tile` to the right: so few are built one by one, and the rest cut from them. On TPUs 128 places are a move of whole registers.
    tile = 128 if num_queries % 128 == 0 else num_queries
    rows = jnp.broadcast_to(by_distance[..., None, :], (*by_distance.shape[:-1], tile, by_distance.shape[-1]))
    last = num_queries - tile
    wide = by_key(rows, last + num_keys)
    return jnp.concatenate([wide[..., last - t : last - t + num_keys] for t in range(0, num_queries, tile)], axis=-2)


def sinusoids(positions: Float[Array, "R"], width: int) -> Float[Array, "R D"]:
    """Sines and cosines of the positions at `width / 2` wavelengths from 2 pi to 10000 * 2 pi (Vaswani et al. 2017); not learned."""
    frequencies = 10_000.0 ** -(np.arange(0, width, 2) / width)
    angles = positions[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[:, :width]
