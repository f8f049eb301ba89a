"""Stories: a reader who knows only the sentences answers every question, and facts stand in prose as they should."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from memorizing.synthetic.recall import BABILong, PlainWords, stories, templates
from memorizing.synthetic.task import Split

TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")
MOVE = re.compile(rf"(\w+) (?:{'|'.join(templates.MOVES)}) the (\w+)\.")
TAKE = re.compile(rf"(\w+) (?:{'|'.join(templates.TAKES)}) the (\w+)(?: there)?\.")
DROP = re.compile(rf"(\w+) (?:{'|'.join(templates.DROPS)}) the (\w+)(?: there)?\.")
GIVE = re.compile(rf"(\w+) (?:{'|'.join(templates.GIVES)}) the (\w+) to (\w+)\.")
RELATION = re.compile(r"The (\w+) is (\w+) of the (\w+)\.")
OPPOSITE = {"east": "west", "west": "east", "north": "south", "south": "north"}


class Reader:
    """Replays sentences. It is written from bAbI's rules, and shares nothing with what tells the stories."""

    def __init__(self, facts: tuple[str, ...]) -> None:
        self.where, self.holds, self.trail, self.gifts, self.lies = {}, {}, {}, [], {}
        for fact in facts:
            self.read(fact.strip())

    def read(self, fact: str) -> None:
        if found := MOVE.fullmatch(fact):
            person, place = found.groups()
            assert self.where.get(person) != place, "nobody goes to where they are"
            self.where[person] = place
            for thing in [thing for thing, holder in self.holds.items() if holder == person]:
                self.seen(thing, place)
        elif found := TAKE.fullmatch(fact):
            person, thing = found.groups()
            assert thing not in self.holds, "what somebody holds cannot be taken"
            self.holds[thing] = person
            self.check_place(person, thing)
        elif found := DROP.fullmatch(fact):
            person, thing = found.groups()
            assert self.holds.pop(thing) == person, "only who holds a thing drops it"
            self.check_place(person, thing)
        elif found := GIVE.fullmatch(fact):
            giver, thing, receiver = found.groups()
            assert self.holds[thing] == giver != receiver
            places = {self.where[person] for person in (giver, receiver) if person in self.where}
            assert len(places) <= 1, "who gives stands beside who gets"
            self.holds[thing] = receiver
            self.gifts.append((giver, thing, receiver))
        else:
            (place, direction, other) = RELATION.fullmatch(fact).groups()
            self.lies[other, direction] = place
            self.lies[place, OPPOSITE[direction]] = other

    def check_place(self, person: str, thing: str) -> None:
        if person in self.where:
            trail = self.trail.get(thing)
            assert not trail or trail[-1] == self.where[person], "a thing is where the person is"
            self.seen(thing, self.where[person])

    def seen(self, thing: str, place: str) -> None:
        trail = self.trail.setdefault(thing, [])
        if not trail or trail[-1] != place:
            trail.append(place)

    def answer(self, question: str) -> str:
        for pattern, find in (
            (r"Where is the (\w+)\?", lambda thing: self.trail[thing][-1]),
            (r"Where is (\w+)\?", lambda person: self.where[person]),
            (r"Where was the (\w+) before the (\w+)\?", self.before),
            (r"What is (\w+) of the (\w+)\?", lambda direction, place: self.lies[place, direction]),
            (r"What is the (\w+) (\w+) of\?", lambda place, direction: self.lies[place, OPPOSITE[direction]]),
            (r"What did (\w+) give to (\w+)\?", lambda giver, receiver: self.gift(giver, None, receiver)[1]),
            (r"Who gave the (\w+) to (\w+)\?", lambda thing, receiver: self.gift(None, thing, receiver)[0]),
            (r"Who did (\w+) give the (\w+) to\?", lambda giver, thing: self.gift(giver, thing, None)[2]),
            (r"Who gave the (\w+)\?", lambda thing: self.gift(None, thing, None)[0]),
            (r"Who received the (\w+)\?", lambda thing: self.gift(None, thing, None)[2]),
        ):
            if found := re.fullmatch(pattern, question.strip()):
                return find(*found.groups())
        raise AssertionError(question)

    def before(self, thing: str, place: str) -> str:
        trail = self.trail[thing]
        assert trail.count(place) == 1, "the question has one answer"
        return trail[trail.index(place) - 1]

    def gift(self, *wanted: str | None) -> tuple[str, str, str]:
        """The last one that is as wanted."""
        fitting = [
            gift for gift in self.gifts if all(name in (None, own) for name, own in zip(wanted, gift, strict=True))
        ]
        return fitting[-1]


def told(task: str, number: int, names: stories.Names = stories.FAMILIAR) -> list[stories.Story]:
    return [stories.story(task, np.random.default_rng([7, index]), names) for index in range(number)]


@pytest.mark.parametrize("task", TASKS)
def test_an_independent_reader_answers_every_question(task: str) -> None:
    """Ten thousand stories, all five tasks together."""
    for index, story in enumerate(told(task, 2000)):
        assert Reader(story.facts).answer(story.question.text) == story.question.answer.strip(), index


@pytest.mark.parametrize("task", TASKS)
def test_the_supporting_facts_tell_the_answer(task: str) -> None:
    """Without them the reader answers something else, or nothing, in most stories: chance is a third or less."""
    number = {"qa1": (1, 1), "qa2": (1, 2), "qa3": (2, 4), "qa4": (1, 1), "qa5": (1, 1)}[task]
    kept = 0
    for story in told(task, 150):
        assert list(story.question.support) == sorted(set(story.question.support)) and len(story.facts) > max(
            story.question.support
        )
        assert number[0] <= len(story.question.support) <= number[1]
        without = tuple(fact for index, fact in enumerate(story.facts) if index not in story.question.support)
        try:
            kept += Reader(without).answer(story.question.text) == story.question.answer.strip()
        except (AssertionError, KeyError, IndexError):
            continue
    assert kept < 150 * 0.45


