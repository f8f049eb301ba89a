"""What the training step costs in memory and search, read off its compiled program.

The external memory is the largest array of a run: a step that made a second copy of it would halve the memory that a
device can hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from memorizing.batch import Batch
from memorizing.models.attention.knn import KNNAttention
from memorizing.models.lm_config import LMConfig
from memorizing.models.memory.search import ExactSearch
from memorizing.runtime.sharding import MeshConfig
from memorizing.synthetic import RepeatedPassages
from memorizing.training.experiment import BatchConfig, Experiment
from memorizing.training.optimizer import AdamW
from memorizing.training.program import Program

ROWS, LENGTH = 16, 8


def experiment(
    memory_size: int = 64, remat: str = "none", num_segments: int = 1, differentiable_memory: bool = False
) -> Experiment:
    search = ExactSearch(block_scores=256 * LENGTH)
    attention = KNNAttention(memory_size, 2, search=search, differentiable_memory=differentiable_memory)
    return Experiment(
        data=RepeatedPassages(vocab_size=32),
        model=LMConfig(32, 2, 16, 2, 8, 32, attention_at=((1, attention),), remat=remat),
        batch=BatchConfig(ROWS * LENGTH * num_segments, LENGTH, num_segments),
        optimizer=AdamW(),
    )


def lowered(experiment: Experiment) -> Any:
    mesh = MeshConfig().make_mesh(jax.devices()[:1])
    shape = (ROWS, experiment.batch.num_segments, LENGTH)
    integers = jax.ShapeDtypeStruct(shape, np.int32)
    floats, flags = jax.ShapeDtypeStruct(shape, np.float32), jax.ShapeDtypeStruct(shape, bool)
    batch = Batch(integers, integers, floats, flags, jax.ShapeDtypeStruct(shape[:2], bool))
    with jax.set_mesh(mesh):
        program = Program(experiment, mesh)
        return program.step.trace(program.abstract_state, batch)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.nightly), "layer"])
def test_the_memory_is_updated_in_place(remat: str):
    """A larger memory makes the step's arguments larger, but hardly what it needs besides them."""
    usage = [
        lowered(experiment(memory_size, remat)).lower().compile().memory_analysis() for memory_size in (1024, 2048)
    ]
    growth = usage[1].argument_size_in_bytes - usage[0].argument_size_in_bytes
    assert growth >= 2 * 4 * ROWS * 2 * 1024 * 8, "keys and values in float32"
    assert usage[1].alias_size_in_bytes - usage[0].alias_size_in_bytes == growth, "donated"
    # Rows are searched one after the other: a copy of one of the 16 is allowed for.
    assert usage[1].temp_size_in_bytes - usage[0].temp_size_in_bytes < 1.5 / ROWS * growth


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program, those of its inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize(
    ("remat", "num_segments", "differentiable_memory"),
    [
        ("none", 1, False),
        *(pytest.param(*case, False, marks=pytest.mark.nightly) for case in (("layer", 1), ("none", 2))),
        ("layer", 2, False),
        ("layer", 2, True),
    ],
)
def test_the_search_runs_once_a_segment(remat: str, num_segments: int, differentiable_memory: bool):
    """Recomputing a layer for its gradient must not search again: the search is what a memory costs."""
    once = sum(equation.primitive.name == "top_k" for equation in equations(lowered(experiment()).jaxpr.jaxpr))
    assert once > 0, "the test does not find the search"
    program = lowered(experiment(64, remat, num_segments, differentiable_memory))
    assert sum(equation.primitive.name == "top_k" for equation in equations(program.jaxpr.jaxpr)) == once
