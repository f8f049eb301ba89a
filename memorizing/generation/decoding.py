"""Generation with a model: whole segments pass as in training, the open one token by token.

An open segment is prefilled, and each decode step adds a token to it: the layers keep its keys and values in a KV
cache, and what they carry from the segments before is only read. When the segment is full it passes once more as a
whole, by the same code as in training, and that replaces the context: the memory that a text leaves does not depend on
whether it was read or generated.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from memorizing.array_typing import Tokens, Tree
from memorizing.context import Context, Decoding, Inputs
from memorizing.evaluation.reading import MOST_SEGMENTS, Pace, in_groups, joined, pass_segments, read_segments
from memorizing.generation.sampling import Sampling, SamplingArrays, draw
from memorizing.models import language_model
from memorizing.models.lm_config import LMConfig
from memorizing.models.losses import Scores, scores
from memorizing.runtime import sharding

# What the layers keep of an open segment: by group of layers, `Report.kv_cache`.
KVCache = Mapping[str, Any]
# On the host.
HostTokens = Int[np.ndarray, "B T"]
# Tokens that the device is given to draw at once, at most.
MOST_TOKENS = 32


class HostScores(NamedTuple):
    """`Scores` on the host: how well the tokens of a text were predicted.

    Attributes:
      nats: float32, -log p of each.
      is_likeliest: bool, whether no token had a larger p.
    """

    nats: np.ndarray
    is_likeliest: np.ndarray


class Weights(NamedTuple):
    """Parameters and buffers of a model, on the devices."""

    params: Tree
    buffers: Tree


class OpenSegment(NamedTuple):
    """A segment that is being written, as far as it has come: what a decode step takes and gives.

    What the KV cache holds of later positions is arbitrary. So whoever drew more tokens than are wanted goes on from
    an earlier place with the same cache.

    Attributes:
      inputs: int32 [B], the pending tokens: predicted, but not read yet.
      index: int32 scalar, where in the segment they stand.
      position: int32 scalar, in the document, of the tokens that are drawn next.
      kv_cache: of the segment's earlier positions.
    """

    inputs: Any
    index: Any
    position: Any
    kv_cache: KVCache | Any


class Decoder:
    """What a model compiles to for reading and generating. No program depends on a position or on the length of a text.

    S is `MOST_SEGMENTS`.

    Attributes:
      config, segment_length: of the model.
      read: `(weights, context, inputs [B, S, T], targets [B, S, T], num_segments) -> (Scores [B, S, T], context)`, so
        many whole segments, the first ones; the context is donated.
      prepare: `(context) -> context` as the next segment reads it; donated.
      prefill: `(weights, context, inputs [B, T], targets [B, T]) -> (Scores [B, T], KV cache)`, the first positions of
        a segment, padded to T; the context as `prepare` gives it, as in every decode step.
      decode: `(weights, context, open segment, sampling, num_tokens) -> (tokens [B, MOST_TOKENS], open segment)`, so
        many decode steps; the open segment is donated.
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
        self.read = self.compiled(functools.partial(_read, config), donate_argnums=1)
        self.prepare = self.compiled(functools.partial(_prepare, config), donate_argnums=0)
        self.prefill = self.compiled(functools.partial(_prefill, config))
        # What a step gives lies as what the first one is given: else that would be another program.
        self._everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        row = self._everywhere
        self.decode = self.compiled(
            functools.partial(_decode, config, segment_length),
            donate_argnums=2,
            out_shardings=(row, OpenSegment(inputs=row, index=row, position=row, kv_cache=None)),
        )

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

    def everywhere(self, tree: Tree) -> Tree:
        """Arrays of the host on every device."""
        return tree if self._everywhere is None else jax.device_put(tree, self._everywhere)

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
        # The open segment's inputs, each [B], on the host as the pending ones.
        self._inputs: list[Any]
        *self._inputs, self._pending = np.asarray(state.inputs).T
        self._context = decoder.prepare(decoder.place(state.context))
        self.num_tokens = int(state.num_tokens)
        # Of the open segment; None where it has to be prefilled first.
        self._kv_cache: KVCache | None = None
        self._reading, self._writing = Pace(MOST_SEGMENTS), Pace(MOST_TOKENS)

    def read(self, tokens: HostTokens, on_progress: Callable[[int], None] = lambda _: None) -> HostScores:
        """Reads on.

        Args:
          tokens: int32 [B, length].
          on_progress: told after every segment how many of the tokens have been read.

        Returns:
          How well each token was predicted, [B, length].
        """
        if not tokens.shape[1]:
            return HostScores(np.zeros(tokens.shape, np.float32), np.ones(tokens.shape, bool))
        num_before, length = len(self._inputs), self._decoder.segment_length
        before = self.state.inputs
        # The open segment passes again from its start; what of it was scored is not scored again.
        inputs = np.concatenate([before, tokens[:, :-1]], axis=1)
        targets = np.concatenate([before[:, 1:], tokens], axis=1)
        num_whole = inputs.shape[1] // length * length
        parts: list[Scores] = []
        for scored in self._pass_whole(inputs[:, :num_whole], targets[:, :num_whole]):
            parts.append(scored)
            on_progress(min(len(parts) * length - num_before, tokens.shape[1]))
        self._inputs = list(inputs[:, num_whole:].T)
        self._pending = tokens[:, -1].astype(np.int32)
        self._kv_cache = None
        if self._inputs:
            parts.append(jax.device_get(self._prefill(targets[:, num_whole:])))
        self.num_tokens += tokens.shape[1]
        on_progress(tokens.shape[1])
        scored = slice(num_before, num_before + tokens.shape[1])
        return HostScores(*(np.concatenate(part, axis=1)[:, scored] for part in zip(*parts, strict=True)))

    def generate(
        self, num_tokens: int, sampling: Sampling, seed: int, allowed: Bool[np.ndarray, "V"]
    ) -> Iterator[Int[np.ndarray, "B"]]:
        """Draws tokens and reads them.

        Row r's token at a position depends on nothing but the seed, r, the position and what row r has read: not on the
        number of rows or of tokens, nor on where generating was interrupted. Whoever stops has read those tokens that
        were handed out, also where the device has drawn more.

        Args:
          num_tokens: how many.
          sampling: how they are drawn.
          seed: of the random numbers.
          allowed: which tokens may be drawn.

        Yields:
          The next token of every row, int32.
        """
        arrays = sampling.arrays(allowed, seed)
        while num_tokens:
            segment = self.open_segment()
            num_here = min(num_tokens, self.room)
            for tokens in self._drawn(segment, arrays, num_here):
                self.accept(tokens)
                yield tokens
            num_tokens -= num_here

    def open_segment(self) -> OpenSegment:
        """What the next token is drawn from; a full segment is closed first, and the next one opened."""
        if len(self._inputs) == self._decoder.segment_length:
            inputs = np.stack(self._inputs, axis=1)[:, None]
            # Targets only matter to the scores, which nobody asks for here.
            _, context = self._read_group(self._context, [(inputs, inputs)])
            self._context = self._decoder.prepare(context)
            self._inputs = []
            if not self._decoder.config.caches_segment_only:
                self._kv_cache = None
        if self._kv_cache is None:
            self._prefill(np.zeros((len(self._pending), 0), np.int32))
        assert self._kv_cache is not None, "prefilled above"
        return OpenSegment(self._pending, np.int32(len(self._inputs)), np.int32(self.num_tokens), self._kv_cache)

    def accept(self, tokens: Int[np.ndarray, "B"]) -> None:
        """Takes tokens that were drawn from `open_segment`, or from what came of it: they become the pending ones."""
        self._inputs.append(self._pending)
        self._pending = tokens
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
    def room(self) -> int:
        """Tokens that can be read before the open segment is full, from 0 to T."""
        return self._decoder.segment_length - len(self._inputs)

    @property
    def context(self) -> Context:
        """That the open segment reads."""
        return self._context

    @property
    def state(self) -> TextState:
        """For another one to go on from, as long as this one does not go on itself."""
        inputs = np.stack([*self._inputs, self._pending], axis=1).astype(np.int32)
        return TextState(self._context, inputs, self.num_tokens)

    def _pass_whole(self, inputs: HostTokens, targets: HostTokens) -> Iterator[Scores]:
        """Passes whole segments, if there are any, a few at a time; yields the scores of each, on the host."""
        if not inputs.size:
            return
        self._reading.start()
        length = self._decoder.segment_length
        ranges = (slice(first, first + length) for first in range(0, inputs.shape[1], length))
        segments = ((inputs[:, None, of_segment], targets[:, None, of_segment]) for of_segment in ranges)
        groups = in_groups(segments, self._reading)
        for (found, num_segments), context in read_segments(self._read_group, self._context, groups):
            self._context = context
            self._reading.has_passed(num_segments)
            for place in range(num_segments):
                yield Scores(*(leaf[:, place] for leaf in found))
        self._context = self._decoder.prepare(self._context)

    def _read_group(
        self, context: Context, group: list[tuple[HostTokens, HostTokens]]
    ) -> tuple[tuple[Scores, int], Context]:
        inputs, targets = joined(group)
        found, context = self._decoder.read(self._weights, context, inputs, targets, np.int32(len(group)))
        return (found, len(group)), context

    def _prefill(self, targets: HostTokens) -> Scores:
        """Makes the KV cache of the open segment's inputs; returns the scores of the targets, [B, T] on the device."""
        shape = (len(self._pending), self._decoder.segment_length)
        padded_inputs, padded_targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for place, column in enumerate(self._inputs):
            padded_inputs[:, place] = column
        padded_targets[:, : targets.shape[1]] = targets
        found, self._kv_cache = self._decoder.prefill(self._weights, self._context, padded_inputs, padded_targets)
        return found

    def _drawn(self, segment: OpenSegment, sampling: SamplingArrays, num_tokens: int) -> Iterator[Int[np.ndarray, "B"]]:
        """Tokens of the open segment; the device draws the next few while the caller has these."""
        self._writing.start()
        inputs, index, position = self._decoder.everywhere(segment[:3])
        segment = OpenSegment(inputs, index, position, segment.kv_cache)
        drawn: collections.deque[tuple[Any, int]] = collections.deque()
        while num_tokens or drawn:
            if num_tokens and len(drawn) < 2:
                num_now = min(self._writing.number, num_tokens)
                tokens, segment = self._decoder.decode(
                    self._weights, self._context, segment, sampling, np.int32(num_now)
                )
                self._kv_cache = segment.kv_cache
                drawn.append((tokens, num_now))
                num_tokens -= num_now
            else:
                tokens, num_drawn = drawn.popleft()
                of_rows = np.asarray(tokens)
                self._writing.has_passed(num_drawn)
                yield from of_rows[:, :num_drawn].T


