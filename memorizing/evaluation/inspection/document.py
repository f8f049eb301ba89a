"""Reading a document once, from its start, while a model tells what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from memorizing.array_typing import PerToken, Tree
from memorizing.batch import Batch
from memorizing.context import Context
from memorizing.evaluation.reading import document_segments, inputs_of, read_segments
from memorizing.models import language_model
from memorizing.models.language_model import ModelOutput
from memorizing.models.lm_config import LMConfig
from memorizing.models.losses import next_token_nats

Told = TypeVar("Told")


class DocumentTokens(NamedTuple):
    """What is read.

    Attributes:
      tokens: int32 [tokens].
      start_id: stands before them.
    """

    tokens: np.ndarray
    start_id: int


def read_document(
    config: LMConfig,
    params: Tree,
    buffers: Tree,
    document: DocumentTokens,
    segment_length: int,
    told_by: Callable[[ModelOutput], Told],
    num_shown: int = 0,
    ablation: Callable[[Context], Context] = lambda context: context,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[np.ndarray, list[Told]]:
    """Reads a document once.

    Args:
      config, params, buffers: the model.
      document: to read.
      segment_length: T.
      told_by: what is kept of each segment.
      num_shown: see `context.Segment`.
      ablation: what is done to the context before each segment.
      advance: told after each segment how many tokens were read.

    Returns:
      -log p of each token, float32 [tokens]; and what was kept of each segment, on the host.
    """

    def apply(params: Tree, buffers: Tree, context: Context, segment: Batch) -> tuple[tuple[PerToken, Told], Context]:
        inputs = inputs_of(segment)
        output = language_model.apply(config, params, buffers, inputs, ablation(context), num_shown=num_shown)
        # Only a decode step returns none.
        assert output.context is not None
        # [1, T]
        nats = next_token_nats(output.logits, segment.targets)
        return (jnp.where(segment.is_real, nats, 0.0), told_by(output)), output.context

    compiled = jax.jit(apply, donate_argnums=2)

    def step(context: Context, segment: Batch) -> tuple[tuple[PerToken, Told], Context]:
        return compiled(params, buffers, context, segment)

    num_tokens = len(document.tokens)
    nats: list[np.ndarray] = []
    told: list[Told] = []
    segments = document_segments(document.tokens, document.start_id, segment_length)
    context = config.init_context(1, segment_length)
    for index, ((of_tokens, of_segment), _) in enumerate(read_segments(step, context, segments)):
        nats.append(np.asarray(of_tokens[0]))
        told.append(of_segment)
        advance(min(segment_length, num_tokens - index * segment_length))
    return np.concatenate(nats)[:num_tokens], told
