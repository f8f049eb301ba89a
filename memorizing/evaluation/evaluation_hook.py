"""Evaluation while a model trains, as a hook of the training loop."""

from __future__ import annotations

from collections.abc import Mapping

from memorizing.evaluation import baselines
from memorizing.evaluation.evaluator import Ablation, Evaluation, Evaluator
from memorizing.runtime import distributed
from memorizing.runtime.events import EventLog
from memorizing.runtime.metrics import MetricWriter, Progress
from memorizing.training.experiment import Experiment
from memorizing.training.hooks import MetricsHook
from memorizing.training.loop import Hook
from memorizing.training.start import Training
from memorizing.training.step import Metrics


class EvaluationHook(Hook):
    """Evaluates on the held-out documents every so many steps, and at the end also with other memories.

    Those are an empty one, that of another document, and a continuous cache that was not trained.

    Attributes:
      final: the evaluations at the end, by name; empty before.
    """

    def __init__(
        self,
        experiment: Experiment,
        training: Training,
        evaluator: Evaluator,
        metrics: MetricsHook,
        writer: MetricWriter,
        progress: Progress,
        events: EventLog,
    ) -> None:
        """
        Args:
          experiment: what is trained.
          training: whose parameters are evaluated.
          evaluator: of the experiment's model.
          metrics: are read first, so that a step's metrics come before its evaluation.
          writer, progress, events: where results, lines on the terminal, and times go.
        """
        self.final: dict[str, Evaluation] = {}
        self._data = experiment.data
        self._with_cache = baselines.with_continuous_cache(experiment)
        self._has_memory = experiment.model.has_memory
        self._every = experiment.loop.evaluate_every
        self._num_steps = experiment.loop.num_steps
        self._training = training
        self._evaluator = evaluator
        self._metrics = metrics
        self._writer = writer
        self._progress = progress
        self._events = events

    def at_start(self) -> None:
        """Evaluates the step that a run goes on from, if it was stopped before it had done that."""
        step = self._training.first_step
        is_evaluated = self._writer.has(step, "evaluation")
        if self._training.is_continued and self._is_due(step) and not distributed.from_primary(is_evaluated):
            self._evaluate(step)

    def after_step(self, step: int, metrics: Metrics) -> None:
        if self._is_due(step):
            self._metrics.flush()
            self._evaluate(step)

    def at_end(self) -> None:
        step = self._training.step
        self.final["as trained"] = self._evaluate(step)
        if self._has_memory:
            self.final["memory cleared"] = self._evaluate(step, "memory_cleared")
            if self._data.num_eval_documents > 1:
                self.final["memory of another document"] = self._evaluate(step, "memory_of_another_document")
        if self._with_cache is not None:
            cached = self._evaluator.with_model(self._with_cache)
            evaluation = self._evaluate(step, baselines.CACHE_ALONE, cached, name="continuous_cache")
            self.final[baselines.CONTINUOUS_CACHE] = evaluation
        self._progress.say(_table(self.final))

    def _is_due(self, step: int) -> bool:
        return bool(self._every) and step % self._every == 0 and 0 < step < self._num_steps

    def _evaluate(
        self, step: int, ablation: Ablation = "none", evaluator: Evaluator | None = None, name: str = ""
    ) -> Evaluation:
        """Evaluates and logs.

        Args:
          step: updates made.
          ablation: what is done to the context.
          evaluator: of another model; None for the one that is trained.
          name: in the log; empty for that of the ablation.
        """
        state = self._training.state
        with self._events.measure("evaluation", step=step):
            evaluation = (evaluator or self._evaluator).run(state.params, state.buffers, self._data, ablation)
        values = evaluation.values()
        kind = "evaluation" if ablation == "none" else f"evaluation_{name or ablation}"
        self._writer.write(step, kind, values)
        if step < self._num_steps:
            self._progress.say(f"held-out documents at step {step}: {_figures(values)}")
            self._progress.restart_clock(step)
        return evaluation


def _figures(values: Mapping[str, float]) -> str:
    text = f"perplexity {values['perplexity']:.3f}"
    if "bits_per_byte" in values:
        text += f", {values['bits_per_byte']:.4f} bits per byte"
    return text


def _table(evaluations: Mapping[str, Evaluation]) -> str:
    """A line an evaluation; those with other memories with the difference that this makes."""
    as_trained, *_ = evaluations.values()
    width = max(map(len, evaluations)) + 2
    lines = ["held-out documents, each once, whole:"]
    for name, evaluation in evaluations.items():
        figures = _figures(evaluation.values())
        if evaluation is not as_trained:
            figures += f" ({baselines.percent(evaluation.loss - as_trained.loss)})"
        lines.append(f"  {name + ':':<{width}}{figures}")
    return "\n".join(lines)
