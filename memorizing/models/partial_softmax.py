"""Softmax attention that is computed in parts: each over some of the keys, joined by their normalisers.

A softmax over several sets of keys is the average of the softmaxes over each, weighted by their sums of exponentials.
So a pattern of visible keys that falls into blocks needs no array of all queries by all keys.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

# Logit where nothing is visible: of weight 0 beside any other, and finite, also when logarithms are added.
HIDDEN = -1e30


class Partial(NamedTuple):
    """Attention to a part of the keys.

    Attributes:
      values: [..., T, H], what a softmax over this part alone gives; arbitrary where none of its keys is visible.
      log_normalizer: float32 [..., T], logarithm of the sum of exponentials; about `HIDDEN` where none is visible.
    """

    values: Float[Array, "*rows T H"]
    log_normalizer: Float[Array, "*rows T"]


def attend(
    logits: Float[Array, "*rows T S"],
    visible: Bool[Array, "*#rows #T #S"] | Bool[np.ndarray, "*#rows #T #S"],
    values: Float[Array, "*#rows S H"],
) -> Partial:
    """softmax(logits) values over the visible keys of one part.

    Args:
      logits: float32.
      visible: which keys each query sees, perhaps none.
      values: of the keys.
    """
    shown = jnp.where(visible, logits, HIDDEN)
    log_normalizer = jax.nn.logsumexp(shown, axis=-1)
    weights = jnp.exp(shown - log_normalizer[..., None])
    weights = weights.astype(values.dtype)
    return Partial(jnp.einsum("...TS,...SH->...TH", weights, values), log_normalizer)


def join(*parts: Partial) -> Partial:
    """Attention to all parts together; their keys are different ones."""
    return join_axis(Partial(*map(jnp.stack, zip(*parts, strict=True))))


def join_axis(parts: Partial) -> Partial:
    """Attention to all parts together, which lie along the first axis."""
    log_normalizer = jax.nn.logsumexp(parts.log_normalizer, axis=0)
    # Not exp(part - whole): where both are large their rounding would show.
    weights = jax.nn.softmax(parts.log_normalizer, axis=0)
    weights = weights.astype(parts.values.dtype)
    values = jnp.sum(weights[..., None] * parts.values, axis=0)
    return Partial(values, log_normalizer)
