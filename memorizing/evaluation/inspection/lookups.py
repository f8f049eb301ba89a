"""What a memory did for one document.

It tells the loss of every token with a smaller and a larger memory, and what was retrieved. The per-token difference
and the look at retrieved neighbours are those of Wu et al. 2022, section 4.6 (their figure 7 and table 8).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from memorizing.array_typing import Tree
from memorizing.evaluation.inspection.document import DocumentTokens, read_document
from memorizing.models.layers import soft_cap
from memorizing.models.lm_config import LMConfig
from memorizing.models.memory import external_memory
from memorizing.models.memory.external_memory import positions_back
from memorizing.models.memory.retrieval import Retrieved


@dataclasses.dataclass(frozen=True)
class Lookups:
    """What the queries of one layer, or of the continuous cache, found, position by position of the document.

    Position i is the one that predicts token i, having read token i - 1.

    Attributes:
      layer: its name.
      gate: float32 [N], share of the memory in the layer's output, or of the cache in the predictions; the mean over
        the document.
      scale: float32 [N], factor of the scores in the softmax.
      distances: int32 [tokens, N, K], how many positions back the neighbour's key was made; 0 where there is none. The
        best neighbour comes first.
      scores: float32 [tokens, N, K], query . key; -inf where there is none.
      logit_cap: of the scaled scores, see `layers.soft_cap`.
    """

    layer: str
    gate: np.ndarray
    scale: np.ndarray
    distances: np.ndarray
    scores: np.ndarray
    logit_cap: float = 0.0

    @property
    def heads(self) -> np.ndarray:
        """The heads that found anything, or all where none did: of some layers not all have a memory."""
        has_found = (self.distances > 0).any(axis=(0, 2))
        return np.flatnonzero(has_found | ~has_found.any())

    def weights(self, positions: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Attention to each neighbour, float32 [tokens, N, K]: the softmax over those of a head.

        0 where there is no neighbour.
        """
        scores = self.scores[positions]
        exists = scores > -np.inf
        scaled = np.where(exists, scores, 0.0) * self.scale[None, :, None]
        logits = np.where(exists, soft_cap(jnp.asarray(scaled), self.logit_cap), -1e30)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        unnormalised = np.where(exists, np.exp(shifted), 0.0)
        total = unnormalised.sum(axis=-1, keepdims=True)
        return (unnormalised / np.maximum(total, 1e-30)).astype(np.float32)


class Recall(NamedTuple):
    """How often look-ups led to the token that had to be predicted: hits. All are means over positions.

    Attributes:
      hit_share: float64 [N], share of the neighbours that are hits.
      hit_weight: float64 [N], share of the attention that is on hits.
      weight_entropy: float64 [N], of the attention to the neighbours, in nats.
      hit_chance: share of hits among all that lay in the memory.
    """

    hit_share: np.ndarray
    hit_weight: np.ndarray
    weight_entropy: np.ndarray
    hit_chance: float


def recall_of(lookups: Lookups, tokens: np.ndarray, memory_size: int, segment_length: int) -> Recall:
    """The recall of one layer over a document, of every 8th position.

    Args:
      lookups: of the layer.
      tokens: int32 [tokens], the document.
      memory_size, segment_length: M, T.
    """
    positions = np.arange(segment_length, len(tokens), 8)
    # [positions, N, K]
    distances = lookups.distances[positions]
    exists = distances > 0
    led_to = tokens[positions[:, None, None] - distances]
    is_hit = exists & (led_to == tokens[positions, None, None])
    weights = lookups.weights(positions)
    nats = -(weights * np.log(np.where(weights > 0, weights, 1.0))).sum(axis=-1)
    return Recall(
        hit_share=is_hit.sum(axis=(0, 2)) / np.maximum(exists.sum(axis=(0, 2)), 1),
        hit_weight=(weights * is_hit).sum(axis=(0, 2)) / max(len(positions), 1),
        weight_entropy=nats.sum(axis=0) / max(len(positions), 1),
        hit_chance=_hit_chance(tokens, positions, memory_size, segment_length),
    )


