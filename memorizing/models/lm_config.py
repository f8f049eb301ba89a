"""What a language model is: its parts, what they ask of each other, and what it carries from segment to segment."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from memorizing import context as context_lib
from memorizing.array_typing import AxesTree, RowFlags
from memorizing.context import (
    Context,
    Layout,
)
from memorizing.errors import Count, CountOrNone, Factor, FactorAboveZero, Range, Share, UserError, Width
from memorizing.models import attention as attention_lib
from memorizing.models.attention.base import Attention, BiasPlace, LayerDims, QKNormKind, ResidualKind
from memorizing.models.attention.flash import KernelKind
from memorizing.models.layers import HeadKind, Lora, MLPKind, NormKind
from memorizing.models.memory.continuous_cache import CONTINUOUS_CACHE, ContinuousCache
from memorizing.models.memory.external_memory import Memory
from memorizing.models.memory.product_keys import ProductKeys
from memorizing.models.positions import Positions, Rotary
from memorizing.models.recurrent_tokens import RecurrentTokens
from memorizing.models.stack.arrays import layer_name
from memorizing.models.stack.groups import LayerGroup
from memorizing.models.stack.remat import Remat, RematKind
from memorizing.models.stack.stack import Stack

# The entry of the recurrent tokens in parameters and context.
RECURRENT = "recurrent_tokens"
# A thousand times those of the largest models.
MAX_PARAMETERS = 1 << 50


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """A language model.

    Attributes:
      vocab_size: V.
      num_layers, embed_dim, num_heads, head_dim, mlp_dim: L, D, N, H, F.
      attention: the mechanism of every layer that `attention_at` does not name; or a pattern of mechanisms, which the
        layers repeat.
      attention_at: pairs of a layer index, from 0, and its mechanism.
      recurrent_tokens: memory tokens around the whole stack, or None.
      continuous_cache: a memory of the document's tokens that is mixed into the predictions, or None.
      dropout: probability, on the embedding and on the outputs of attention and MLP.
      initial_logit_scale: value at initialisation of the learned per-head scale of the attention logits.
      dtype: of activations and carried states; parameters are float32.
      remat: what is computed again for the gradient: 'none'; 'layer', each layer, all but the memory search; 'dots',
        all but that and products with parameters.
      remat_every: with the square root of the number of layers, and 'layer', memory grows as that root.
      unroll: see `Remat`.
      residuals: 'plain'; 'parallel', where attention and MLP of a layer read the same x; or 'reversible': two streams,
        whose activations are computed back from the outputs.
      mlp_chunks: parts of a segment that pass through the MLP one after the other, so that its hidden layer is small.
      loss_chunks: parts of a segment whose logits are there at a time in training.
      norm, mlp, qk_norm, positions, num_kv_heads, norm_epsilon, biases, attention_scale, attention_logit_cap,
        sandwich_norms: the parts of a layer, see `LayerDims`.
      product_keys: a memory in the place of the MLP of the layers that `product_keys_at` names.
      product_keys_at: indices of layers, from 0.
      learned_positions: () for none; or sizes of the axes of a learned vector for each position of a segment, which is
        added to the embedding: one size, or several whose product is the number of positions, see `PositionTable`.
      initial_outputs: 'plain', or 'by_depth' to begin with output projections of attention and MLP divided by
        sqrt(2 L), as the Sparse Transformer does (Child et al. 2019, section 5.2).
      head: how logits are made: by the table of the embedding, divided by sqrt(D) ('tied_scaled') or not ('tied'), or
        by a matrix of their own ('untied').
      scales_embedding: whether embeddings are multiplied by sqrt(D).
      final_logit_cap: c, the logits become c * tanh(logits / c); 0 for none.
      lora: low-rank changes of projections, for light training; None for none.
      attention_kernel: 'tpu' for kernels of the local attention on TPUs from v4 on, 'none' for the plain form
        everywhere, 'interpreted' for kernels computed by plain operations, which is slow and for tests.
    """

    vocab_size: Width = 259
    num_layers: Annotated[int, Range(1, 10_000)] = 2
    embed_dim: Width = 64
    num_heads: Annotated[int, Range(1, 2**16)] = 2
    head_dim: Annotated[int, Range(1, 2**16)] = 32
    mlp_dim: Width = 256
    attention: Attention | tuple[Attention, ...] = attention_lib.DEFAULT
    attention_at: tuple[tuple[CountOrNone, Attention], ...] = ()
    recurrent_tokens: RecurrentTokens | None = None
    dropout: Share = 0.0
    initial_logit_scale: FactorAboveZero = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: RematKind = "none"
    norm: NormKind = "rms"
    mlp: MLPKind = "relu"
    qk_norm: QKNormKind = "l2"
    positions: Positions = "t5"
    initial_outputs: Literal["plain", "by_depth"] = "plain"
    residuals: ResidualKind = "plain"
    mlp_chunks: Count = 1
    loss_chunks: Count = 1
    remat_every: Count = 1
    unroll: Count = 1
    continuous_cache: ContinuousCache | None = None
    num_kv_heads: Annotated[int, Range(1, 2**16)] | None = None
    norm_epsilon: FactorAboveZero = 1e-6
    biases: tuple[BiasPlace, ...] = ()
    attention_scale: FactorAboveZero | None = None
    attention_logit_cap: Factor = 0.0
    sandwich_norms: bool = False
    head: HeadKind = "tied_scaled"
    scales_embedding: bool = False
    final_logit_cap: Factor = 0.0
    product_keys: ProductKeys | None = None
    product_keys_at: tuple[CountOrNone, ...] = ()
    learned_positions: tuple[Width, ...] = ()
    lora: Lora | None = None
    attention_kernel: KernelKind = "tpu"

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "num_layers",
            "embed_dim",
            "num_heads",
            "head_dim",
            "mlp_dim",
            "mlp_chunks",
            "loss_chunks",
            "remat_every",
            "unroll",
        ):
            size = getattr(self, name)
            if size < 1:
                raise UserError(f"LMConfig.{name} = {size}: at least 1")
        if self.residuals == "reversible" and self.remat != "none":
            raise UserError(
                f"LMConfig.remat = '{self.remat}' with LMConfig.residuals = 'reversible': reversible layers store no "
                "activations that could be computed again; set LMConfig.remat = 'none'"
            )
        if self.num_parameters > MAX_PARAMETERS:
            raise UserError(
                f"LMConfig describes about {self.num_parameters:.1e} parameters, more than any machine holds: choose "
                "smaller sizes or fewer layers"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"LMConfig.dropout = {self.dropout}: a probability below 1")
        if self.attention == ():
            raise UserError("LMConfig.attention = (): a mechanism, or a pattern of at least one")
        indices = [index for index, _ in self.attention_at]
        are_different = len(set(indices)) == len(indices)
        are_layers = all(0 <= index < self.num_layers for index in indices)
        if not are_different or not are_layers:
            raise UserError(
                f"LMConfig.attention_at names the layers {indices}: different indices from 0 to {self.num_layers - 1} "
                f"(LMConfig.num_layers = {self.num_layers})"
            )
        at = self.product_keys_at
        if len(set(at)) < len(at) or not all(0 <= index < self.num_layers for index in at):
            raise UserError(
                f"LMConfig.product_keys_at = {at}: different indices of layers from 0 to {self.num_layers - 1} "
                f"(LMConfig.num_layers = {self.num_layers})"
            )
        if bool(at) != bool(self.product_keys):
            raise UserError(
                f"LMConfig.product_keys_at = {at} with LMConfig.product_keys = {self.product_keys}: one says which "
                "layers have the memory that the other describes, set both or neither"
            )
        self._check_parts()

    def _check_parts(self) -> None:
        """Raises UserError where the parts of a layer do not fit each other, or its mechanism."""
        if self.num_heads % self.dims.kv_heads:
            raise UserError(
                f"LMConfig.num_kv_heads = {self.num_kv_heads} does not divide LMConfig.num_heads = {self.num_heads}: "
                "as many query heads have to share each key and value head"
            )
        if self.attention_scale is not None and self.qk_norm == "l2":
            raise UserError(
                f"LMConfig.attention_scale = {self.attention_scale} with LMConfig.qk_norm = 'l2', which learns the scale: "
                "leave it out, or choose another qk_norm"
            )
        if isinstance(self.positions, Rotary):
            self.positions.check(self.head_dim)
        if self.learned_positions:
            self._check_learned_positions()
        for mechanism in set(self.stack.mechanisms):
            mechanism.check_parts(self.dims)

    def _check_learned_positions(self) -> None:
        sizes = self.learned_positions
        if self.embed_dim % len(sizes):
            raise UserError(
                f"LMConfig.learned_positions = {sizes}: LMConfig.embed_dim = {self.embed_dim} is no multiple of the number "
                "of axes, which share it equally"
            )
        for mechanism in self.stack.mechanisms:
            if mechanism.state_axes() != ():
                raise UserError(
                    f"LMConfig.learned_positions = {sizes} with @{type(mechanism).__name__}(): positions begin anew in "
                    "every segment, so that keys of the same positions would be carried; use a mechanism that carries "
                    "nothing, such as @FullAttention()"
                )

    @property
    def num_parameters(self) -> int:
        """About how many parameters there are: those of matrices in layers, and of the embedding."""
        of_attention = 2 * self.embed_dim * (self.num_heads + self.dims.kv_heads) * self.head_dim
        of_mlp = 2 * self.embed_dim * self.mlp_dim
        of_layers = self.num_layers * of_attention + (self.num_layers - len(self.product_keys_at)) * of_mlp
        of_memories = self.product_keys.num_parameters(self.embed_dim) if self.product_keys else 0
        return of_layers + len(self.product_keys_at) * of_memories + self.vocab_size * self.embed_dim

    @property
    def dims(self) -> LayerDims:
        """Sizes and parts of a layer."""
        return LayerDims(
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            mlp_dim=self.mlp_dim,
            dropout=self.dropout,
            initial_logit_scale=self.initial_logit_scale,
            dtype=jnp.dtype(self.dtype),
            norm=self.norm,
            mlp=self.mlp,
            qk_norm=self.qk_norm,
            positions=self.positions,
            mlp_chunks=self.mlp_chunks,
            initial_output_scale=1.0 if self.initial_outputs == "plain" else (2 * self.num_layers) ** -0.5,
            num_kv_heads=self.num_kv_heads,
            norm_epsilon=self.norm_epsilon,
            biases=self.biases,
            attention_scale=self.attention_scale,
            attention_logit_cap=self.attention_logit_cap,
            sandwich_norms=self.sandwich_norms,
            residuals=self.residuals,
            lora=self.lora,
            attention_kernel=self.attention_kernel,
        )

    @property
    def pattern(self) -> tuple[Attention, ...]:
        """The mechanisms that the layers repeat."""
        if isinstance(self.attention, tuple):
            return self.attention
        return (self.attention,)

    @functools.cached_property
    def stack(self) -> Stack:
        """The layers."""
        return Stack(
            num_layers=self.num_layers,
            pattern=self.pattern,
            exceptions=self.attention_at,
            product_keys_at=self.product_keys_at,
            dims=self.dims,
            remat=Remat(self.remat, self.remat_every, self.unroll),
            residuals=self.residuals,
            product_keys=self.product_keys,
        )

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """Layers whose states and parameters lie in the same arrays, by which trees of both have their entries."""
        return self.stack.groups

    def layout(self, segment_length: int) -> Layout:
        """The positions that pass through the layers for a segment of T tokens."""
        if self.recurrent_tokens is None:
            return Layout(segment_length)
        return self.recurrent_tokens.layout(segment_length)

    # External memories.

    @property
    def memory_sizes(self) -> dict[str, int]:
        """Slots of every external memory, by layer; of the continuous cache by its own name."""
        sizes = {}
        for index, mechanism in enumerate(self.stack.mechanisms):
            if mechanism.memory_size:
                sizes[layer_name(index)] = mechanism.memory_size
        if self.continuous_cache:
            sizes[CONTINUOUS_CACHE] = self.continuous_cache.memory_size
        return sizes

    @property
    def memory_size(self) -> int:
        """Slots of its largest external memory; 0 without one."""
        return max(self.memory_sizes.values(), default=0)

    @property
    def has_memory(self) -> bool:
        """Whether any layer has an external memory, or the whole a continuous cache."""
        return self.memory_size > 0

    @property
    def memory_heads(self) -> int:
        """The key heads that have an external memory; the greatest divisor of all where layers differ, 0 for none."""
        layers = [mechanism for mechanism in self.stack.mechanisms if mechanism.memory_size]
        return math.gcd(*(mechanism.memory_dims(self.dims).kv_heads for mechanism in layers))

    def with_memory_size(self, memory_size: int) -> LMConfig:
        """The same model, which has the same parameters, with external memories of another size."""
        cache = self.continuous_cache and dataclasses.replace(self.continuous_cache, memory_size=memory_size)
        resized = self._with_mechanisms(lambda attention: attention.with_memory_size(memory_size))
        return dataclasses.replace(resized, continuous_cache=cache)

    def with_window(self, window: int) -> LMConfig:
        """The same model, which has the same parameters, whose local attention sees so many positions before a segment.

        Itself where no mechanism has such a window.
        """
        return self._with_mechanisms(lambda attention: attention.with_window(window))

    @property
    def trained_length(self) -> int:
        """Positions of the documents that a pretrained model was trained on, 0 where no mechanism knows."""
        return max(mechanism.trained_length for mechanism in self.stack.mechanisms)

    def without_memory(self) -> LMConfig:
        """The model without a continuous cache, whose layers with a memory have their local attention alone."""
        local = self._with_mechanisms(lambda attention: attention.without_memory())
        return dataclasses.replace(local, continuous_cache=None)

    def map_memories(self, context: Context, change: Callable[[Memory], Memory]) -> Context:
        """The same context with every external memory changed, and everything that waits to be written to it."""
        changed = dict(context)
        for group in self.groups:
            state = context[group.name]
            changed[group.name] = group.attention.map_memory(state, change)
        if self.continuous_cache:
            state = context[CONTINUOUS_CACHE]
            changed[CONTINUOUS_CACHE] = self.continuous_cache.map_memory(state, change)
        return changed

    def memories(self, context: Context) -> list[Memory]:
        """The external memories in a context."""
        memories = []
        for group in self.groups:
            memory = group.attention.memory(context[group.name])
            if memory is not None:
                memories.append(memory)
        if self.continuous_cache:
            memories.append(context[CONTINUOUS_CACHE].memory)
        return memories

    def without_context(self) -> LMConfig:
        """The same sizes with full attention within a segment and nothing carried to the next."""
        return dataclasses.replace(
            self,
            attention=attention_lib.DEFAULT,
            attention_at=(),
            recurrent_tokens=None,
            continuous_cache=None,
        )

    def _with_mechanisms(self, change: Callable[[Attention], Attention]) -> LMConfig:
        """The model with every mechanism changed; a layer that then has the pattern's is no exception any more."""
        pattern = tuple(map(change, self.pattern))
        attention = pattern if isinstance(self.attention, tuple) else pattern[0]
        changed = [(index, change(mechanism)) for index, mechanism in self.attention_at]
        exceptions = [(index, each) for index, each in changed if each != pattern[index % len(pattern)]]
        return dataclasses.replace(self, attention=attention, attention_at=tuple(exceptions))

    # What it can be used for.

    def check(self, segment_length: int) -> None:
        """Raises UserError if a mechanism cannot work with segments of this length."""
        for group in self.groups:
            group.attention.check(segment_length)
            if self.recurrent_tokens and not group.attention.takes_memory_tokens:
                raise UserError(
                    f"LMConfig.recurrent_tokens with @{type(group.attention).__name__}(): it knows no positions but the "
                    "segment's own; use memory tokens with @FullAttention() or @XLAttention(), or leave them out"
                )
        if self.continuous_cache:
            self.continuous_cache.check(segment_length)
        sizes = self.learned_positions
        if sizes and math.prod(sizes) < segment_length:
            raise UserError(
                f"LMConfig.learned_positions = {sizes}: {math.prod(sizes)} positions are fewer than the segment length "
                f"{segment_length} (BatchConfig.segment_length)"
            )
        num_positions = self.layout(segment_length).size
        if num_positions % self.mlp_chunks:
            raise UserError(
                f"LMConfig.mlp_chunks = {self.mlp_chunks} does not divide the {num_positions} positions that pass "
                "through the layers"
            )
        if segment_length % self.loss_chunks:
            raise UserError(
                f"LMConfig.loss_chunks = {self.loss_chunks} does not divide the segment length {segment_length}"
            )
        if self.loss_chunks > 1 and self.continuous_cache:
            raise UserError(
                f"LMConfig.loss_chunks = {self.loss_chunks}: a continuous cache mixes the logits of a whole segment; "
                "set LMConfig.loss_chunks = 1"
            )

    def check_can_decode(self) -> None:
        """Raises UserError if a text cannot be generated, or scored, token by token."""
        if self.layout(1).bidirectional:
            raise UserError(
                "RecurrentTokens.version = 'encoder': every position sees the later ones, so that such a model cannot "
                "write or score a text token by token; that takes a model with 'decoder'"
            )
        for group in self.groups:
            if not group.attention.can_decode:
                raise UserError(
                    f"@{type(group.attention).__name__}() reads whole segments only: a model with it cannot write or "
                    f"score a text token by token{group.attention.decoding_advice}"
                )

    @property
    def caches_segment_only(self) -> bool:
        """Whether a KV cache holds nothing from before its segment: see `Attention`."""
        return not self.recurrent_tokens and all(group.attention.caches_segment_only for group in self.groups)

    # The context.

    def init_context(self, batch_size: int, segment_length: int) -> Context:
        """The context of rows that have seen nothing."""
        context: Context = {"clock": jnp.zeros((), jnp.int32)}
        if self.recurrent_tokens:
            context[RECURRENT] = self.recurrent_tokens.init_state(
                self.embed_dim,
                self.dims.dtype,
                batch_size,
            )
        if self.continuous_cache:
            context[CONTINUOUS_CACHE] = self.continuous_cache.init_state(
                self.embed_dim,
                self.dims.dtype,
                batch_size,
                segment_length,
            )
        return context | self.stack.init_states(batch_size, segment_length)

    def context_axes(self) -> AxesTree:
        """Logical axis names of every leaf of the context."""
        axes: dict[str, Any] = {"clock": ()}
        if self.recurrent_tokens:
            axes[RECURRENT] = self.recurrent_tokens.state_axes()
        if self.continuous_cache:
            axes[CONTINUOUS_CACHE] = self.continuous_cache.state_axes()
        return axes | self.stack.state_axes()

    def prepare_context(self, context: Context, start_of_document: RowFlags) -> Context:
        """The context as a segment reads it: the layers' states are up to date, and the flagged rows are fresh.

        Idempotent.

        Args:
          context: as the segment before left it.
          start_of_document: bool [B].
        """
        prepared = dict(context)
        for group in self.groups:
            attention = group.attention
            state = attention.prepare_state(context[group.name], context["clock"])
            fresh = attention.fresh_state()
            prepared[group.name] = context_lib.reset_rows(state, fresh, start_of_document)
        if self.recurrent_tokens:
            prepared[RECURRENT] = self.recurrent_tokens.reset(context[RECURRENT], start_of_document)
        if self.continuous_cache:
            state = self.continuous_cache.prepare_state(context[CONTINUOUS_CACHE], context["clock"])
            prepared[CONTINUOUS_CACHE] = self.continuous_cache.reset(state, start_of_document)
        return prepared

    def state_bytes(self, segment_length: int) -> int:
        """Bytes of the context of one row."""
        context = jax.eval_shape(lambda: self.init_context(1, segment_length))
        # Scalars are shared by all rows.
        leaves = [leaf for leaf in jax.tree.leaves(context) if leaf.ndim > 0]
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