def _whole(tokens: Tokens, segment_length: int) -> Inputs:
    """All positions are real; no row begins a document: a fresh context is one that has."""
    num_rows = tokens.shape[0]
    return Inputs(tokens, jnp.ones((num_rows, segment_length), bool), jnp.zeros(num_rows, bool))


def _read(
    config: LMConfig,
    weights: Weights,
    context: Context,
    inputs: Int[Array, "B S T"],
    targets: Int[Array, "B S T"],
    num_segments: Int[Array, ""],
) -> tuple[Scores, Context]:
    def step(context: Context, segment: tuple[Tokens, Tokens]) -> tuple[Scores, Context]:
        inputs, targets = segment
        output = language_model.apply(config, *weights, _whole(inputs, inputs.shape[1]), context)
        assert output.context is not None, "the segment is whole"
        return scores(output.logits, targets), output.context

    return pass_segments(step, context, (inputs, targets), num_segments)


def _prepare(config: LMConfig, context: Context) -> Context:
    num_rows = max(leaf.shape[0] if leaf.ndim else 1 for leaf in jax.tree.leaves(context))
    return config.prepare_context(context, jnp.zeros(num_rows, bool))


def _prefill(
    config: LMConfig, weights: Weights, context: Context, inputs: Tokens, targets: Tokens
) -> tuple[Scores, KVCache]:
    decoding = Decoding(jnp.zeros((), jnp.int32))
    segment = _whole(inputs, inputs.shape[1])
    output = language_model.apply(config, *weights, segment, context, decoding=decoding)
    return scores(output.logits, targets), output.report.kv_cache


