"""How the next token is drawn from what a model predicts."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from memorizing.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of sampling. `top_k` is applied first, then `top_p` to what is left; then it is drawn.

    Attributes:
      temperature: the logits are divided by it; 0 always takes the most probable token.
      top_k: only the k most probable tokens may be drawn; 0 for all.
      top_p: only the most probable tokens that together reach this probability may be drawn (Holtzman et al. 2020, "nucleus sampling"), at least one.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature = {self.temperature}: 0 (always the most probable token) or more")
        if self.top_k < 0:
            raise UserError(f"top_k = {self.top_k}: at least 1, or 0 for no limit")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: above 0 and at most 1")

    def arrays(self, allowed: Bool[np.ndarray, "V"], seed: int) -> SamplingArrays:
        """The settings as a compiled program takes them, which is the same one for all settings.

        Args:
          allowed: which tokens may be drawn at all, at least one.
          seed: of the random numbers.
        """
        is_greedy = self.temperature == 0
        limit = 1 if is_greedy else self.top_k or np.iinfo(np.int32).max
        temperature = np.float32(1.0 if is_greedy else self.temperature)
        return SamplingArrays(temperature, np.int32(limit), np.float32(self.top_p), allowed, np.uint32(seed))


class SamplingArrays(NamedTuple):
    """`Sampling` as arrays: temperature above 0, and how many tokens may be drawn at most.

    With them the tokens that may be drawn at all, and the seed.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    allowed: Bool[Array, "V"]
    seed: Int[Array, ""]


def draw(logits: Float[Array, "B V"], position: Int[Array, ""], sampling: SamplingArrays) -> Int[Array, "B"]:
    """Draws a token for every row. What is drawn depends on its logits, the seed, the row and the position.

    Args:
      logits: float32.
      position: of the token in its document.
      sampling: how it is drawn.
    """
    logits = jnp.where(sampling.allowed[None], logits, -jnp.inf)
    # By rank, so that of equal logits the lower token comes first and exactly k are left.
    tokens = jnp.argsort(-logits, axis=-1, stable=True)
    scaled = jnp.take_along_axis(logits, tokens, axis=-1) / sampling.temperature
    rank = jnp.arange(logits.shape[-1])[None]
    scaled = jnp.where(rank < sampling.top_k, scaled, -jnp.inf)
    probabilities = jax.nn.softmax(scaled, axis=-1)
    # The probability of all tokens before a token: what has reached top_p needs no more.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    scaled = jnp.where((before < sampling.top_p) | (rank == 0), scaled, -jnp.inf)

    def key(row: Int[Array, ""]) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), row), position)

    drawn = jax.vmap(jax.random.categorical)(jax.vmap(key)(jnp.arange(len(logits))), scaled)
    return jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)
