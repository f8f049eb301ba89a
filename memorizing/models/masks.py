"""Attention masks as pure functions of a segment's layout; true means visible."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from memorizing.context import Layout


class DistancesAndKeys(NamedTuple):
    """A query sees a key if it sees this distance, and if this key is seen.

    Attributes:
      distances: R = S + T - 1 of them, in the order of `positions.distances`.
      keys: of each row.
    """

    distances: Bool[np.ndarray, "R"]
    keys: Bool[Array, "B S"]


class Visible(NamedTuple):
    """Which keys each query of a segment sees.

    Attributes:
      mask: whether it does; every query sees at least one.
      by_distance: the same, but for queries at positions that hold nothing; None where more than this decides.
    """

    mask: Bool[Array, "B T S"]
    by_distance: DistancesAndKeys | None = None


def visible(layout: Layout, num_cached: int = 0) -> Bool[Array, "T S"]:
    """Which keys each position of a segment sees.

    In a bidirectional segment every position sees everything. Otherwise the mask is causal, except that the read tokens
    see each other freely, and so do the write tokens (Bulatov et al. 2022, section 3).

    Args:
      layout: of the segment, T positions.
      num_cached: keys from before the segment; S = num_cached + T.
    """
    num_keys = num_cached + layout.size
    first_write = layout.num_read + layout.length

    # Positions in the segment, [T, 1] and [1, S]; those of cached keys are negative.
    query = jnp.arange(layout.size)[:, None]
    key = jnp.arange(-num_cached, layout.size)[None, :]

    if layout.bidirectional:
        seen = jnp.broadcast_to(key < layout.size, (layout.size, num_keys))
    else:
        both_read = query < layout.num_read
        both_read &= key >= 0
        both_read &= key < layout.num_read

        both_write = query >= first_write
        both_write &= key >= first_write

        seen = key <= query
        seen |= both_read
        seen |= both_write

    if not layout.memory_sees_cache:
        is_own_token = query >= layout.num_read
        is_own_token &= query < first_write
        is_in_segment = key >= 0
        seen &= is_own_token | is_in_segment
    return seen


def itself(num_queries: int, num_keys: int) -> Bool[Array, "T S"]:
    """The key at each query's own position; the keys end where the queries end."""
    query, key = _positions(num_queries, num_keys)
    return key == query


def within(window: int, num_queries: int, num_keys: int) -> Bool[Array, "T S"]:
    """The last `window` keys up to each query's own, and all later ones; the keys end where the queries end."""
    query, key = _positions(num_queries, num_keys)
    distance = query - key
    return distance < window


def _positions(num_queries: int, num_keys: int) -> tuple[Int[Array, "T 1"], Int[Array, "1 S"]]:
    """Positions of the queries and of the keys, counted from the first key."""
    num_earlier = num_keys - num_queries
    query = jnp.arange(num_queries)[:, None] + num_earlier
    key = jnp.arange(num_keys)[None, :]
    return query, key
