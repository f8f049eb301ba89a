"""What every token of a document attended to within its segment, where a mechanism tells it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from memorizing.array_typing import Tree
from memorizing.context import Attended
from memorizing.evaluation.inspection.document import DocumentTokens, read_document
from memorizing.models.lm_config import LMConfig

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
    nats, told = read_document(
        config,
        params,
        buffers,
        document,
        segment_length,
        told_by=lambda output: dict(output.report.attended),
        num_shown=NUM_SHOWN,
        advance=advance,
    )
    # By layer and kind of head, of every segment.
    parts: dict[tuple[str, int], list[Attended]] = {}
    for of_segment in told:
        for layer, kinds in of_segment.items():
            for kind, of_heads in enumerate(kinds):
                parts.setdefault((layer, kind), []).append(of_heads)
    attention = [_joined(layer, of_kind, len(nats)) for (layer, _), of_kind in parts.items()]
    return AttentionReading(nats, tuple(attention))


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
