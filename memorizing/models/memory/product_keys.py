"""A product-key memory in the place of an MLP (Lample et al. 2019, "Large Memory Layers with Product Keys").

A key is a pair of sub-keys, one of n for each half of a query, so that n + n vectors make K = n * n keys. The k best
keys of all K are among the pairs of the k best of either half: the search is exact, and compares with 2 n vectors only.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memorizing.array_typing import Activations
from memorizing.errors import Range, UserError
from memorizing.models.layers import Einsum, parameter
from memorizing.models.memory.search import ExactSearch


@dataclasses.dataclass(frozen=True)
class ProductKeys:
    """A memory of K = n * n values of width D, of which every head reads k.

    The paper normalises queries over the batch; here over their own width, so that rows do not see each other.

    Attributes:
      num_sub_keys: n, of each half.
      num_heads: each with queries and sub-keys of its own; all share the values.
      num_neighbors: k.
      key_dim: width of a query, whose halves are compared; even.
    """

    num_sub_keys: Annotated[int, Range(1, 2**15)] = 128
    num_heads: Annotated[int, Range(1, 2**10)] = 4
    num_neighbors: Annotated[int, Range(1, 2**15)] = 32
    key_dim: Annotated[int, Range(2, 2**16)] = 64

    def __post_init__(self) -> None:
        if self.key_dim % 2:
            raise UserError(f"ProductKeys.key_dim = {self.key_dim}: an even number, since it has two halves")
        if self.num_neighbors > self.num_sub_keys:
            raise UserError(
                f"ProductKeys.num_neighbors = {self.num_neighbors}: at most ProductKeys.num_sub_keys = "
                f"{self.num_sub_keys}"
            )

    @property
    def num_keys(self) -> int:
        """K."""
        return self.num_sub_keys**2

    def num_parameters(self, embed_dim: int) -> int:
        """Of values, sub-keys and projection of the queries."""
        return self.num_keys * embed_dim + self.num_heads * self.key_dim * (self.num_sub_keys + embed_dim)

    def flops(self, embed_dim: int, length: int) -> int:
        """FLOPs for a segment of one row: queries, scores of sub-keys, sums of pairs, and the values' average."""
        queries = 2 * embed_dim * self.key_dim
        scores = 2 * self.num_sub_keys * self.key_dim
        pairs = self.num_neighbors**2
        values = 2 * self.num_neighbors * embed_dim
        return length * self.num_heads * (queries + scores + pairs + values)


class ProductKeyMemory(nn.Module):
    """[B, T, D] -> [B, T, D]: for each position the average of the values of the k best keys, summed over heads.

    Attributes:
      config: sizes.
      dtype: of the computation.
      initial_scale: factor of the initial values.
    """

    config: ProductKeys
    dtype: jnp.dtype
    initial_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        config = self.config
        embed_dim = x.shape[-1]
        half = config.key_dim // 2
        project = Einsum(
            "BTD,DNH->BTNH",
            shape=(embed_dim, config.num_heads, config.key_dim),
            axes=("embed", "heads", "head_dim"),
            dtype=self.dtype,
            name="query",
        )
        queries = _standardized(project(x))
        sub_keys = parameter(
            self,
            "sub_keys",
            nn.initializers.normal(half**-0.5),
            shape=(config.num_heads, 2, config.num_sub_keys, half),
            axes=("heads", None, None, "head_dim"),
        )
        values = parameter(
            self,
            "values",
            nn.initializers.normal(self.initial_scale * embed_dim**-0.5),
            shape=(config.num_keys, embed_dim),
            axes=("vocab", "embed"),
        )

        # [B, T, N, 2, H / 2]
        halves = queries.reshape(*queries.shape[:3], 2, half)
        scores, keys = best_keys(halves, sub_keys.astype(self.dtype), config.num_neighbors)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)

        def add_head(total: Activations, of_head: tuple) -> tuple[Activations, None]:
            weights, keys = of_head
            # [B, T, k, D]
            found = jnp.take(values, keys, axis=0).astype(self.dtype)
            return total + jnp.einsum("BTk,BTkD->BTD", weights, found), None

        # One head after the other: what is found is k times as large as the activations.
        heads_first = (jnp.moveaxis(weights, 2, 0), jnp.moveaxis(keys, 2, 0))
        y, _ = jax.lax.scan(add_head, jnp.zeros_like(x), heads_first)
        return y


def best_keys(
    queries: Float[Array, "B T N 2 h"],
    sub_keys: Float[Array, "N 2 n h"],
    k: int,
) -> tuple[Float[Array, "B T N k"], Int[Array, "B T N k"]]:
    """The k best of all n * n keys of each head, exactly: scores, float32 and descending, and numbers of the keys.

    Key i * n + j has the sub-keys i and j, and the sum of their scores.

    Args:
      queries: in halves.
      sub_keys: of each head and half.
      k: at most n.
    """
    num_sub_keys = sub_keys.shape[2]
    everything = jnp.ones(num_sub_keys, bool)

    def of_half(queries: Float[Array, "T h"], sub_keys: Float[Array, "n h"]) -> tuple[Array, Array]:
        return ExactSearch().top_k(queries, sub_keys, everything, k)

    # Over halves, heads and rows: [B, N, 2, T, k].
    search = jax.vmap(jax.vmap(jax.vmap(of_half)), in_axes=(0, None))
    scores, indices = search(jnp.moveaxis(queries, 1, 3), sub_keys)
    # [B, N, T, k, k]
    pair_scores = scores[:, :, 0, :, :, None] + scores[:, :, 1, :, None, :]
    pair_keys = indices[:, :, 0, :, :, None] * num_sub_keys + indices[:, :, 1, :, None, :]
    flat = (*pair_scores.shape[:3], k * k)
    best, place = jax.lax.top_k(pair_scores.reshape(flat), k)
    keys = jnp.take_along_axis(pair_keys.reshape(flat), place, axis=-1)
    return jnp.moveaxis(best, 1, 2), jnp.moveaxis(keys, 1, 2)


def _standardized(x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """(x - mean) / standard deviation over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    return (centered * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)
