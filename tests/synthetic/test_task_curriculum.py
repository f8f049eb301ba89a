"""A curriculum over tasks hands out each task's own stream, one after the other, and goes on wherever it was left."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from memorizing.batch import Batch
from memorizing.errors import UserError
from memorizing.synthetic import Curriculum, DictionaryLookup

EASY = DictionaryLookup(
    num_segments=2, distances=(1, 1), key_length=1, value_length=1, eval_segments=3, eval_distance=1
)
HARD = DictionaryLookup(
    num_segments=3, distances=(1, 2), key_length=2, value_length=2, eval_segments=4, eval_distance=2
)
CURRICULUM = Curriculum(((0, EASY), (3, HARD), (8, EASY)))
ROWS, LENGTH = 4, 32


def stream(source: Curriculum | DictionaryLookup, rows: range = range(ROWS)):
    return source.train_batches(ROWS, rows, 1, LENGTH, 7)


def assert_equal(first: Batch, second: Batch) -> None:
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_stage_is_its_task_from_the_start():
    batches, streams = stream(CURRICULUM), (stream(EASY), stream(HARD), stream(EASY))
    for number in range(12):
        assert_equal(next(batches), next(streams[(number >= 3) + (number >= 8)]))


@pytest.mark.parametrize("at", range(10))
def test_goes_on_from_any_position_with_another_number_of_hosts(at: int):
    whole = stream(CURRICULUM)
    for _ in range(at):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    parts = [stream(CURRICULUM, range(2 * host, 2 * host + 2)) for host in range(2)]
    for part in parts:
        part.set_state(state)
    for _ in range(4):
        expected = next(whole)
        found = (np.concatenate(fields) for fields in zip(*map(next, parts), strict=True))
        assert_equal(Batch(*found), expected)


def test_the_position_of_another_stream_is_refused():
    with pytest.raises(ValueError, match="another stream"):
        stream(CURRICULUM).set_state(stream(EASY).get_state())
    other = stream(Curriculum(((0, HARD),)))
    with pytest.raises(ValueError, match="another stream"):
        stream(CURRICULUM).set_state(other.get_state())


def test_held_out_samples_are_those_of_the_last_task():
    last = dataclasses.replace(CURRICULUM, stages=((0, EASY), (5, HARD)))
    for found, expected in zip(
        last.reaching(3).evaluation_batches(2, LENGTH), HARD.reaching(3).evaluation_batches(2, LENGTH), strict=True
    ):
        assert_equal(found.batch, expected.batch)
    assert (last.chance, last.vocab_size, last.num_eval_documents) == (HARD.chance, HARD.vocab_size, 32)
    assert last.identity != CURRICULUM.identity


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ((), "starts at the batches"),
        (((5, EASY),), "expected 0 first"),
        (((0, EASY), (5, HARD), (5, EASY)), "growing"),
        (((0, EASY), (5, dataclasses.replace(HARD, num_words=70))), "as many in all"),
    ],
)
def test_wrong_stages_are_named(stages: tuple, told: str):
    with pytest.raises(UserError, match=told):
        Curriculum(stages)
