"""The tasks with facts in noise: answers follow from the facts in the text, facts stand where they should."""

from __future__ import annotations

import collections
import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memorizing.synthetic import DetectAndMemorize, Memorize, Reasoning, SyntheticWords, babi

WORDS = SyntheticWords()
WHEREABOUTS = [Memorize(), DetectAndMemorize(), DetectAndMemorize(position="any_offset")]
FACT = re.compile(r"(?<!\S)(Mary|John|Daniel|Sandra) (?:\w+ )+?to the (\w+) \.")
RELATION = re.compile(r"The (\w+) is (\w+) of the (\w+) \.")
OPPOSITE = {"east": "west", "west": "east", "north": "south", "south": "north"}


def text_of(task, index: int, num_segments: int, length: int = 24) -> tuple[str, np.ndarray]:
    sample = task.sample("train", 0, index, num_segments, length)
    return WORDS.decode(sample.targets.ravel()), sample.loss_weights.ravel()


def answer_from(text: str) -> str:
    """The answer that follows from the facts in a text, by reading it."""
    where = re.search(r"Where is (\w+) \?", text)
    if where:
        return dict(FACT.findall(text))[where[1]]
    lies = {}
    for place, direction, other in RELATION.findall(text):
        # What lies in a direction of a place.
        lies[other, direction] = place
        lies[place, OPPOSITE[direction]] = other
    one = re.search(r"What is (\w+) of the (\w+) \?", text)
    if one:
        return lies[one[2], one[1]]
    other = re.search(r"What is the (\w+) (\w+) of \?", text)
    return lies[other[1], OPPOSITE[other[2]]]


@given(
    st.sampled_from([*WHEREABOUTS, Reasoning(), Reasoning(position="any_offset")]),
    st.integers(0, 2**40),
    st.integers(1, 9),
)
def test_the_answer_follows_from_the_facts_and_only_it_is_scored(task, index: int, num_segments: int) -> None:
    text, weights = text_of(task, index, num_segments)
    before, answer = text.rsplit(" ", 1)
    assert answer in babi.PLACES and before.endswith("?")
    assert answer == answer_from(before)
    assert weights[-1] == 1 and weights.sum() == 1
    facts = FACT.findall(before) + RELATION.findall(before)
    assert len(facts) == (2 if isinstance(task, Reasoning) else 1)
    # Everything else is noise.
    rest = RELATION.sub("", FACT.sub("", before))
    assert re.fullmatch(r"(\s*noise\d+)*\s*(Where|What)[^?]*\?", rest)


def starts_of_facts(task, num_segments: int, count: int, length: int = 24) -> list[tuple[int, ...]]:
    starts = []
    for index in range(count):
        words = text_of(task, index, num_segments, length)[0].split(" ")
        starts.append(tuple(i for i, word in enumerate(words[:-8]) if word in (*babi.NAMES, "The")))
    return starts


def test_memorize_begins_with_the_fact() -> None:
    assert set(starts_of_facts(Memorize(), 5, 50)) == {(0,)}


def test_segment_starts_are_equally_likely() -> None:
    starts = starts_of_facts(DetectAndMemorize(), 4, 2000)
    counts = collections.Counter(starts)
    assert set(counts) == {(0,), (24,), (48,), (72,)}
    # Standard deviation 19.4 of an expected 500.
    assert all(abs(count - 500) < 90 for count in counts.values())


def test_any_offset_is_any_and_equally_likely() -> None:
    # The longest fact has 7 words, question and answer 5: offsets up to 48 - 5 - 7 come with every fact.
    starts = [start for (start,) in starts_of_facts(DetectAndMemorize(position="any_offset"), 2, 4000)]
    counts = np.bincount(starts, minlength=38)
    assert set(starts) == set(range(38)) and len(counts) == 38
    assert counts[:37].min() > 60 and counts[:37].max() < 160
    # Across the border too.
    assert counts[18:24].sum() > 0


def test_two_facts_choose_their_segments_independently() -> None:
    starts = starts_of_facts(Reasoning(), 2, 2000)
    counts = collections.Counter(starts)
    assert set(counts) == {(0, 8), (0, 24), (24, 32)}
    assert abs(counts[0, 24] - 1000) < 120 and abs(counts[0, 8] - 500) < 100


def test_two_facts_at_any_offset_do_not_overlap() -> None:
    for first, second in starts_of_facts(Reasoning(position="any_offset"), 2, 500):
        assert first >= 0 and first + 8 <= second <= 48 - 8 - 8


@pytest.mark.parametrize("task", [*WHEREABOUTS, Reasoning()], ids=lambda task: task.identity)
def test_chance_is_what_the_question_alone_gives(task) -> None:
    """The best answer to each question without the facts is right as often as `chance` says; all places are answers."""
    answers: dict[str, collections.Counter] = {}
    for index in range(3000):
        text = text_of(task, index, 1)[0]
        question = re.search(r"(Where|What)[^?]*\?", text)[0]
        key = question if question.startswith("Where") else re.findall("|".join(babi.PLACES), question)[0]
        answers.setdefault(key, collections.Counter())[text.rsplit(" ", 1)[1]] += 1
    assert {answer for counter in answers.values() for answer in counter} == set(babi.PLACES)
    best = sum(max(counter.values()) for counter in answers.values()) / 3000
    assert task.chance <= best < task.chance + 0.035


def test_one_fact_is_not_enough_for_reasoning() -> None:
    """Both facts name the place asked about, each is the right one half of the time, and their order tells nothing."""
    first_is_right = 0
    for index in range(1000):
        text = text_of(Reasoning(), index, 1)[0]
        before, answer = text.rsplit(" ", 1)
        facts = RELATION.findall(before)
        asked = re.findall("|".join(babi.PLACES), before)[-1]
        assert all(asked in fact for fact in facts)
        first_is_right += answer in facts[0]
    assert 400 < first_is_right < 600


@dataclasses.dataclass(frozen=True)
class Letters:
    """A vocabulary of bytes, for answers of several tokens and different lengths."""

    vocab_size: int = 257

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 1

    def sample(self, rng: np.random.Generator, length: int) -> np.ndarray:
        return np.full(length, ord(".") + 1, np.int32)


def test_answers_of_several_tokens_end_the_document_and_their_length_is_not_told() -> None:
    task, ends = Memorize(noise=Letters()), set()
    for index in range(60):
        sample = task.sample("train", 0, index, 2, 80)
        targets, weights = sample.targets.ravel(), sample.loss_weights.ravel()
        text = bytes((targets[sample.is_real.ravel()] - 1).tolist()).decode()
        answer = bytes((targets[weights == 1] - 1).tolist()).decode()
        assert answer.strip() in babi.PLACES and text.endswith(f"? {answer.strip()}")
        assert f"to the {answer.strip()}." in text
        ends.add(int(np.argmax(weights)))
    assert ends == {160 - len(" bathroom")}


def test_words_encode_what_they_decode() -> None:
    ids = WORDS.encode(" Daniel went back to the hallway. Where is Daniel? noise0 noise255")
    assert WORDS.decode(ids) == "Daniel went back to the hallway . Where is Daniel ? noise0 noise255"
    assert Memorize.start_id not in ids and ids.max() == WORDS.vocab_size - 1
    with pytest.raises(ValueError, match="'Paris' is not in the vocabulary"):
        WORDS.encode("Where is Paris?")
    noise = WORDS.sample(np.random.default_rng(0), 5000)
    assert len(set(noise.tolist())) == 256 and noise.min() > WORDS.encode("?")[0]
