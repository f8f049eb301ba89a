"""What a memory did for one document: the loss of every token with a smaller and a larger memory, and the neighbours that every query attended to.

The per-token difference and the look at retrieved neighbours are those of Wu et al. 2022, section 4.6 (their figure 7 and table 8).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memorizing.array_typing import PerToken, RealPositions, Tokens, Tree
from memorizing.attention.knn import KNNAttention, forget_memories
from memorizing.context import Context
from memorizing.external_memory import NEIGHBOURS, Neighbours, positions_back
from memorizing.losses import next_token_nats
from memorizing.model import LanguageModel, LMConfig


@dataclasses.dataclass(frozen=True)
class Lookups:
    """What the queries of one layer found, position by position of the document. Position i is the one that predicts token i, having read token i - 1.

    Attributes:
      layer: its name.
      gate: float32 [N], share of the memory in the layer's output.
      scale: float32 [N], factor of the scores in the softmax.
      distances: int32 [tokens, N, K], how many positions back the neighbour was stored; 0 where there is none. Best neighbour first.
      scores: float32 [tokens, N, K], query . key, both of length 1; -inf where there is none.
    """

    layer: str
    gate: np.ndarray
    scale: np.ndarray
    distances: np.ndarray
    scores: np.ndarray

    def weights(self, positions: slice = slice(None)) -> np.ndarray:
        """Attention to each neighbour, float32 [tokens, N, K]: the softmax over the neighbours of a head; 0 where there is none."""
        scores = self.scores[positions]
        exists = scores > -np.inf
        logits = np.where(exists, scores, -1e30) * self.scale[None, :, None]
        shifted = np.where(exists, np.exp(logits - logits.max(axis=-1, keepdims=True)), 0.0)
        return (shifted / np.maximum(shifted.sum(axis=-1, keepdims=True), 1e-30)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A document read with two memories by the same weights.

    Attributes:
      tokens: int32 [tokens].
      memory_sizes: the smaller memory (0 for none) and the larger, in tokens.
      segment_length: T.
      nats: float32 [2, tokens], -log p of each token with either.
      lookups: of every layer with an external memory, with the larger one.
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


class Read(NamedTuple):
    """A document after one reading: `nats` float32 [tokens], and by layer the distances and scores of `Lookups`, and the gate."""

    nats: np.ndarray
    neighbours: dict[str, tuple[np.ndarray, np.ndarray]]
    gates: dict[str, np.ndarray]


def inspect(
    config: LMConfig,
    params: Tree,
    tokens: np.ndarray,
    start_id: int,
    memory_sizes: tuple[int, int],
    segment_length: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Inspection:
    """Reads a document twice, from an empty memory.

    Args:
      config: a model with an external memory.
      params: of the model.
      tokens: int32 [tokens].
      start_id: stands before them.
      memory_sizes: the smaller, 0 for none, and the larger; multiples of the segment length.
      segment_length: T.
      advance: told after each segment how many tokens were read.
    """
    smaller, larger = memory_sizes
    small = read(
        config.with_memory_size(smaller or segment_length),
        params,
        tokens,
        start_id,
        segment_length,
        advance,
        is_cleared=smaller == 0,
    )
    large = read(
        config.with_memory_size(larger), params, tokens, start_id, segment_length, advance, keeps_neighbours=True
    )
    lookups = tuple(
        Lookups(layer, large.gates[layer], _scale(params[layer]), *neighbours)
        for layer, neighbours in large.neighbours.items()
    )
    return Inspection(tokens, memory_sizes, segment_length, np.stack([small.nats, large.nats]), lookups)


def read(
    config: LMConfig,
    params: Tree,
    tokens: np.ndarray,
    start_id: int,
    segment_length: int,
    advance: Callable[[int], None] = lambda _: None,
    is_cleared: bool = False,
    keeps_neighbours: bool = False,
) -> Read:
    """Reads a document once, segment after segment; `is_cleared` empties the memory before each, `keeps_neighbours` keeps what was found."""
    num_tokens, length = len(tokens), segment_length
    targets = np.pad(tokens.astype(np.int32), (0, -num_tokens % length))
    inputs = np.concatenate([[start_id], targets[:-1]]).astype(np.int32)
    is_real = np.arange(len(targets)) < num_tokens
    step = jax.jit(
        functools.partial(_step, config, is_cleared=is_cleared, keeps_neighbours=keeps_neighbours), donate_argnums=1
    )
    context = config.init_context(1, length)
    nats = np.zeros(len(targets), np.float32)
    collected: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    gates: dict[str, np.ndarray] = {}
    sizes = {
        group.name: group.attention.memory_size for group in config.groups if isinstance(group.attention, KNNAttention)
    }

    def collect(start: int, result: tuple[PerToken, dict[str, Neighbours], dict[str, jax.Array]]) -> None:
        segment_nats, neighbours, new_gates = jax.device_get(result)
        nats[start : start + length] = segment_nats[0]
        gates.update(new_gates)
        for name, found in neighbours.items():
            if name not in collected:
                shape = (len(targets), *found.slots.shape[2:])
                collected[name] = np.zeros(shape, np.int32), np.full(shape, -np.inf, np.float32)
            distances, scores = collected[name]
            # The document began with the first segment: as many segments were processed before this one as lie before it in the document.
            back = positions_back(found.slots[0], start // length, sizes[name], length)
            exists = found.scores[0] > -np.inf
            distances[start : start + length] = np.where(exists, back + np.arange(length)[:, None, None], 0)
            scores[start : start + length] = found.scores[0]

    pending: tuple | None = None
    for start in range(0, len(targets), length):
        segment = tuple(each[None, start : start + length] for each in (inputs, targets, is_real))
        result, context = step(params, context, *segment, np.array([start == 0]))
        # One segment late, so that the device always has the next one to work on.
        if pending:
            collect(*pending)
        pending = (start, result)
        advance(min(length, num_tokens - start))
    if pending:
        collect(*pending)
    neighbours = {
        name: (distances[:num_tokens], scores[:num_tokens]) for name, (distances, scores) in collected.items()
    }
    return Read(nats[:num_tokens], neighbours, gates)


def _step(
    config: LMConfig,
    params: Tree,
    context: Context,
    tokens: Tokens,
    targets: Tokens,
    is_real: RealPositions,
    start: jax.Array,
    *,
    is_cleared: bool,
    keeps_neighbours: bool,
) -> tuple[tuple[PerToken, dict[str, Neighbours], dict[str, jax.Array]], Context]:
    if is_cleared:
        context = forget_memories(context)
    model = LanguageModel(config)
    output, looked_on = model.apply(
        {"params": params},
        tokens,
        is_real,
        start,
        context,
        mutable=["intermediates"] if keeps_neighbours else [],
    )
    neighbours = {
        name: layer["attention"]["core"][NEIGHBOURS][0] for name, layer in looked_on.get("intermediates", {}).items()
    }
    gates = {name: output.report.metrics[f"{name}/gate"] for name in neighbours}
    nats = jnp.where(is_real, next_token_nats(output.logits, targets), 0.0)
    return (nats, neighbours, gates), output.context


def _scale(layer: Any) -> np.ndarray:
    return np.abs(np.asarray(layer["attention"]["scale"], np.float32))
