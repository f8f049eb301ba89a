"""Copy, Reverse and the dictionary look-up: answers are right, distances exact, only answers are scored."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memorizing.synthetic import Copy, DictionaryLookup, Reverse

KEY, VALUE, QUERY, FILLER = 65, 66, 67, 68


@given(
    st.sampled_from([Copy(), Copy(num_copies=1), Reverse()]),
    st.integers(0, 2**40),
    st.integers(1, 5),
    st.integers(5, 40),
)
def test_the_answer_is_the_sequence_again(task, index: int, num_segments: int, length: int) -> None:
    sample = task.sample("train", 0, index, num_segments, length)
    text = sample.targets[sample.targets > 0]
    (separator,) = np.flatnonzero(text == task.num_symbols + 1)
    sequence, answer = text[:separator], text[separator + 1 :]
    assert sequence.min() >= 1 and sequence.max() <= task.num_symbols
    expected = sequence[::-1] if isinstance(task, Reverse) else np.tile(sequence, task.num_copies)
    np.testing.assert_array_equal(answer, expected)
    # As long as fits: one more symbol would not.
    assert sample.targets.size - len(text) <= task.answer_parts
    np.testing.assert_array_equal(np.flatnonzero(sample.loss_weights), np.arange(separator + 1, len(text)))


def look_ups(
    task: DictionaryLookup, split: str, index: int, num_segments: int, length: int
) -> list[tuple[int, int, bool]]:
    """Reads a sample: segment, distance in segments and whether it is scored, of every query; checks each answer."""
    sample = task.sample(split, 0, index, num_segments, length)
    defined, found, scored_tokens = {}, [], 0
    for segment, (targets, weights) in enumerate(zip(sample.targets, sample.loss_weights, strict=True)):
        is_record = targets != FILLER
        assert is_record.sum() == (length - 1) // 10 * 10 and not is_record[-1]
        for record, weight in zip(targets[is_record].reshape(-1, 10), weights[is_record].reshape(-1, 10), strict=True):
            key, value = tuple(record[1:5]), tuple(record[6:])
            assert record[5] == VALUE and max(key + value) <= 64 and min(key + value) >= 1
            if record[0] == KEY:
                assert key not in defined and not weight.any()
                defined[key] = (segment, value)
            else:
                assert record[0] == QUERY and defined[key][1] == value
                assert not weight[:6].any() and len(set(weight[6:])) == 1
                found.append((segment, segment - defined[key][0], bool(weight[6])))
                scored_tokens += int(weight[6:].sum())
    assert scored_tokens == sample.loss_weights.sum()
    return found


@given(st.integers(0, 2**40), st.integers(1, 60), st.integers(21, 128), st.sampled_from([(1, 50), (2, 5), (7, 7)]))
def test_training_look_ups_are_right_and_within_reach(
    index: int, num_segments: int, length: int, distances: tuple[int, int]
) -> None:
    task = DictionaryLookup(distances=distances)
    for _, distance, is_scored in look_ups(task, "train", index, num_segments, length):
        assert is_scored and (distance == 0 or distances[0] <= distance <= distances[1])


def test_training_mixes_short_and_long_look_ups() -> None:
    found = [look_up for index in range(60) for look_up in look_ups(DictionaryLookup(), "train", index, 60, 64)]
    late = [distance for segment, distance, _ in found if segment >= 50]
    assert 0.4 < np.mean(np.array(late) == 0) < 0.65
    counts = collections.Counter(late)
    assert all(counts[distance] for distance in range(51))
    only_short = [d for _, d, _ in look_ups(DictionaryLookup(short_fraction=1.0), "train", 0, 60, 64)]
    assert set(only_short) == {0}


@pytest.mark.parametrize("distance", [0, 1, 7, 50])
def test_held_out_look_ups_are_scored_at_the_exact_distance(distance: int) -> None:
    task = dataclasses.replace(DictionaryLookup(), eval_distance=distance)
    for index in range(3):
        found = look_ups(task, "validation", index, 60, 128)
        assert {d for _, d, is_scored in found if is_scored} == {distance}
        assert sum(is_scored for *_, is_scored in found) == (60 - distance) * 6
        assert all(is_scored == (segment >= distance) for segment, _, is_scored in found)


def test_the_value_is_not_seen_between_definition_and_held_out_query() -> None:
    """Where a short look-up repeats a value, it does so in the segment of the definition."""
    sample = DictionaryLookup(eval_distance=7).sample("validation", 0, 0, 20, 64)

    def records_of(targets: np.ndarray) -> np.ndarray:
        return targets[targets != FILLER].reshape(-1, 10)

    for segment in range(7, 20):
        records = records_of(sample.targets[segment])
        for record in records[records[:, 0] == QUERY]:
            between = records_of(sample.targets[segment - 6 : segment])
            assert not np.any(np.all(between[:, 1:5] == record[1:5], axis=1))


def test_the_place_of_a_definition_does_not_follow_from_that_of_its_query() -> None:
    distances = []
    for index in range(20):
        for targets in DictionaryLookup(short_fraction=1.0).sample("train", 0, index, 10, 128).targets:
            starts = {tuple(targets[i + 1 : i + 5]): i for i in np.flatnonzero(targets == KEY)}
            queries = np.flatnonzero(targets == QUERY)
            distances += [i - starts[tuple(targets[i + 1 : i + 5])] for i in queries]
    assert collections.Counter(distances).most_common(1)[0][1] < 0.25 * len(distances)


def test_values_are_equally_likely() -> None:
    values = [DictionaryLookup().sample("train", 0, i, 60, 128) for i in range(10)]
    words = np.concatenate([sample.targets[sample.loss_weights == 1] for sample in values])
    shares = np.bincount(words, minlength=65)[1:65] / len(words)
    assert DictionaryLookup().chance == 1 / 64 and shares.min() > 0.5 / 64 and shares.max() < 1.6 / 64
