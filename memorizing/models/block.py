"""One layer of a model, put together from parts: normalisation, attention, MLP, and residuals around both."""

from __future__ import annotations

import flax.linen as nn
import jax

from memorizing.array_typing import Activations, Tree
from memorizing.context import Report, Segment
from memorizing.models.attention.base import Attention, LayerDims
from memorizing.models.layers import MLP, dropout, make_norm


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)).

    Attributes:
      mechanism: of the attention.
      dims: sizes and parts.
    """

    mechanism: Attention
    dims: LayerDims

    def setup(self) -> None:
        dims = self.dims
        self.attention_norm = make_norm(dims.norm)
        self.attention = self.mechanism.layer(dims)
        self.mlp_norm = make_norm(dims.norm)
        self.mlp = MLP(dims.mlp_dim, dims.mlp, dims.dtype, dims.initial_output_scale)

    def __call__(
        self,
        x: Activations,
        segment: Segment,
        state: Tree,
    ) -> tuple[Activations, Tree, Report]:
        """The layer's output [B, T, D], its new state, and its report."""
        rate = self.dims.dropout

        y = self.attention_norm(x)
        y, state, report = self.attention(y, segment, state)
        y = dropout(y, rate, segment.rngs, "attention_dropout")
        x = x + y

        with jax.named_scope("mlp"):
            y = self.mlp_norm(x)
            y = self.mlp(y)
        y = dropout(y, rate, segment.rngs, "mlp_dropout")
        x = x + y

        return x, state, report
