"""Reading a document segment by segment: the loops of evaluation, inspection and generation."""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from memorizing.array_typing import Tree
from memorizing.batch import Batch, DataSource, text_of
from memorizing.context import Inputs
from memorizing.runtime.progress import Bar

Segment = TypeVar("Segment")
Result = TypeVar("Result")
# A context, or several.
Carried = TypeVar("Carried")

# Segments that the device is given at once, at most.
MOST_SEGMENTS = 8


def num_rows_side_by_side(source: DataSource, at_most: int, mesh: Mesh) -> int:
    """How many documents to read at once: the fewest with which it takes hardly longer than with all.

    A document is read from its start to its end, and rows stand idle while the last one is. What the devices divide.
    """
    devices = mesh.shape["data"]
    most = _divided(min(at_most, source.num_eval_documents), devices)
    sizes = source.document_bytes
    if sizes is None:
        return most
    as_long = 1.1 * _longest_row(sizes, most)
    fewest = _divided(math.ceil(sizes.sum() / as_long), devices)
    return next(num_rows for num_rows in range(fewest, most + 1, devices) if _longest_row(sizes, num_rows) <= as_long)


def _divided(num_rows: int, devices: int) -> int:
    """Rounded up to what the devices divide, at least one each."""
    return max(-(-num_rows // devices), 1) * devices


def _longest_row(sizes: np.ndarray, num_rows: int) -> int:
    """What a row reads at most: the longest documents go first, each onto the row that is free first."""
    rows = [0] * num_rows
    for size in np.sort(sizes)[::-1].tolist():
        heapq.heapreplace(rows, rows[0] + max(size, 1))
    return max(rows)


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


def pass_segments(
    step: Callable[[Carried, Any], tuple[Any, Carried]],
    context: Carried,
    segments: Tree,
    num_segments: Int[Array, ""] | int,
) -> tuple[Tree, Carried]:
    """The same within a compiled program: one for any number of segments, up to as many as there is room for.

    Args:
      step: `(context, segment) -> (result, new context)`.
      context: that the first segment reads.
      segments: leaves [B, S, ...].
      num_segments: how many of them to pass, the first ones.

    Returns:
      The results, leaves [B, S, ...], zeros where no segment was passed; and the context after the last one.
    """

    def segment(index: Int[Array, ""] | int) -> Tree:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, axis=1, keepdims=False), segments)

    def pass_one(index: Int[Array, ""], carried: tuple[Tree, Carried]) -> tuple[Tree, Carried]:
        results, context = carried
        result, context = step(context, segment(index))
        return jax.tree.map(lambda all_of, one: all_of.at[:, index].set(one), results, result), context

    room = jax.tree.leaves(segments)[0].shape[1]
    shapes, _ = jax.eval_shape(lambda: step(context, segment(0)))
    empty = jax.tree.map(lambda leaf: jnp.zeros((leaf.shape[0], room, *leaf.shape[1:]), leaf.dtype), shapes)
    return jax.lax.fori_loop(0, num_segments, pass_one, (empty, context))


class Pace:
    """How many steps the device is given at once: as many as take a moment.

    So it seldom waits for the host, results come without a delay that is noticed, and a signal is answered soon. What
    is computed must not depend on it.

    Attributes:
      number: of steps, from 1 up.
    """

    _SECONDS = 0.05

    def __init__(self, at_most: int) -> None:
        self.number = 1
        self._at_most = at_most
        self._before = time.monotonic()

    def start(self) -> None:
        """The next steps begin now."""
        self._before = time.monotonic()

    def has_passed(self, num_steps: int) -> None:
        """Their results have come, and the next steps have begun."""
        now = time.monotonic()
        seconds = max(now - self._before, 1e-9)
        self.number = max(1, min(self._at_most, int(num_steps * self._SECONDS / seconds)))
        self._before = now


def in_groups(segments: Iterable[Segment], pace: Pace) -> Iterator[list[Segment]]:
    """Segments in lists, as many in each as are passed at once."""
    remaining = iter(segments)
    while group := list(itertools.islice(remaining, pace.number)):
        yield group


def joined(segments: Sequence[Tree]) -> Tree:
    """Segments, leaves [B, 1, ...] on the host, behind each other, zeros behind the last: [B, MOST_SEGMENTS, ...]."""

    def join(*leaves: np.ndarray) -> np.ndarray:
        num_rows, _, *rest = leaves[0].shape
        room = np.zeros((num_rows, MOST_SEGMENTS - len(leaves), *rest), leaves[0].dtype)
        return np.concatenate([*leaves, room], axis=1)

    return jax.tree.map(join, *segments)


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


class ReadingBar:
    """The bar of an evaluation, on a terminal: compiling, then reading, with the time left where that can be known."""

    def __init__(self, source: DataSource, what: str, is_compiled: bool, known: dict[str, int]) -> None:
        """
        Args:
          source: what is read.
          what: the same in words.
          is_compiled: whether there is a program for it.
          known: by identity of a source, how many tokens it has; this one is added.
        """
        self._what = what
        self._bar = Bar(f"{'reading' if is_compiled else 'compiling the evaluation of'} {self._what}")
        self._source = source
        self._known = known
        self._done = 0

    def __enter__(self) -> ReadingBar:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._bar.is_live and error is None:
            self._known[self._source.identity] = self._done
        self._bar.close()

    def has_read(self, num_tokens: int) -> None:
        """So many tokens were scored so far."""
        if not self._bar.is_live:
            return
        if not self._done:
            total = self._known.get(self._source.identity) or _num_tokens(self._source)
            self._bar.describe(f"reading {self._what}", total)
        self._bar.advance(num_tokens - self._done)
        self._done = num_tokens


def _num_tokens(source: DataSource) -> int | None:
    """Tokens of all held-out documents; None where they are no text and so not known before they are read."""
    text = text_of(source)
    if text is None:
        return None
    return sum(len(text.document_tokens(index)) for index in range(source.num_eval_documents))
