"""What all mechanisms share: the sizes of a layer, the interface, and the projections around a dot-product core."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from memorizing.array_typing import Activations, AxesTree, Clock, HeadScale, Tree
from memorizing.context import Layout, Report, Segment
from memorizing.errors import UserError
from memorizing.models.attention.flash import KernelKind
from memorizing.models.layers import Einsum, Lora, MLPKind, NormKind, RMSNorm, once_in_backward, parameter
from memorizing.models.memory.external_memory import Memory
from memorizing.models.memory.product_keys import ProductKeys
from memorizing.models.positions import LayerPositions, Positions, Rotary

QKNormKind = Literal["l2", "none", "rms", "rms_llama", "rms_gemma"]
BiasPlace = Literal["qkv", "output", "mlp"]
ResidualKind = Literal["plain", "parallel", "reversible"]
# FLOPs for each score of a softmax: exponential, sum, division (Hoffmann et al. 2022, appendix F).
SOFTMAX_FLOPS = 3


@dataclasses.dataclass(frozen=True)
class LayerDims:
    """Sizes of one layer, and the parts that it is put together from.

    Attributes:
      embed_dim, num_heads, head_dim, mlp_dim: D, N, H, F.
      dropout: probability, on the outputs of attention and MLP.
      initial_logit_scale: value at initialisation of the learned scale of the logits, for each head.
      dtype: of activations and of carried states.
      norm: of the residuals.
      mlp: kind of the MLP.
      qk_norm: 'l2' normalises queries and keys to length 1 and learns the scale of the logits; with the others it is
        `attention_scale`. The kinds of RMS norm have a learned scale for each element of a head; 'none' is none.
      positions: 't5' adds a bias learned for each bucket of distances; `Rotary` turns queries and keys; 'none' leaves
        the order to the mask.
      initial_output_scale: factor of the initial output projections of attention and MLP.
      mlp_chunks: parts of the segment that pass through the MLP one after the other.
      num_kv_heads: K; query head n reads key and value head n // (N / K). None: as many as query heads.
      norm_epsilon: of all norms but 'l2'.
      biases: projections that have one: 'qkv', 'output' (of attention) and 'mlp' (both, or all three).
      attention_scale: factor of the logits where it is not learned; None: 1 / sqrt(H).
      attention_logit_cap: c, logits become c * tanh(logits / c); 0 for none.
      sandwich_norms: whether what attention and MLP add to the residual is normalised.
      residuals: 'parallel' where attention and MLP read the same x.
      product_keys: a memory in the place of the MLP, or None.
      lora: low-rank changes of projections, None for none.
      attention_kernel: where the local attention is computed by kernels, see `flash`.
    """

    embed_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    dropout: float
    initial_logit_scale: float
    dtype: jnp.dtype
    norm: NormKind = "rms"
    mlp: MLPKind = "relu"
    qk_norm: QKNormKind = "l2"
    positions: Positions = "t5"
    initial_output_scale: float = 1.0
    mlp_chunks: int = 1
    num_kv_heads: int | None = None
    norm_epsilon: float = 1e-6
    biases: tuple[BiasPlace, ...] = ()
    attention_scale: float | None = None
    attention_logit_cap: float = 0.0
    sandwich_norms: bool = False
    residuals: ResidualKind = "plain"
    product_keys: ProductKeys | None = None
    lora: Lora | None = None
    attention_kernel: KernelKind = "tpu"

    @property
    def width(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_heads(self) -> int:
        """Key and value heads: K."""
        return self.num_kv_heads or self.num_heads

    @property
    def kv_width(self) -> int:
        """Width of all key heads together."""
        return self.kv_heads * self.head_dim

    @property
    def fixed_logit_scale(self) -> float:
        """The scale of the logits where it is not learned."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def with_positions(self, positions: LayerPositions) -> LayerDims:
        """The same parts with the positions of a layer that has its own; None: the model's."""
        return self if positions is None else dataclasses.replace(self, positions=positions)

    @property
    def parts_of_attention(self) -> list[str]:
        """The settings of `LMConfig` by which attention departs from what every mechanism knows."""
        departs = {
            "num_kv_heads": self.kv_heads != self.num_heads,
            "biases": "qkv" in self.biases or "output" in self.biases,
            "qk_norm": self.qk_norm not in ("l2", "none"),
            "positions": isinstance(self.positions, Rotary),
            "attention_scale": self.attention_scale is not None,
            "attention_logit_cap": self.attention_logit_cap > 0,
            "lora": self.lora is not None,
        }
        return [name for name, does in departs.items() if does]


