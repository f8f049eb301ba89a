"""The parts every model shares: linear maps, norms, MLPs, the embedding.

Parameters are float32 and carry logical axis names; activations have the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from memorizing.array_typing import Activations, Logits, Tokens
from memorizing.context import Rngs

NormKind = Literal["rms", "layer"]
MLPKind = Literal["relu", "gelu", "gated_silu", "gated_gelu"]

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": nn.relu, "gelu": nn.gelu, "silu": nn.silu}


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


class LayerNorm(nn.Module):
    """(x - mean) / standard deviation * scale + bias over the last axis, computed in float32 (Ba et al. 2016)."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        def parameter(name: str, initializer: nn.initializers.Initializer) -> jax.Array:
            boxed = nn.with_logical_partitioning(initializer, ("embed",))
            return self.param(name, boxed, x.shape[-1:], jnp.float32)[None, None, :]

        wide = x.astype(jnp.float32)
        centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        normalized = centered * jax.lax.rsqrt(variance + self.epsilon)
        scale, bias = parameter("scale", nn.initializers.ones), parameter("bias", nn.initializers.zeros)
        return (normalized * scale + bias).astype(x.dtype)


def make_norm(kind: NormKind, name: str | None = None) -> nn.Module:
    """The norm of residuals: 'rms' or 'layer'."""
    return {"rms": RMSNorm, "layer": LayerNorm}[kind](name=name)


class MLP(nn.Module):
    """MLP without biases, D -> F -> D.

    Attributes:
      mlp_dim: F.
      kind: the activation; one that is 'gated' is multiplied by a second projection of the input (Shazeer 2020).
      dtype: of the computation.
    """

    mlp_dim: int
    kind: MLPKind
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        embed_dim = x.shape[-1]

        def project_up(name: str) -> jax.Array:
            return Einsum("BTD,DF->BTF", (embed_dim, self.mlp_dim), ("embed", "mlp"), self.dtype, name=name)(x)

        activation = _ACTIVATIONS[self.kind.removeprefix("gated_")]
        if self.kind.startswith("gated_"):
            hidden = activation(project_up("gate")) * project_up("up")
        else:
            hidden = activation(project_up("up"))
        return Einsum("BTF,FD->BTD", (self.mlp_dim, embed_dim), ("mlp", "embed"), self.dtype, name="down")(hidden)


def dropout(x: Activations, rate: float, rngs: Rngs | None, name: str) -> Activations:
    """Sets values to 0 with a probability and scales the others up; does nothing where nothing is random.

    What a row loses depends on its own random numbers only, so that it is the same in every split of the batch.

    Args:
      x: [B, T, D].
      rate: probability.
      rngs: random numbers, None in evaluation.
      name: of the stream of random numbers.
    """
    if rngs is None or rate == 0:
        return x
    is_kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(rngs.row_streams(name))
    return jnp.where(is_kept, x / (1 - rate), 0).astype(x.dtype)


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
