"""What a memory is held against: the same model trained without, and a continuous cache that nobody trained."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from tiny_texts import MEMORY, TinyTexts, finished_run

from memorizing import main
from memorizing.config.loading import load_experiment
from memorizing.config.runs import open_run
from memorizing.evaluation import baselines
from memorizing.evaluation.evaluator import Evaluation, Evaluator
from memorizing.evaluation.reading import num_rows_side_by_side
from memorizing.models.memory.continuous_cache import ContinuousCache

SMALL = ("LoopConfig.num_steps=2", "LMConfig.embed_dim=16", "LMConfig.mlp_dim=16", "BatchConfig.tokens_per_step=128")


def evaluation(losses: list[float]) -> Evaluation:
    """Two documents of 100 and 300 tokens with these mean losses."""
    tokens = np.array([[100], [300]])
    return Evaluation(
        cell_nats=np.array(losses)[:, None] * tokens,
        cell_tokens=tokens,
        bin_starts=np.array([0]),
        answers=0,
        right_answers=0,
        right_tokens=0,
        documents=np.array([0, 1]),
        document_bytes=None,
        document_words=None,
    )


def test_the_worth_of_a_memory_is_told_against_the_model_without():
    """Loss 3 without, 2 with an untrained cache, 1 with the memory; documents differ, and so the interval is wide."""
    trained = {"as trained": evaluation([1.5, 5 / 6]), "memory cleared": evaluation([9.0, 9.0])}
    without = {"as trained": evaluation([3.0, 3.0]), baselines.CONTINUOUS_CACHE: evaluation([2.0, 2.0])}
    _, base, cache, memory = baselines.worth(trained, without).splitlines()
    assert base.split() == ["trained", "without", "a", "memory", "20.086"]
    assert cache.split()[-4:] == ["7.389", "-63.2%", "[-63.2%,", "-63.2%]"]
    assert memory.split()[-4:-2] == ["2.718", "-86.5%"]
    # exp(-1.5) and exp(-13/6), the two documents alone.
    assert memory.split()[-2:] == ["[-88.5%,", "-77.7%]"]


def test_without_memory_is_the_same_experiment_but_for_its_memories():
    experiment, _ = load_experiment(["smoke"], SMALL)
    without, text = load_experiment(["smoke"], [*SMALL, baselines.WITHOUT_MEMORY])
    assert experiment.model.has_memory and not without.model.has_memory
    assert without.model == experiment.model.without_memory()
    for field in dataclasses.fields(experiment):
        if field.name not in ("model", "without_memory"):
            assert getattr(experiment, field.name) == getattr(without, field.name)
    again, _ = load_experiment([], [], base=text)
    assert again == without


@pytest.mark.parametrize("model_file", ["models/memorizing_tiny.gin", "models/transformer_tiny.gin"])
def test_the_cache_baseline_is_as_large_as_the_memory(tmp_path: pathlib.Path, model_file: str):
    experiment = open_run(finished_run(tmp_path / "run", model_file=model_file)).experiment
    with_cache = baselines.with_continuous_cache(experiment)
    assert with_cache is not None and with_cache.continuous_cache is not None
    expected = MEMORY if experiment.model.has_memory else ContinuousCache().memory_size
    assert with_cache.continuous_cache.memory_size == expected
    assert not with_cache.continuous_cache.has_parameters
    layers = experiment.model.with_memory_size(experiment.batch.segment_length)
    assert dataclasses.replace(with_cache, continuous_cache=None) == layers
    # Where that is the model already, and its only memory, it is no baseline.
    if not experiment.model.has_memory:
        assert baselines.with_continuous_cache(dataclasses.replace(experiment, model=with_cache)) is None
    assert isinstance(experiment.data, TinyTexts)


@pytest.mark.parametrize("model_file", ["models/memorizing_tiny.gin"])
def test_the_cache_baseline_reads_as_with_the_whole_memories_cleared(tmp_path: pathlib.Path, model_file: str):
    finished = open_run(finished_run(tmp_path / "run", model_file=model_file))
    experiment, mesh = finished.experiment, finished.experiment.mesh.make_mesh()
    small = baselines.with_continuous_cache(experiment)
    assert small is not None
    whole = dataclasses.replace(experiment.model, continuous_cache=small.continuous_cache)
    assert small.memory_sizes != whole.memory_sizes
    num_rows = num_rows_side_by_side(experiment.data, experiment.batch.num_rows, mesh)
    with jax.set_mesh(mesh):
        params, buffers = finished.variables_on(mesh)
        found, expected = (
            Evaluator(model, num_rows, experiment.batch.segment_length, mesh).run(
                params, buffers, experiment.data, baselines.CACHE_ALONE
            )
            for model in (small, whole)
        )
    np.testing.assert_allclose(found.cell_nats, expected.cell_nats, rtol=1e-5)


def test_train_compares(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    """Two runs, each in its folder, each like one that is trained by itself; and a table at the end."""
    flags = ["--gin_file=smoke", *(f"--gin.{binding}" for binding in SMALL)]
    assert main._run(["train", *flags, "--compare", f"--workdir={tmp_path / 'run'}"]) == 0
    told = capsys.readouterr().out
    assert main._run(["train", *flags, f"--gin.{baselines.WITHOUT_MEMORY}", f"--workdir={tmp_path / 'alone'}"]) == 0
    results = {
        name: json.loads((tmp_path / folder / "evaluation.json").read_text())
        for name, folder in {"with": "run", "without": "run/without_memory", "alone": "alone"}.items()
    }
    assert results["without"] == results["alone"]
    table = told[told.index("trained without a memory") :]
    for name in ("with", "without"):
        assert f"{results[name]['as trained']['perplexity']:.3f}" in table
    assert open_run(str(tmp_path / "run" / "without_memory")).experiment.without_memory


def test_a_model_without_memory_is_not_compared(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    arguments = ["train", "--gin_file=smoke", f"--gin.{baselines.WITHOUT_MEMORY}", "--compare"]
    assert main._run([*arguments, f"--workdir={tmp_path / 'run'}"]) == 2
    assert "no external memory" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
