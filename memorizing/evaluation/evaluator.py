"""Evaluation on held-out documents: every document once, whole, from an empty context."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from memorizing.array_typing import RowFlags, Tree
from memorizing.batch import Batch, DataSource, EvaluationBatch, text_of
from memorizing.context import Context
from memorizing.evaluation.another_document import OtherDocuments, with_memories_of
from memorizing.evaluation.reading import (
    MOST_SEGMENTS,
    Pace,
    ReadingBar,
    in_groups,
    inputs_of,
    joined,
    pass_segments,
    read_segments,
)
from memorizing.models import language_model
from memorizing.models.lm_config import LMConfig
from memorizing.models.losses import Scores, scores
from memorizing.models.memory import external_memory
from memorizing.models.memory.continuous_cache import CONTINUOUS_CACHE
from memorizing.runtime import sharding
from memorizing.runtime.metrics import Values, perplexity
from memorizing.runtime.sharding import RowPlacement

# What may be done to the context before a segment, to measure what it is worth.
Ablation = Literal[
    "none",
    "memory_cleared",
    "memory_of_layers_cleared",
    "memory_permuted",
    "memory_of_another_document",
    "state_reset",
    "state_shuffled",
]


def ablate(config: LMConfig, ablation: Ablation, context: Context, segment: Batch) -> tuple[Context, RowFlags]:
    """The context and start_of_document that the model gets instead of its own."""
    start = segment.start_of_document
    if ablation == "memory_cleared":
        # External memories are empty; local attention and caches keep theirs.
        return config.map_memories(context, external_memory.cleared), start
    if ablation == "memory_of_layers_cleared":
        # Of the memories only the continuous cache is left.
        cache = {CONTINUOUS_CACHE: context[CONTINUOUS_CACHE]} if CONTINUOUS_CACHE in context else {}
        return config.map_memories(context, external_memory.cleared) | cache, start
    if ablation == "memory_permuted":
        # What is found is no longer what belongs to it.
        return config.map_memories(context, external_memory.permuted), start
    if ablation == "state_reset":
        # Every segment begins a document.
        return context, jnp.ones_like(start)
    if ablation == "state_shuffled":
        # Every row gets what its neighbour carried, before segments in which something is scored: shifted at every
        # segment, states would come home after B of them.
        is_scored = jnp.any(segment.loss_weights > 0)

        def shift(leaf: jax.Array) -> jax.Array:
            if leaf.ndim == 0:
                # The clock, which all rows share.
                return leaf
            return jnp.where(is_scored, jnp.roll(leaf, 1, axis=0), leaf)

        return jax.tree.map(shift, context), start
    return context, start


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Sums over held-out documents. What counts are the positions with a loss weight.

    Attributes:
      cell_nats, cell_tokens: float64 and int64 [documents, bins], total -log p and number of scored tokens by document
        and position in it; bin i covers the tokens from `bin_starts[i]` up to the next bin's start.
      bin_starts: int64 [bins], in tokens.
      answers, right_answers: runs of scored tokens within a segment, and how many of them are predicted without a
        mistake.
      right_tokens: scored tokens that are predicted rightly.
      documents: int64 [documents], their indices among the held-out documents, ascending.
      document_bytes, document_words: int64 [documents], UTF-8 bytes and words of each, or None where there are none.
    """

    cell_nats: np.ndarray
    cell_tokens: np.ndarray
    bin_starts: np.ndarray
    answers: int
    right_answers: int
    right_tokens: int
    documents: np.ndarray
    document_bytes: np.ndarray | None
    document_words: np.ndarray | None

    @property
    def nats(self) -> np.ndarray:
        """By document."""
        return self.cell_nats.sum(axis=1)

    @property
    def tokens(self) -> np.ndarray:
        """By document."""
        return self.cell_tokens.sum(axis=1)

    @property
    def nats_by_position(self) -> np.ndarray:
        return self.cell_nats.sum(axis=0)

    @property
    def tokens_by_position(self) -> np.ndarray:
        return self.cell_tokens.sum(axis=0)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nats.sum() / max(self.tokens.sum(), 1))

    @property
    def accuracy(self) -> float:
        """Share of the answers that are right in all their tokens."""
        return self.right_answers / max(self.answers, 1)

    @property
    def token_accuracy(self) -> float:
        """Share of the scored tokens that are predicted rightly."""
        return self.right_tokens / max(int(self.tokens.sum()), 1)

    def values(self) -> Values:
        """The figures to log.

        Loss, perplexity per token, number of tokens; bits per byte and perplexity per word where there are bytes and
        words.
        """
        total_nats = float(self.nats.sum())
        values = {
            "loss": self.loss,
            "perplexity": perplexity(self.loss),
            "tokens": float(self.tokens.sum()),
        }
        if self.document_bytes is not None:
            total_bits = total_nats / math.log(2)
            values["bits_per_byte"] = total_bits / max(self.document_bytes.sum(), 1)
        if self.document_words is not None:
            nats_per_word = total_nats / max(self.document_words.sum(), 1)
            values["word_perplexity"] = perplexity(nats_per_word)
        return values


