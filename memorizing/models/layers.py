"""The parts every model shares: linear maps, norms, MLPs, the embedding.

Parameters are float32 and carry logical axis names; activations have the dtype of the model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from memorizing.array_typing import Activations, Logits, Tokens
from memorizing.context import Rngs
from memorizing.errors import FactorAboveZero, Range

NormKind = Literal["rms", "rms_llama", "rms_gemma", "layer"]
Projection = Literal["query", "key", "value", "output", "gate", "up", "down"]
HeadKind = Literal["tied_scaled", "tied", "untied"]
# 'gelu' is its approximation by tanh, 'exact_gelu' the function itself.
MLPKind = Literal["relu", "gelu", "exact_gelu", "quick_gelu", "gated_silu", "gated_gelu"]


def _quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), as the Sparse Transformer approximates GELU (Child et al. 2019, section 5.2)."""
    return x * nn.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "gelu": nn.gelu,
    "exact_gelu": functools.partial(nn.gelu, approximate=False),
    "quick_gelu": _quick_gelu,
    "silu": nn.silu,
}


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank changes of projections (Hu et al. 2021): y + scale * (x A) B beside y = x W, with B = 0 at the start.

    Attributes:
      rank: columns of A, and rows of B.
      scale: of the change; the paper's alpha / rank.
      projections: which ones, in every layer.
    """

    rank: Annotated[int, Range(1, 2**12)] = 8
    scale: FactorAboveZero = 2.0
    projections: tuple[Projection, ...] = ("query", "output")


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


def gathered(kernel: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A kernel as a layer computes with it: where devices share it along 'embed' (FSDP), each gets all of it.

    Left to itself, the compiler for TPUs cuts the product into as many parts as there are devices.

    Args:
      kernel: in the dtype of the computation, so that no more is sent than is used.
      axes: logical axis name of each dimension.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return kernel
    spec = PartitionSpec(*(None if axis == "embed" else PartitionSpec.UNCONSTRAINED for axis in axes))
    return jax.lax.with_sharding_constraint(kernel, spec)


class Einsum(nn.Module):
    """A linear map, written as the einsum that it is.

    Attributes:
      equation: `'input,kernel->output'`. The kernel's letters that the output lacks are contracted; they make up the
        fan-in of the initialiser.
      shape: shape of the kernel.
      axes: logical axis name of each kernel dimension.
      dtype: dtype of the computation and the result.
      initial_scale: factor of the initial kernel.
      has_bias: whether a learned bias is added, 0 at the start.
      lora: a change of low rank, if it is for a projection of this name.
    """

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: jnp.dtype
    initial_scale: float = 1.0
    has_bias: bool = False
    lora: Lora | None = None

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
        kernel = gathered(kernel.astype(self.dtype), self.axes)
        y = jnp.einsum(self.equation, x, kernel)
        if self.lora is not None and self.name in self.lora.projections:
            y = y + self._low_rank(x, self.lora)
        if not self.has_bias:
            return y
        # The last letters of the output are those of the kernel, in its order.
        kept = [i for i, letter in enumerate(letters) if letter in output]
        bias = parameter(
            self,
            "bias",
            nn.initializers.zeros,
            shape=tuple(self.shape[i] for i in kept),
            axes=tuple(self.axes[i] for i in kept),
        )
        return y + _with_axes_in_front(bias.astype(self.dtype), y.ndim)

    def _low_rank(self, x: jax.Array, lora: Lora) -> jax.Array:
        """What the low-rank change adds. Of all kernels the contracted axes come first."""
        operands, output = self.equation.split("->")
        of_input, letters = operands.split(",")
        num_contracted = sum(letter not in output for letter in letters)
        contracted, kept = letters[:num_contracted], letters[num_contracted:]
        between = "".join(letter for letter in of_input if letter not in contracted)

        initializer = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=range(num_contracted), out_axis=-1
        )
        down_shape = (*self.shape[:num_contracted], lora.rank)
        up_shape = (lora.rank, *self.shape[num_contracted:])
        down = parameter(self, "lora_a", initializer, down_shape, (*self.axes[:num_contracted], None))
        up = parameter(self, "lora_b", nn.initializers.zeros, up_shape, (None, *self.axes[num_contracted:]))
        # [..., r]
        low = jnp.einsum(f"{of_input},{contracted}r->{between}r", x, down.astype(self.dtype))
        change = jnp.einsum(f"{between}r,r{kept}->{output}", low, up.astype(self.dtype))
        return change * lora.scale


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis; no mean subtraction, no bias. The norm itself is computed in float32.

    Attributes:
      epsilon: is added to the mean square.
      kind: what differs between models. 'rms' multiplies by the scale in float32; 'rms_llama' in the dtype of x, to
        which the normalised x is brought first; 'rms_gemma' multiplies by 1 + scale in float32.
      axis_name: logical name of the last axis.
    """

    epsilon: float = 1e-6
    kind: Literal["rms", "rms_llama", "rms_gemma"] = "rms"
    axis_name: str = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "*rest D"]) -> Float[Array, "*rest D"]:
        initializer = nn.initializers.zeros if self.kind == "rms_gemma" else nn.initializers.ones
        scale = parameter(self, "scale", initializer, x.shape[-1:], (self.axis_name,))
        scale = _with_axes_in_front(scale, x.ndim)

        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normalized = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        if self.kind == "rms_llama":
            return normalized.astype(x.dtype) * scale.astype(x.dtype)
        if self.kind == "rms_gemma":
            scale = 1 + scale
        scaled = normalized * scale
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


def make_norm(kind: NormKind, epsilon: float, name: str | None = None) -> nn.Module:
    """The norm of residuals."""
    if kind == "layer":
        return LayerNorm(epsilon, name=name)
    return RMSNorm(epsilon, kind, name=name)


