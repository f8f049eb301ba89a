"""docs/adding-a-mechanism.md: what a reader copies works, is as short as it is said to be, and is all there is to do.

That the mechanism keeps the laws is tested with all the others: it has its row in tests/mechanisms.py.
"""

from __future__ import annotations

import ast
import pathlib
import re

import jax
import pytest
import walk_through
from mechanisms import MECHANISMS, Mechanism
from walk_through import DecayingAverage

from memorizing.config.loading import load_experiment
from memorizing.config.types import register
from memorizing.cost.flops import segment_flops
from memorizing.training.program import Program

ROOT = pathlib.Path(__file__).parents[1]


def test_the_mechanism_is_short():
    (code, *_) = walk_through.blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) < 80


def test_it_touches_at_most_six_files():
    """Those of the page's table: two are new, and the others are there."""
    table = re.findall(r"^\| `([\w/.]+)` \|", walk_through.PAGE.read_text(), flags=re.MULTILINE)
    assert len(table) == 5
    assert [path for path in table if not (ROOT / path).exists()] == [
        "memorizing/models/attention/decaying_average.py",
        "gin/models/decaying_average_tiny.gin",
    ]


def test_its_row_is_that_of_the_page():
    (_, row) = walk_through.blocks("python")
    (mechanism,) = (each for each in MECHANISMS if isinstance(each.attention, DecayingAverage))
    ast.parse(row)
    assert eval(row, {"Mechanism": Mechanism, "DecayingAverage": DecayingAverage}) == mechanism


def test_its_gin_file_configures_a_run_that_trains(tmp_path: pathlib.Path):
    register(DecayingAverage)
    (text,) = walk_through.blocks("gin")
    file = tmp_path / "decaying_average_tiny.gin"
    file.write_text(text)
    experiment, _ = load_experiment(["smoke", str(file)], ["LMConfig.attention_at=()"])
    assert experiment.model.attention == DecayingAverage()
    mesh = experiment.make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = Program(experiment, mesh)
        state = jax.eval_shape(program.init)
    assert any("decay" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params))


def test_it_tells_what_it_costs():
    (mechanism,) = (each for each in MECHANISMS if isinstance(each.attention, DecayingAverage))
    assert segment_flops(mechanism.config, 8) > 0
    assert mechanism.attention.state_bytes(mechanism.config.dims, 8) == 4 * mechanism.config.embed_dim + 1


@pytest.mark.parametrize("word", ["settle", "kept", "continues", "winners"])
def test_the_page_speaks_the_words_of_the_field(word: str):
    assert word not in walk_through.PAGE.read_text()
