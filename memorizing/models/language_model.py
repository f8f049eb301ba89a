"""The decoder-only language model: the one function that applies it to a segment.

Training, evaluation, inspection and generation all call `apply`.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memorizing.array_typing import Activations, Logits, PerToken, Tokens, Tree
from memorizing.context import (
    Context,
    Decoding,
    Inputs,
    Layout,
    Report,
    Rngs,
    Segment,
)
from memorizing.models.layers import Embedder, PositionTable, dropout, make_norm
from memorizing.models.lm_config import RECURRENT, LMConfig
from memorizing.models.losses import next_token_nats
from memorizing.models.memory.continuous_cache import CONTINUOUS_CACHE, Mixture
from memorizing.models.recurrent_tokens import MemoryTokens, written
from memorizing.models.stack.stack import StackOutput

# The entry of learned positions in parameters.
POSITIONS = "positions"


class ModelOutput(NamedTuple):
    """The result of one segment.

    Attributes:
      logits: float32 [B, T, V]; of a decode step [B, 1, V].
      context: for the next segment; None where the segment is not whole.
      buffers: as they are after the segment.
      report: what the layers report, by layer; the entries of `kv_cache` by group.
      hidden: [B, T, D], what the logits are made from.
      log_normalizer: float32 [B, T], log of the sum of exp(logits) over V where it is known already, else None.
    """

    logits: Logits
    context: Context | None
    buffers: Tree
    report: Report
    hidden: Activations
    log_normalizer: PerToken | None


def init(config: LMConfig, num_rows: int, segment_length: int, rng: jax.Array) -> dict[str, Tree]:
    """Parameters and buffers that still carry their logical axis names: `{"params": ..., "buffers": ...}`.

    They depend neither on rows nor on the segment, which only have to fit mesh and mechanisms. The initial parameters
    of a layer depend on the key and its index, not on how layers are stacked.
    """
    dtype = config.dims.dtype

    def key(name: str) -> jax.Array:
        return jax.random.fold_in(rng, zlib.crc32(name.encode()))

    tokens = jnp.zeros((num_rows, segment_length), jnp.int32)
    x = jnp.zeros((num_rows, segment_length, config.embed_dim), dtype)
    created = {
        "embedder": _embedder(config).init(key("embedder"), tokens, method="encode"),
        "final_norm": _final_norm(config).init(key("final_norm"), x),
    }
    if config.recurrent_tokens:
        memory_tokens = MemoryTokens(config.recurrent_tokens)
        state = config.recurrent_tokens.init_state(config.embed_dim, dtype, num_rows)
        created[RECURRENT] = memory_tokens.init(key(RECURRENT), x, state)
    if config.continuous_cache and config.continuous_cache.has_parameters:
        created[CONTINUOUS_CACHE] = Mixture(config.continuous_cache).init(key(CONTINUOUS_CACHE), x)
    if config.learned_positions:
        created[POSITIONS] = _position_table(config).init(key(POSITIONS), 0, segment_length)
    params = {name: variables["params"] for name, variables in created.items()}

    layout = config.layout(segment_length)
    layers = config.stack.init(key("layers"), num_rows, layout)
    return {
        "params": params | layers["params"],
        "buffers": layers["buffers"],
    }


@functools.lru_cache(maxsize=16)
def abstract_variables(config: LMConfig, num_rows: int, segment_length: int) -> dict[str, Tree]:
    """What `init` would give, which is not computed: shapes and dtypes, with their logical axis names."""
    return jax.eval_shape(lambda: init(config, num_rows, segment_length, jax.random.key(0)))


def apply(
    config: LMConfig,
    params: Tree,
    buffers: Tree,
    inputs: Inputs,
    context: Context,
    rngs: Rngs | None = None,
    decoding: Decoding | None = None,
    update_buffers: bool = False,
    num_shown: int = 0,
) -> ModelOutput:
    """Reads one segment of every row.

    Args:
      config: the model.
      params, buffers: of the model.
      inputs: the segment.
      context: from `LMConfig.init_context` or from the segment before; while a segment is generated, as
        `LMConfig.prepare_context` gives it.
      rngs: random numbers of the segment, of dropout for example; None where nothing is random, as in evaluation.
      decoding: the place in a segment that is being generated, with `kv_cache` by group; None for a whole segment.
      update_buffers: whether the layers may change their buffers, as they do in training.
      num_shown: see `context.Segment`.
    """
    layout = config.layout(inputs.is_real.shape[1])
    is_whole = decoding is None
    is_decode_step = decoding is not None and decoding.kv_cache is not None
    if is_whole:
        context = config.prepare_context(context, inputs.start_of_document)

    embedder = _embedder(config)
    x = _apply_module(embedder, params["embedder"], inputs.tokens, method="encode")
    if config.learned_positions:
        first = decoding.position - layout.num_read if is_decode_step else 0
        x = x + _apply_module(_position_table(config), params[POSITIONS], first, x.shape[1])
    x = dropout(x, config.dropout, rngs, "embedding_dropout")
    if config.recurrent_tokens and not is_decode_step:
        memory_tokens = MemoryTokens(config.recurrent_tokens)
        x = _apply_module(memory_tokens, params[RECURRENT], x, context[RECURRENT], is_whole)

    segment = Segment(
        is_real=layout.widen(inputs.is_real),
        layout=layout,
        decoding=decoding,
        rngs=rngs,
        tokens=inputs.tokens,
        clock=context["clock"],
        taught=inputs.taught,
        num_shown=num_shown,
    )
    layers = config.stack.apply(params, buffers, x, segment, context, update_buffers)
    x = _apply_module(_final_norm(config), params["final_norm"], layers.x)

    # In a decode step x is the one position that is passed.
    own = x if is_decode_step else layout.own(x)
    logits = _apply_module(embedder, params["embedder"], own, method="decode")
    log_normalizer = None
    report = layers.report
    if config.continuous_cache:
        mixture = _apply_module(Mixture(config.continuous_cache), params.get(CONTINUOUS_CACHE, {}), own)
        state = context[CONTINUOUS_CACHE]
        (logits, log_normalizer), of_cache = config.continuous_cache.mix(logits, own, state, mixture, segment)
        report = report.with_part(CONTINUOUS_CACHE, of_cache)

    new_context = _next_context(config, inputs, context, layout, x, layers) if is_whole else None
    return ModelOutput(logits, new_context, layers.buffers, report, own, log_normalizer)


def token_nats(config: LMConfig, params: Tree, output: ModelOutput, targets: Tokens) -> PerToken:
    """-log p(target) in nats, float32 [B, T], unweighted.

    With `LMConfig.loss_chunks` the logits [B, T, V] of `output` are not used, so that a compiled program never has them
    all: they are computed, and computed again for the gradient, for a part of the segment at a time.

    Args:
      config, params: of the model.
      output: of a whole segment.
      targets: int [B, T].
    """
    if config.loss_chunks == 1:
        return next_token_nats(output.logits, targets, output.log_normalizer)
    embedder = _embedder(config)

    @jax.checkpoint
    def of_chunk(chunk: tuple[Activations, Tokens]) -> PerToken:
        hidden, targets = chunk
        logits = _apply_module(embedder, params["embedder"], hidden, method="decode")
        return next_token_nats(logits, targets)

    def cut(x: jax.Array) -> jax.Array:
        num_rows, length, *rest = x.shape
        chunks = x.reshape(num_rows, config.loss_chunks, length // config.loss_chunks, *rest)
        return jnp.moveaxis(chunks, 1, 0)

    # [chunks, B, T / chunks]
    nats = jax.lax.map(of_chunk, (cut(output.hidden), cut(targets)))
    return jnp.moveaxis(nats, 0, 1).reshape(targets.shape)


def _next_context(
    config: LMConfig,
    inputs: Inputs,
    context: Context,
    layout: Layout,
    x: Activations,
    layers: StackOutput,
) -> Context:
    """The context for the next segment.

    Args:
      config: the model.
      inputs: this segment.
      context: of this segment.
      layout: of this segment.
      x: output of the last norm, [B, T, D].
      layers: output of the layers.
    """
    clock = context["clock"] + 1
    new_context: Context = {"clock": clock, **layers.states}
    if config.recurrent_tokens:
        new_context[RECURRENT] = written(layout, x)
    if config.continuous_cache:
        state = context[CONTINUOUS_CACHE]
        new_context[CONTINUOUS_CACHE] = config.continuous_cache.record(
            state, layout.own(x), inputs.tokens, inputs.is_real
        )
    return new_context


def _apply_module(
    module: nn.Module,
    params: Tree,
    *args: Any,
    method: str | None = None,
) -> Any:
    """The output of a module that has parameters only."""
    return module.apply({"params": params}, *args, method=method)


def _embedder(config: LMConfig) -> Embedder:
    return Embedder(
        config.vocab_size,
        config.embed_dim,
        config.dims.dtype,
        config.head,
        config.scales_embedding,
        config.final_logit_cap,
    )


def _position_table(config: LMConfig) -> PositionTable:
    return PositionTable(config.learned_positions, config.embed_dim, config.dims.dtype)


def _final_norm(config: LMConfig) -> nn.Module:
    return make_norm(config.norm, config.norm_epsilon, name="final_norm")
