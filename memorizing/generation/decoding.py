"""Generation with a model: whole segments pass as in training, the open one token by token.

An open segment is prefilled, and each decode step adds a token to it: the layers keep its keys and values in a KV
cache, and what they carry from the segments before is only read. When the segment is full it passes once more as a
whole, by the same code as in training, and that replaces the context: the memory that a text leaves does not depend on
whether it was read or generated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from memorizing.array_typing import Tokens, Tree
from memorizing.context import Context, Decoding, Inputs
from memorizing.evaluation.reading import read_segments
from memorizing.generation.sampling import Sampling, SamplingArrays, draw
from memorizing.models import language_model
from memorizing.models.lm_config import LMConfig
from memorizing.models.losses import Scores, scores
from memorizing.runtime import sharding

# What the layers keep of an open segment: by group of layers, `Report.kv_cache`.
KVCache = Mapping[str, Any]
# On the host.
HostTokens = Int[np.ndarray, "B T"]


class Decoder:
    """What a model compiles to for reading and generating. No program depends on a position or on the length of a text.

    Attributes:
      config, segment_length: of the model.
      read: `(params, buffers, inputs [B, T], targets [B, T], context) -> (Scores [B, T], context)`, a whole segment;
        the context is donated.
      prepare: `(context) -> context` as the next segment reads it; donated.
      prefill: `(params, buffers, inputs, targets, context) -> (Scores, KV cache)`, the first positions of a segment,
        padded to T; the context as `prepare` gives it, as in every decode step.
      decode: `(params, buffers, inputs [B], index, KV cache, context, position, sampling) -> (Drawn, KV cache)`, the
        input at `index` of the segment, and a draw from what it predicts, the token at `position` of the document; the
        KV cache is donated.
    """

    def __init__(self, config: LMConfig, segment_length: int, mesh: Mesh | None = None) -> None:
        """
        Args:
          config, segment_length: of the model.
          mesh: over which weights and contexts lie, with all rows on every device of it; None for one device.

        Raises:
          UserError: the model cannot generate token by token.
        """
        config.check_can_decode()
        self.config = config
        self.segment_length = segment_length
        self._mesh = mesh
        self.read = self.compiled(functools.partial(_read, config), donate_argnums=4)
        self.prepare = self.compiled(functools.partial(_prepare, config), donate_argnums=0)
        self.prefill = self.compiled(functools.partial(_prefill, config))
        self.decode = self.compiled(functools.partial(decode_step, config, segment_length), donate_argnums=4)

    def init(self, num_rows: int) -> Context:
        """The context of rows that have read nothing."""
        return self._init_of(num_rows)()

    # A decoder lives as long as the process, and so does what its methods keep.
    @functools.cache  # noqa: B019
    def _init_of(self, num_rows: int) -> Callable[[], Context]:
        """Makes that context; compiled once for each number of rows."""
        init_context = functools.partial(self.config.init_context, num_rows, self.segment_length)
        return self.compiled(init_context, out_shardings=self._shardings(num_rows))

    @functools.cache  # noqa: B019
    def abstract_context(self, num_rows: int) -> Context:
        """Shapes and dtypes of a context."""
        return jax.eval_shape(functools.partial(self.config.init_context, num_rows, self.segment_length))

    def place(self, context: Context) -> Context:
        """A context on the devices."""
        num_rows = max(leaf.shape[0] if leaf.ndim else 1 for leaf in jax.tree.leaves(context))
        return jax.device_put(context, self._shardings(num_rows))

    def start(self, start_id: int) -> TextState:
        """One row at the start of a document, before which `start_id` stands."""
        return TextState(self.init(1), np.full((1, 1), start_id, np.int32), 0)

    @functools.cache  # noqa: B019
    def _shardings(self, num_rows: int) -> Any:
        if self._mesh is None:
            return None
        axes = self.config.context_axes()
        return sharding.tree_shardings(self._mesh, self.abstract_context(num_rows), axes, sharding.STATE_RULES)

    def compiled(self, function: Callable, **options: Any) -> Callable:
        """A function, compiled for the mesh that the weights and contexts lie on."""
        compiled = jax.jit(function, **options)
        if self._mesh is None:
            return compiled

        def call(*arguments: Any) -> Any:
            with jax.set_mesh(self._mesh):
                return compiled(*arguments)

        return call


class Weights(NamedTuple):
    """Parameters and buffers of a model, on the devices."""

    params: Tree
    buffers: Tree


class Drawn(NamedTuple):
    """A token of every row, int32 [B], and the logits that it was drawn from, float32 [B, V]."""

    tokens: Int[Array, "B"]
    logits: Float[Array, "B V"]


class DecodeStep(NamedTuple):
    """What the next token is drawn from, but for the weights and how it is drawn: arguments of `Decoder.decode`.

    Attributes:
      inputs: int32 [B], the pending tokens.
      index: where in the segment they stand.
      kv_cache: of the segment's earlier positions.
      context: of the segments before.
      position: of the tokens that will be drawn, in their document.
    """

    inputs: Any
    index: np.int32
    kv_cache: KVCache
    context: Context
    position: np.int32


class TextState(NamedTuple):
    """All that is known of texts that are being read or generated.

    Attributes:
      context: of their rows.
      inputs: int32 [B, t + 1], the open segment's inputs, and the pending token.
      num_tokens: tokens of the document so far.
    """

    context: Context
    inputs: Any
    num_tokens: Any


class TextDecoder:
    """Rows that read and generate in lockstep, each with a context of its own.

    A token is first predicted, then read: the pending one is predicted but not yet read, so that nothing is special
    about the ends of texts and segments. At the start of a document it is the vocabulary's `start_id`, as in training.

    Attributes:
      num_tokens: tokens of the document so far.
    """

    def __init__(self, decoder: Decoder, weights: Weights, state: TextState) -> None:
        """
        Args:
          decoder: of the model.
          weights: of the model.
          state: of the rows that these go on from, or `Decoder.start`.
        """
        self._decoder, self._weights = decoder, weights
        # The open segment's inputs, each [B].
        self._inputs: list[Any]
        *self._inputs, self._pending = np.asarray(state.inputs).T
        self._context = decoder.prepare(decoder.place(state.context))
        self.num_tokens = int(state.num_tokens)
        # Of the open segment; None where it has to be prefilled first.
        self._kv_cache: KVCache | None = None

    def read(self, tokens: HostTokens, on_progress: Callable[[int], None] = lambda _: None) -> Scores:
        """Reads on.

        Args:
          tokens: int32 [B, length].
          on_progress: told after every segment how many of the tokens have been read.

        Returns:
          How well each token was predicted, [B, length] on the host.
        """
        if not tokens.shape[1]:
            return Scores(np.zeros(tokens.shape, np.float32), np.ones(tokens.shape, bool))
        num_before, length = len(self._inputs), self._decoder.segment_length
        before = self.state.inputs
        # The open segment passes again from its start; what of it was scored is not scored again.
        inputs = np.concatenate([before, tokens[:, :-1]], axis=1)
        targets = np.concatenate([before[:, 1:], tokens], axis=1)
        num_whole = inputs.shape[1] // length * length
        parts: list[Scores] = []
        starts = range(0, num_whole, length)
        segments = ((inputs[:, start : start + length], targets[:, start : start + length]) for start in starts)
        for scored, context in read_segments(self._read_segment, self._context, segments):
            self._context = context
            parts.append(scored)
            on_progress(min(len(parts) * length - num_before, tokens.shape[1]))
        if num_whole:
            self._context = self._decoder.prepare(self._context)
        self._inputs = list(inputs[:, num_whole:].T)
        self._pending = tokens[:, -1].astype(np.int32)
        self._kv_cache = None
        if self._inputs:
            parts.append(jax.device_get(self._prefill(targets[:, num_whole:])))
        self.num_tokens += tokens.shape[1]
        on_progress(tokens.shape[1])
        scored = slice(num_before, num_before + tokens.shape[1])
        return Scores(*(np.concatenate(part, axis=1)[:, scored] for part in zip(*parts, strict=True)))

    def generate(
        self, num_tokens: int, sampling: Sampling, seed: int, allowed: Bool[np.ndarray, "V"]
    ) -> Iterator[Drawn]:
        """Draws tokens and reads them.

        Row r's token at a position depends on nothing but the seed, r, the position and what row r has read: not on the
        number of rows or of tokens, nor on where generating was interrupted.

        Args:
          num_tokens: how many.
          sampling: how they are drawn.
          seed: of the random numbers.
          allowed: which tokens may be drawn.

        Yields:
          The next token of every row, on the device: the caller may ask for the next before it looks at one.
        """
        arrays = sampling.arrays(allowed, seed)
        for _ in range(num_tokens):
            step = self.next_step()
            drawn, kv_cache = self._decoder.decode(*self._weights, *step, arrays)
            self.accept(drawn.tokens, kv_cache)
            yield drawn

    def next_step(self) -> DecodeStep:
        """What the next token is drawn from; a full segment is closed first, and the next one opened."""
        if len(self._inputs) == self._decoder.segment_length:
            inputs = np.stack([np.asarray(column) for column in self._inputs], axis=1)
            # Targets only matter to the scores, which nobody asks for here.
            _, context = self._decoder.read(*self._weights, inputs, inputs, self._context)
            self._context = self._decoder.prepare(context)
            self._inputs, self._kv_cache = [], None
        if self._kv_cache is None:
            self._prefill(np.zeros((len(self._pending), 0), np.int32))
        assert self._kv_cache is not None, "prefilled above"
        index, position = np.int32(len(self._inputs)), np.int32(self.num_tokens)
        return DecodeStep(self._pending, index, self._kv_cache, self._context, position)

    def accept(self, tokens: Any, kv_cache: KVCache | None = None) -> None:
        """Takes what was drawn from `next_step`.

        Args:
          tokens: int32 [B], they become the pending ones.
          kv_cache: after that step; None where the caller keeps it for as long as the segment is open.
        """
        self._inputs.append(self._pending)
        self._pending = tokens
        if kv_cache is not None:
            self._kv_cache = kv_cache
        self.num_tokens += 1

    def fork(self, num_rows: int) -> TextDecoder:
        """Rows that have all read what the only row of this one has; they go their own ways."""

        def repeat(leaf: Any) -> Any:
            # A copy in any case: contexts are given away to be overwritten.
            return jnp.repeat(leaf, num_rows, axis=0) if leaf.ndim and num_rows > 1 else jnp.copy(leaf)

        state = self.state
        context = jax.tree.map(repeat, state.context)
        inputs = state.inputs.repeat(num_rows, axis=0)
        return TextDecoder(self._decoder, self._weights, state._replace(context=context, inputs=inputs))

    @property
    def num_open(self) -> int:
        """Tokens of the open segment that are read, from 0 to T."""
        return len(self._inputs)

    @property
    def state(self) -> TextState:
        """For another one to go on from, as long as this one does not go on itself."""
        inputs = np.stack([*map(np.asarray, self._inputs), np.asarray(self._pending)], axis=1).astype(np.int32)
        return TextState(self._context, inputs, self.num_tokens)

    def _read_segment(self, context: Context, segment: tuple[HostTokens, HostTokens]) -> tuple[Scores, Context]:
        return self._decoder.read(*self._weights, *segment, context)

    def _prefill(self, targets: HostTokens) -> Scores:
        """Makes the KV cache of the open segment's inputs; returns the scores of the targets, [B, T] on the device."""
        shape = (len(self._pending), self._decoder.segment_length)
        padded_inputs, padded_targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for place, column in enumerate(self._inputs):
            padded_inputs[:, place] = column
        padded_targets[:, : targets.shape[1]] = targets
        found, self._kv_cache = self._decoder.prefill(*self._weights, padded_inputs, padded_targets, self._context)
        return found


