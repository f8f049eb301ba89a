"""Associative recall: pairs are told once and asked for once, across segments, and only the newest value counts."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memorizing.batch import Batch
from memorizing.errors import UserError
from memorizing.synthetic.recall import MQAR, SegmentedMQAR

SEGMENTED = [
    SegmentedMQAR(num_ids=256, num_pairs=8, eval_gap=3),
    SegmentedMQAR(num_ids=256, num_pairs=8, num_new_values=4, eval_gap=0),
    SegmentedMQAR(num_ids=256, num_pairs=12, num_queries=5, pair_segments=2, query_segments=3, eval_gap=1),
]
PUBLISHED = [MQAR(num_ids=256), MQAR(num_ids=256, num_pairs=6, num_new_values=3)]


def pairs_of(task, text) -> list[tuple[int, int, int]]:
    """Position, key and value of every key that is followed by a value."""
    ids, half = text.ids, task.num_ids // 2
    return [(i, ids[i], ids[i + 1]) for i in range(len(ids) - 1) if 0 < ids[i] < half <= ids[i + 1]]


@given(st.sampled_from(SEGMENTED), st.integers(0, 2**40), st.sampled_from(["train", "validation"]))
def test_an_oracle_answers_all_and_each_answer_was_told_in_an_earlier_segment(task, index: int, split: str) -> None:
    length = 32
    num_segments = task.eval_segments if split == "validation" else task.eval_segments + 2
    text = task.text_of_sample(split, 0, index, num_segments, length)
    asked = np.flatnonzero(text.is_answer)
    assert len(asked) == (task.num_queries or task.num_pairs) and len(set(text.ids[asked - 1])) == len(asked)
    # Fillers are fresh: whatever looks like one of the sample's pairs is one.
    keys = {int(text.ids[place - 1]) for place in asked}
    newest: dict[int, tuple[int, int]] = {}
    for place, key, value in pairs_of(task, text):
        if place + 1 not in asked and key in keys:
            newest[int(key)] = (place + 1, int(value))
    for place in asked:
        told_at, value = newest[int(text.ids[place - 1])]
        assert text.ids[place] == value and text.told_at[place] == told_at and told_at // length < place // length
        # The answer's id stands exactly twice: where it is told and where it is asked for.
        assert np.flatnonzero(text.ids == value).tolist() == [told_at, place]
    assert (text.told_at >= 0).sum() == len(asked)
    assert text.ids.min() >= 1 and text.ids.max() < task.vocab_size
    # A pair never ends a segment: its value is read in the segment of its key.
    assert all((place + 1) % length != length - 1 for place in asked)


@pytest.mark.parametrize("task", SEGMENTED)
@pytest.mark.parametrize("gap", [0, 1, 7])
def test_held_out_gaps_are_exact(task: SegmentedMQAR, gap: int) -> None:
    own = dataclasses.replace(task, eval_gap=gap)
    assert own.eval_segments == own.pair_segments + gap + own.query_segments
    text = own.held_out_text(3, 32)
    asked = np.flatnonzero(text.is_answer)
    distance = asked // 32 - text.told_at[asked] // 32
    assert distance.min() >= gap + 1 and distance.max() <= gap + own.pair_segments + own.query_segments - 1
    farthest = own.reaching(own.pair_segments + own.query_segments - 1 + gap)
    assert farthest.eval_gap == gap and own.identity == task.identity


def test_training_gaps_are_all_that_are_asked_for() -> None:
    task = SegmentedMQAR(num_ids=64, num_pairs=2, gaps=(0, 2), num_segments=5)
    distances = set()
    for index in range(60):
        text = task.text_of_sample("train", 0, index, 5, 16)
        asked = np.flatnonzero(text.is_answer)
        assert (asked // 16 == 4).all()
        distances |= set((4 - text.told_at[asked] // 16).tolist())
    assert distances == {1, 2, 3}


def test_a_new_value_comes_after_the_old_one_and_is_the_answer() -> None:
    task = SEGMENTED[1]
    for index in range(20):
        text = task.held_out_text(index, 48)
        told = [(place, key, value) for place, key, value in pairs_of(task, text) if place < 48]
        twice = {key for _, key, _ in told if [other for _, other, _ in told].count(key) == 2}
        assert len(twice) == 4
        for place in np.flatnonzero(text.is_answer):
            key, value = text.ids[place - 1], text.ids[place]
            assert [v for _, k, v in told if k == key][-1] == value


@pytest.mark.parametrize("task", PUBLISHED)
@pytest.mark.parametrize("fillers", ["fresh", "any", "zero"])
def test_the_published_form(task: MQAR, fillers: str) -> None:
    task = dataclasses.replace(task, fillers=fillers)
    for index in range(30):
        text = task.text_of_sample("train", 0, index, 1, 64)
        told = 2 * (task.num_pairs + task.num_new_values)
        pairs = text.ids[:told].reshape(-1, 2)
        newest = dict(pairs.tolist())
        asked = np.flatnonzero(text.is_answer)
        assert len(asked) == task.num_pairs and (asked % 2 == 1).all() and asked.min() > told
        assert {int(text.ids[place - 1]): int(text.ids[place]) for place in asked} == newest
        assert pairs[:, 0].max() < 128 <= pairs[:, 1].min() and len(set(pairs[:, 1])) == len(pairs)
        # What is read behind a key that is asked for is no answer.
        sample = task.sample("train", 0, index, 1, 64)
        np.testing.assert_array_equal(sample.targets[0][asked], text.ids[asked])
        np.testing.assert_array_equal(sample.tokens[0][asked], text.ids[asked - 1])
        read = sample.tokens[0][asked[asked < 63] + 1]
        if fillers == "fresh":
            assert not set(read) & set(pairs.ravel())
        if fillers == "zero":
            assert not read.any() and not np.delete(text.ids[told:], np.r_[asked, asked - 1] - told).any()


def test_near_slots_are_likelier_as_published() -> None:
    """The median distance between pair and question at (64, 4) and a = 0.01 is 14 tokens."""
    task = MQAR(num_ids=256)
    distances = []
    for index in range(400):
        text = task.text_of_sample("train", 0, index, 1, 64)
        asked = np.flatnonzero(text.is_answer)
        distances += (asked - text.told_at[asked]).tolist()
    assert abs(np.median(distances) - 14) <= 2
    uniform = dataclasses.replace(task, power=1.0)
    slots = [np.flatnonzero(uniform.text_of_sample("train", 0, i, 1, 64).is_answer) for i in range(400)]
    assert abs(np.mean(slots) - (8 + 56 / 2)) < 1.5


def test_a_guesser_is_at_chance() -> None:
    task = SegmentedMQAR(num_ids=64, num_pairs=6)
    rng = np.random.default_rng(0)
    values = np.concatenate([text.ids[text.is_answer] for text in (task.held_out_text(i, 32) for i in range(400))])
    guesses = rng.integers(32, 64, len(values))
    assert abs(np.mean(guesses == values) - task.chance) < 3 * np.sqrt(task.chance / len(values))
    assert task.chance == 1 / 32


def test_samples_are_functions_of_seed_and_index_and_resume() -> None:
    task = dataclasses.replace(SEGMENTED[0], num_segments=4, gaps=(0, 2))
    first, second = (task.train_batches(3, range(3), 2, 32, 5) for _ in range(2))
    next(first)
    second.set_state(json.loads(json.dumps(first.get_state())))
    for _ in range(3):
        batch, other = next(first), next(second)
        for one, two in zip(batch, other, strict=True):
            np.testing.assert_array_equal(one, two)
        assert isinstance(batch, Batch)
    texts = {
        task.sample(split, seed, 1, 4, 32).targets.tobytes() for split in ("train", "validation") for seed in (0, 1)
    }
    assert len(texts) == 4


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda: SegmentedMQAR(num_ids=9), r"num_ids = 9: an even number"),
        (lambda: SegmentedMQAR(num_ids=16, num_pairs=7), r"num_pairs = 7.*fewer than the 7 keys"),
        (lambda: SegmentedMQAR(num_queries=9), r"num_queries = 9"),
        (lambda: SegmentedMQAR(gaps=(2, 1)), r"gaps"),
        (lambda: SegmentedMQAR(num_segments=2, gaps=(1, 1)), r"num_segments = 2: at least 3"),
        (lambda: SegmentedMQAR(num_pairs=8).held_out_text(0, 16), r"segment_length = 16.*segments of 18 tokens"),
        (lambda: MQAR(num_pairs=8).sample("train", 0, 0, 1, 16), r"take 32 tokens.*has 16"),
        (lambda: SegmentedMQAR(pair_segments=2, query_segments=2).reaching(1), r"up to 3 segments back or more, not 1"),
    ],
)
def test_what_does_not_fit_is_told(make, pattern: str) -> None:
    with pytest.raises(UserError, match=pattern):
        make()
