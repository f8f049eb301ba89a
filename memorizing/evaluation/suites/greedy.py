"""What a model generates behind prompts, greedily, with any ablation of its context: for the benchmarks' own scores.

An open segment is read anew for every token, so that no mechanism has to decode token by token, and a prompt passes as
in training. The segments before are read once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from memorizing.array_typing import Tree
from memorizing.batch import Batch
from memorizing.context import Context
from memorizing.evaluation.evaluator import Ablation, ablate
from memorizing.evaluation.reading import inputs_of
from memorizing.evaluation.suites.answers import RecallTask, Text
from memorizing.models import language_model
from memorizing.models.lm_config import LMConfig
from memorizing.runtime.sharding import RowPlacement


class Prompt(Protocol):
    """See `memorizing.synthetic.recall.prompt.Prompt`."""

    @property
    def text(self) -> Text: ...

    @property
    def num_generated(self) -> int: ...


class Language(Protocol):
    """What turns ids into text."""

    def decode(self, ids: Sequence[int]) -> str: ...


class PromptTask(RecallTask, Protocol):
    """See `memorizing.synthetic.recall.prompt.PromptTask`."""

    @property
    def language(self) -> Language: ...

    def held_out_prompt(self, index: int, segment_length: int) -> Prompt: ...

    def score(self, prediction: str, prompt: Prompt) -> float: ...


class Greedy:
    """Generates in rows side by side; compiles once an ablation. For a single process.

    Attributes:
      num_rows: prompts read side by side.
    """

    def __init__(self, config: LMConfig, num_rows: int, segment_length: int, mesh: Mesh) -> None:
        """
        Args:
          config, segment_length: of the model.
          num_rows: prompts read side by side.
          mesh: where the parameters lie.
        """
        self.num_rows = num_rows
        self._segment_length = segment_length
        self._rows = RowPlacement(mesh, num_rows)
        self._init_context = jax.jit(functools.partial(config.init_context, num_rows, segment_length))
        self._step = jax.jit(functools.partial(_greedy_step, config), static_argnames="ablation")

    def generate(
        self,
        params: Tree,
        buffers: Tree,
        prompts: Sequence[np.ndarray],
        numbers: Sequence[int],
        start_id: int,
        ablation: Ablation = "none",
    ) -> list[np.ndarray]:
        """The most likely continuation of each prompt, token by token.

        Args:
          params, buffers: of the model.
          prompts: int32 [length] each, at most `num_rows`.
          numbers: of tokens to generate behind each.
          start_id: stands before a prompt.
          ablation: what is done to the context before every segment.

        Returns:
          int32 [number] of each prompt.
        """
        length = self._segment_length
        known = np.zeros(self.num_rows, int)
        total = np.zeros(self.num_rows, int)
        known[: len(prompts)] = [len(prompt) for prompt in prompts]
        total[: len(prompts)] = known[: len(prompts)] + numbers
        num_segments = -(-int(total.max()) // length)
        ids = np.zeros((self.num_rows, num_segments * length), np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        context = self._init_context()
        for first in range(0, num_segments * length, length):
            while True:
                # A row waits for a token of this segment.
                is_open = (known < total) & (known < first + length)
                batch = self._segment(ids, known, total, first, start_id)
                likeliest, after = self._step(params, buffers, context, self._rows.put(batch), ablation=ablation)
                if not is_open.any():
                    break
                drawn = np.asarray(likeliest)
                for row in np.flatnonzero(is_open):
                    ids[row, known[row]] = drawn[row, known[row] - first]
                    known[row] += 1
            context = after
        return [
            ids[row, len(prompt) : len(prompt) + number]
            for row, (prompt, number) in enumerate(zip(prompts, numbers, strict=True))
        ]

    def _segment(self, ids: np.ndarray, known: np.ndarray, total: np.ndarray, first: int, start_id: int) -> Batch:
        """A segment [B, 1, T] as far as it is known: a position can be read where the token before it is there."""
        length = self._segment_length
        place = first + np.arange(length)
        end = np.minimum(known + 1, total)  # [B]
        before = np.concatenate([np.full((len(ids), 1), start_id, np.int32), ids[:, :-1]], axis=1)
        own = slice(first, first + length)
        return Batch(
            tokens=before[:, None, own],
            targets=ids[:, None, own],
            loss_weights=np.zeros((len(ids), 1, length), np.float32),
            is_real=(place < end[:, None])[:, None],
            start_of_document=np.full((len(ids), 1), first == 0),
        )


def own_score(
    task: PromptTask, greedy: Greedy, params: Tree, buffers: Tree, segment_length: int, ablation: Ablation
) -> float:
    """Mean of the benchmark's own score over the held-out prompts, each continued greedily.

    Args:
      task: the prompts.
      greedy: generates.
      params, buffers: of the model.
      segment_length: T of the run.
      ablation: what is done to the context.
    """
    scores = []
    prompts = [task.held_out_prompt(index, segment_length) for index in range(task.num_eval_documents)]
    for first in range(0, len(prompts), greedy.num_rows):
        some = prompts[first : first + greedy.num_rows]
        texts = [prompt.text.ids[: int(np.argmax(prompt.text.is_answer))] for prompt in some]
        numbers = [prompt.num_generated for prompt in some]
        generated = greedy.generate(params, buffers, texts, numbers, task.start_id, ablation)
        scores += [
            task.score(task.language.decode(ids.tolist()), prompt) for ids, prompt in zip(generated, some, strict=True)
        ]
    return float(np.mean(scores))


def _greedy_step(
    config: LMConfig, params: Tree, buffers: Tree, context: Context, batch: Batch, *, ablation: Ablation
) -> tuple[jax.Array, Context]:
    """The most likely token at every position, int32 [B, T], and the context behind the segment."""
    segment: Any = jax.tree.map(lambda leaf: leaf[:, 0], batch)
    context, start = ablate(config, ablation, context, segment)
    inputs = dataclasses.replace(inputs_of(segment), start_of_document=start)
    output = language_model.apply(config, params, buffers, inputs, context)
    assert output.context is not None
    return jnp.argmax(output.logits, axis=-1), output.context
