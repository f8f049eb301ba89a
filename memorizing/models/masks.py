"""Attention masks as pure functions of a segment's layout; true means visible."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool

from memorizing.context import Layout


def visible(layout: Layout, num_cached: int = 0) -> Bool[Array, "T S"]:
    """Which keys each position of a segment sees.

    Causal over everything, except that the read tokens see each other freely, and so do the write tokens (Bulatov et al. 2022, section 3); or, for a bidirectional segment,
    everything.

    Args:
      layout: of the segment, T positions.
      num_cached: keys from before the segment; S = num_cached + T.
    """
    query = jnp.arange(layout.size)[:, None]
    key = jnp.arange(-num_cached, layout.size)[None, :]
    first_write = layout.num_read + layout.length
    if layout.bidirectional:
        seen = jnp.broadcast_to(key < layout.size, (layout.size, num_cached + layout.size))
    else:
        both_read = (query < layout.num_read) & (key >= 0) & (key < layout.num_read)
        both_write = (query >= first_write) & (key >= first_write)
        seen = (key <= query) | both_read | both_write
    if not layout.memory_sees_cache:
        is_token = (query >= layout.num_read) & (query < first_write)
        seen &= is_token | (key >= 0)
    return seen


def itself(num_queries: int, num_keys: int) -> Bool[Array, "T S"]:
    """The key at each query's own position; the keys end where the queries end."""
    query = jnp.arange(num_queries)[:, None] + (num_keys - num_queries)
    return jnp.arange(num_keys)[None, :] == query


def within(window: int, num_queries: int, num_keys: int) -> Bool[Array, "T S"]:
    """The last `window` keys up to each query's own; the keys end where the queries end."""
    query = jnp.arange(num_queries)[:, None] + (num_keys - num_queries)
    return query - jnp.arange(num_keys)[None, :] < window
