"""Relative positions as pure functions: T5's buckets (Raffel et al. 2020, section 2.1) and the bias matrix made of them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def t5_buckets(distances: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """Maps distances back in tokens (>= 0) to buckets: exact up to half the buckets, then logarithmic up to `max_distance`, the last bucket beyond it.

    Args:
      distances: int [any shape], query position minus key position.
      num_buckets: size of the table.
      max_distance: distance, in tokens, from which on all keys share the last bucket.

    Returns:
      int32 array of the same shape with values in [0, num_buckets).
    """
    exact = num_buckets // 2
    ratio = np.log(np.maximum(distances, exact) / exact) / np.log(max_distance / exact)
    logarithmic = exact + (ratio * (num_buckets - exact)).astype(np.int32)
    return np.where(distances < exact, distances, np.minimum(logarithmic, num_buckets - 1)).astype(np.int32)


def bias_by_distance(by_distance: Float[Array, "N S"], num_queries: int) -> Float[Array, "N T S"]:
    """Spreads one value per distance into a matrix whose entry (t, s) holds the value of the distance from query t back to key s.

    The keys end where the queries end, so the distance is t + (S - T) - s. Entries of keys that come after their query are unspecified: the causal mask hides them.
    Built by tiling and reshaping (the shift of Transformer-XL, appendix B), not by a gather, which accelerators do badly.

    Args:
      by_distance: value for each of the distances 0 ... S-1.
      num_queries: T.
    """
    num_heads, num_keys = by_distance.shape
    # Row t is the reversed vector moved left by T - 1 - t. Rows of S + 1 values read as rows of S, from value T - 1 on, are moved so.
    reverse = jnp.pad(by_distance[:, ::-1], ((0, 0), (0, 1)))
    sheet = jnp.broadcast_to(reverse[:, None, :], (num_heads, num_queries, num_keys + 1)).reshape(num_heads, -1)
    first = num_queries - 1
    return sheet[:, first : first + num_queries * num_keys].reshape(num_heads, num_queries, num_keys)
