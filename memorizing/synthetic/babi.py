"""Facts and questions in the style of bAbI (Weston et al. 2015).

Their templates are those of the RMT report (Bulatov et al. 2023, section 4). The answer to every question is one of six
places. All texts but the answer's own word end in punctuation, and all begin with a space, so that they can be put
behind any other text.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NAMES = ("Mary", "John", "Daniel", "Sandra")
ACTIONS = ("moved", "went", "went back", "journeyed", "travelled")
PLACES = ("bathroom", "hallway", "garden", "office", "bedroom", "kitchen")
OPPOSITE = {"east": "west", "west": "east", "north": "south", "south": "north"}

_TEMPLATE_WORDS = "The the to is of Where What"
_ALL_WORDS = " ".join((*NAMES, *ACTIONS, *PLACES, *OPPOSITE, _TEMPLATE_WORDS, ". ?")).split()
# All words and marks that a story can have, each once.
WORDS = tuple(dict.fromkeys(_ALL_WORDS))


class Story(NamedTuple):
    """What a sample is about.

    Attributes:
      facts: sentences, in the order of the text.
      question: a sentence.
      answer: a place.
    """

    facts: tuple[str, ...]
    question: str
    answer: str


def whereabouts(rng: np.random.Generator) -> Story:
    """One fact: " Daniel went back to the hallway.", " Where is Daniel?", " hallway"."""
    name = str(rng.choice(NAMES))
    action = str(rng.choice(ACTIONS))
    place = str(rng.choice(PLACES))
    return Story(
        facts=(f" {name} {action} to the {place}.",),
        question=f" Where is {name}?",
        answer=f" {place}",
    )


def directions(rng: np.random.Generator) -> Story:
    """Two facts about three places on a line (bAbI's task 4).

    Only the direction tells which of them answers the question:
    " The hallway is east of the bathroom.", " The bedroom is west of the bathroom.", " What is the bathroom east of?",
    " bedroom". The question is always about the place in the middle, which both facts name, and every sentence may be
    turned round, so that it takes both the place and the direction to find the answer.
    """
    first, middle, last = map(str, rng.choice(PLACES, 3, replace=False))
    direction = str(rng.choice(list(OPPOSITE)))
    # `first` lies in the direction of the middle, `last` on the other side.
    facts = [
        _relation(rng, first, direction, middle),
        _relation(rng, last, OPPOSITE[direction], middle),
    ]
    rng.shuffle(facts)
    if rng.integers(2):
        question = f" What is {direction} of the {middle}?"
    else:
        question = f" What is the {middle} {OPPOSITE[direction]} of?"
    return Story(tuple(facts), question, f" {first}")


def _relation(rng: np.random.Generator, place: str, direction: str, other: str) -> str:
    if rng.integers(2):
        return f" The {other} is {OPPOSITE[direction]} of the {place}."
    return f" The {place} is {direction} of the {other}."
