"""Evaluation on held-out documents: every document once, whole, from an empty context."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memorizing import sharding
from memorizing.array_typing import PerToken, Tree
from memorizing.attention.knn import forget_memories
from memorizing.batch import PADDING, Batch, DataSource
from memorizing.context import Context
from memorizing.losses import next_token_nats
from memorizing.metrics import Values, perplexity
from memorizing.model import LanguageModel, LMConfig


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Sums over held-out documents.

    Attributes:
      nats, tokens: float64 and int64 [documents], total -log p and number of scored tokens of each.
      num_bytes: UTF-8 bytes of all documents, or None where text has no bytes.
      nats_by_position, tokens_by_position: the same sums by position in the document; bin i covers the tokens from `bin_starts[i]` up to the next bin's start.
      bin_starts: int64 [bins], in tokens.
    """

    nats: np.ndarray
    tokens: np.ndarray
    num_bytes: int | None
    nats_by_position: np.ndarray
    tokens_by_position: np.ndarray
    bin_starts: np.ndarray

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nats.sum() / max(self.tokens.sum(), 1))

    def values(self) -> Values:
        """The figures to log: loss, perplexity per token, tokens, and bits per byte where there are bytes."""
        values = {"loss": self.loss, "perplexity": perplexity(self.loss), "tokens": float(self.tokens.sum())}
        if self.num_bytes:
            values["bits_per_byte"] = float(self.nats.sum()) / math.log(2) / self.num_bytes
        return values


class Evaluator:
    """Evaluates parameters on a source's held-out documents; compiles once a mode.

    Attributes:
      num_rows: documents read side by side.
    """

    def __init__(self, config: LMConfig, source: DataSource, num_rows: int, segment_length: int, mesh: Mesh) -> None:
        self._config, self._source, self._mesh = config, source, mesh
        self.num_rows, self._segment_length = num_rows, segment_length
        abstract = jax.eval_shape(lambda: config.init_context(num_rows, segment_length))
        self._context_shardings = sharding.tree_shardings(mesh, abstract, config.context_axes(), sharding.STATE_RULES)
        self._rows = NamedSharding(mesh, PartitionSpec("data"))

    @functools.cached_property
    def _init_context(self):
        return jax.jit(
            lambda: self._config.init_context(self.num_rows, self._segment_length),
            out_shardings=self._context_shardings,
        )

    @functools.cached_property
    def _step(self):
        function = functools.partial(_evaluation_step, self._config)
        return jax.jit(
            function, static_argnames="forget_memory", donate_argnums=1, out_shardings=(None, self._context_shardings)
        )

    def run(self, params: Tree, forget_memory: bool = False) -> Evaluation:
        """Reads all held-out documents.

        Args:
          params: of the model.
          forget_memory: empties every external memory before each segment: what the same weights do without what they remember.
        """
        context = self._init_context()
        sums = _Sums(self._segment_length)
        pending: tuple | None = None
        for batch, document, offset in self._source.evaluation_batches(self.num_rows, self._segment_length):
            nats, context = self._step(params, context, jax.device_put(batch, self._rows), forget_memory=forget_memory)
            # One segment late, so that the device always has the next one to work on.
            if pending:
                sums.add(*pending)
            pending = (nats, batch, document, offset)
        if pending:
            sums.add(*pending)
        return sums.result(self._source.document_bytes)


def _evaluation_step(
    config: LMConfig, params: Tree, context: Context, batch: Batch, *, forget_memory: bool
) -> tuple[PerToken, Context]:
    segment = jax.tree.map(lambda leaf: leaf[:, 0], batch)
    is_real = segment.targets != PADDING
    if forget_memory:
        context = forget_memories(context)
    output = LanguageModel(config).apply(
        {"params": params}, segment.tokens, is_real, segment.start_of_document, context
    )
    return jnp.where(is_real, next_token_nats(output.logits, segment.targets), 0.0), output.context


class _Sums:
    """Adds up losses by document and by position."""

    def __init__(self, segment_length: int) -> None:
        self._segment_length = segment_length
        self._by_document: dict[int, list[float]] = {}
        self._by_bin: dict[int, list[float]] = {}

    def add(self, nats: Any, batch: Batch, document: np.ndarray, offset: np.ndarray) -> None:
        nats, real = np.asarray(nats, np.float64), np.asarray(batch.targets[:, 0] != PADDING)
        for row in np.flatnonzero(document >= 0):
            total = (nats[row].sum(), real[row].sum())
            # Bins double: segment 0, segment 1, segments 2-3, 4-7, ...; a segment lies in one bin.
            position_bin = int(offset[row] // self._segment_length).bit_length()
            for sums, key in ((self._by_document, int(document[row])), (self._by_bin, position_bin)):
                entry = sums.setdefault(key, [0.0, 0.0])
                entry[0] += total[0]
                entry[1] += total[1]

    def result(self, document_bytes: np.ndarray | None) -> Evaluation:
        documents, bins = (
            np.array([sums[key] for key in sorted(sums)]).reshape(-1, 2) for sums in (self._by_document, self._by_bin)
        )
        starts = [0 if index == 0 else self._segment_length << (index - 1) for index in sorted(self._by_bin)]
        return Evaluation(
            nats=documents[:, 0],
            tokens=documents[:, 1].astype(np.int64),
            num_bytes=None if document_bytes is None else int(np.sum(document_bytes)),
            nats_by_position=bins[:, 0],
            tokens_by_position=bins[:, 1].astype(np.int64),
            bin_starts=np.array(starts, np.int64),
        )