class Example(NamedTuple):
    """A mechanism as tables of costs compare it with others.

    Attributes:
      name: short.
      meaning: a line that says what is carried, and where; it ends with "layer" where the layer's number is to follow.
      attention: the mechanism.
      is_everywhere: whether it is in every layer, or in one of the upper ones.
    """

    name: str
    meaning: str
    attention: Attention
    is_everywhere: bool = True


class Attention:
    """A mechanism: a frozen dataclass that builds a layer and describes it to the rest of the library.

    The layer carries a state from segment to segment. `init_state`, `state_axes` and `fresh_state` give three trees of
    one structure, so the fields of a state class are arrays or `Any`: its instances also hold axis names, or what a
    reset writes.

    The defaults are those of a mechanism without state whose layer is a dot-product core between projections. A
    mechanism with projections of its own overrides `layer`; the others provide `core`.

    Attributes:
      stackable: whether the states of several layers may be stacked for a scan (and copied in every step).
      is_compiled_apart: whether layers that stand alone are compiled apart from each other, as those of a scan are: so
        a model computes the same bits when some of its layers get this mechanism.
      can_decode: whether the layer also passes segments that are still being generated: see `context.Decoding`.
      caches_segment_only: whether its KV cache holds nothing from before the segment: then the next segment may begin
        with it as it is, and nothing has to be prefilled.
      memory_size: slots of its external memory in positions, 0 without one.
      takes_memory_tokens: whether recurrent memory tokens may stand before and after the segment's own.
      takes_all_parts: whether its layers can be put together from all that `LayerDims` offers.
      joins_memory: whether it can share a softmax with a memory: its core has a method `attend`, which also gives the
        normalisers, and all positions of a segment see the same of what lies before it.
      num_before: positions before the segment that all of its positions see, 0 for none.
      trained_length: positions of the documents that a pretrained model was trained on, 0 where it does not know.
      decoding_advice: what to do where the layer cannot decode.
      tells_attention: whether it reports what positions attend to within a segment: see `context.Attended`.
    """

    stackable: ClassVar[bool] = True
    is_compiled_apart: ClassVar[bool] = False
    can_decode: ClassVar[bool] = False
    caches_segment_only: ClassVar[bool] = False
    memory_size: ClassVar[int] = 0
    takes_memory_tokens: ClassVar[bool] = True
    takes_all_parts: ClassVar[bool] = False
    joins_memory: ClassVar[bool] = False
    num_before: ClassVar[int] = 0
    trained_length: ClassVar[int] = 0
    decoding_advice: ClassVar[str] = ""
    tells_attention: ClassVar[bool] = False

    # What it carries.

    def init_state(self, dims: LayerDims, batch_size: int, segment_length: int) -> Tree:
        """The state of rows that have seen nothing. Every leaf has the row axis first."""
        return ()

    def state_axes(self) -> AxesTree:
        """The logical axis names of every leaf of the state."""
        return ()

    def fresh_state(self) -> Tree:
        """What a reset writes: see `context.reset_rows`."""
        return ()

    def memory_dims(self, dims: LayerDims) -> LayerDims:
        """Sizes of the heads that have an external memory: of all, unless the mechanism says otherwise."""
        return dims

    def prepare_state(self, state: Tree, clock: Clock) -> Tree:
        """Brings the state up to date before a segment reads it; nothing here is recomputed for the gradient.

        Idempotent.

        Args:
          state: as the segment before left it; rows that begin a document are reset afterwards.
          clock: int32 scalar, segments processed before this one.
        """
        return state

    # What it computes.

    def core(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        """A module `(queries, keys, values, scale, segment, state) -> (output [B, T, N, H], new state, Report)`."""
        raise TypeError(f"{type(self).__name__} has no core: it provides its layer itself")

    def layer(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        """A module `(x [B, T, D], segment, state) -> (y [B, T, D], new state, Report)`."""
        return ProjectedAttention(self, dims, name=name)

    def check(self, segment_length: int) -> None:
        """Raises UserError if the mechanism cannot work with segments of this length."""

    def check_parts(self, dims: LayerDims) -> None:
        """Raises UserError if its layers cannot be put together from these parts."""
        if dims.parts_of_attention and not self.takes_all_parts:
            name = dims.parts_of_attention[0]
            raise UserError(
                f"LMConfig.{name} with @{type(self).__name__}(): it does not know this part; leave out "
                f"LMConfig.{name}, or use @FullAttention(), @XLAttention() or @JointMemoryAttention()"
            )

    def sees_before(self, state: Tree, positions_back: Int[Array, "M"]) -> Bool[Array, "#B M"]:
        """Which positions, so many before the segment's first, all queries see without a memory."""
        return jnp.zeros((1, len(positions_back)), bool)

    # What it costs.

    def flops(self, dims: LayerDims, layout: Layout) -> int:
        """Forward FLOPs of one layer for a segment of one row, all but its MLP.

        A mask saves nothing, and an empty cache or memory costs as much as a full one, as in the compiled program.

        Raises:
          NotImplementedError: nobody has counted them.
        """
        raise NotImplementedError(f"{type(self).__name__} does not tell its FLOPs")

    def state_bytes(self, dims: LayerDims, segment_length: int) -> int:
        """Bytes of the state of one layer for one row."""
        state = jax.eval_shape(lambda: self.init_state(dims, 1, segment_length))
        leaves = jax.tree.leaves(state)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    @classmethod
    def example(cls, segment_length: int) -> Example | None:
        """The mechanism as tables of costs show it, in segments of this length; None to leave it out."""
        return None

    # What it sees before the segment.

    def with_window(self, window: int) -> Attention:
        """The same mechanism, with the same parameters, and this many positions that are seen before the segment.

        Itself where there is no such window, or where it belongs to the model.
        """
        return self

    # Its external memory, if it has one.

    def with_heads(self, heads: tuple[int, ...]) -> Attention:
        """The mechanism whose external memory these key heads have, () for all; itself where all have to."""
        return self

    def with_openings(self) -> Attention:
        """The mechanism whose heads can have an external memory one by one, each opened by a share.

        Itself where they cannot; then it has no `openings`.
        """
        return self

    def openings(self, shares: Float[Array, "N"]) -> dict[str, Array]:
        """Parameters of the core of `with_openings` with which the memory of each query head is open by so much."""
        return {}

    def with_memory_size(self, memory_size: int) -> Attention:
        """The same mechanism, with the same parameters, and a memory of another size."""
        return self

    def without_memory(self) -> Attention:
        """The mechanism that is left without the memory."""
        return self

    def map_memory(self, state: Tree, change: Callable[[Memory], Memory]) -> Tree:
        """The same state with the memory changed, and everything that waits to be written to it."""
        return state

    def memory(self, state: Tree) -> Memory | None:
        """The memory in a state."""
        return None


class ProjectedAttention(nn.Module):
    """Projects to queries, keys and values, lets the mechanism's core attend, and projects back.

    With L2-normalised queries and keys (`qk_norm` = 'l2'), keys that were stored long ago have the magnitude of new
    ones.
    """

    attention: Attention
    dims: LayerDims

    @nn.compact
    def __call__(
        self,
        x: Activations,
        segment: Segment,
        state: Tree,
    ) -> tuple[Activations, Tree, Report]:
        """See `Attention.layer`."""
        dims = self.dims

        queries = once_in_backward(project_to_heads(dims, "query")(x))
        keys = once_in_backward(project_to_heads(dims, "key")(x))
        values = project_to_heads(dims, "value")(x)
        if dims.qk_norm == "l2":
            queries = normalize(queries)
            keys = normalize(keys)
        elif dims.qk_norm != "none":
            queries = RMSNorm(dims.norm_epsilon, dims.qk_norm, "head_dim", name="query_norm")(queries)
            keys = RMSNorm(dims.norm_epsilon, dims.qk_norm, "head_dim", name="key_norm")(keys)

        core = self.attention.core(dims, name="core")
        scale = logit_scale(self, dims, fixed=dims.fixed_logit_scale)
        y, state, report = core(queries, keys, values, scale, segment, state)

        return project_from_heads(dims)(y), state, report


def project_to_heads(dims: LayerDims, name: Literal["query", "key", "value"]) -> Einsum:
    """A projection [B, T, D] -> [B, T, N, H]; to be made in the module whose submodule it is.

    Keys and values have K heads.
    """
    num_heads = dims.num_heads if name == "query" else dims.kv_heads
    return Einsum(
        "BTD,DNH->BTNH",
        shape=(dims.embed_dim, num_heads, dims.head_dim),
        axes=("embed", "heads", "head_dim"),
        dtype=dims.dtype,
        has_bias="qkv" in dims.biases,
        lora=dims.lora,
        name=name,
    )


def project_from_heads(dims: LayerDims) -> Einsum:
    """The output projection [B, T, N, H] -> [B, T, D]; to be made in the module whose submodule it is."""
    return Einsum(
        "BTNH,NHD->BTD",
        shape=(dims.num_heads, dims.head_dim, dims.embed_dim),
        axes=("heads", "head_dim", "embed"),
        dtype=dims.dtype,
        initial_scale=dims.initial_output_scale,
        has_bias="output" in dims.biases,
        lora=dims.lora,
        name="output",
    )


def logit_scale(module: nn.Module, dims: LayerDims, fixed: float) -> HeadScale:
    """The scale of the logits of each head, float32 [N].

    Args:
      module: whose parameter it is where it is learned.
      dims: of the layer; with `qk_norm` = 'l2' the scale is learned.
      fixed: what it is else.
    """
    shape = (dims.num_heads,)
    if dims.qk_norm != "l2":
        return jnp.full(shape, fixed, jnp.float32)
    initializer = nn.initializers.constant(dims.initial_logit_scale)
    return jnp.abs(parameter(module, "scale", initializer, shape, ("heads",)))


def normalize(x: Float[Array, "*rest H"]) -> Float[Array, "*rest H"]:
    """x / |x| over the last axis, with the sum in float32."""
    squares = jnp.square(x.astype(jnp.float32))
    square_length = jnp.sum(squares, axis=-1, keepdims=True)
    normalized = x * jax.lax.rsqrt(square_length + 1e-6)
    return normalized.astype(x.dtype)


def projection_flops(dims: LayerDims, layout: Layout) -> int:
    """FLOPs of queries, keys, values and output of a segment."""
    return matmul_flops(layout.size, dims.embed_dim, 2 * dims.width + 2 * dims.kv_width)


def attend_flops(dims: LayerDims, num_queries: int, num_keys: int) -> int:
    """FLOPs of all heads' softmax(q . k) v."""
    num_scores = num_queries * num_keys * dims.num_heads
    products = 2 * matmul_flops(num_queries, dims.width, num_keys)
    softmax = SOFTMAX_FLOPS * num_scores
    return products + softmax


def matmul_flops(rows: int, inner: int, columns: int) -> int:
    """FLOPs of a matrix product, 2 for each multiply-add."""
    return 2 * rows * inner * columns