def _hit_chance(tokens: np.ndarray, positions: np.ndarray, memory_size: int, segment_length: int) -> float:
    """Share of the earlier segments' tokens, as far as the memory reaches, that are the one of a position."""
    num_hits = 0
    num_slots = 0
    for position in positions.tolist():
        start = position // segment_length * segment_length
        held = tokens[max(start - memory_size, 0) : start]
        num_hits += int(np.sum(held == tokens[position]))
        num_slots += len(held)
    return num_hits / max(num_slots, 1)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A document read with two memories by the same weights.

    Attributes:
      tokens: int32 [tokens].
      memory_sizes: the smaller memory (0 for none) and the larger, in tokens.
      segment_length: T.
      nats: float32 [2, tokens], -log p of each token with either.
      lookups: of every external memory, with the larger one.
    """

    tokens: np.ndarray
    memory_sizes: tuple[int, int]
    segment_length: int
    nats: np.ndarray
    lookups: tuple[Lookups, ...]

    @property
    def gain(self) -> np.ndarray:
        """How much the larger memory helped each token, in nats: the paper's Delta, float32 [tokens]."""
        return self.nats[0] - self.nats[1]

    @property
    def num_equal(self) -> int:
        """So many tokens at the start see the same with both memories: the smaller has lost nothing yet."""
        return min(self.memory_sizes[0] + self.segment_length, len(self.tokens))


class DocumentReading(NamedTuple):
    """What came of reading a document once.

    Attributes:
      nats: float32 [tokens], -log p of each token.
      lookups: of every external memory; empty where they were not asked for.
    """

    nats: np.ndarray
    lookups: tuple[Lookups, ...]


def inspect(
    config: LMConfig,
    params: Tree,
    buffers: Tree,
    document: DocumentTokens,
    memory_sizes: tuple[int, int],
    segment_length: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Inspection:
    """Reads a document twice, from an empty memory.

    Args:
      config: a model with an external memory.
      params, buffers: of the model.
      document: to read.
      memory_sizes: the smaller, 0 for none, and the larger; multiples of the segment length.
      segment_length: T.
      advance: told after each segment how many tokens were read.
    """
    smaller, larger = memory_sizes
    read = functools.partial(
        read_with_memory,
        params=params,
        buffers=buffers,
        document=document,
        segment_length=segment_length,
        advance=advance,
    )
    small = read(config.with_memory_size(smaller or segment_length), is_cleared=smaller == 0)
    large = read(config.with_memory_size(larger), keeps_lookups=True)
    nats = np.stack([small.nats, large.nats])
    return Inspection(document.tokens, memory_sizes, segment_length, nats, large.lookups)


def read_with_memory(
    config: LMConfig,
    params: Tree,
    buffers: Tree,
    document: DocumentTokens,
    segment_length: int,
    advance: Callable[[int], None] = lambda _: None,
    is_cleared: bool = False,
    keeps_lookups: bool = False,
) -> DocumentReading:
    """Reads a document once.

    Args:
      config, params, buffers: the model.
      document: to read.
      segment_length: T.
      advance: told after each segment how many tokens were read.
      is_cleared: empties the memory before each segment.
      keeps_lookups: returns what was retrieved.
    """
    nats, told = read_document(
        config,
        params,
        buffers,
        document,
        segment_length,
        told_by=lambda output: dict(output.report.retrieved) if keeps_lookups else {},
        ablation=lambda context: config.map_memories(context, external_memory.cleared) if is_cleared else context,
        advance=advance,
    )
    sizes = config.memory_sizes
    lookups = [_lookups(layer, [each[layer] for each in told], sizes[layer], len(nats)) for layer in told[0]]
    return DocumentReading(nats, tuple(lookups))


def _lookups(layer: str, parts: list[Retrieved], memory_size: int, num_tokens: int) -> Lookups:
    """What a layer retrieved in all segments of a document."""
    distances = []
    scores = []
    # The document began with the first segment: as many were processed before each as lie before it in the document.
    for index, part in enumerate(parts):
        slots = part.neighbours.slots[0]  # [T, N, K]
        of_slots = part.neighbours.scores[0]  # [T, N, K]
        length = len(slots)
        back_from_start = positions_back(slots, index, memory_size, length)
        # Of a slot that holds the key of the position before its own, the key counts.
        back = back_from_start + np.arange(length)[:, None, None] + part.stores_next
        distances.append(np.where(of_slots > -np.inf, back, 0).astype(np.int32))
        scores.append(of_slots)
    return Lookups(
        layer=layer,
        gate=np.stack([part.gate for part in parts]).mean(axis=0, dtype=np.float32),
        scale=np.asarray(parts[0].scale, np.float32),
        distances=np.concatenate(distances)[:num_tokens],
        scores=np.concatenate(scores)[:num_tokens],
        logit_cap=parts[0].logit_cap,
    )