class ReadSegment(NamedTuple):
    """What came of a segment of every row.

    Attributes:
      scores: of the targets, [B, T].
      batch, document, offset: see `EvaluationBatch`.
    """

    scores: Scores
    batch: Batch
    document: np.ndarray
    offset: np.ndarray


class Evaluator:
    """Evaluates parameters on held-out documents; compiles once an ablation.

    Attributes:
      num_rows: documents read side by side.
    """

    def __init__(
        self,
        config: LMConfig,
        num_rows: int,
        segment_length: int,
        mesh: Mesh,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
          config: the model.
          num_rows: see above.
          segment_length: T.
          mesh: where the parameters lie.
          on_step: called before every few segments, in all processes.
        """

        def init_context() -> Context:
            return config.init_context(num_rows, segment_length)

        self.num_rows = num_rows
        self._segment_length = segment_length
        self._mesh = mesh
        self._on_step = on_step
        # Ablations whose program there is.
        self._compiled: set[Ablation] = set()
        # By identity of a source, how many tokens it has, as far as a bar has shown that.
        self._num_tokens: dict[str, int] = {}
        self._rows = RowPlacement(mesh, num_rows)
        abstract = jax.eval_shape(init_context)
        shardings = sharding.tree_shardings(mesh, abstract, config.context_axes(), sharding.STATE_RULES)
        self._init_context = jax.jit(init_context, out_shardings=shardings)
        self._step = jax.jit(
            functools.partial(_evaluation_steps, config),
            static_argnames="ablation",
            donate_argnums=2,
            out_shardings=(None, shardings),
        )
        self._step_beside = jax.jit(
            functools.partial(_evaluation_steps_beside, config),
            donate_argnums=2,
            out_shardings=(None, (shardings, shardings)),
        )

    def with_model(self, config: LMConfig) -> Evaluator:
        """The same for another model."""
        return Evaluator(config, self.num_rows, self._segment_length, self._mesh, self._on_step)

    def run(self, params: Tree, buffers: Tree, source: DataSource, ablation: Ablation = "none") -> Evaluation:
        """Reads all held-out documents of a source.

        Args:
          params, buffers: of the model; buffers stay as they are.
          source: where the documents come from.
          ablation: what is done to the context before every segment; 'memory_of_another_document' takes a source of
            two documents or more, and twice the time.
        """
        sums = _Sums(self._segment_length)
        is_compiled = ablation in self._compiled
        with ReadingBar(source, _named(ablation), is_compiled, self._num_tokens) as reading:
            for segment in self.read(params, buffers, source, ablation):
                sums.add(*segment)
                reading.has_read(sums.num_tokens)
        self._compiled.add(ablation)
        return sums.result(source)

    def read(
        self, params: Tree, buffers: Tree, source: DataSource, ablation: Ablation = "none"
    ) -> Iterator[ReadSegment]:
        """The same, segment by segment: what `run` adds up."""
        size = (self.num_rows, self._segment_length)
        others = OtherDocuments(source, *size) if ablation == "memory_of_another_document" else None
        # Of several processes, each reads its own rows' documents.
        is_shared = jax.process_count() > 1
        rows = (self._rows.rows,) if is_shared else ()
        # Clocks of several processes differ, and all have to pass as many segments at once.
        pace = Pace(1 if is_shared else MOST_SEGMENTS)

        def step(context: Any, group: list[EvaluationBatch]) -> tuple[tuple, Any]:
            self._on_step()
            num_segments = np.int32(len(group))
            placed = self._rows.put(joined([segment.batch for segment in group]))
            if others:
                beside = self._rows.put(joined([others.beside(segment) for segment in group]))
                found, context = self._step_beside(params, buffers, context, (placed, beside), num_segments)
            else:
                found, context = self._step(params, buffers, context, placed, num_segments, ablation=ablation)
            if not is_shared:
                return (found, group), context
            # ... and learns what came of the others', so that all have the same sums.
            (segment,) = group
            place = self._rows.put((segment.document, segment.offset.astype(np.int32)))
            found, batch, *place = self._rows.gather((found, self._rows.put(segment.batch), *place))
            return (found, [EvaluationBatch(batch, *place)]), context

        segments = source.evaluation_batches(*size, *rows)
        context = (self._init_context(), self._init_context()) if others else self._init_context()
        for (found, group), _ in read_segments(step, context, in_groups(segments, pace)):
            pace.has_passed(len(group))
            for place, segment in enumerate(group):
                yield ReadSegment(Scores(*(leaf[:, place] for leaf in found)), *segment)


def _named(ablation: Ablation) -> str:
    """What is read, in words."""
    return "held-out documents" if ablation == "none" else f"held-out documents, {ablation.replace('_', ' ')}"


class ReachingTask(DataSource, Protocol):
    """Samples whose answers can be made to lie several segments back, such as the tasks of `memorizing.synthetic`."""

    @property
    def chance(self) -> float:
        """Accuracy, on answers, of the best guess that uses nothing but the question."""
        ...

    def reaching(self, num_segments: int) -> DataSource:
        """The same task with held-out samples whose answers lie up to so many segments back."""
        ...


def accuracy_by_reach(
    controls: Mapping[str, tuple[Evaluator, Ablation]],
    params: Tree,
    buffers: Tree,
    task: ReachingTask,
    reaches: Sequence[int],
) -> dict[str, dict[int, dict[str, float]]]:
    """Accuracy on held-out samples whose answers lie several numbers of segments back.

    Args:
      controls: by name, what evaluates and what it does to the context.
      params, buffers: of the model.
      task: where the samples come from.
      reaches: in segments.

    Returns:
      `{name: {reach: {"answers": share of answers right in all their tokens, "tokens": share of right tokens}}}`
    """

    def accuracy(evaluator: Evaluator, ablation: Ablation, reach: int) -> dict[str, float]:
        evaluation = evaluator.run(params, buffers, task.reaching(reach), ablation)
        return {"answers": evaluation.accuracy, "tokens": evaluation.token_accuracy}

    accuracies: dict[str, dict[int, dict[str, float]]] = {}
    for name, (evaluator, ablation) in controls.items():
        accuracies[name] = {reach: accuracy(evaluator, ablation, reach) for reach in reaches}
    return accuracies


def _evaluation_steps(
    config: LMConfig,
    params: Tree,
    buffers: Tree,
    context: Context,
    batch: Batch,
    num_segments: jax.Array,
    *,
    ablation: Ablation,
) -> tuple[Scores, Context]:
    """Reads so many segments of a batch [B, S, T]; scores are [B, S, T]."""

    def step(context: Context, segment: Batch) -> tuple[Scores, Context]:
        context, start = ablate(config, ablation, context, segment)
        inputs = dataclasses.replace(inputs_of(segment), start_of_document=start)
        output = language_model.apply(config, params, buffers, inputs, context)
        # Only a decode step returns none.
        assert output.context is not None
        return scores(output.logits, segment.targets), output.context

    return pass_segments(step, context, batch, num_segments)


def _evaluation_steps_beside(
    config: LMConfig,
    params: Tree,
    buffers: Tree,
    contexts: tuple[Context, Context],
    batches: tuple[Batch, Batch],
    num_segments: jax.Array,
) -> tuple[Scores, tuple[Context, Context]]:
    """Reads segments with the memories that other documents have written, and after each a segment of these."""

    def step(contexts: tuple[Context, Context], segments: tuple[Batch, Batch]) -> tuple[Scores, Any]:
        own, other = contexts
        segment, beside = segments
        own = with_memories_of(config, own, other)
        output = language_model.apply(config, params, buffers, inputs_of(segment), own)
        of_other = language_model.apply(config, params, buffers, inputs_of(beside), other)
        # Only a decode step returns none.
        assert output.context is not None and of_other.context is not None
        return scores(output.logits, segment.targets), (output.context, of_other.context)

    return pass_segments(step, contexts, batches, num_segments)


class _Sums:
    """Adds up losses by document and by position, and answers."""

    def __init__(self, segment_length: int) -> None:
        self._segment_length = segment_length
        # By document and bin: nats, tokens.
        self._cells: dict[tuple[int, int], np.ndarray] = {}
        self._answers = 0
        self._right_answers = 0
        self._right_tokens = 0
        self._tokens = 0

    def add(self, result: tuple[Any, Any], batch: Batch, document: np.ndarray, offset: np.ndarray) -> None:
        nats, is_right = map(np.asarray, result)  # [B, T]
        is_present = document >= 0  # [B]
        weights = np.asarray(batch.loss_weights[:, 0], np.float64) * is_present[:, None]  # [B, T]
        # where(): a position that does not count may be anything.
        weighted = np.where(weights > 0, nats * weights, 0.0)
        row_nats = weighted.sum(axis=1, dtype=np.float64)
        row_tokens = weights.sum(axis=1)
        self._tokens += int(row_tokens.sum())
        sums = np.stack([row_nats, row_tokens], axis=1)  # [B, 2]
        for row in np.flatnonzero(is_present):
            # Bins double: segment 0, segment 1, segments 2-3, 4-7, ...; a segment lies in one bin.
            position_bin = int(offset[row] // self._segment_length).bit_length()
            cell = self._cells.setdefault((int(document[row]), position_bin), np.zeros(2))
            cell += sums[row]
        self._add_answers(weights > 0, is_right)

    @property
    def num_tokens(self) -> int:
        """Scored so far."""
        return self._tokens

    def result(self, source: DataSource) -> Evaluation:
        # Documents and bins that occur, and of each cell their places among these.
        keys = np.array(list(self._cells), np.int64).reshape(-1, 2)
        documents, row = np.unique(keys[:, 0], return_inverse=True)
        bins, column = np.unique(keys[:, 1], return_inverse=True)
        cells = np.zeros((len(documents), len(bins), 2))
        if self._cells:
            cells[row, column] = list(self._cells.values())
        text = text_of(source)

        def of_documents(sizes: np.ndarray | None) -> np.ndarray | None:
            return None if sizes is None else np.asarray(sizes, np.int64)[documents]

        return Evaluation(
            cell_nats=cells[..., 0],
            cell_tokens=cells[..., 1].astype(np.int64),
            bin_starts=np.array([self._segment_length << (i - 1) if i else 0 for i in bins.tolist()], np.int64),
            answers=self._answers,
            right_answers=self._right_answers,
            right_tokens=self._right_tokens,
            documents=documents,
            document_bytes=of_documents(source.document_bytes),
            document_words=of_documents(text.document_words if text else None),
        )

    def _add_answers(self, counts: np.ndarray, is_right: np.ndarray) -> None:
        # Each row ends with a position that does not count, so that answers of two rows do not touch.
        margin = ((0, 0), (1, 1))
        counts = np.pad(counts, margin).reshape(-1)  # [B * (T + 2)]
        wrong = np.pad(~is_right, margin).reshape(-1) & counts
        starts = np.flatnonzero(counts[1:] & ~counts[:-1]) + 1
        ends = np.flatnonzero(counts[:-1] & ~counts[1:]) + 1
        mistakes_before = np.concatenate([[0], np.cumsum(wrong)])
        mistakes = mistakes_before[ends] - mistakes_before[starts]  # [answers]
        self._right_tokens += int(np.sum(counts & ~wrong))
        self._answers += len(starts)
        self._right_answers += int(np.sum(mistakes == 0))
