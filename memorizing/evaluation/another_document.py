"""The control "memory of another document": every document reads a memory that was written by another one.

What a model gains by its own memory, and not by this one, it gains by recall.
"""

from __future__ import annotations

import jax
import numpy as np

from memorizing.batch import Batch, DataSource, EvaluationBatch
from memorizing.context import Context
from memorizing.models.lm_config import LMConfig


def with_memories_of(config: LMConfig, context: Context, other: Context) -> Context:
    """The context with the external memories of another one, and with what waits to be written to them there.

    Local attention, caches of keys and recurrent tokens stay. Both contexts have read as many segments.
    """
    nothing = jax.tree.map(lambda _: False, context)
    is_memory = config.map_memories(nothing, lambda memory: jax.tree.map(lambda _: True, memory))
    return jax.tree.map(lambda takes, own, others: others if takes else own, is_memory, context, other)


class OtherDocuments:
    """For every document of a source another one, of about its length, which is read beside it from the same position.

    It is the next one in the order of evaluation, the longest documents first; the last one gets the first. One that is
    shorter begins anew when it ends, without a reset, so that its memory goes on holding what it holds.
    """

    def __init__(self, source: DataSource, num_rows: int, segment_length: int) -> None:
        """
        Args:
          source: with two held-out documents or more.
          num_rows, segment_length: as in the evaluation beside which they are read.
        """
        self._segment_length = segment_length
        # By document, in the order of evaluation: its segments, a row each.
        self._segments: dict[int, list[Batch]] = {}
        for batch, documents, _ in source.evaluation_batches(num_rows, segment_length):
            for row in np.flatnonzero(documents >= 0):
                own = jax.tree.map(lambda leaf, row=row: np.asarray(leaf)[row], batch)
                self._segments.setdefault(int(documents[row]), []).append(own)
        order = list(self._segments)
        if len(order) < 2:
            raise ValueError("the memory of another document needs two held-out documents")
        self._other = dict(zip(order, order[1:] + order[:1], strict=True))

    def beside(self, segment: EvaluationBatch) -> Batch:
        """What the other documents show while these segments are read; [B, 1, T] as they."""
        rows = [self._beside_row(segment, row) for row in range(len(segment.document))]
        tokens, targets, weights, is_real, _ = (np.stack(leaves) for leaves in zip(*rows, strict=True))
        return Batch(tokens, targets, weights, is_real, segment.batch.start_of_document)

    def _beside_row(self, segment: EvaluationBatch, row: int) -> Batch:
        document = int(segment.document[row])
        if document < 0:
            # Nothing is read in this row.
            return jax.tree.map(lambda leaf: np.asarray(leaf)[row], segment.batch)
        others = self._segments[self._other[document]]
        return others[int(segment.offset[row]) // self._segment_length % len(others)]
