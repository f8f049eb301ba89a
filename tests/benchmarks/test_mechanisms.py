"""The leaderboard gives every mechanism as many bytes, and chooses nothing on what it reports."""

from __future__ import annotations

import argparse

import pytest

from memorizing.benchmarks.trained import mechanisms
from memorizing.benchmarks.trained.cells import ENTRIES, NOTHING, TASKS, Cell, Entry, settings, size_within
from memorizing.benchmarks.trained.leaderboard import chosen, markdown, picture
from memorizing.config.loading import load_experiment
from memorizing.errors import UserError
from memorizing.training.experiment import Experiment

BUDGET = 2**20


def options(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    mechanisms.add_arguments(parser)
    return parser.parse_args(flags)


def experiment_of(cell: Cell, size: int) -> Experiment:
    return load_experiment(*settings(cell, size, "stdlib"))[0]


def context_bytes(experiment: Experiment) -> int:
    return experiment.model.state_bytes(experiment.batch.segment_length)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_size_is_the_largest_within_the_budget(entry: Entry, task: str):
    cell = Cell(entry, task, BUDGET, 1e-2, seed=0, steps=100)
    size = size_within(cell, "stdlib")
    experiment = experiment_of(cell, size)
    assert context_bytes(experiment) <= BUDGET
    if entry.is_sized:
        segment = experiment.batch.segment_length
        assert size % segment == 0
        assert context_bytes(experiment_of(cell, size + segment)) > BUDGET


def test_models_differ_in_nothing_but_their_mechanism():
    plain, *others = (experiment_of(Cell(entry, "text", BUDGET, 1e-2, seed=1, steps=100), 128) for entry in ENTRIES)
    for experiment in others:
        assert (experiment.batch, experiment.data, experiment.loop) == (plain.batch, plain.data, plain.loop)
        sizes = ("vocab_size", "num_layers", "embed_dim", "num_heads", "head_dim", "mlp_dim", "initial_logit_scale")
        for name in sizes:
            assert getattr(experiment.model, name) == getattr(plain.model, name), experiment.model


def figures(mechanism: str, rate: float, seed: int, train_loss: float, loss: float) -> dict:
    return {
        "mechanism": mechanism,
        "task": "text",
        "budget": BUDGET,
        "rate": rate,
        "seed": seed,
        "train_loss": train_loss,
        "microseconds_a_token": 100.0,
        "bytes_a_row": 1000,
        "loss": loss,
        "cleared": None,
    }


FOUND = [
    figures(NOTHING, 1e-2, 0, train_loss=4.0, loss=4.5),
    figures("window", 1e-2, 0, train_loss=3.0, loss=4.4),
    figures("window", 1e-2, 1, train_loss=3.2, loss=4.0),
    # Better on what is reported, worse in training.
    figures("window", 1e-3, 0, train_loss=3.5, loss=1.0),
    figures("window", 1e-3, 1, train_loss=3.5, loss=1.0),
]


def test_the_learning_rate_is_chosen_by_the_loss_in_training():
    nothing, window = chosen(FOUND)
    assert (nothing.rate, window.rate) == (1e-2, 1e-2)
    assert [cell["seed"] for cell in window.cells] == [0, 1]


def test_the_page_has_means_spreads_and_the_best_first():
    page = markdown(chosen(FOUND))
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert lines[1].startswith("| window | 1,000 | 4.2000 (0.4000) | -0.3000 |")
    assert lines[2].startswith(f"| {NOTHING} | 1,000 | 4.5000 |")
    assert picture(chosen(FOUND)).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--tasks=speech"], "there is no task speech"),
        (["--only=Hopfield"], "in no name of"),
        (["--rates=fast"], "--rates=fast"),
        (["--rates=2"], "between 0 and 1"),
        (["--budgets=64"], "a segment of window alone takes"),
        (["--lengths=1"], "--lengths"),
    ],
)
def test_a_wrong_flag_is_named(flags: list[str], told: str, tmp_path):
    with pytest.raises(UserError, match=told):
        mechanisms.run(options(*flags, f"--workdir={tmp_path / 'lb'}"), [])
    assert not list(tmp_path.rglob("*.log")), "nothing is trained"
