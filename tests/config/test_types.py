"""Which values a field takes, and what a user is told that it takes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest

from memorizing.config import types
from memorizing.config.loading import load_experiment
from memorizing.config.types import describe, matches
from memorizing.errors import Range


@pytest.mark.parametrize(
    ("hint", "right", "wrong"),
    [
        (int, [0, -3], [True, 1.0, "1", None]),
        (float, [0.5, 2], [True, "0.5", None]),
        (bool, [True, False], [0, 1, "True"]),
        (str | None, ["", None], [0, ()]),
        # Equal is not enough: True == 1 == 1.0.
        (Literal[1, "a"], [1, "a"], [True, 1.0, "b", [1]]),
        (tuple[int, ...], [(), (1,), (1, 2)], [1, [1], (1, "2"), (True,)]),
        (tuple[int, str], [(1, "a")], [(), (1,), (1, "a", 2), ("a", 1)]),
        (tuple[()], [()], [(1,)]),
        (tuple[tuple[int, float], ...], [(), ((1, 2.0), (3, 4))], [(1, 2.0), ((1,),), ((1, None),)]),
        (list[int], [[1]], [(1,), 1]),
        (Any, [None, 1, "a"], []),
    ],
)
def test_types(hint: Any, right: list, wrong: list):
    assert [value for value in right if not matches(value, hint)] == []
    assert [value for value in wrong if matches(value, hint)] == []


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "a whole number"),
        (str | None, "a string or None"),
        (Literal["mean", "max"], "one of 'mean', 'max'"),
        (tuple[float, ...], "a tuple, each item a number"),
        (str | tuple[str, ...], "a string or a tuple of such"),
        (tuple[tuple[int, bool], ...], "a tuple, each item a tuple (a whole number, True or False)"),
    ],
)
def test_descriptions(hint: Any, words: str):
    assert describe(hint) == words


@pytest.mark.parametrize(
    ("hint", "given", "expected"),
    [
        (float, 10**23, 1e23),
        (Annotated[float, Range(0, 1e30)] | None, 10**23, 1e23),
        (tuple[float, ...], (1, 2.0), (1.0, 2.0)),
        (tuple[int, float], (1, 2), (1, 2.0)),
        (int | float, 1, 1),
        (float | None, None, None),
        (str, "1", "1"),
    ],
)
def test_a_whole_number_is_a_float_where_that_is_meant(hint: Any, given: Any, expected: Any):
    """JAX takes 10**23 for a number of 32 bits, and refuses it; 1e23 is a number like any other."""
    found = types._with_floats(given, hint)
    assert repr(found) == repr(expected)


def test_a_configuration_has_floats_where_these_are_meant():
    experiment, _ = load_experiment(["smoke"], ["LMConfig.final_logit_cap = 100000000000000000000000"])
    assert repr(experiment.model.final_logit_cap) == "1e+23"
