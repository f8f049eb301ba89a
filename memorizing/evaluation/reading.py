"""Reading a document segment by segment: the one loop of evaluation, inspection and generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import jax
import numpy as np

from memorizing.batch import Batch
from memorizing.context import Inputs

Segment = TypeVar("Segment")
Result = TypeVar("Result")
# A context, or several.
Carried = TypeVar("Carried")


def read_segments(
    step: Callable[[Carried, Segment], tuple[Result, Carried]], context: Carried, segments: Iterable[Segment]
) -> Iterator[tuple[Result, Carried]]:
    """Passes segment after segment, the context carried from each to the next.

    A result is handed out one segment late, so that the device always has the next one to work on.

    Args:
      step: `(context, segment) -> (result on the device, new context)`.
      context: that the first segment reads; it may be donated.
      segments: in order.

    Yields:
      Of each segment, its result on the host, and the context after the last segment that was started.
    """
    results: list[Result] = []
    for segment in segments:
        result, context = step(context, segment)
        results.append(result)
        if len(results) > 1:
            yield jax.device_get(results.pop(0)), context
    for result in results:
        yield jax.device_get(result), context


def inputs_of(batch: Batch) -> Inputs:
    """What a model reads of a segment [B, T]."""
    return Inputs(batch.tokens, batch.is_real, batch.start_of_document)


def document_segments(tokens: np.ndarray, start_id: int, segment_length: int) -> Iterator[Batch]:
    """A document in segments, one row, [1, T] each; positions after its end are not real.

    Args:
      tokens: int32 [tokens].
      start_id: stands before the first one.
      segment_length: T.
    """
    missing = -len(tokens) % segment_length
    targets = np.pad(tokens.astype(np.int32), (0, missing))[None]
    previous = np.concatenate([[[start_id]], targets[:, :-1]], axis=1, dtype=np.int32)
    is_real = (np.arange(targets.shape[1]) < len(tokens))[None]
    for start in range(0, targets.shape[1], segment_length):
        own = slice(start, start + segment_length)
        yield Batch(
            tokens=previous[:, own],
            targets=targets[:, own],
            loss_weights=is_real[:, own].astype(np.float32),
            is_real=is_real[:, own],
            start_of_document=np.array([start == 0]),
        )
