"""How the next token is drawn from what a model predicts."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from memorizing.errors import MOST, Range, UserError

TEMPERATURE = Range(0, 1e6)
TOP_K = Range(0, MOST)
TOP_P = Range(0, 1)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of sampling. `top_k` is applied first, then `top_p` to what is left; then a token is drawn.

    Attributes:
      temperature: the logits are divided by it; 0 always takes the most probable token.
      top_k: only the k most probable tokens may be drawn; 0 for all.
      top_p: only the most probable tokens that together reach this probability may be drawn (Holtzman et al. 2020,
        "nucleus sampling"), at least one.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if self.temperature not in TEMPERATURE:
            raise UserError(f"temperature = {self.temperature}: 0 (always the most probable token), {TEMPERATURE}")
        if self.top_k not in TOP_K:
            raise UserError(f"top_k = {self.top_k}: 0 for no limit, {TOP_K}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: above 0 and at most 1")

    def arrays(self, allowed: Bool[np.ndarray, "V"], seed: int) -> SamplingArrays:
        """The settings as arguments of a compiled program, which is the same one for all settings.

        Args:
          allowed: which tokens may be drawn at all, at least one.
          seed: of the random numbers.
        """
        if self.temperature == 0:
            temperature = 1.0
            top_k = 1
        else:
            temperature = self.temperature
            top_k = self.top_k or np.iinfo(np.int32).max
        return SamplingArrays(
            temperature=np.float32(temperature),
            top_k=np.int32(top_k),
            top_p=np.float32(self.top_p),
            allowed=allowed,
            seed=np.uint32(seed),
        )


class SamplingArrays(NamedTuple):
    """`Sampling` as arrays: of NumPy before a compiled program, of JAX inside it.

    Attributes:
      temperature: above 0.
      top_k: how many tokens may be drawn at most.
      top_p: as in `Sampling`.
      allowed: which tokens may be drawn at all.
      seed: of the random numbers.
    """

    temperature: Float[Array, ""] | Any
    top_k: Int[Array, ""] | Any
    top_p: Float[Array, ""] | Any
    allowed: Bool[Array, "V"] | Any
    seed: UInt32[Array, ""] | Any


def draw(logits: Float[Array, "B V"], position: Int[Array, ""], sampling: SamplingArrays) -> Int[Array, "B"]:
    """Draws a token for every row. What is drawn depends on its logits, the seed, the row and the position.

    Args:
      logits: float32.
      position: of the token in its document.
      sampling: how it is drawn.
    """
    logits = jnp.where(sampling.allowed[None], logits, -jnp.inf)
    # Only values are sorted, which is several times as fast on CPUs as to sort tokens by them. A draw is a rank, and
    # the token of a rank is found by its value.
    values = _ascending(logits)  # [B, V]
    ranked = ~jnp.sort(~values, axis=-1, stable=False)  # [B, V], the greatest first
    scaled = _logits_of(ranked) / sampling.temperature  # [B, V]
    rank = jnp.arange(logits.shape[-1])[None]  # [1, V]
    scaled = jnp.where(rank < sampling.top_k, scaled, -jnp.inf)
    probabilities = jax.nn.softmax(scaled, axis=-1)
    # The probability of all tokens before a token: what has reached top_p needs no more.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    is_candidate = (before < sampling.top_p) | (rank == 0)
    scaled = jnp.where(is_candidate, scaled, -jnp.inf)

    def draw_rank(row: Int[Array, ""], row_logits: Float[Array, "V"]) -> Int[Array, ""]:
        key = jax.random.key(sampling.seed)
        key = jax.random.fold_in(key, row)
        key = jax.random.fold_in(key, position)
        return jax.random.categorical(key, row_logits)

    rows = jnp.arange(len(logits))  # [B]
    drawn = jax.vmap(draw_rank)(rows, scaled)[:, None]  # [B, 1]
    value = jnp.take_along_axis(ranked, drawn, axis=-1)  # [B, 1]
    # Of equal logits the lower token comes first, so that exactly k are left. One token is the drawn one.
    place = drawn - jnp.sum(values > value, axis=-1, keepdims=True)  # [B, 1], among those of this value
    is_same = values == value  # [B, V]
    is_drawn = is_same & (jnp.cumsum(is_same, axis=-1) == place + 1)
    return jnp.sum(jnp.where(is_drawn, rank, 0), axis=-1, dtype=jnp.int32)


def _ascending(logits: Float[Array, "B V"]) -> Int[Array, "B V"]:
    """Integers in the order of float32 logits."""
    # -0 is 0.
    bits = jax.lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.int32)
    return _swapped(bits)


def _logits_of(values: Int[Array, "B V"]) -> Float[Array, "B V"]:
    """The inverse of `_ascending`."""
    return jax.lax.bitcast_convert_type(_swapped(values), jnp.float32)


def _swapped(bits: Int[Array, "B V"]) -> Int[Array, "B V"]:
    """The order of negative ones turned around: of floats it is that of their absolute values."""
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
