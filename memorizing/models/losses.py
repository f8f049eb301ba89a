"""Losses of predictions, in float32."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from memorizing.array_typing import Logits, PerToken, Tokens


class Scores(NamedTuple):
    """How well targets were predicted.

    Attributes:
      nats: float32 [B, T], -log p of each.
      is_likeliest: bool [B, T], whether no token had a larger p.
    """

    nats: PerToken | Any
    is_likeliest: Bool[Array, "B T"] | Any


def scores(logits: Logits, targets: Tokens) -> Scores:
    """How well logits [B, T, V] predict targets [B, T]. Of equally likely tokens the one with the lowest id counts."""
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)  # [B, T, 1]
    tokens = jnp.arange(logits.shape[-1])[None, None]  # [1, 1, V]
    is_after = (logits < target_logits) | ((logits == target_logits) & (tokens >= targets[..., None]))
    # Counted, which on CPUs takes a quarter of the time of argmax. A logit that is no number is after none.
    num_before = jnp.sum(~is_after, axis=-1)
    return Scores(next_token_nats(logits, targets), num_before == 0)


def next_token_nats(logits: Logits, targets: Tokens, log_normalizer: PerToken | None = None) -> PerToken:
    """-log p(target) in nats, float32 [B, T], unweighted.

    Args:
      logits: float [B, T, V].
      targets: int [B, T].
      log_normalizer: float32 [B, T], log of the sum of exp(logits) over V where that is known; None to compute it.
    """
    logits = logits.astype(jnp.float32)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    # [B, T]
    target_logits = target_logits[..., 0]
    if log_normalizer is None:
        log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    return log_normalizer - target_logits
