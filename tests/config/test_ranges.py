"""Every number that a user can set has a range, is refused outside of it in one line, and is never a surprise inside.

Fields and flags are those that are registered and that parsers have, not a list.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import math
import random
import re
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from settings_to_try import EXTREMES, ODD, fields, flags

from memorizing import main
from memorizing.config.loading import load_experiment
from memorizing.config.registry import MECHANISMS
from memorizing.errors import Range, UserError


def numbers(hint: Any) -> Iterator[Any]:
    """The parts of a type that are numbers, with what is said of their range."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated or hint in (int, float):
        yield hint
    elif origin is not typing.Literal:
        for arg in typing.get_args(hint):
            yield from numbers(arg)


@pytest.mark.parametrize(("cls", "name", "hint"), fields(), ids=lambda value: getattr(value, "__name__", None))
def test_every_number_of_a_configuration_has_a_range(cls: type, name: str, hint: Any):
    for number in numbers(hint):
        ranges = [note for note in typing.get_args(number)[1:] if isinstance(note, Range)]
        assert ranges, f"{cls.__name__}.{name} is {number}: annotate it with a Range"


def test_everything_is_tried():
    """Else a module that nobody had imported would be left out."""
    names = {cls.__name__ for cls, _, _ in fields()}
    assert {"LMConfig", "AdamW", "LoopConfig", "CachedCorpus", *(kind.__name__ for kind in MECHANISMS)} <= names


def test_every_number_of_a_command_has_a_range():
    bare = [f"{name} {action.option_strings[0]}" for name, action in flags() if action.type in (int, float)]
    assert bare == []


@pytest.mark.parametrize("outside", [math.nan, math.inf, -math.inf, 10**30, -(10**30)])
def test_no_flag_takes_what_is_no_number(outside: float):
    for name, action in flags():
        if getattr(action.type, "__name__", "") in ("int", "float"):
            with pytest.raises((argparse.ArgumentTypeError, ValueError)):
                action.type(str(outside))
                raise AssertionError(f"{name} {action.option_strings[0]}={outside} is taken")


@pytest.mark.parametrize(
    ("wanted", "inside", "outside"),
    [
        (Range(1, 2**31 - 1), [1, 2**31 - 1], [0, -1, 2**31, 10**30, math.nan, math.inf]),
        (Range(0, 1), [0, 0.5, 1], [-1e-300, 1.0000001, math.nan]),
        (Range(0, 1, without_ends=True), [0.5], [0, 1, math.nan]),
    ],
)
def test_a_range(wanted: Range, inside: list[float], outside: list[float]):
    assert [value for value in inside if value not in wanted] == []
    assert [value for value in outside if value in wanted] == []


# What a user might try.

RUNS = (["smoke"], ["demo"], ["rmt_curriculum"], ["dictionary"], ["table4_context512_memory8192_xl512"])


def loaded(files: list[str], bindings: list[str]) -> str:
    """What the user is told; empty if the experiment is built."""
    try:
        load_experiment(files, bindings)
    except UserError as error:
        return str(error)
    return ""


def some_bindings(seed: int, number: int) -> Iterator[tuple[list[str], list[str]]]:
    """Runs with one or two bindings, made of what is registered and of numbers that are seldom tried."""
    rng = random.Random(seed)
    known = fields()
    for _ in range(number):
        bindings = []
        for _ in range(rng.choice([1, 1, 2])):
            cls, name, _ = rng.choice(known)
            value = rng.choice([*map(str, EXTREMES), *ODD])
            bindings.append(f"{cls.__name__}.{name}={value}")
        yield rng.choice(RUNS[:2]), bindings


