"""The layers every model shares: Einsum, RMSNorm, Embedder, MLP. Parameters are float32 and carry logical axis names; activations have the dtype of the model."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from memorizing.array_typing import Activations, Logits, Tokens


class Einsum(nn.Module):
    """A linear map without bias, written as the einsum that it is.

    Attributes:
      equation: `'input,kernel->output'`; the kernel's letters that the output lacks are contracted and make up the fan-in of the initialiser.
      shape: shape of the kernel.
      axes: logical axis name of each kernel dimension.
      dtype: dtype of the computation and the result.
    """

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, frozen: bool = False) -> jax.Array:
        """The map of x; if frozen, no gradient reaches the kernel."""
        operands, output = self.equation.split("->")
        letters = operands.split(",")[1]
        initializer = nn.initializers.variance_scaling(
            1.0,
            "fan_in",
            "truncated_normal",
            in_axis=[i for i, letter in enumerate(letters) if letter not in output],
            out_axis=[i for i, letter in enumerate(letters) if letter in output],
        )
        kernel = self.param("kernel", nn.with_logical_partitioning(initializer, self.axes), self.shape, jnp.float32)
        if frozen:
            kernel = jax.lax.stop_gradient(kernel)
        return jnp.einsum(self.equation, x, kernel.astype(self.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, computed in float32; no mean subtraction, no bias."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), x.shape[-1:], jnp.float32
        )
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(variance + self.epsilon) * scale[None, None, :]).astype(x.dtype)


class MLP(nn.Module):
    """ReLU MLP without biases, D -> F -> D."""

    mlp_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        embed_dim = x.shape[-1]
        hidden = Einsum("BTD,DF->BTF", (embed_dim, self.mlp_dim), ("embed", "mlp"), self.dtype, name="up")(x)
        return Einsum("BTF,FD->BTD", (self.mlp_dim, embed_dim), ("mlp", "embed"), self.dtype, name="down")(
            nn.relu(hidden)
        )


class Embedder(nn.Module):
    """One table for input embedding and output logits, initialised N(0, 1); logits are divided by sqrt(D)."""

    vocab_size: int
    embed_dim: int
    dtype: jnp.dtype

    def setup(self) -> None:
        initializer = nn.with_logical_partitioning(nn.initializers.normal(stddev=1.0), ("vocab", "embed"))
        self.table = self.param("table", initializer, (self.vocab_size, self.embed_dim), jnp.float32)

    def encode(self, tokens: Tokens) -> Activations:
        return jnp.take(self.table, tokens, axis=0).astype(self.dtype)

    def decode(self, x: Activations) -> Logits:
        """Logits in float32."""
        logits = jnp.einsum("BTD,VD->BTV", x, self.table.astype(self.dtype), preferred_element_type=jnp.float32)
        return logits * self.embed_dim**-0.5


def rows_over_data(x: jax.Array) -> jax.Array:
    """Keeps the row axis of activations on the mesh axis `data`, where a mesh is set, whatever the sharding of the parameters would suggest to the compiler."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec("data"))
