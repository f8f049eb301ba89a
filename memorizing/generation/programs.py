"""What a model compiles to for reading and generating.

Whole segments pass as in training, the open one token by token: it is prefilled, and each decode step adds a token to
it. The layers keep its keys and values in a KV cache; what they carry from the segments before is only read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from memorizing.array_typing import Tokens, Tree
from memorizing.context import Context, Decoding, Inputs
from memorizing.evaluation.reading import pass_segments
from memorizing.generation.sampling import SamplingArrays, draw
from memorizing.models import language_model
from memorizing.models.lm_config import LMConfig
from memorizing.models.losses import Scores, scores
from memorizing.runtime import sharding

# What the layers keep of an open segment: by group of layers, `Report.kv_cache`.
KVCache = Mapping[str, Any]
# Tokens that the device is given to draw at once, at most.
MOST_TOKENS = 32


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
