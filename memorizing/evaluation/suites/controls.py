"""The ways in which every answer is asked for: as trained, and in those that tell what a right answer comes from."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from memorizing.array_typing import Tree
from memorizing.errors import UserError
from memorizing.evaluation import baselines
from memorizing.evaluation.evaluator import Ablation, Evaluator
from memorizing.evaluation.suites.answers import RecallTask
from memorizing.evaluation.suites.greedy import Greedy
from memorizing.evaluation.suites.one_window import OneWindow
from memorizing.models.lm_config import LMConfig
from memorizing.training.experiment import Experiment
from memorizing.training.state import init_variables

AS_TRAINED = "as trained"
CLEARED = "memory cleared"
ANOTHERS = "memory of another document"
NOTHING = "nothing carried"
SHUFFLED = "state of another document"
WINDOW = "window long enough"


class Setting(NamedTuple):
    """One way to ask.

    Attributes:
      name: what it is called.
      model: what is evaluated.
      ablation: what is done to its context.
      is_one_window: whether a sample is one segment.
    """

    name: str
    model: LMConfig
    ablation: Ablation = "none"
    is_one_window: bool = False


def settings_of(experiment: Experiment) -> list[Setting]:
    """All settings for a run's model, as trained first."""
    model = experiment.model
    settings = [Setting(AS_TRAINED, model)]
    if model.has_memory:
        settings.append(Setting(CLEARED, model, "memory_cleared"))
        settings.append(Setting(ANOTHERS, model, "memory_of_another_document"))
    else:
        settings.append(Setting(NOTHING, model, "state_reset"))
        settings.append(Setting(SHUFFLED, model, "state_shuffled"))
    settings.append(Setting(WINDOW, model, "state_reset", is_one_window=True))
    with_cache = baselines.cached(experiment)
    if with_cache != model or len(model.memory_sizes) > 1:
        settings.append(Setting(baselines.CONTINUOUS_CACHE, with_cache, baselines.CACHE_ALONE))
    return settings


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A setting for samples of one length.

    Attributes:
      evaluator: of its model.
      source: the samples as it reads them.
    """

    evaluator: Evaluator
    source: RecallTask | OneWindow


class Evaluators:
    """Makes what evaluates, once for each model and segment length."""

    def __init__(self, num_rows: int, segment_length: int, mesh: Mesh, most_in_a_window: int) -> None:
        """
        Args:
          num_rows: samples read side by side.
          segment_length: T.
          mesh: where the parameters lie.
          most_in_a_window: tokens of the longest sample that is read as one segment.
        """
        self._num_rows = num_rows
        self._segment_length = segment_length
        self._mesh = mesh
        self._most = most_in_a_window
        self._greedy: dict[LMConfig, Greedy] = {}
        self._made: dict[tuple[LMConfig, int], Evaluator] = {}

    def prepare(self, setting: Setting, source: RecallTask) -> Prepared | None:
        """What reads the samples of a source; None where they are too long for one window, or the model takes none."""
        if not setting.is_one_window:
            return Prepared(self._evaluator(setting.model, self._segment_length), source)
        window = OneWindow(source, self._segment_length)
        if window.length > self._most:
            return None
        # A memory that is never read: as small as can be.
        model = setting.model.with_memory_size(window.length) if setting.model.has_memory else setting.model
        try:
            model.check(window.length)
        except UserError:
            return None
        if self._variables(model, window.length) != self._variables(model, self._segment_length):
            return None
        return Prepared(self._evaluator(model, window.length), window)

    def greedy(self, setting: Setting) -> Greedy:
        """What generates in a setting."""
        if setting.model not in self._greedy:
            self._greedy[setting.model] = Greedy(setting.model, self._num_rows, self._segment_length, self._mesh)
        return self._greedy[setting.model]

    def _evaluator(self, model: LMConfig, length: int) -> Evaluator:
        key = (model, length)
        if key not in self._made:
            self._made[key] = Evaluator(model, self._num_rows, length, self._mesh)
        return self._made[key]

    def _variables(self, model: LMConfig, length: int) -> Tree:
        """Shapes of parameters and buffers, which for some models are those of one segment length."""
        return jax.eval_shape(functools.partial(init_variables, model, self._num_rows, length), jax.random.key(0))
