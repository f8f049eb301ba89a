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
MLPKind = Literal["relu", "gelu", "quick_gelu", "gated_silu", "gated_gelu"]


def _quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), as the Sparse Transformer approximates GELU (Child et al. 2019, section 5.2)."""
    return x * nn.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "gelu": nn.gelu,
    "quick_gelu": _quick_gelu,
    "silu": nn.silu,
}


def parameter(
    module: nn.Module,
    name: str,
    initializer: nn.initializers.Initializer,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
) -> jax.Array:
    """A parameter of a module, float32, whose dimensions carry logical axis names.

    Args:
      module: to be called where `module.param` may be called.
      name: of the parameter.
      initializer: `(key, shape, dtype) -> array`.
      shape: of the parameter.
      axes: logical axis name of each dimension; None where it has none.
    """
    boxed = nn.with_logical_partitioning(initializer, axes)
    value = module.param(name, boxed, shape, jnp.float32)
    # Flax declares the box that the initializer returns, but `param` unboxes it.
    return value  # pyright: ignore[reportReturnType]


class Einsum(nn.Module):
    """A linear map without bias, written as the einsum that it is.

    Attributes:
      equation: `'input,kernel->output'`. The kernel's letters that the output lacks are contracted; they make up the
        fan-in of the initialiser.
      shape: shape of the kernel.
      axes: logical axis name of each kernel dimension.
      dtype: dtype of the computation and the result.
      initial_scale: factor of the initial kernel.
    """

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: jnp.dtype
    initial_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, frozen: bool = False) -> jax.Array:
        """The map of x; if frozen, no gradient reaches the kernel."""
        operands, output = self.equation.split("->")
        _, letters = operands.split(",")
        initializer = nn.initializers.variance_scaling(
            self.initial_scale**2,
            "fan_in",
            "truncated_normal",
            in_axis=[i for i, letter in enumerate(letters) if letter not in output],
            out_axis=[i for i, letter in enumerate(letters) if letter in output],
        )
        kernel = parameter(self, "kernel", initializer, self.shape, self.axes)
        if frozen:
            kernel = jax.lax.stop_gradient(kernel)
        kernel = kernel.astype(self.dtype)
        return jnp.einsum(self.equation, x, kernel)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, computed in float32; no mean subtraction, no bias."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        scale = parameter(self, "scale", nn.initializers.ones, x.shape[-1:], ("embed",))

        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normalized = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        scaled = normalized * scale[None, None, :]
        return scaled.astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / standard deviation * scale + bias over the last axis, computed in float32 (Ba et al. 2016)."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        width = x.shape[-1:]
        scale = parameter(self, "scale", nn.initializers.ones, width, ("embed",))
        bias = parameter(self, "bias", nn.initializers.zeros, width, ("embed",))

        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide, axis=-1, keepdims=True)
        centered = wide - mean
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        normalized = centered * jax.lax.rsqrt(variance + self.epsilon)

        # [1, 1, D]
        scale = scale[None, None, :]
        bias = bias[None, None, :]
        y = normalized * scale + bias
        return y.astype(x.dtype)


_NORMS: dict[NormKind, type[nn.Module]] = {
    "rms": RMSNorm,
    "layer": LayerNorm,
}


def make_norm(kind: NormKind, name: str | None = None) -> nn.Module:
    """The norm of residuals: 'rms' or 'layer'."""
    norm = _NORMS[kind]
    return norm(name=name)


class MLP(nn.Module):
    """MLP without biases, D -> F -> D.

    Attributes:
      mlp_dim: F.
      kind: the activation; one that is 'gated' is multiplied by a second projection of the input (Shazeer 2020).
      dtype: of the computation.
      initial_output_scale: factor of the initial projection down.
    """

    mlp_dim: int
    kind: MLPKind
    dtype: jnp.dtype
    initial_output_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        embed_dim = x.shape[-1]

        def project_up(name: str) -> jax.Array:
            projection = Einsum(
                "BTD,DF->BTF",
                shape=(embed_dim, self.mlp_dim),
                axes=("embed", "mlp"),
                dtype=self.dtype,
                name=name,
            )
            return projection(x)

        # [B, T, F]
        activation = _ACTIVATIONS[self.kind.removeprefix("gated_")]
        if self.kind.startswith("gated_"):
            gate = activation(project_up("gate"))
            hidden = gate * project_up("up")
        else:
            hidden = activation(project_up("up"))

        project_down = Einsum(
            "BTF,FD->BTD",
            shape=(self.mlp_dim, embed_dim),
            axes=("mlp", "embed"),
            dtype=self.dtype,
            initial_scale=self.initial_output_scale,
            name="down",
        )
        return project_down(hidden)


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
    keep_rate = 1 - rate
    shape_of_row = x.shape[1:]

    def draw_row(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, keep_rate, shape_of_row)

    keys = rngs.row_streams(name)
    # [B, T, D]
    mask = jax.vmap(draw_row)(keys)
    dropped = jnp.where(mask, x / keep_rate, 0)
    return dropped.astype(x.dtype)


class Embedder(nn.Module):
    """One table for input embedding and output logits, initialised N(0, 1); logits are divided by sqrt(D)."""

    vocab_size: int
    embed_dim: int
    dtype: jnp.dtype

    def setup(self) -> None:
        self.table = parameter(
            self,
            "table",
            nn.initializers.normal(stddev=1.0),
            shape=(self.vocab_size, self.embed_dim),
            axes=("vocab", "embed"),
        )

    def encode(self, tokens: Tokens) -> Activations:
        """The embedding of each token."""
        embedded = jnp.take(self.table, tokens, axis=0)
        return embedded.astype(self.dtype)

    def decode(self, x: Activations) -> Logits:
        """Logits in float32."""
        table = self.table.astype(self.dtype)
        logits = jnp.einsum("BTD,VD->BTV", x, table, preferred_element_type=jnp.float32)
        scale = self.embed_dim**-0.5
        return logits * scale


def rows_over_data(x: jax.Array) -> jax.Array:
    """Shards the rows of activations over the mesh axis `data`, where a mesh is set.

    Without this constraint the compiler might choose what the sharding of the parameters suggests.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec("data"))
