"""One layer of a model, put together from parts: normalisation, attention, MLP, and residuals around both."""

from __future__ import annotations

import flax.linen as nn
import jax

from memorizing.array_typing import Activations, Tree
from memorizing.context import Report, Segment
from memorizing.models.attention.base import Attention, LayerDims
from memorizing.models.layers import MLP, dropout, make_norm
from memorizing.models.memory.product_keys import ProductKeyMemory


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); or both of the same x.

    Its halves, without their residuals, are `attend` and `feed_forward`. With sandwich norms (Gemma 2) what either adds
    is normalised too.

    Attributes:
      mechanism: of the attention.
      dims: sizes and parts.
    """

    mechanism: Attention
    dims: LayerDims

    def setup(self) -> None:
        dims = self.dims
        self.attention_norm = make_norm(dims.norm, dims.norm_epsilon)
        self.attention = self.mechanism.layer(dims)
        self.mlp_norm = make_norm(dims.norm, dims.norm_epsilon)
        if dims.product_keys:
            self.mlp = ProductKeyMemory(dims.product_keys, dims.dtype, dims.initial_output_scale)
        else:
            has_biases = "mlp" in dims.biases
            self.mlp = MLP(dims.mlp_dim, dims.mlp, dims.dtype, dims.initial_output_scale, has_biases, dims.lora)
        if dims.sandwich_norms:
            self.attention_output_norm = make_norm(dims.norm, dims.norm_epsilon)
            self.mlp_output_norm = make_norm(dims.norm, dims.norm_epsilon)

    def __call__(
        self,
        x: Activations,
        segment: Segment,
        state: Tree,
    ) -> tuple[Activations, Tree, Report]:
        """The layer's output [B, T, D], its new state, and its report."""
        y, state, report = self.attend(x, segment, state)
        if self.dims.residuals == "parallel":
            return x + y + self.feed_forward(x, segment), state, report
        x = x + y
        x = x + self.feed_forward(x, segment)
        return x, state, report

    def attend(
        self,
        x: Activations,
        segment: Segment,
        state: Tree,
    ) -> tuple[Activations, Tree, Report]:
        """What attention adds to the residual, its new state, and its report."""
        y = self.attention_norm(x)
        y, state, report = self.attention(y, segment, state)
        if self.dims.sandwich_norms:
            y = self.attention_output_norm(y)
        y = dropout(y, self.dims.dropout, segment.rngs, "attention_dropout")
        return y, state, report

    def feed_forward(self, x: Activations, segment: Segment) -> Activations:
        """What the MLP adds to the residual."""
        with jax.named_scope("mlp"):
            y = self.mlp_norm(x)
            y = self._mlp_in_chunks(y)
            if self.dims.sandwich_norms:
                y = self.mlp_output_norm(y)
        return dropout(y, self.dims.dropout, segment.rngs, "mlp_dropout")

    def _mlp_in_chunks(self, x: Activations) -> Activations:
        """The MLP, whose hidden layer [B, T, F] is computed, and computed again, for a few positions at a time."""
        num_rows, length, width = x.shape
        num_chunks = self.dims.mlp_chunks
        # While a segment is generated fewer positions pass, and need no chunks; parameters are made as ever.
        if num_chunks == 1 or length % num_chunks or self.is_initializing():
            return self.mlp(x)

        def pass_chunk(mlp: nn.Module, carry: None, chunk: Activations) -> tuple[None, Activations]:
            return carry, mlp(chunk)

        in_turn = nn.scan(
            nn.remat(pass_chunk, prevent_cse=False),
            variable_broadcast="params",
            in_axes=1,
            out_axes=1,
        )
        chunks = x.reshape(num_rows, num_chunks, length // num_chunks, width)
        _, y = in_turn(self.mlp, None, chunks)
        return y.reshape(x.shape)
