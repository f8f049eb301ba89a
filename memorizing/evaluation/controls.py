"""Controls: does a model answer by what it carries from segment to segment, or some other way?"""

from __future__ import annotations

from typing import cast

from memorizing.evaluation.evaluator import Ablation, Evaluator, ReachingTask, accuracy_by_reach
from memorizing.runtime.events import EventLog
from memorizing.runtime.metrics import Progress
from memorizing.training.experiment import Experiment
from memorizing.training.loop import Hook
from memorizing.training.start import Training

# By control and by number of segments: shares of right answers and of right tokens.
Accuracies = dict[str, dict[int, dict[str, float]]]


class ControlsHook(Hook):
    """At the end, measures accuracy on samples whose answers lie several numbers of segments back.

    Each is answered by the model as trained, and in every way that should keep it from such an answer.

    Attributes:
      accuracies: of every control; None before the end, and where no segments were asked for.
    """

    def __init__(
        self, experiment: Experiment, training: Training, evaluator: Evaluator, progress: Progress, events: EventLog
    ) -> None:
        """
        Args:
          experiment: what is trained; its loop names the numbers of segments.
          training: whose parameters are evaluated.
          evaluator: of the experiment's model.
          progress, events: where lines on the terminal, and times go.
        """
        self.accuracies: Accuracies | None = None
        self._experiment = experiment
        self._training = training
        self._evaluator = evaluator
        self._progress = progress
        self._events = events

    def at_end(self) -> None:
        reaches = self._experiment.loop.evaluate_segments
        if not reaches:
            return
        # The experiment was checked: whose data is no such task has no `evaluate_segments`.
        task = cast(ReachingTask, self._experiment.data)
        state = self._training.state
        with self._events.measure("evaluation", step=self._training.step):
            controls = self._controls(max(reaches))
            self.accuracies = accuracy_by_reach(controls, state.params, state.buffers, task, reaches)
        self._progress.say(_accuracy_table(self.accuracies, task.chance))

    def _controls(self, reach: int) -> dict[str, tuple[Evaluator, Ablation]]:
        """What evaluates and what it does to the context, by name. `reach`: the largest number of segments back."""
        model = self._experiment.model
        evaluator = self._evaluator
        controls: dict[str, tuple[Evaluator, Ablation]] = {"as trained": (evaluator, "none")}
        if model.has_memory:
            num_segments = max(reach // 2, 1)
            memory_size = num_segments * self._experiment.batch.segment_length
            smaller = evaluator.with_model(model.with_memory_size(memory_size))
            controls[f"memory of {num_segments} segments"] = (smaller, "none")
            controls["memory permuted"] = (evaluator, "memory_permuted")
            controls["memory cleared"] = (evaluator, "memory_cleared")
        controls["state reset"] = (evaluator, "state_reset")
        # A single row would be its own neighbour.
        if evaluator.num_rows > 1:
            controls["state shuffled"] = (evaluator, "state_shuffled")
        return controls


def _accuracy_table(accuracies: Accuracies, chance: float) -> str:
    cells = [cell for by_reach in accuracies.values() for cell in by_reach.values()]
    are_words = all(cell["answers"] == cell["tokens"] for cell in cells)
    if are_words:
        measures = {"answers": f"answers (chance {chance:.3f})"}
    else:
        measures = {"answers": "answers, whole", "tokens": f"words of answers (chance {chance:.3f})"}
    width = max(map(len, accuracies)) + 2
    reaches = next(iter(accuracies.values()))
    heads = "".join(f"{reach:>8}" for reach in reaches)
    lines = []
    for measure, what in measures.items():
        lines.append(f"share of right {what}, by the number of segments to reach over:")
        lines.append(f"  {'':<{width}}{heads}")
        for name, by_reach in accuracies.items():
            figures = "".join(f"{accuracy[measure]:>8.3f}" for accuracy in by_reach.values())
            lines.append(f"  {name:<{width}}{figures}")
    return "\n".join(lines)