@pytest.mark.parametrize("number", [600, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_no_configuration_ends_in_anything_but_an_experiment_or_a_line(number: int):
    refused = 0
    for files, bindings in some_bindings(number, number):
        told = loaded(files, bindings)
        refused += bool(told)
        assert "\n" not in told and len(told) < 1000, (files, bindings)
    assert refused > number / 2


@pytest.mark.parametrize(
    "binding",
    [
        *(
            "LoopConfig.seed=-1",
            f"LoopConfig.seed={10**23}",
            "LoopConfig.evaluate_every=-1",
            "LoopConfig.hang_seconds=1e-9",
        ),
        *("LoopConfig.profile_steps=(5,1)", f"LMConfig.mlp_dim={10**20}", f"LMConfig.num_heads={10**8}"),
        *(f"LMConfig.embed_dim={10**12}", f"LMConfig.num_layers={10**9}", f"LMConfig.num_layers={10**24}"),
        *("LMConfig.initial_logit_scale=0.0", "LMConfig.dropout=-0.1"),
        *(f"KNNAttention.memory_size={16 * 10**12}", f"KNNAttention.num_neighbors={10**12}"),
        *(f"FullAttention.num_buckets={count}" for count in (0, 1, -4, 256)),
        *("FullAttention.max_distance=16", f"BatchConfig.tokens_per_step={16 * 10**15}"),
        *("BatchConfig.curriculum=((1,99999999999),)", "BatchConfig.tokens_per_step=2147482624"),
        *("AdamW.b1=-1", "AdamW.b2=257", "AdamW.b2=1.0", "AdamW.weight_decay=-1e30", "AdamW.max_gradient_norm=0"),
        *("AdamW.max_gradient_norm=-1", "Cosine.peak=-1", "Cosine.peak=0", "Cosine.final=-1e999", "Cosine.final=1e999"),
    ],
)
def test_what_was_once_built(binding: str):
    name = binding.partition("=")[0]
    told = loaded(["smoke"], [binding])
    assert told and "\n" not in told
    assert name in told, told


def test_sizes_that_are_right_one_by_one_and_together_too_large():
    wide = ["LMConfig.embed_dim=16777216", "LMConfig.mlp_dim=16777216", "LMConfig.num_layers=10000"]
    assert re.search(r"about .* parameters, more than any machine holds", loaded(["smoke"], wide))
    remembers = [
        "KNNAttention.memory_size=2147483520",
        "BatchConfig.tokens_per_step=16777216",
        "LMConfig.num_heads=65536",
    ]
    assert re.search(r"the context of .* rows takes .* bytes, more than any machine has", loaded(["smoke"], remembers))


@pytest.mark.parametrize(
    "arguments",
    [
        *(["generate", f"--top_k={10**14}"], ["generate", f"--num_samples={10**9}"], ["generate", "--temperature=nan"]),
        *(["evaluate", "--seed=-1"], ["evaluate", f"--rows={10**9}"], ["inspect", "--max_tokens=0"]),
        *(
            ["launch", "local", "--grace=nan"],
            ["bench", "step", "--rounds=0"],
            ["plan", "--topology=v3:4x4", "--slices=0"],
        ),
        *(["train", "--restore_step=-1"], ["prepare", "--validation_fraction=2"], ["train", "--restore_step=x"]),
        *(["train", "--nothing=1"], ["generate", "--prompt=\udcff"], ["train", "--gin.TASK=\udcff"]),
    ],
    ids=" ".join,
)
def test_flags_are_refused_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture):
    assert main._run(arguments) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and arguments[-1].partition("=")[0] in told, told


@pytest.mark.parametrize("number", [400, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_no_flag_ends_in_anything_but_a_value_or_a_line(number: int):
    """Parsed only: what the commands then do is other tests'."""
    rng = random.Random(number)
    known = [(name, action) for name, action in flags() if action.option_strings[0].startswith("--")]
    for _ in range(number):
        name, action = rng.choice(known)
        arguments = [*name.split(), f"{action.option_strings[-1]}={rng.choice([*map(str, EXTREMES), *ODD])}"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            try:
                main._parser(arguments).parse_args(arguments)
            except UserError as error:
                assert "\n" not in str(error), arguments


def test_commands_are_all_imported():
    assert [importlib.import_module(module) for module, _ in main.COMMANDS.values()]
