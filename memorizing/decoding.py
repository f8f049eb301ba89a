"""Reading and writing with a model: whole segments pass as in training, the open one position by position.

While a segment is open the layers keep the keys and values of its positions, and what they carry from the segments before is only read. When the segment is full it passes
once more as a whole, by the same code as in training, and that replaces the context: the memory that a text leaves does not depend on whether it was read or written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from memorizing.array_typing import PerToken, Tokens, Tree
from memorizing.context import Context, Slice
from memorizing.errors import UserError
from memorizing.losses import next_token_nats
from memorizing.model import LanguageModel, LMConfig
from memorizing.sampling import Sampler, Sampling, draw

# What the layers have kept of an open segment: by layer group, `Report.kept`.
Kept = dict[str, Any]


class Decoder:
    """What a model compiles to for reading and writing. No program depends on a position or on the length of a text.

    Attributes:
      config, segment_length: of the model.
      init: `(num_rows) -> context` of rows that have read nothing.
      read: `(params, inputs [B, T], targets [B, T], context) -> (nats [B, T], context)`, a whole segment; the context is donated.
      begin: `(context) -> context` as the next segment reads it; donated.
      open: `(params, inputs, targets, context) -> (nats, kept)`, the first positions of a segment, padded to T; the context as `begin` gives it, as from here on.
      write: `(params, inputs [B], index, kept, context, position, sampler) -> (Drawn, kept)`, the input at `index` of the segment, and a draw from what it predicts, the token at
        `position` of the document; what was kept is donated.
    """

    def __init__(self, config: LMConfig, segment_length: int) -> None:
        """
        Raises:
          UserError: the model cannot write token by token.
        """
        if config.recurrent_tokens and config.recurrent_tokens.layout(segment_length).bidirectional:
            raise UserError(
                "RecurrentTokens.version = 'encoder': every position sees the later ones, so that such a model cannot write or score a text token by token; "
                "that takes a model with 'decoder'"
            )
        self.config, self.segment_length = config, segment_length
        model = LanguageModel(config)
        self.init = jax.jit(functools.partial(config.init_context, segment_length=segment_length), static_argnums=0)
        self.read = jax.jit(functools.partial(_read, model), donate_argnums=3)
        self.begin = jax.jit(functools.partial(_begin, config), donate_argnums=0)
        self.open = jax.jit(functools.partial(_open, model))
        self.write = jax.jit(functools.partial(_write, model, segment_length), donate_argnums=3)

    def start(self, start_id: int) -> ReaderState:
        """One row at the start of a document, before which `start_id` stands."""
        return ReaderState(self.init(1), np.full((1, 1), start_id, np.int32), 0)


class Drawn(NamedTuple):
    """A token of every row, int32 [B], and the logits that it was drawn from, float32 [B, V]."""

    tokens: Int[Array, "B"]
    logits: Float[Array, "B V"]


class ReaderState(NamedTuple):
    """All that a reader knows.

    Attributes:
      context: of its rows.
      inputs: int32 [B, t + 1], the open segment's inputs, and the pending token.
      num_tokens: tokens of the document so far.
    """

    context: Context
    inputs: Any
    num_tokens: Any


class Reader:
    """Rows that read and write in lockstep, each with a context of its own.

    A token is first predicted, then read: `pending` is the last one, which is predicted but not yet read, so that nothing is special about the ends of texts and segments. At
    the start of a document it is the vocabulary's `start_id`, as in training.

    Attributes:
      num_tokens: tokens of the document so far.
    """

    def __init__(self, decoder: Decoder, params: Tree, state: ReaderState) -> None:
        """
        Args:
          decoder: of the model.
          params: its parameters, on the device.
          state: of the reader that this one goes on from, or `Decoder.start`.
        """
        self._decoder, self._params = decoder, params
        # The open segment's inputs, each [B].
        self._inputs: list[Any]
        *self._inputs, self._pending = np.asarray(state.inputs).T
        self._context, self.num_tokens = decoder.begin(jax.device_put(state.context)), int(state.num_tokens)
        # What the layers have kept of the open segment; None where that has to be made first.
        self._kept: Kept | None = None

    def read(self, tokens: Tokens, on_progress: Callable[[int], None] = lambda _: None) -> PerToken:
        """Reads on.

        Args:
          tokens: int32 [B, length].
          on_progress: told after every segment how many of the tokens have been read.

        Returns:
          -log p of each token, float32 [B, length] on the host.
        """
        if not tokens.shape[1]:
            return np.zeros(tokens.shape, np.float32)
        num_before, length = len(self._inputs), self._decoder.segment_length
        before = self.state.inputs
        # The open segment passes again from its start; what of it was scored is not scored again.
        inputs, targets = np.concatenate([before, tokens[:, :-1]], axis=1), np.concatenate([before[:, 1:], tokens], 1)
        num_whole = inputs.shape[1] // length * length
        nats: list[Any] = []
        for start in range(0, num_whole, length):
            segment = slice(start, start + length)
            scored, self._context = self._decoder.read(
                self._params, inputs[:, segment], targets[:, segment], self._context
            )
            nats.append(scored)
            # One segment late, so that the device always has the next one to work on.
            if start:
                nats[-2] = np.asarray(nats[-2])
                on_progress(start - num_before)
        if num_whole:
            self._context = self._decoder.begin(self._context)
        self._inputs, self._pending, self._kept = list(inputs[:, num_whole:].T), tokens[:, -1].astype(np.int32), None
        if self._inputs:
            nats.append(np.asarray(self._open(targets[:, num_whole:]))[:, : len(self._inputs)])
        self.num_tokens += tokens.shape[1]
        scored = np.concatenate([np.asarray(part) for part in nats], axis=1)
        on_progress(tokens.shape[1])
        return scored[:, num_before:]

    def write(self, num_tokens: int, sampling: Sampling, seed: int, allowed: Bool[np.ndarray, "V"]) -> Iterator[Drawn]:
        """Draws tokens and reads them. Row r's token at a position depends on nothing but the seed, r, the position and what row r has read: not on the number of rows or of
        tokens, nor on where writing was interrupted.

        Args:
          num_tokens: how many.
          sampling: how they are drawn.
          seed: of the random numbers.
          allowed: which tokens may be drawn.

        Yields:
          The next token of every row, on the device: the caller may ask for the next before it looks at one.
        """
        sampler = sampling.sampler(allowed, seed)
        for _ in range(num_tokens):
            kept, index = self._next_place()
            self._inputs.append(self._pending)
            drawn, self._kept = self._decoder.write(
                self._params,
                self._pending,
                np.int32(index),
                kept,
                self._context,
                np.int32(self.num_tokens),
                sampler,
            )
            self._pending = drawn.tokens
            self.num_tokens += 1
            yield drawn

    def fork(self, num_rows: int) -> Reader:
        """A reader whose rows have all read what the only row of this one has; they go their own ways."""

        def repeat(leaf: Any) -> Any:
            # A copy in any case: readers give their contexts away to be overwritten.
            return jnp.repeat(leaf, num_rows, axis=0) if leaf.ndim and num_rows > 1 else jnp.copy(leaf)

        state = self.state
        return Reader(
            self._decoder,
            self._params,
            state._replace(context=jax.tree.map(repeat, state.context), inputs=state.inputs.repeat(num_rows, axis=0)),
        )

    @property
    def state(self) -> ReaderState:
        """For another reader to go on from, as long as this one does not go on itself."""
        inputs = np.stack([*map(np.asarray, self._inputs), np.asarray(self._pending)], axis=1).astype(np.int32)
        return ReaderState(self._context, inputs, self.num_tokens)

    def _next_place(self) -> tuple[Kept, int]:
        """What the layers have kept so far, and where in the segment the pending token stands; closes a full segment and opens the next."""
        if len(self._inputs) == self._decoder.segment_length:
            inputs = np.stack([np.asarray(column) for column in self._inputs], axis=1)
            # Targets only matter to the scores, which writing does not ask for.
            _, context = self._decoder.read(self._params, inputs, inputs, self._context)
            self._context, self._inputs, self._kept = self._decoder.begin(context), [], None
        if self._kept is None:
            self._open(np.zeros((len(self._pending), 0), np.int32))
        return self._kept, len(self._inputs)

    def _open(self, targets: Tokens) -> PerToken:
        """Makes what the layers keep of the open segment's inputs; returns the -log p of the targets, [B, T] on the device."""
        padded = np.zeros((2, len(self._pending), self._decoder.segment_length), np.int32)
        for place, column in enumerate(self._inputs):
            padded[0, :, place] = column
        padded[1, :, : targets.shape[1]] = targets
        nats, self._kept = self._decoder.open(self._params, padded[0], padded[1], self._context)
        return nats


