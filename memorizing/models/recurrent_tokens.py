"""Recurrent Memory Transformer: memory tokens around the whole stack (Bulatov et al. 2022; the encoder version is that of Bulatov et al. 2023)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from memorizing.array_typing import Activations, AxesTree, RowFlags
from memorizing.context import Layout, reset_rows
from memorizing.errors import UserError


@struct.dataclass
class RecurrentTokensState:
    """What the memory tokens became in the segment before.

    Attributes:
      tokens: [B, R, D] in the dtype of the activations; gradients flow through them from segment to segment of a step.
      started: bool [B], false before the first segment of a document: then the learned initial tokens stand in.
    """

    tokens: Float[Array, "B R D"]
    started: Bool[Array, "B"]


@dataclasses.dataclass(frozen=True)
class RecurrentTokens:
    """Memory tokens that pass through all layers with the segment; what they become is the memory of the next segment.

    The decoder version puts them before the segment, to be read, and after it, to be written (2207.06881, section 3); the next memory is what the write tokens became. The
    encoder version (2304.11062, section 3) puts them once, before a segment whose positions all see each other; the next memory is what they became themselves. Since inputs are
    targets one position later, an encoder reads every target but a segment's last off its input: it is for tasks whose answer is the last token, not for language modelling.

    Attributes:
      num_tokens: R.
      version: 'decoder' or 'encoder'.
      backward_segments: through how many segments before it the gradient of a step's last segment reaches, -1 for all of the step. The step's segments are cut, from the last
        one backwards, into runs of this many and one; no gradient crosses a cut.
      sees_cache: whether memory tokens see the layers' caches of earlier positions.
    """

    num_tokens: int = 10
    version: Literal["decoder", "encoder"] = "decoder"
    backward_segments: int = -1
    sees_cache: bool = True

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise UserError(
                f"RecurrentTokens.num_tokens = {self.num_tokens}: at least 1; without them leave out LMConfig.recurrent_tokens"
            )
        if self.backward_segments < -1:
            raise UserError(
                f"RecurrentTokens.backward_segments = {self.backward_segments}: -1 for all segments of a step, or 0 and more"
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

    def init_state(self, embed_dim: int, dtype: jnp.dtype, batch_size: int) -> RecurrentTokensState:
        tokens = jnp.zeros((batch_size, self.num_tokens, embed_dim), dtype)
        return RecurrentTokensState(tokens, jnp.zeros(batch_size, bool))

    def state_axes(self) -> AxesTree:
        return RecurrentTokensState(tokens=("batch", "length", "embed"), started=("batch",))

    def reset(self, state: RecurrentTokensState, start_of_document: RowFlags) -> RecurrentTokensState:
        """Flagged rows begin with the initial tokens."""
        return reset_rows(state, RecurrentTokensState(tokens=None, started=False), start_of_document)

    def truncate(self, state: RecurrentTokensState, index: jax.Array, num_segments: int) -> RecurrentTokensState:
        """Lets no gradient into the segment before segment `index` of a step of `num_segments`, if a cut lies there."""
        if self.backward_segments < 0:
            return state
        is_cut = (num_segments - index) % (self.backward_segments + 1) == 0
        return state.replace(tokens=jnp.where(is_cut, jax.lax.stop_gradient(state.tokens), state.tokens))


class MemoryTokens(nn.Module):
    """Puts the memory tokens around the embedded segment."""

    config: RecurrentTokens

    @nn.compact
    def __call__(self, x: Activations, state: RecurrentTokensState, with_write_tokens: bool = True) -> Activations:
        # Independent vectors, of the scale of word embeddings: equal ones would only be told apart by their position.
        initializer = nn.with_logical_partitioning(nn.initializers.normal(stddev=1.0), (None, "embed"))
        initial = self.param("initial", initializer, (self.config.num_tokens, x.shape[-1]), jnp.float32)
        memory = jnp.where(state.started[:, None, None], state.tokens, initial[None].astype(x.dtype))
        writes = with_write_tokens and self.config.version == "decoder"
        return jnp.concatenate([memory, x, memory] if writes else [memory, x], axis=1)


def written(layout: Layout, x: Activations) -> RecurrentTokensState:
    """The next state: what the write tokens (of an encoder: the memory tokens) became after the last norm."""
    tokens = x[:, -layout.num_write :] if layout.num_write else x[:, : layout.num_read]
    return RecurrentTokensState(tokens, jnp.ones(x.shape[0], bool))
