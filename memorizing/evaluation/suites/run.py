"""Runs suites: every exercise in every setting, one line of results each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np

from memorizing.array_typing import Tree
from memorizing.evaluation import bootstrap
from memorizing.evaluation.suites.answers import Answers, Exercise, RecallTask, Spans, answers_of, spans_of
from memorizing.evaluation.suites.controls import Evaluators, Setting
from memorizing.evaluation.suites.greedy import PromptTask, own_score

Line = dict[str, Any]

DEPTHS = 10


def run_exercise(
    exercise: Exercise,
    settings: Sequence[Setting],
    evaluators: Evaluators,
    params: Tree,
    buffers: Tree,
    segment_length: int,
    seed: int,
    generates: bool = False,
) -> Iterator[Line]:
    """Asks for all answers of an exercise in every setting.

    Args:
      exercise: the samples.
      settings: how to ask.
      evaluators: what does.
      params, buffers: of the model.
      segment_length: T of the run.
      seed: of the bootstrap over samples.
      generates: whether prompts are also continued, for the benchmark's own score, as trained and with nothing carried.

    Yields:
      A JSON-able line for each setting; `accuracy` is None where it cannot read the samples.
    """
    source = exercise.source
    spans = spans_of(source, segment_length)
    length = source.eval_segments * segment_length
    about = {
        "suite": exercise.suite,
        "task": exercise.task,
        **exercise.settings,
        "chance": source.chance,
        "samples": source.num_eval_documents,
        "answers": len(spans.sample),
        "distance": [int(spans.distance.min()), int(spans.distance.max())],
        "identity": source.identity,
        "prompts": digests(source, segment_length),
    }
    for setting in settings:
        prepared = evaluators.prepare(setting, source)
        line = about | {"setting": setting.name}
        if prepared is None:
            yield line | {"accuracy": None}
            continue
        segments = prepared.evaluator.read(params, buffers, prepared.source, setting.ablation)
        answers = answers_of(spans, segments, length)
        # What is carried has a size in the segments of the run; one window carries nothing.
        carried = 0 if setting.is_one_window else setting.model.state_bytes(segment_length)
        line |= {"bytes_carried": carried} | figures(spans, answers, seed)
        if generates and setting in settings[:2] and hasattr(source, "held_out_prompt"):
            prompts = cast(PromptTask, source)
            greedy = evaluators.greedy(setting)
            line["generated"] = own_score(prompts, greedy, params, buffers, segment_length, setting.ablation)
        yield line


def figures(spans: Spans, answers: Answers, seed: int) -> Line:
    """Accuracy of all answers, with an interval over samples, by distance, and by depth."""
    num_samples = int(spans.sample.max()) + 1
    right = np.bincount(spans.sample, answers.right, num_samples)
    asked = np.bincount(spans.sample, minlength=num_samples)
    interval = bootstrap.ratio_interval(right, asked, seed)
    depth = np.minimum((spans.depth * DEPTHS).astype(int), DEPTHS - 1)
    return {
        "accuracy": float(answers.right.mean()),
        "interval": None if np.isnan(interval).any() else interval.tolist(),
        "nats": float(answers.nats.mean()),
        "by_distance": {int(each): _share(answers.right[spans.distance == each]) for each in np.unique(spans.distance)},
        "by_depth": [_share(answers.right[depth == each]) for each in range(DEPTHS)],
    }


def _share(right: np.ndarray) -> list[float | int] | None:
    """Share of right answers, and how many there are; None where there are none."""
    return [float(right.mean()), len(right)] if len(right) else None


def digests(source: RecallTask, segment_length: int) -> list[str]:
    """Of every sample the start of a digest of its ids: two machines that have the same have the same samples."""
    texts = (source.held_out_text(index, segment_length) for index in range(source.num_eval_documents))
    return [hashlib.sha256(np.asarray(text.ids, "<i4").tobytes()).hexdigest()[:16] for text in texts]
