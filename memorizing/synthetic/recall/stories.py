"""Stories in the style of bAbI's first five tasks (Weston et al. 2015), told by an own simulation of its world.

Persons go to places, take, drop and give things. A person takes a thing only where it lies, drops only what they hold,
gives only to a person in the same place, and goes only to another place. What a question asks follows from the
sentences alone.

qa1 one fact, qa2 two, qa3 three, qa4 relations of two places, qa5 relations of three (who gave what to whom).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from memorizing.synthetic.recall import templates

Task = Literal["qa1", "qa2", "qa3", "qa4", "qa5"]
_NUM_QUESTIONS = 5
_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


class Names(NamedTuple):
    """Who and what a story is about.

    Attributes:
      persons: of qa1 to qa3.
      givers: of qa5.
      things, places: of all.
    """

    persons: tuple[str, ...]
    givers: tuple[str, ...]
    things: tuple[str, ...]
    places: tuple[str, ...]

    def labels(self, task: Task) -> tuple[str, ...]:
        """What may be an answer."""
        return (*self.givers, *self.things) if task == "qa5" else self.places


FAMILIAR = Names(templates.PERSONS, templates.GIVERS, templates.THINGS, templates.PLACES)
OTHER = Names(templates.OTHER_PERSONS, templates.OTHER_GIVERS, templates.OTHER_THINGS, templates.OTHER_PLACES)


class Question(NamedTuple):
    """Something that follows from the facts before it.

    Attributes:
      text, answer: each begins with a space.
      support: indices of the facts that the answer takes, ascending.
    """

    text: str
    answer: str
    support: tuple[int, ...]


class Moment(NamedTuple):
    """When a question is asked.

    Attributes:
      num_facts: facts before it.
      questions: all that may be asked, of which bAbI asks one.
    """

    num_facts: int
    questions: tuple[Question, ...]


class Story(NamedTuple):
    """Facts, and the question behind the last of them.

    Attributes:
      facts: sentences, each of which begins with a space.
      question: the question.
      moments: those at which bAbI asks, up to that of the question.
    """

    facts: tuple[str, ...]
    question: Question
    moments: tuple[Moment, ...]


def story(task: Task, rng: np.random.Generator, names: Names = FAMILIAR) -> Story:
    """A story of a task, up to one of its five questions."""
    if task == "qa4":
        facts, moments = _directions(rng, names)
    else:
        teller = _Teller(rng, names.givers if task == "qa5" else names.persons, names)
        asked = int(rng.integers(_NUM_QUESTIONS))
        tell = {"qa1": _moves, "qa2": _things, "qa3": _former_places, "qa5": _gifts}[task]
        moments = list(tell(teller, rng, asked))
        facts = teller.facts
    choices = moments[-1].questions
    return Story(tuple(facts), choices[int(rng.integers(len(choices)))], tuple(moments))


class _Visit(NamedTuple):
    """That a thing was at a place, and the facts that tell it."""

    place: str
    support: tuple[int, ...]


@dataclasses.dataclass
class _Gift:
    """A thing that was given, by the fact of that number."""

    giver: str
    thing: str
    receiver: str
    fact: int


class _Teller:
    """The world, and what a reader knows of it."""

    def __init__(self, rng: np.random.Generator, persons: Sequence[str], names: Names) -> None:
        self._rng = rng
        self._names = names
        self.persons = list(persons)
        self.facts: list[str] = []
        # What is so, unknown to the reader at first: where persons are, where things lie or who holds them.
        self._place = {person: self._any(names.places) for person in persons}
        self._lies = dict(zip(names.things, [names.places[4 % len(names.places)], *names.places[2:4]], strict=True))
        self._holder: dict[str, str] = {}
        # What the reader knows: the fact that last moved a person, that last changed a thing's hands, and where a thing
        # has been.
        self.moved: dict[str, int] = {}
        self.handled: dict[str, int] = {}
        self.visits: dict[str, list[_Visit]] = {thing: [] for thing in names.things}
        self.gifts: list[_Gift] = []

    def _any(self, choices: Sequence[str]) -> str:
        return choices[int(self._rng.integers(len(choices)))]

    def moment(self, questions: Iterable[Question]) -> Moment:
        """A moment behind all facts that have been told."""
        return Moment(len(self.facts), tuple(questions))

    def place_of(self, person: str) -> str:
        return self._place[person]

    def _say(self, sentence: str) -> int:
        self.facts.append(f" {sentence}.")
        return len(self.facts) - 1

    def move(self) -> None:
        """A person goes to another place, with everything that they hold."""
        person = self._any(self.persons)
        place = self._any([place for place in self._names.places if place != self._place[person]])
        self._place[person] = place
        fact = self._say(f"{person} {self._any(templates.MOVES)} the {place}")
        self.moved[person] = fact
        for thing, holder in self._holder.items():
            if holder == person:
                self.visits[thing].append(_Visit(place, (self.handled[thing], fact)))

    def takes(self) -> list[tuple[str, str]]:
        """Who can take what."""
        return [(p, t) for t, place in self._lies.items() for p in self.persons if self._place[p] == place]

    def drops(self) -> list[tuple[str, str]]:
        """Who can drop what."""
        return [(holder, thing) for thing, holder in self._holder.items()]

    def gives(self, unlike: _Gift | None = None) -> list[tuple[str, str, str]]:
        """Who can give what to whom; only other things between other persons than in a gift, if there is one."""
        able = [
            (holder, thing, other)
            for thing, holder in self._holder.items()
            for other in self.persons
            if other != holder and self._place[other] == self._place[holder]
        ]
        if unlike is None:
            return able
        persons = {unlike.giver, unlike.receiver}
        return [gift for gift in able if gift[1] != unlike.thing and {gift[0], gift[2]} != persons]

    def take(self, person: str, thing: str) -> None:
        del self._lies[thing]
        self._holder[thing] = person
        fact = self._say(f"{person} {self._any(templates.TAKES)} the {thing}{self._there()}")
        self._learn(person, thing, fact)

    def drop(self, person: str, thing: str) -> None:
        del self._holder[thing]
        self._lies[thing] = self._place[person]
        fact = self._say(f"{person} {self._any(templates.DROPS)} the {thing}{self._there()}")
        self._learn(person, thing, fact)

    def give(self, giver: str, thing: str, receiver: str) -> None:
        self._holder[thing] = receiver
        fact = self._say(f"{giver} {self._any(templates.GIVES)} the {thing} to {receiver}")
        self.handled[thing] = fact
        self.gifts.append(_Gift(giver, thing, receiver, fact))

    def _there(self) -> str:
        return " there" if self._rng.integers(2) else ""

    def _learn(self, person: str, thing: str, fact: int) -> None:
        """A thing is where the person is that has it in hand, if that is known."""
        self.handled[thing] = fact
        if person not in self.moved:
            return
        visit = _Visit(self._place[person], tuple(sorted((self.moved[person], fact))))
        visits = self.visits[thing]
        if visits and visits[-1].place == visit.place:
            # Told once more.
            visits[-1] = visit
        else:
            visits.append(visit)

    def any_step(self, kinds: Sequence[str], unlike: _Gift | None = None) -> None:
        """One of the kinds that can be done, all equally likely; within a kind, any who can. `unlike`: see `gives`."""
        possible = {"take": self.takes(), "drop": self.drops(), "give": self.gives(unlike)}
        doable = [kind for kind in kinds if kind == "move" or possible[kind]]
        kind = self._any(doable)
        if kind == "move":
            self.move()
            return
        who = possible[kind]
        getattr(self, kind)(*who[int(self._rng.integers(len(who)))])


def _moves(teller: _Teller, rng: np.random.Generator, asked: int) -> Iterator[Moment]:
    """qa1: two moves before every question."""
    for _ in range(asked + 1):
        teller.move()
        teller.move()
        yield teller.moment(
            Question(f" Where is {person}?", f" {teller.place_of(person)}", (fact,))
            for person, fact in teller.moved.items()
        )


def _until_asked(teller: _Teller, rng: np.random.Generator, asked: int, least: int) -> Iterator[list[str]]:
    """Tells on until the question of that number; yields the things that each question may be about.

    Those are known to have been at `least` places, and at the last of them once only.
    """
    since = 0
    while True:
        handling = "take" if teller.takes() else "drop" if teller.drops() else "move"
        if teller.takes() and teller.drops() and rng.integers(2):
            handling = "drop"
        teller.any_step(("move", handling))
        since += 1
        places = {thing: [visit.place for visit in visits] for thing, visits in teller.visits.items()}
        known = [thing for thing, own in places.items() if len(own) >= least and own.count(own[-1]) == 1]
        if least == 1:
            known = [thing for thing, own in places.items() if own]
        if since > 2 and known and rng.integers(2):
            yield known
            if asked == 0:
                return
            asked -= 1
            since = 0


def _things(teller: _Teller, rng: np.random.Generator, asked: int) -> Iterator[Moment]:
    """qa2: where a thing is."""
    for known in _until_asked(teller, rng, asked, 1):
        visits = {thing: teller.visits[thing][-1] for thing in known}
        yield teller.moment(
            Question(f" Where is the {thing}?", f" {visit.place}", visit.support) for thing, visit in visits.items()
        )


def _former_places(teller: _Teller, rng: np.random.Generator, asked: int) -> Iterator[Moment]:
    """qa3: where a thing was before it came to where it now is."""
    for known in _until_asked(teller, rng, asked, 2):
        yield teller.moment(_former_place(thing, *teller.visits[thing][-2:]) for thing in known)


def _former_place(thing: str, before: _Visit, last: _Visit) -> Question:
    support = tuple(sorted({*before.support, *last.support}))
    return Question(f" Where was the {thing} before the {last.place}?", f" {before.place}", support)


def _gifts(teller: _Teller, rng: np.random.Generator, asked: int) -> Iterator[Moment]:
    """qa5: a gift, with up to five steps behind it, in which the same thing and the same two persons have no other."""
    kinds = ("move", "take", "give")
    for _ in range(asked + 1):
        before = len(teller.gifts)
        while len(teller.gifts) == before:
            teller.any_step(kinds)
        gift = teller.gifts[-1]
        for _ in range(int(rng.integers(6))):
            teller.any_step(kinds, unlike=gift)
        yield teller.moment(_of_a_gift(gift))


def _of_a_gift(gift: _Gift) -> Iterator[Question]:
    asked = [
        (f" What did {gift.giver} give to {gift.receiver}?", gift.thing),
        (f" Who gave the {gift.thing} to {gift.receiver}?", gift.giver),
        (f" Who did {gift.giver} give the {gift.thing} to?", gift.receiver),
        (f" Who gave the {gift.thing}?", gift.giver),
        (f" Who received the {gift.thing}?", gift.receiver),
    ]
    for text, answer in asked:
        yield Question(text, f" {answer}", (gift.fact,))


def _directions(rng: np.random.Generator, names: Names) -> tuple[list[str], list[Moment]]:
    """qa4: three places in a line, of which the question names the middle one."""
    first, middle, last = (names.places[i] for i in rng.choice(len(names.places), 3, replace=False))
    direction = list(_OPPOSITE)[int(rng.integers(4))]
    relations = [(first, middle), (middle, last)]
    if rng.integers(2):
        relations.reverse()
    facts = [f" The {place} is {direction} of the {other}." for place, other in relations]
    of_last = Question(f" What is the {middle} {direction} of?", f" {last}", (relations.index((middle, last)),))
    of_first = Question(f" What is {direction} of the {middle}?", f" {first}", (relations.index((first, middle)),))
    return facts, [Moment(len(facts), (of_last, of_first))]
