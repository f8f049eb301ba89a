"""BABILong (Kuratov et al. 2024): the facts of a bAbI story scattered in prose, and a question behind it.

The stories are our own (see `stories`), the prose is any; lengths count tokens of the model's own vocabulary. There are
no worked examples before the context: a model is trained on the task, as the authors train RMT.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import numpy as np

from memorizing.synthetic.recall import scoring, stories
from memorizing.synthetic.recall.prompt import Draft, Prompt, PromptTask, TooShort, units_from

# As published: shorter sentences of the prose are left out.
_LEAST_SENTENCE = 10
_GENERATED = 20
_TRIES = 100


@dataclasses.dataclass(frozen=True)
class BABILong(PromptTask):
    """Facts stand in their order before random sentences of the prose; several may stand before the same one.

    Attributes:
      task: qa1 to qa5.
      names: 'familiar', bAbI's persons, things and places; 'other', for a test whether a model has learned the task or
        its labels.
    """

    task: stories.Task = "qa1"
    names: Literal["familiar", "other"] = "familiar"

    @property
    def chance(self) -> float:
        """Of the best guess that uses nothing but the question."""
        # In qa4 the question names one of the six places; in qa5 there are three things, and three others.
        return {"qa4": 1 / 5, "qa5": 1 / 3}.get(self.task, 1 / 6)

    @property
    def _names(self) -> stories.Names:
        return stories.FAMILIAR if self.names == "familiar" else stories.OTHER

    @functools.cached_property
    def _room_for_answer(self) -> int:
        """Tokens of the longest label: where a prompt ends does not tell its answer."""
        return max(len(self.language.encode(f" {label}")) for label in self._names.labels(self.task))

    @functools.cached_property
    def _sentences(self) -> list[np.ndarray]:
        return [sentence for sentence in self.language.sentences() if len(sentence) >= _LEAST_SENTENCE]

    def prompt(self, rng: np.random.Generator, length: int) -> Prompt:
        encode = self.language.encode
        needed = []
        for _ in range(_TRIES):
            story = stories.story(self.task, rng, self._names)
            facts = [encode(fact) for fact in story.facts]
            question = encode(story.question)
            fixed = sum(map(len, facts)) + len(question) + self._room_for_answer
            if fixed <= length:
                break
            # Too many facts: another story, as published.
            needed.append(fixed)
        else:
            raise TooShort(min(needed))
        noise = self._noise(rng, length - fixed)
        places = np.sort(rng.integers(0, len(noise) + 1, len(facts)))
        draft = Draft()
        told_at = []
        fact = 0
        for index in range(len(noise) + 1):
            while fact < len(facts) and places[fact] == index:
                told_at.append(draft.add(facts[fact]))
                fact += 1
            if index < len(noise):
                draft.add(noise[index])
        draft.add(question)
        draft.answer(encode(story.answer), told_at[story.support[0]])
        return Prompt(draft.text(), (story.answer.strip(),), story.question.strip(), _GENERATED)

    def _noise(self, rng: np.random.Generator, room: int) -> list[np.ndarray]:
        """Sentences in order, the last one cut."""
        if room == 0:
            return []
        units = units_from(self._sentences, rng, room)
        excess = sum(map(len, units)) - room
        while excess >= len(units[-1]):
            excess -= len(units.pop())
        if excess:
            units[-1] = units[-1][:-excess]
        return units

    def score(self, prediction: str, prompt: Prompt) -> float:
        labels = self._names.labels(self.task)
        return scoring.babilong(prediction, prompt.references[0], prompt.question, labels)
