"""The decoder-only language model: its configuration, and the stack that carries the context through its layers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memorizing import context as context_lib
from memorizing.array_typing import Activations, AxesTree, Logits, RealPositions, RowFlags, Tokens, Tree
from memorizing.attention.base import Attention, LayerDims
from memorizing.attention.full import FullAttention
from memorizing.attention.knn import KNNAttention
from memorizing.context import Context, Layout, Report, Segment, Slice
from memorizing.errors import UserError
from memorizing.external_memory import NEIGHBOURS
from memorizing.layers import MLP, Embedder, RMSNorm, rows_over_data
from memorizing.recurrent_tokens import MemoryTokens, RecurrentTokens, written

# The entry of the recurrent tokens in parameters and context.
RECURRENT = "recurrent_tokens"


class LayerGroup(NamedTuple):
    """Consecutive layers with the same mechanism: their parameters and states are stacked, and they are compiled once.

    Attributes:
      name: `layer_08` for a single layer, `layers_00_07` for several.
      attention: their mechanism.
      length: number of layers.
    """

    name: str
    attention: Attention
    length: int

    @property
    def is_stacked(self) -> bool:
        return self.length > 1


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """A language model.

    Attributes:
      vocab_size: V, including padding.
      num_layers, embed_dim, num_heads, head_dim, mlp_dim: L, D, N, H, F.
      attention: the mechanism of every layer that `attention_at` does not name.
      attention_at: pairs of a layer index, from 0, and its mechanism.
      recurrent_tokens: memory tokens around the whole stack, or None.
      dropout: probability, on the embedding and on the outputs of attention and MLP.
      initial_logit_scale: value at initialisation of the learned per-head scale of the attention logits.
      dtype: of activations and carried states; parameters are float32.
      remat: 'none', or 'layer' to recompute each layer for its gradient, all but the memory search.
    """

    vocab_size: int = 259
    num_layers: int = 2
    embed_dim: int = 64
    num_heads: int = 2
    head_dim: int = 32
    mlp_dim: int = 256
    attention: Attention = FullAttention()
    attention_at: tuple[tuple[int, Attention], ...] = ()
    recurrent_tokens: RecurrentTokens | None = None
    dropout: float = 0.0
    initial_logit_scale: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "layer"] = "none"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "embed_dim", "num_heads", "head_dim", "mlp_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"LMConfig.{name} = {getattr(self, name)}: at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LMConfig.dropout = {self.dropout}: a probability below 1")
        indices = [index for index, _ in self.attention_at]
        if len(set(indices)) < len(indices) or not all(0 <= index < self.num_layers for index in indices):
            raise UserError(
                f"LMConfig.attention_at names the layers {indices}: different indices from 0 to {self.num_layers - 1} "
                f"(LMConfig.num_layers = {self.num_layers})"
            )

    @property
    def dims(self) -> LayerDims:
        return LayerDims(
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            mlp_dim=self.mlp_dim,
            dropout=self.dropout,
            initial_logit_scale=self.initial_logit_scale,
            dtype=jnp.dtype(self.dtype),
        )

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The layers from first to last, equal neighbours together if their mechanism is stackable."""
        special = dict(self.attention_at)
        layers = [special.get(index, self.attention) for index in range(self.num_layers)]
        same = itertools.groupby(enumerate(layers), key=lambda item: (item[1], item[1].stackable or item[0]))
        groups = []
        for (attention, _), members in same:
            indices = [index for index, _ in members]
            first, last = indices[0], indices[-1]
            name = f"layer_{first:02d}" if first == last else f"layers_{first:02d}_{last:02d}"
            groups.append(LayerGroup(name, attention, len(indices)))
        return tuple(groups)

    @property
    def has_memory(self) -> bool:
        """Whether any layer has an external memory."""
        return any(isinstance(group.attention, KNNAttention) for group in self.groups)

    @property
    def memory_size(self) -> int:
        """Slots of its external memories, of the largest where they differ; 0 without one."""
        return max((g.attention.memory_size for g in self.groups if isinstance(g.attention, KNNAttention)), default=0)

    def with_memory_size(self, memory_size: int) -> LMConfig:
        """The same model, which has the same parameters, with external memories of another size."""
        return self._with_memories(lambda attention: dataclasses.replace(attention, memory_size=memory_size))

    def without_memory(self) -> LMConfig:
        """The model with the local attention alone where it has an external memory."""
        return self._with_memories(lambda attention: attention.local)

    def _with_memories(self, change: Callable[[KNNAttention], Attention]) -> LMConfig:
        def changed(attention: Attention) -> Attention:
            return change(attention) if isinstance(attention, KNNAttention) else attention

        layers = tuple((index, changed(attention)) for index, attention in self.attention_at)
        return dataclasses.replace(self, attention=changed(self.attention), attention_at=layers)

    def check(self, segment_length: int) -> None:
        """Raises UserError if a mechanism cannot work with segments of this length."""
        for group in self.groups:
            group.attention.check(segment_length)

    def init_context(self, batch_size: int, segment_length: int) -> Context:
        """The context of rows that have seen nothing."""

        def stack(leaf: jax.Array, length: int) -> jax.Array:
            return jnp.broadcast_to(leaf[:, None], (leaf.shape[0], length, *leaf.shape[1:]))

        context: Context = {"clock": jnp.zeros((), jnp.int32)}
        if self.recurrent_tokens:
            context[RECURRENT] = self.recurrent_tokens.init_state(self.embed_dim, self.dims.dtype, batch_size)
        for name, attention, length in self.groups:
            state = attention.init_state(self.dims, batch_size, segment_length)
            context[name] = state if length == 1 else jax.tree.map(lambda leaf, n=length: stack(leaf, n), state)
        return context

    def context_axes(self) -> AxesTree:
        """Logical axis names of every leaf of the context."""
        axes: dict[str, Any] = {"clock": ()}
        if self.recurrent_tokens:
            axes[RECURRENT] = self.recurrent_tokens.state_axes()
        for group in self.groups:
            axes[group.name] = jax.tree.map(
                lambda names, stacked=group.is_stacked: (*names[:1], "layers", *names[1:]) if stacked else names,
                group.attention.state_axes(),
                is_leaf=lambda names: type(names) is tuple and len(names) > 0,
            )
        return axes

    def begin(self, context: Context, start_of_document: RowFlags) -> Context:
        """The context as a segment reads it: what the segment before left is put in its place, and the flagged rows are fresh. Done twice it is as done once.

        Args:
          context: as the segment before left it.
          start_of_document: bool [B].
        """
        begun = dict(context)
        for group in self.groups:
            state = group.attention.settle(context[group.name], context["clock"])
            begun[group.name] = context_lib.reset_rows(state, group.attention.fresh_state(), start_of_document)
        if self.recurrent_tokens:
            begun[RECURRENT] = self.recurrent_tokens.reset(context[RECURRENT], start_of_document)
        return begun


