"""What all synthetic tasks promise: the shift, the stream's position, hosts, evaluation, errors."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memorizing.batch import Batch
from memorizing.errors import UserError
from memorizing.synthetic import (
    Copy,
    DetectAndMemorize,
    DictionaryLookup,
    Memorize,
    Reasoning,
    Reverse,
    SyntheticTask,
    SyntheticWords,
    TopicCopy,
)
from memorizing.synthetic.repeated_passages import RepeatedPassages

TASKS = [
    Memorize(),
    DetectAndMemorize(),
    DetectAndMemorize(position="any_offset"),
    Reasoning(),
    Reasoning(position="any_offset"),
    Copy(),
    Reverse(),
    DictionaryLookup(num_segments=0, distances=(1, 2), eval_segments=6, eval_distance=3),
    TopicCopy(num_topics=5),
]
LENGTH = 24
tasks = st.sampled_from(TASKS)
each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.identity)


def stream(task: SyntheticTask, num_rows: int = 4, rows: range | None = None, num_segments: int = 2, seed: int = 0):
    return task.train_batches(num_rows, rows or range(num_rows), num_segments, LENGTH, seed)


def assert_same(first: Batch, second: Batch) -> None:
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@given(tasks, st.integers(0, 2**40), st.integers(1, 6))
def test_tokens_are_targets_one_position_earlier_across_segments(
    task: SyntheticTask, index: int, num_segments: int
) -> None:
    sample = task.sample("train", 0, index, num_segments, LENGTH)
    assert [field.shape for field in sample] == [(num_segments, LENGTH)] * 4
    assert [field.dtype for field in sample] == [np.int32, np.int32, np.float32, bool]
    tokens, targets = sample.tokens.ravel(), sample.targets.ravel()
    length = np.count_nonzero(sample.is_real)
    assert tokens[0] == task.start_id
    np.testing.assert_array_equal(tokens[1:length], targets[: length - 1])
    # Positions after the end hold nothing, are not real and not scored.
    for field in sample:
        assert not field.ravel()[length:].any()
    assert targets[:length].all() and targets.max() < task.vocab_size


@given(tasks, st.integers(0, 3), st.integers(1, 3), st.sampled_from([0, 3, 5]))
def test_resumed_stream_is_the_same(task: SyntheticTask, steps: int, num_segments: int, sample_segments: int) -> None:
    task = dataclasses.replace(task, num_segments=sample_segments)
    first, second = stream(task, num_segments=num_segments), stream(task, num_segments=num_segments)
    for _ in range(steps):
        next(first)
    second.set_state(json.loads(json.dumps(first.get_state())))
    for _ in range(4):
        assert_same(next(first), next(second))


@pytest.mark.parametrize("num_segments", [1, 2, 3, 5, 7])
def test_long_samples_stream_through_steps_of_any_number_of_segments(num_segments: int) -> None:
    task = DetectAndMemorize(num_segments=5)
    batches = stream(task, num_segments=num_segments)
    read = [next(batches) for _ in range(-(-15 // num_segments))]
    joined = Batch(*(np.concatenate(field, axis=1)[:, :15] for field in zip(*read, strict=True)))
    samples = [[task.sample("train", 0, turn * 4 + row, 5, LENGTH) for row in range(4)] for turn in range(3)]
    for name in ("tokens", "targets", "loss_weights", "is_real"):
        expected = np.concatenate([np.stack([getattr(s, name) for s in turn]) for turn in samples], axis=1)
        np.testing.assert_array_equal(getattr(joined, name), expected)
    np.testing.assert_array_equal(joined.start_of_document, np.tile([True, False, False, False, False], (4, 3)))


@each_task
def test_a_sample_fills_a_step_unless_told_otherwise(task: SyntheticTask) -> None:
    batches = stream(task, num_segments=3)
    for _ in range(2):
        batch = next(batches)
        np.testing.assert_array_equal(batch.start_of_document, np.tile([True, False, False], (4, 1)))


@each_task
def test_rows_do_not_depend_on_hosts(task: SyntheticTask) -> None:
    whole, hosts = stream(task), [stream(task, rows=rows) for rows in (range(0, 1), range(1, 4))]
    for _ in range(3):
        parts = [next(host) for host in hosts]
        assert_same(next(whole), Batch(*(np.concatenate(field) for field in zip(*parts, strict=True))))
    assert [host.get_state() for host in hosts] == [whole.get_state()] * 2


@each_task
def test_no_sample_comes_twice_and_splits_and_seeds_differ(task: SyntheticTask) -> None:
    def texts(split: str, seed: int) -> set[bytes]:
        return {task.sample(split, seed, index, 2, LENGTH).targets.tobytes() for index in range(50)}

    train, other_seed, validation = texts("train", 0), texts("train", 1), texts("validation", 0)
    assert len(train) == len(other_seed) == len(validation) == 50
    assert not train & other_seed and not train & validation
    batches = stream(task)
    read = [row.tobytes() for _ in range(10) for row in next(batches).targets]
    assert len(set(read)) == len(read)


def test_a_curriculum_goes_on_with_new_samples() -> None:
    """Between samples, the position of a stage is a position of the next one, whose rows and segments are others."""
    short, task = stream(Memorize(), num_rows=4, num_segments=1), Memorize()
    next(short), next(short)
    longer = stream(task, num_rows=2, num_segments=2)
    longer.set_state(short.get_state())
    np.testing.assert_array_equal(next(longer).targets[1], task.sample("train", 0, 9, 2, LENGTH).targets)


@each_task
def test_state_of_another_stream_is_refused(task: SyntheticTask) -> None:
    state = stream(task).get_state()
    with pytest.raises(ValueError, match="its seed is 0, here it is 1"):
        stream(task, seed=1).set_state(state)
    with pytest.raises(ValueError, match="its task is"):
        stream(dataclasses.replace(task, num_segments=7)).set_state(state)
    long = dataclasses.replace(task, num_segments=7)
    inside = stream(long)
    next(inside)
    with pytest.raises(ValueError, match="its num_rows is 4, here it is 2"):
        stream(long, num_rows=2).set_state(inside.get_state())


@pytest.mark.parametrize("eval_segments", [1, 4, 16])
@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_every_held_out_sample_is_evaluated_once(eval_segments: int, num_rows: int) -> None:
    task = dataclasses.replace(Memorize(num_eval_samples=7), eval_segments=eval_segments)
    seen: dict[int, list[np.ndarray]] = {}
    for batch, document, offset in task.evaluation_batches(num_rows, LENGTH):
        assert batch.targets.shape == (num_rows, 1, LENGTH)
        np.testing.assert_array_equal(batch.start_of_document[:, 0], offset == 0)
        for row in range(num_rows):
            if document[row] < 0:
                assert not batch.targets[row].any() and not batch.loss_weights[row].any()
                continue
            segments = seen.setdefault(int(document[row]), [])
            assert offset[row] == len(segments) * LENGTH
            segments.append(batch.targets[row, 0])
    assert sorted(seen) == list(range(7))
    for index, segments in seen.items():
        expected = task.sample("validation", 0, index, eval_segments, LENGTH).targets
        np.testing.assert_array_equal(np.stack(segments), expected)


@pytest.mark.parametrize(
    "task",
    [Memorize(num_eval_samples=7), RepeatedPassages(passage_length=5, num_documents=7)],
    ids=["sample", "passage"],
)
def test_hosts_share_the_rows_of_an_evaluation(task) -> None:
    whole = list(task.evaluation_batches(6, LENGTH))
    shares = [list(task.evaluation_batches(6, LENGTH, range(first, first + 2))) for first in (0, 2, 4)]
    for all_rows, *parts in zip(whole, *shares, strict=True):
        for field, *rows in zip(jax.tree.leaves(all_rows), *map(jax.tree.leaves, parts), strict=True):
            np.testing.assert_array_equal(field, np.concatenate(rows))


def test_evaluation_settings_are_no_part_of_the_identity() -> None:
    for task in TASKS:
        assert dataclasses.replace(task, num_eval_samples=3, eval_segments=99).identity == task.identity
    assert Memorize(noise=SyntheticWords(num_words=5)).identity != Memorize().identity
    assert DetectAndMemorize(position="any_offset").identity != DetectAndMemorize().identity


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Memorize(num_segments=-1), "Memorize.num_segments = -1: a number of segments"),
        (lambda: Copy(eval_segments=0), "Copy.eval_segments = 0: at least 1"),
        (lambda: Copy(num_copies=0), "Copy.num_copies = 0: at least 1"),
        (lambda: Reverse(num_symbols=1), "Reverse.num_symbols = 1: at least 2"),
        (lambda: Reasoning(position="end"), "Reasoning.position = 'end': 'segment_start' or 'any_offset'"),
        (lambda: SyntheticWords(num_words=0), "SyntheticWords.num_words = 0: at least 1"),
        (lambda: DictionaryLookup(eval_distance=60), "DictionaryLookup.eval_distance = 60: from 0 to below .*60"),
        (lambda: DictionaryLookup(distances=(5, 4)), r"DictionaryLookup.distances = \(5, 4\): a least distance"),
        (lambda: DictionaryLookup(num_segments=3, distances=(3, 4)), "DictionaryLookup.distances = .*num_segments = 3"),
        (lambda: DictionaryLookup(short_fraction=1.5), "DictionaryLookup.short_fraction = 1.5: a share"),
        (lambda: Memorize().sample("train", 0, 0, 4, 4), "BatchConfig.segment_length = 4: .* segments of 5 tokens"),
        (lambda: Reasoning().sample("train", 0, 0, 4, 20), "BatchConfig.segment_length = 20: .* 24 tokens"),
        (lambda: Copy().sample("train", 0, 0, 1, 3), "BatchConfig.segment_length = 3: Copy needs at least 4 tokens"),
        (
            lambda: DictionaryLookup().sample("train", 0, 0, 1, 20),
            "BatchConfig.segment_length = 20: a definition and a query of DictionaryLookup take 21 tokens",
        ),
        (
            lambda: DictionaryLookup(num_words=2, key_length=1).sample("train", 0, 0, 60, 64),
            "DictionaryLookup.num_words = 2: 2 keys of 1 words are not enough for the 300 definitions",
        ),
    ],
)
def test_what_cannot_work_is_told(build, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()
