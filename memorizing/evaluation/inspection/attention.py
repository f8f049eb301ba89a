"""What every token of a document attended to within its segment, where a mechanism tells it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memorizing.array_typing import PerToken, Tree
from memorizing.batch import Batch
from memorizing.context import Attended, Context
from memorizing.evaluation.inspection.lookups import DocumentTokens
from memorizing.evaluation.reading import document_segments, inputs_of, read_segments
from memorizing.models import language_model
from memorizing.models.lm_config import LMConfig
from memorizing.models.losses import next_token_nats

# Of the positions that a head attends to from one position.
NUM_SHOWN = 8
# Says that there is no position.
NONE = 0xFFFF


class HeadsAttention(NamedTuple):
    """Attention of heads of one layer, position by position of the document.

    Position i is the one that predicts token i, having read token i - 1.

    Attributes:
      layer: its name.
      heads: which of its heads.
      distances: uint16 [tokens, N, k], positions back in the segment, 0 the own one; NONE where there is none. The one
        with the greatest weight comes first.
      weights: float32 [tokens, N, k], of the attention to them.
      groups: int32 [tokens, N, g], numbers of what each position belongs to, such as buckets or a cluster.
      group_names: what they are called.
    """

    layer: str
    heads: tuple[int, ...]
    distances: np.ndarray
    weights: np.ndarray
    groups: np.ndarray
    group_names: tuple[str, ...]


class AttentionReading(NamedTuple):
    """What came of reading a document once.

    Attributes:
      nats: float32 [tokens], -log p of each token.
      attention: of every layer that tells, and of each kind of head in it.
    """

    nats: np.ndarray
    attention: tuple[HeadsAttention, ...]


def tells_attention(config: LMConfig) -> bool:
    """Whether any layer reports what it attended to."""
    return any(mechanism.tells_attention for mechanism in config.stack.mechanisms)


def read_attention(
    config: LMConfig,
    params: Tree,
    buffers: Tree,
    document: DocumentTokens,
    segment_length: int,
    advance: Callable[[int], None] = lambda _: None,
) -> AttentionReading:
    """Reads a document once.

    Args:
      config, params, buffers: a model some of whose layers tell what they attended to.
      document: to read.
      segment_length: T, below 65,535.
      advance: told after each segment how many tokens were read.
    """
    compiled = jax.jit(functools.partial(_step, config), donate_argnums=2)

    def step(context: Context, segment: Batch) -> tuple[tuple[PerToken, dict[str, tuple[Attended, ...]]], Context]:
        return compiled(params, buffers, context, segment)

    num_tokens = len(document.tokens)
    nats: list[np.ndarray] = []
    told: dict[tuple[str, int], list[Attended]] = {}
    segments = document_segments(document.tokens, document.start_id, segment_length)
    context = config.init_context(1, segment_length)
    for index, ((segment_nats, attended), _) in enumerate(read_segments(step, context, segments)):
        nats.append(np.asarray(segment_nats[0]))
        for layer, kinds in attended.items():
            for kind, of_heads in enumerate(kinds):
                told.setdefault((layer, kind), []).append(of_heads)
        advance(min(segment_length, num_tokens - index * segment_length))
    attention = [_joined(layer, parts, num_tokens) for (layer, _), parts in told.items()]
    return AttentionReading(np.concatenate(nats)[:num_tokens], tuple(attention))


def _step(
    config: LMConfig,
    params: Tree,
    buffers: Tree,
    context: Context,
    segment: Batch,
) -> tuple[tuple[PerToken, dict[str, tuple[Attended, ...]]], Context]:
    output = language_model.apply(config, params, buffers, inputs_of(segment), context, num_shown=NUM_SHOWN)
    # Only a decode step returns none.
    assert output.context is not None
    nats = next_token_nats(output.logits, segment.targets)  # [1, T]
    return (jnp.where(segment.is_real, nats, 0.0), dict(output.report.attended)), output.context


def _joined(layer: str, parts: list[Attended], num_tokens: int) -> HeadsAttention:
    """What heads attended to in all segments of a document."""
    distances = []
    for part in parts:
        positions = part.positions[0]  # [T, N, k]
        back = np.arange(len(positions))[:, None, None] - positions
        distances.append(np.where(positions >= 0, back, NONE).astype(np.uint16))
    return HeadsAttention(
        layer=layer,
        heads=tuple(parts[0].heads),
        distances=np.concatenate(distances)[:num_tokens],
        weights=np.concatenate([part.weights[0] for part in parts])[:num_tokens],
        groups=np.concatenate([part.groups[0] for part in parts])[:num_tokens],
        group_names=parts[0].group_names,
    )
