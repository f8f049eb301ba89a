"""Attention masks as pure functions; true means visible."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool


def causal(num_queries: int, num_keys: int) -> Bool[Array, "T S"]:
    """Keys at or before each query, where the keys end where the queries end (S >= T; the first S - T keys come before all queries)."""
    query = jnp.arange(num_queries)[:, None] + (num_keys - num_queries)
    return jnp.arange(num_keys)[None, :] <= query


def itself(num_queries: int, num_keys: int) -> Bool[Array, "T S"]:
    """The key at each query's own position, in the layout of `causal`."""
    query = jnp.arange(num_queries)[:, None] + (num_keys - num_queries)
    return jnp.arange(num_keys)[None, :] == query