class ModelOutput(NamedTuple):
    """What one segment, or a slice of one, gives.

    Attributes:
      logits: float32 [B, T, V].
      context: for the next segment; None after a slice.
      report: what the layers report; the entries of `kept` by layer group.
    """

    logits: Logits
    context: Context | None
    report: Report


class LanguageModel(nn.Module):
    """Embedding, pre-norm layers, final norm, tied logits. Dropout is on where a `dropout` rng is given."""

    config: LMConfig

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        is_real: RealPositions,
        start_of_document: RowFlags,
        context: Context,
        slice: Slice | None = None,
    ) -> ModelOutput:
        """Reads one segment of every row, or a slice of one.

        Args:
          tokens: int32 [B, T]; of a slice after the first only its own, [B, positions].
          is_real: bool [B, T], false at padding.
          start_of_document: bool [B], rows whose context is forgotten before the segment.
          context: from `LMConfig.init_context` or from the segment before; for a slice as `LMConfig.begin` gives it.
          slice: None for a whole segment; `kept` by layer group.
        """
        config, layout = self.config, Layout(is_real.shape[1])
        if slice is None:
            context = config.begin(context, start_of_document)
        continues = slice is not None and slice.kept is not None
        new_context: Context = {"clock": context["clock"] + 1}
        losses, metrics, kept = {}, {}, {}
        embedder = Embedder(config.vocab_size, config.embed_dim, config.dims.dtype, name="embedder")
        x = Dropout(config.dropout, name="dropout")(embedder.encode(tokens))
        if config.recurrent_tokens:
            layout = config.recurrent_tokens.layout(layout.length)
            if not continues:
                x = MemoryTokens(config.recurrent_tokens, name=RECURRENT)(x, context[RECURRENT], slice is None)
        for group in config.groups:
            x = rows_over_data(x)
            own_slice = slice.replace(kept=slice.kept[group.name]) if continues else slice
            segment = Segment(layout.widen(is_real), layout, own_slice)
            x, (new_context[group.name], report) = _layers(config, group, segment)(x, segment, context[group.name])
            losses |= {f"{group.name}/{name}": value.sum() for name, value in report.losses.items()}
            metrics |= {f"{group.name}/{name}": value for name, value in report.metrics.items()}
            kept[group.name] = report.kept
            if slice is not None and not report.kept:
                raise UserError(
                    f"@{type(group.attention).__name__}() reads whole segments only: a model with it cannot write or score a text token by token"
                )
        x = RMSNorm(name="final_norm")(x)
        if slice is not None:
            return ModelOutput(embedder.decode(x if continues else layout.own(x)), None, Report(kept=kept))
        if config.recurrent_tokens:
            new_context[RECURRENT] = written(layout, x)
        return ModelOutput(embedder.decode(layout.own(x)), new_context, Report(losses, metrics))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); the carry, the broadcast input and the scanned state of a scan over layers."""

    attention: Attention
    dims: LayerDims

    @nn.compact
    def __call__(self, x: Activations, segment: Segment, state: Tree) -> tuple[Activations, tuple[Tree, Report]]:
        dropout = Dropout(self.dims.dropout, name="dropout")
        attention = self.attention.layer(self.dims, name="attention")
        y, state, report = attention(RMSNorm(name="attention_norm")(x), segment, state)
        x = x + dropout(y)
        with jax.named_scope("mlp"):
            x = x + dropout(MLP(self.dims.mlp_dim, self.dims.dtype, name="mlp")(RMSNorm(name="mlp_norm")(x)))
        return x, (state, report)


class Dropout(nn.Module):
    """Dropout that is on exactly when a `dropout` rng is given, so that no flag has to travel through the model."""

    rate: float

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        return nn.Dropout(self.rate, deterministic=not self.has_rng("dropout"))(x)


def _layers(config: LMConfig, group: LayerGroup, segment: Segment) -> nn.Module:
    layer = Layer
    if config.remat == "layer":
        policy = jax.checkpoint_policies.save_only_these_names(NEIGHBOURS)
        # prevent_cse is not needed inside a scan, and would only slow it down.
        layer = nn.remat(Layer, policy=policy, prevent_cse=not group.is_stacked)
    if group.is_stacked:
        # All layers are told the same of a segment, but each has kept its own.
        scanned = nn.broadcast
        if segment.continues:
            scanned = Segment(nn.broadcast, segment.layout, Slice(nn.broadcast, kept=0))
        layer = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(scanned, 1),
            out_axes=(1, 0),
            length=group.length,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
    return layer(group.attention, config.dims, name=group.name)
