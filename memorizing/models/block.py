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
        self.attention_norm = make_norm(self.dims.norm)
        self.attention = self.mechanism.layer(self.dims)
        self.mlp_norm = make_norm(self.dims.norm)
        self.mlp = MLP(self.dims.mlp_dim, self.dims.mlp, self.dims.dtype)

    def __call__(self, x: Activations, segment: Segment, state: Tree) -> tuple[Activations, Tree, Report]:
        """The layer's output [B, T, D], its new state, and what it reports."""
        y, state, report = self.attention(self.attention_norm(x), segment, state)
        x = x + dropout(y, self.dims.dropout, segment.rngs, "attention_dropout")
        with jax.named_scope("mlp"):
            y = self.mlp(self.mlp_norm(x))
        x = x + dropout(y, self.dims.dropout, segment.rngs, "mlp_dropout")
        return x, state, report