def _with_axes_in_front(x: jax.Array, num_axes: int) -> jax.Array:
    """The same array with as many axes, those in front of size 1."""
    return x.reshape((1,) * (num_axes - x.ndim) + x.shape)


class MLP(nn.Module):
    """MLP, D -> F -> D.

    Attributes:
      mlp_dim: F.
      kind: the activation; one that is 'gated' is multiplied by a second projection of the input (Shazeer 2020).
      dtype: of the computation.
      initial_output_scale: factor of the initial projection down.
      has_biases: whether its projections have biases.
      lora: low-rank changes of its projections.
    """

    mlp_dim: int
    kind: MLPKind
    dtype: jnp.dtype
    initial_output_scale: float = 1.0
    has_biases: bool = False
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        embed_dim = x.shape[-1]

        def project_up(name: str) -> jax.Array:
            projection = Einsum(
                "BTD,DF->BTF",
                shape=(embed_dim, self.mlp_dim),
                axes=("embed", "mlp"),
                dtype=self.dtype,
                has_bias=self.has_biases,
                lora=self.lora,
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
            has_bias=self.has_biases,
            lora=self.lora,
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
    """The table of the input embedding, and the output logits.

    Attributes:
      vocab_size, embed_dim: V, D.
      dtype: of the activations.
      head: how logits are made: by the same table, and divided by sqrt(D) ('tied_scaled') or not ('tied'); or by a
        matrix of their own ('untied').
      scales_input: whether embeddings are multiplied by sqrt(D), rounded to the dtype, as Gemma does.
      logit_cap: c, the logits become c * tanh(logits / c); 0 for none.
    """

    vocab_size: int
    embed_dim: int
    dtype: jnp.dtype
    head: HeadKind = "tied_scaled"
    scales_input: bool = False
    logit_cap: float = 0.0

    def setup(self) -> None:
        # As GPT-2 has it, where the embeddings' size is that of the logits.
        stddev = 1.0 if self.head == "tied_scaled" else 0.02
        self.table = self._matrix("table", stddev)
        if self.head == "untied":
            self.output_table = self._matrix("output_table", stddev)

    def _matrix(self, name: str, stddev: float) -> jax.Array:
        """A vector for each token, [V, D]."""
        initializer = nn.initializers.normal(stddev)
        return parameter(self, name, initializer, (self.vocab_size, self.embed_dim), ("vocab", "embed"))

    def encode(self, tokens: Tokens) -> Activations:
        """The embedding of each token."""
        embedded = jnp.take(self.table, tokens, axis=0)
        embedded = embedded.astype(self.dtype)
        if self.scales_input:
            embedded = embedded * jnp.asarray(self.embed_dim**0.5, self.dtype)
        return embedded

    def decode(self, x: Activations) -> Logits:
        """Logits in float32."""
        table = self.output_table if self.head == "untied" else self.table
        table = gathered(table.astype(self.dtype), ("vocab", "embed"))
        logits = jnp.einsum("BTD,VD->BTV", x, table, preferred_element_type=jnp.float32)
        if self.head == "tied_scaled":
            logits = logits * self.embed_dim**-0.5
        return soft_cap(logits, self.logit_cap)


class PositionTable(nn.Module):
    """A learned vector for each position of a segment, put together from a part for each axis.

    With sizes (n, m) position i * m + j has the i-th vector of a first table beside the j-th of a second, of D / 2
    each: n + m vectors in place of n * m (the axial embedding of Reformer, Kitaev et al. 2020, appendix D). With one
    size each position has a vector of its own, as in GPT-2.

    Attributes:
      sizes: of the axes; their product is the number of positions.
      embed_dim: D, which the axes share equally.
      dtype: of the activations.
    """

    sizes: tuple[int, ...]
    embed_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, first: int | jax.Array, num_positions: int) -> Activations:
        """The vectors of consecutive positions, from the first one on: [1, T, D]."""
        num_axes = len(self.sizes)
        width = self.embed_dim // num_axes
        parts = []
        for axis, size in enumerate(self.sizes):
            name = "table" if num_axes == 1 else f"table_{axis}"
            table = parameter(self, name, nn.initializers.normal(stddev=1.0), (size, width), (None, "embed"))
            # [n, m, ..., width], of which one axis is not repeated.
            along_axis = tuple(size if other == axis else 1 for other in range(num_axes))
            parts.append(jnp.broadcast_to(table.reshape(*along_axis, width), (*self.sizes, width)))
        of_all = jnp.concatenate(parts, axis=-1).reshape(-1, self.embed_dim)
        of_positions = jax.lax.dynamic_slice_in_dim(of_all, first, num_positions)
        return of_positions.astype(self.dtype)[None]


@jax.custom_vjp
def once_in_backward(x: Array) -> Array:
    """x, whose gradient is computed once.

    For projections: XLA fuses what comes behind them into the products with that gradient, a normalisation say, and
    computes it anew for each tile of each product.
    """
    return x


def _keep_nothing(x: Array) -> tuple[Array, None]:
    return x, None


def _once(_: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.optimization_barrier(gradient),)


once_in_backward.defvjp(_keep_nothing, _once)


def soft_cap(logits: Float[Array, "*shape"], cap: float) -> Float[Array, "*shape"]:
    """cap * tanh(logits / cap), which stays below the cap (Gemma 2); the same logits where it is 0."""
    if not cap:
        return logits
    return cap * jnp.tanh(logits / cap)


def rows_over_data(x: jax.Array) -> jax.Array:
    """Shards the rows of activations over the mesh axis `data`, where a mesh is set.

    Without this constraint the compiler might choose what the sharding of the parameters suggests.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec("data"))
