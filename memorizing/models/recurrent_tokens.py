"""Recurrent Memory Transformer: memory tokens around the whole stack.

The decoder version is that of Bulatov et al. 2022, the encoder version that of Bulatov et al. 2023.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from memorizing.array_typing import Activations, AxesTree, RowFlags
from memorizing.context import Layout, reset_rows
from memorizing.errors import MOST, Range, UserError
from memorizing.models.layers import parameter


@struct.dataclass
class RecurrentTokensState:
    """What the memory tokens became in the segment before.

    Attributes:
      tokens: [B, R, D] in the dtype of the activations; gradients flow through them from segment to segment of a step.
      started: bool [B], false before the first segment of a document: then the learned initial tokens stand in.
    """

    tokens: Float[Array, "B R D"] | Any
    started: Bool[Array, "B"] | Any


@dataclasses.dataclass(frozen=True)
class RecurrentTokens:
    """Memory tokens that pass through all layers with the segment.

    What they become is the memory of the next segment. The decoder version (2207.06881, section 3) puts them before the
    segment, to be read, and after it, to be written; the next memory is what the write tokens became. The encoder
    version (2304.11062, section 3) puts them once, before a segment whose positions all see each other; the next memory
    is what they became themselves.

    Since inputs are targets one position later, an encoder can read every target but a segment's last from its input:
    it is for tasks whose answer is the last token, not for language modelling.

    Attributes:
      num_tokens: R.
      version: 'decoder' or 'encoder'.
      backward_segments: how many segments before it the gradient of a step's last segment reaches, -1 for all of the
        step. The step's segments are cut, from the last one backwards, into runs of this many and one; no gradient
        crosses a cut.
      sees_cache: whether memory tokens see the layers' caches of earlier positions.
    """

    num_tokens: Annotated[int, Range(1, 2**20)] = 10
    version: Literal["decoder", "encoder"] = "decoder"
    backward_segments: Annotated[int, Range(-1, MOST)] = -1
    sees_cache: bool = True

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise UserError(
                f"RecurrentTokens.num_tokens = {self.num_tokens}: at least 1; "
                "without them leave out LMConfig.recurrent_tokens"
            )
        if self.backward_segments < -1:
            raise UserError(
                f"RecurrentTokens.backward_segments = {self.backward_segments}: "
                "-1 for all segments of a step, or 0 and more"
            )

    def layout(self, length: int) -> Layout:
        """The positions of a segment of `length` tokens."""
        is_encoder = self.version == "encoder"
        return Layout(
            length,
            num_read=self.num_tokens,
            num_write=0 if is_encoder else self.num_tokens,
            bidirectional=is_encoder,
            memory_sees_cache=self.sees_cache,
        )

    def init_state(
        self,
        embed_dim: int,
        dtype: jnp.dtype,
        batch_size: int,
    ) -> RecurrentTokensState:
        """The state of rows that have seen nothing."""
        shape = (batch_size, self.num_tokens, embed_dim)
        return RecurrentTokensState(
            tokens=jnp.zeros(shape, dtype),
            started=jnp.zeros(batch_size, bool),
        )

    def state_axes(self) -> AxesTree:
        """The logical axis names of every leaf of the state."""
        return RecurrentTokensState(
            tokens=("batch", "length", "embed"),
            started=("batch",),
        )

    def reset(self, state: RecurrentTokensState, start_of_document: RowFlags) -> RecurrentTokensState:
        """The flagged rows begin with the initial tokens."""
        fresh = RecurrentTokensState(tokens=None, started=False)
        return reset_rows(state, fresh, start_of_document)

    def truncate(
        self,
        state: RecurrentTokensState,
        index: Int[Array, ""] | int,
        num_segments: int,
    ) -> RecurrentTokensState:
        """Stops the gradient from segment `index` of a step into the segment before it, if a cut lies there."""
        if self.backward_segments < 0:
            return state
        length_of_run = self.backward_segments + 1
        is_cut = (num_segments - index) % length_of_run == 0
        without_gradient = jax.lax.stop_gradient(state.tokens)
        tokens = jnp.where(is_cut, without_gradient, state.tokens)
        return dataclasses.replace(state, tokens=tokens)


class MemoryTokens(nn.Module):
    """Puts the memory tokens around the embedded segment."""

    config: RecurrentTokens

    @nn.compact
    def __call__(
        self,
        x: Activations,
        state: RecurrentTokensState,
        with_write_tokens: bool = True,
    ) -> Float[Array, "B all D"]:
        """The read tokens, x, and the write tokens of a decoder.

        Args:
          x: the segment [B, T, D].
          state: of the segment before.
          with_write_tokens: false while the segment is being generated.
        """
        config = self.config
        initial = parameter(
            self,
            "initial",
            # Independent vectors of the scale of word embeddings. Only their position would tell equal ones apart.
            nn.initializers.normal(stddev=1.0),
            shape=(config.num_tokens, x.shape[-1]),
            axes=(None, "embed"),
        )
        started = state.started[:, None, None]
        # [B, R, D]
        memory = jnp.where(started, state.tokens, initial[None].astype(x.dtype))
        parts = [memory, x]
        if with_write_tokens and config.version == "decoder":
            parts.append(memory)
        return jnp.concatenate(parts, axis=1)


def written(layout: Layout, x: Activations) -> RecurrentTokensState:
    """The next state: the write tokens after the last norm; of an encoder, the memory tokens after it."""
    tokens = x[:, -layout.num_write :] if layout.num_write else x[:, : layout.num_read]
    batch_size = x.shape[0]
    return RecurrentTokensState(tokens, started=jnp.ones(batch_size, bool))
