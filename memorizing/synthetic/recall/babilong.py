"""BABILong (Kuratov et al. 2024): the facts of a bAbI story scattered in prose, and a question behind it.

The stories are our own (see `stories`), the prose is any; lengths count tokens of the model's own vocabulary. There are
no worked examples before the context: a model is trained on the task, as the authors train RMT.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from memorizing.errors import CountOrNone
from memorizing.synthetic.recall import scoring, stories
from memorizing.synthetic.recall.prompt import Draft, Prompt, PromptTask, TooShort, units_from
from memorizing.synthetic.task import Text

# As published: shorter sentences of the prose are left out.
_LEAST_SENTENCE = 10
_GENERATED = 20
_TRIES = 100


class _Piece(NamedTuple):
    """A fact, or a question with its answer.

    Attributes:
      ids: int32 [length], of the fact or the question.
      answer: int32 [length], of a question.
      told_by: the first fact that a question's answer takes; None in a fact.
    """

    ids: np.ndarray
    answer: np.ndarray = np.zeros(0, np.int32)
    told_by: int | None = None


def _asking_at_moments(
    story: stories.Story, rng: np.random.Generator, more_questions: int
) -> Iterator[str | stories.Question]:
    """The facts, and behind those of each moment so many questions, perhaps the same ones."""
    told = 0
    for moment in story.moments:
        yield from story.facts[told : moment.num_facts]
        told = moment.num_facts
        for _ in range(more_questions):
            yield moment.questions[int(rng.integers(len(moment.questions)))]


def _asking_at_end(
    story: stories.Story, rng: np.random.Generator, more_questions: int
) -> Iterator[str | stories.Question]:
    """The facts, and then so many questions, as far as there are others than the story's."""
    yield from story.facts
    if more_questions:
        others = [question for question in story.moments[-1].questions if question != story.question]
        yield from (others[i] for i in rng.permutation(len(others))[:more_questions])


@dataclasses.dataclass(frozen=True)
class BABILong(PromptTask):
    """Facts stand in their order before random sentences of the prose; several may stand before the same one.

    Attributes:
      task: qa1 to qa5.
      names: 'familiar', bAbI's persons, things and places; 'other', for a test whether a model has learned the task or
        its labels.
      more_questions: questions that a training sample answers before its last one. 0, as published: none. A held-out
        sample has its one question.
      ask_more: where these stand. 'at_end': behind all facts, all different. 'at_moments': so many at each of the up to
        five moments at which bAbI asks one, which is easier, since most are about what was told last or has been asked
        before.
      prose: whether the facts are scattered in prose; without it a sample is the story alone, BABILong's length 0.
    """

    task: stories.Task = "qa1"
    names: Literal["familiar", "other"] = "familiar"
    more_questions: CountOrNone = 0
    ask_more: Literal["at_end", "at_moments"] = "at_end"
    prose: bool = True

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
        return self._prompt(rng, length, 0)

    def training_text(self, rng: np.random.Generator, length: int) -> Text:
        return self._prompt(rng, length, self.more_questions).text

    def _prompt(self, rng: np.random.Generator, length: int, more_questions: int) -> Prompt:
        """A sample that answers so many questions, if there are others, before its last one."""
        in_order = _asking_at_end if self.ask_more == "at_end" else _asking_at_moments
        needed = []
        for _ in range(_TRIES):
            story = stories.story(self.task, rng, self._names)
            pieces = [self._piece(piece) for piece in in_order(story, rng, more_questions)]
            last = self._piece(story.question)
            fixed = sum(len(piece.ids) + len(piece.answer) for piece in pieces) + len(last.ids) + self._room_for_answer
            if fixed <= length:
                break
            # Too many facts: another story, as published.
            needed.append(fixed)
        else:
            raise TooShort(min(needed))
        draft = self._scattered(rng, pieces, last, length - fixed)
        question = story.question
        return Prompt(draft.text(), (question.answer.strip(),), question.text.strip(), _GENERATED)

    def _scattered(self, rng: np.random.Generator, pieces: list[_Piece], last: _Piece, room: int) -> Draft:
        """The pieces in their order, each before a random sentence of so much prose, and the last question."""
        noise = self._noise(rng, room)
        places = np.sort(rng.integers(0, len(noise) + 1, len(pieces)))
        before_each = [noise[first:after] for first, after in itertools.pairwise([0, *places, len(noise)])]
        draft = Draft()
        told_at: list[int] = []
        for sentences, piece in zip(before_each, [*pieces, last], strict=True):
            for sentence in sentences:
                draft.add(sentence)
            position = draft.add(piece.ids)
            if piece.told_by is None:
                told_at.append(position)
            else:
                draft.answer(piece.answer, told_at[piece.told_by])
        return draft

    def _piece(self, piece: str | stories.Question) -> _Piece:
        encode = self.language.encode
        if isinstance(piece, stories.Question):
            return _Piece(encode(piece.text), encode(piece.answer), piece.support[0])
        return _Piece(encode(piece))

    def _noise(self, rng: np.random.Generator, room: int) -> list[np.ndarray]:
        """Sentences in order, the last one cut."""
        if room == 0 or not self.prose:
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