def _flags(num_rows: int, length: int) -> tuple[Bool[Array, "B T"], Bool[Array, "B"]]:
    """All positions are real; no row begins a document: a fresh context is one that has."""
    return jnp.ones((num_rows, length), bool), jnp.zeros(num_rows, bool)


def _read(
    model: LanguageModel, params: Tree, inputs: Tokens, targets: Tokens, context: Context
) -> tuple[PerToken, Context]:
    output = model.apply({"params": params}, inputs, *_flags(*inputs.shape), context)
    return next_token_nats(output.logits, targets), output.context


def _begin(config: LMConfig, context: Context) -> Context:
    num_rows = max(leaf.shape[0] if leaf.ndim else 1 for leaf in jax.tree.leaves(context))
    return config.begin(context, jnp.zeros(num_rows, bool))


def _open(
    model: LanguageModel, params: Tree, inputs: Tokens, targets: Tokens, context: Context
) -> tuple[PerToken, Kept]:
    first = Slice(jnp.zeros((), jnp.int32))
    output = model.apply({"params": params}, inputs, *_flags(*inputs.shape), context, first)
    return next_token_nats(output.logits, targets), output.report.kept


def _write(
    model: LanguageModel,
    segment_length: int,
    params: Tree,
    inputs: Int[Array, "B"],
    index: Int[Array, ""],
    kept: Kept,
    context: Context,
    position: Int[Array, ""],
    sampler: Sampler,
) -> tuple[Drawn, Kept]:
    recurrent = model.config.recurrent_tokens
    this = Slice(index + (recurrent.layout(segment_length).num_read if recurrent else 0), kept)
    output = model.apply({"params": params}, inputs[:, None], *_flags(len(inputs), segment_length), context, this)
    logits = output.logits[:, 0]
    return Drawn(draw(logits, position, sampler), logits), output.report.kept