def predict(
    config: LMConfig, segment_length: int, weights: Weights, context: Context, segment: OpenSegment
) -> tuple[Float[Array, "B V"], KVCache]:
    """What follows the pending tokens: logits, float32, and the KV cache with these tokens."""
    decoding = Decoding(segment.index + config.layout(segment_length).num_read, segment.kv_cache)
    inputs = _whole(segment.inputs[:, None], segment_length)
    output = language_model.apply(config, *weights, inputs, context, decoding=decoding)
    return output.logits[:, 0], output.report.kv_cache


def decode_step(
    config: LMConfig,
    segment_length: int,
    weights: Weights,
    context: Context,
    segment: OpenSegment,
    sampling: SamplingArrays,
) -> OpenSegment:
    """The segment one token further: the tokens that were drawn are its pending ones."""
    logits, kv_cache = predict(config, segment_length, weights, context, segment)
    drawn = draw(logits, segment.position, sampling)
    return OpenSegment(drawn, segment.index + 1, segment.position + 1, kv_cache)


def decode_steps(
    step: Callable[[OpenSegment], OpenSegment], segment: OpenSegment, num_tokens: Int[Array, ""]
) -> tuple[Int[Array, "*rows MOST_TOKENS"], OpenSegment]:
    """So many decode steps within a compiled program, which is one for any number up to `MOST_TOKENS`.

    Args:
      step: one of them.
      segment: before the first; its pending tokens are int32 [*rows].
      num_tokens: how many.

    Returns:
      The tokens that were drawn, zeros behind them; and the segment after the last step.
    """

    def draw_one(index: Int[Array, ""], carried: tuple[Array, OpenSegment]) -> tuple[Array, OpenSegment]:
        tokens, segment = carried
        segment = step(segment)
        return tokens.at[..., index].set(segment.inputs), segment

    tokens = jnp.zeros((*segment.inputs.shape, MOST_TOKENS), jnp.int32)
    return jax.lax.fori_loop(0, num_tokens, draw_one, (tokens, segment))


def _decode(
    config: LMConfig,
    segment_length: int,
    weights: Weights,
    context: Context,
    segment: OpenSegment,
    sampling: SamplingArrays,
    num_tokens: Int[Array, ""],
) -> tuple[Int[Array, "B MOST_TOKENS"], OpenSegment]:
    def step(segment: OpenSegment) -> OpenSegment:
        return decode_step(config, segment_length, weights, context, segment, sampling)

    return decode_steps(step, segment, num_tokens)