@pytest.mark.parametrize("task", TASKS)
def test_other_names_make_other_labels(task: str) -> None:
    familiar = {label for label in stories.FAMILIAR.labels(task)}
    answers = {story.question.answer.strip() for story in told(task, 100, stories.OTHER)}
    assert not answers & familiar and answers <= set(stories.OTHER.labels(task))
    assert {story.question.answer.strip() for story in told(task, 100)} <= familiar
    for story in told(task, 50, stories.OTHER):
        assert Reader(story.facts).answer(story.question.text) == story.question.answer.strip()


def test_stories_are_as_long_as_published() -> None:
    """Facts before a question: 2 to 10, 2 to 68, 4 to 320 and 2; of the longest ones nearly all."""
    lengths = {task: [len(story.facts) for story in told(task, 150)] for task in TASKS}
    assert set(lengths["qa1"]) == {2, 4, 6, 8, 10} and set(lengths["qa4"]) == {2}
    assert min(lengths["qa2"]) >= 2 and np.quantile(lengths["qa2"], 0.99) <= 68
    assert min(lengths["qa3"]) >= 4 and np.quantile(lengths["qa3"], 0.99) <= 320
    assert min(lengths["qa5"]) >= 2 and np.quantile(lengths["qa5"], 0.99) <= 126


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_facts_stand_in_prose_in_their_order_and_the_answer_ends_the_text(task: str, split: Split) -> None:
    words = PlainWords()
    babilong = BABILong(language=words, task=task)
    chance, right = babilong.chance, 0
    for index in range(30):
        text = babilong.text_of_sample(split, 0, index, 8, 64)
        prompt, answer = words.decode(text.ids).rsplit(" ", 1)
        start = re.search(r"(Where|What|Who)\b[^?]*\?$", prompt).start()
        context, question = prompt[:start], prompt[start:].replace(" ?", "?")
        # Prose has none of the story's words.
        facts = tuple(fact.replace(" .", ".") for fact in re.findall(r"(?:[A-Z]|[a-z]{2,})[A-Za-z ]* \.", context))
        assert Reader(facts).answer(question) == answer and text.is_answer.tolist().index(True) == len(text.ids) - 1
        assert len(text.ids) == 8 * 64
        told_at = text.told_at[-1]
        assert words.decode(text.ids[told_at : told_at + 1]) == "." and text.told_at[:-1].max() == -1
        guess = stories.FAMILIAR.labels(task)[index % len(stories.FAMILIAR.labels(task))]
        right += guess == answer
    # A guesser among all labels is not better than chance.
    assert right / 30 <= chance + 3 * np.sqrt(chance * (1 - chance) / 30)


@pytest.mark.parametrize("ask_more", ["at_end", "at_moments"])
@pytest.mark.parametrize("task", TASKS)
def test_every_question_of_a_training_sample_follows_from_the_facts_before_it(task: str, ask_more: str) -> None:
    """With `more_questions` a training sample asks more; a held-out one still asks once, as published.

    Behind the story nothing is asked twice, so that no answer can be copied from an earlier one.
    """
    words = PlainWords()
    plain = BABILong(language=words, task=task)
    asking = dataclasses.replace(plain, more_questions=3, ask_more=ask_more)
    piece = re.compile(r"((?:Where|What|Who)\b[^?.]*\?) (\w+)|((?:[A-Z]|[a-z]{2,})[A-Za-z ]* \.)")
    numbers = set()
    for index in range(20):
        text = asking.text_of_sample("train", 0, index, 16, 64)
        answers = iter(text.ids[text.is_answer])
        facts, questions = [], []
        for found in piece.finditer(words.decode(text.ids)):
            question, answer, fact = found.groups()
            if fact:
                assert ask_more == "at_moments" or not questions
                facts.append(fact.replace(" .", "."))
                continue
            questions.append(question)
            assert Reader(tuple(facts)).answer(question.replace(" ?", "?")) == answer == words.decode([next(answers)])
        assert next(answers, None) is None
        numbers.add(len(questions))
        if ask_more == "at_end":
            assert len(questions) == len(set(questions))
        else:
            assert (len(questions) - 1) % 3 == 0 < len(questions) - 1
        told_at = text.told_at[text.is_answer]
        assert (told_at < np.flatnonzero(text.is_answer)).all() and (words.encode(".") == text.ids[told_at]).all()
        held_out = [source.text_of_sample("validation", 0, index, 16, 64) for source in (plain, asking)]
        np.testing.assert_array_equal(held_out[0].ids, held_out[1].ids)
    if ask_more == "at_end":
        # There are not always as many as are asked for: in qa4 two.
        assert 1 < max(numbers) <= (2 if task == "qa4" else 4)


@pytest.mark.parametrize("task", TASKS)
def test_without_prose_a_sample_is_the_story_alone(task: str) -> None:
    words = PlainWords()
    babilong = BABILong(language=words, task=task, prose=False)
    for index in range(20):
        text = babilong.text_of_sample("validation", 0, index, 16, 64)
        story, answer = words.decode(text.ids).rsplit(" ", 1)
        *facts, question = re.findall(r"[A-Z][A-Za-z ]* [.?]", story)
        assert " ".join([*facts, question]) == story
        facts = tuple(fact.replace(" .", ".") for fact in facts)
        assert Reader(facts).answer(question.replace(" ?", "?")) == answer