def _whole(tokens: Tokens, segment_length: int) -> Inputs:
    """All positions are real; no row begins a document: a fresh context is one that has."""
    num_rows = tokens.shape[0]
    return Inputs(tokens, jnp.ones((num_rows, segment_length), bool), jnp.zeros(num_rows, bool))


def _read(
    config: LMConfig, params: Tree, buffers: Tree, inputs: Tokens, targets: Tokens, context: Context
) -> tuple[Scores, Context]:
    output = language_model.apply(config, params, buffers, _whole(inputs, inputs.shape[1]), context)
    assert output.context is not None, "the segment is whole"
    return scores(output.logits, targets), output.context


def _prepare(config: LMConfig, context: Context) -> Context:
    num_rows = max(leaf.shape[0] if leaf.ndim else 1 for leaf in jax.tree.leaves(context))
    return config.prepare_context(context, jnp.zeros(num_rows, bool))


def _prefill(
    config: LMConfig, params: Tree, buffers: Tree, inputs: Tokens, targets: Tokens, context: Context
) -> tuple[Scores, KVCache]:
    decoding = Decoding(jnp.zeros((), jnp.int32))
    segment = _whole(inputs, inputs.shape[1])
    output = language_model.apply(config, params, buffers, segment, context, decoding=decoding)
    return scores(output.logits, targets), output.report.kv_cache


def decode_step(
    config: LMConfig,
    segment_length: int,
    params: Tree,
    buffers: Tree,
    inputs: Int[Array, "B"],
    index: Int[Array, ""],
    kv_cache: KVCache,
    context: Context,
    position: Int[Array, ""],
    sampling: SamplingArrays,
) -> tuple[Drawn, KVCache]:
    """`Decoder.decode`, not compiled."""
    decoding = Decoding(index + config.layout(segment_length).num_read, kv_cache)
    segment = _whole(inputs[:, None], segment_length)
    output = language_model.apply(config, params, buffers, segment, context, decoding=decoding)
    logits = output.logits[:, 0]
    return Drawn(draw(logits, position, sampling), logits), output.report.kv_cache
