"""Losses of predictions, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from memorizing.array_typing import Logits, PerToken, Tokens


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
