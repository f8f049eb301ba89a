"""benchmarks/results.py: its rows are experiments that differ as they say, and its figures are what they are called."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
import pathlib
import time

import jax
import numpy as np
import pytest
from mechanisms import init_params

from memorizing.benchmarks.trained import trainings
from memorizing.config.loading import load_experiment
from memorizing.evaluation import bootstrap
from memorizing.models.attention.full import FullAttention
from memorizing.models.attention.xl import XLAttention

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "results.py"
SMALL = (
    "VOCAB_SIZE=64",
    "STEPS=100",
    "SEED=3",
    "LMConfig.embed_dim=16",
    "LMConfig.num_heads=2",
    "LMConfig.head_dim=8",
    "LMConfig.mlp_dim=32",
)


def loaded(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results():
    return loaded(SCRIPT)


def test_rows_differ_in_nothing_but_what_they_say(results):
    """All is equal but memory and window; parameters up to the gates, and theta and weight of a cache."""
    no_memory, *_ = experiments = [
        load_experiment([str(results.GIN_FILE), "tasks/repeated_passages.gin"], [*SMALL, *row.bindings])[0]
        for row in results.ROWS
    ]
    added = {"none": 0, "window": 0, "paper": 2, "recall": 2, "both": 4}
    sizes = {}
    for row, experiment in zip(results.ROWS, experiments, strict=True):
        model = experiment.model
        assert model.attention == (XLAttention(window=128) if row.run == "window" else FullAttention())
        assert model.has_memory == (row.run in ("paper", "recall", "both"))
        assert bool(model.continuous_cache) == (row.run == "both")
        if model.has_memory:
            ((layer, memory),) = model.attention_at
            assert layer == 2 and memory.memory_size == 2048 and memory.local == FullAttention()
            assert memory.stores_next == (row.run != "paper") == bool(memory.retrieval_loss)
        groups = experiment.optimizer.groups
        assert [group.pattern for group in groups] == ["attention/core/gate$"] * (row.run in ("recall", "both"))
        optimizer = dataclasses.replace(no_memory.optimizer, groups=groups)
        assert experiment == dataclasses.replace(no_memory, model=experiment.model, optimizer=optimizer)
        params = jax.eval_shape(
            lambda model=model: init_params(model, 2, experiment.batch.segment_length, jax.random.key(0))  # noqa: B023
        )
        sizes[row.run] = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert {run: size - sizes["none"] for run, size in sizes.items()} == added
    assert no_memory.loop.seed == 3 and no_memory.loop.num_steps == 100


def test_the_rows_are_those_of_the_demo(results):
    """The last run is what `memorizing train` does, the first the same without its memories."""
    demo, _ = load_experiment(["runs/demo.gin"], ["STEPS=100", "LoopConfig.seed=3"])
    common = ["VOCAB_SIZE=2048", "STEPS=100", "SEED=3"]
    both, none = (
        load_experiment(
            [str(results.GIN_FILE), "tasks/stdlib.gin"],
            [*common, *next(row.bindings for row in results.ROWS if row.run == run)],
        )[0]
        for run in ("both", "none")
    )
    assert (both.model, both.batch, both.optimizer) == (demo.model, demo.batch, demo.optimizer)
    assert none.model == demo.model.without_memory()


def test_rows_of_the_size_for_an_accelerator(results):
    larger = str(results.GIN_FILE.with_name("results_40m.gin"))
    for row in results.ROWS:
        bindings = ["VOCAB_SIZE=2048", "STEPS=100", "SEED=3", *row.bindings]
        experiment, _ = load_experiment([str(results.GIN_FILE), "tasks/stdlib.gin", larger], bindings)
        assert experiment.model.dtype == "bfloat16"
        length = experiment.batch.segment_length
        params = jax.eval_shape(functools.partial(init_params, experiment.model, 1, length), jax.random.key(0))
        assert 30e6 < sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) < 100e6


def test_no_command_begins_after_the_end(tmp_path: pathlib.Path):
    with pytest.raises(trainings.NoTimeLeft):
        trainings.train(["--gin_file=none"], tmp_path, 3, {}, tmp_path / "times.jsonl", end=time.monotonic())
    # One that has begun is stopped.
    with pytest.raises(trainings.NoTimeLeft):
        trainings.command(["launch", "--help"], {}, end=time.monotonic() + 0.01)
    assert not (tmp_path / "times.jsonl").exists()


def _figures(losses: list[float], perplexity: float) -> dict:
    return {
        "document_tokens": [100, 300],
        "by_document": losses,
        "perplexity": perplexity,
        "bits_per_byte": 2.0,
        "by_position": [{"from": 0, "loss": losses[0]}, {"from": 128, "loss": losses[1]}],
    }


def test_means_spreads_and_paired_differences(results):
    assert results.over_seeds([3.0, 4.0]) == {"mean": 3.5, "spread": 1.0}
    assert results.over_seeds([3.0]) == {"mean": 3.0, "spread": None}
    base = {0: _figures([2.0, 3.0], 10.0), 1: _figures([2.5, 3.5], 12.0), 2: _figures([9.0, 9.0], 90.0)}
    row = {0: _figures([1.0, 2.9], 8.0), 1: _figures([2.1, 3.6], 9.0)}
    difference = results.paired(row, base)
    # By seed and document -1.0, -0.1 and -0.4, +0.1, weighted by 100 and 300 tokens; the base's third seed has no pair.
    by_seed = [-0.325, -0.025]
    assert difference["mean"] == pytest.approx(np.mean(by_seed))
    assert difference["spread"] == pytest.approx(0.3)
    assert difference["documents"] == 2 and difference["documents_better"] == 1
    low, high = difference["interval"]
    # Resampled documents and seeds lie between those that gain most and least.
    assert low == pytest.approx(-1.0) and high == pytest.approx(0.1)
    assert results.paired(row, {}) is None
    assert results._shown(difference) == "-0.1750 (0.3000) [-1.0000, +0.1000]"


def test_an_interval_over_seeds_is_wider_than_over_documents():
    rng = np.random.default_rng(0)
    tokens = rng.integers(100, 1000, 40).astype(float)
    # Trainings that differ by more than documents do.
    nats = tokens * (rng.normal(size=40) * 0.01 + np.array([[-0.1], [0.0], [0.1]]))
    low, high = bootstrap.interval_over_seeds(nats, tokens)
    of_mean_low, of_mean_high = bootstrap.ratio_interval(nats.mean(axis=0), tokens)
    assert low < -0.05 < of_mean_low < of_mean_high < 0.05 < high
    one = nats[:1]
    np.testing.assert_allclose(bootstrap.interval_over_seeds(one, tokens), bootstrap.ratio_interval(one[0], tokens))
    assert np.isnan(bootstrap.interval_over_seeds(np.ones((3, 1)), np.ones(1))).all()


def test_report_has_what_is_finished(results, tmp_path: pathlib.Path):
    """A row without a finished run, or one of other steps, is left out."""
    losses = {"none": [2.0, 3.0], "paper": [1.0, 2.0], "recall": [0.0, 0.0]}
    for run, values in losses.items():
        folder = results.folder_of(tmp_path, "corpus", run, 0, 7)
        folder.mkdir(parents=True)
        evaluation = {
            "step": 7 if run != "recall" else 5,
            "documents": {"tokens": [100, 300]},
            "as trained": _figures(values, 5.0 if run == "none" else 4.0),
            results.baselines.CONTINUOUS_CACHE: _figures(values, 5.0),
        }
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
        steps = [
            {
                "kind": "train",
                "layer_02/hit_share/0": share,
                "layer_02/hit_chance": 0.01,
                "layer_02/weight_entropy": 1.0,
            }
            for share in (0.0, 0.2)
        ]
        logged = "\n".join(json.dumps(line) for line in [*steps, {"kind": "evaluation"}])
        (folder / "metrics.jsonl").write_text(logged if run == "paper" else '{"kind": "train", "loss": 1.0}')
    found = results.read_results(tmp_path, ["corpus"], [0, 1], 7)
    summary = results.summarize(found["corpus"])
    assert list(summary["rows"]) == [
        "no memory",
        "no memory, continuous cache, untrained",
        "kNN layer as in the paper",
    ]
    assert summary["contrasts"] == {}
    table = results.markdown("corpus", summary)
    row = "| 4.000 | -20.0% | -1.0000 [-1.0000, -1.0000] | 2 of 2 | 0.200, 0.010 | 1 |"
    assert f"| kNN layer as in the paper {row}" in table
    results.picture(found, tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_later_evaluation_found_counts_too(results, tmp_path: pathlib.Path):
    """And only after the end of the training that it is asked for."""
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps({"evaluations": {results.LARGER: {"loss": 1}}}))
    assert results.finished_evaluation(tmp_path, 7) == {}
    (tmp_path / "evaluation.json").write_text(json.dumps({"step": 7, "as trained": {"loss": 2}}))
    assert results.finished_evaluation(tmp_path, 8) == {}
    found = results.finished_evaluation(tmp_path, 7)
    assert found["as trained"] == {"loss": 2} and found[results.LARGER] == {"loss": 1}


def test_the_picture_of_all_corpora_shows_what_the_tables_say(results, tmp_path: pathlib.Path):
    """It knows the rows by their titles, and takes the first table of a corpus."""
    worth = loaded(SCRIPT.with_name("worth.py"))
    assert worth.ROWS.keys() <= {row.title for row in results.ROWS}
    losses = {"none": 0.0, "recall": -0.5, "both": -0.7}
    by_seed = {row.title: {} for row in results.ROWS}
    for row, seed in itertools.product(results.ROWS, range(2)):
        if row.run in losses:
            loss = losses[row.run]
            by_seed[row.title][seed] = _figures([3 + loss] * 2, (10 + seed) * np.exp(loss))
    table = results.markdown("c4", results.summarize(by_seed))
    text = f"Before.\n\n{table}\n\nAgain:\n\n{table.replace('%', '9%')}\n| other | perplexity |\n|---|---|\n| a | 1 |\n"
    found = worth.changes_of(text)
    assert found["c4"]["kNN layer, taught to look up"] == pytest.approx((100 * (np.exp(-0.5) - 1), 0.0), abs=0.05)
    assert found["c4"].keys() == worth.ROWS.keys() and found.keys() == {"c4"}
    worth.draw(found, tmp_path / "worth.png")
    assert (tmp_path / "worth.png").read_bytes().startswith(b"\x89PNG")
