"""What `memorizing bench` measures is what it says, and it leaves a record that can be read."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest

from memorizing import main
from memorizing.benchmarks import measure, search, step
from memorizing.gin_registry import load_experiment


def test_recall_counts_true_neighbours():
    queries, keys = search.vectors(256, 8)
    true = search.true_neighbours(queries, keys)
    assert true.shape == (search.HEADS, search.QUERIES, search.K)
    assert search.recall(true[..., ::-1], true) == 1
    half = np.where(np.arange(search.K) % 2, true, -1)
    assert search.recall(half, true) == 0.5


def test_variants_run_in_turn_and_the_first_run_of_each_is_not_counted():
    runs: list[str] = []
    seconds = measure.interleaved({"a": lambda: runs.append("a"), "b": lambda: runs.append("b")}, 3)
    assert "".join(runs) == "ab" + "ababab"
    assert [len(of_variant) for of_variant in seconds.values()] == [3, 3]
    assert measure.ratio([2.0, 9.0, 2.0], [1.0, 1.0, 2.0]) == 2


def test_memories_are_full_and_a_memory_of_nothing_is_none():
    experiment, _ = load_experiment(["smoke"], [])
    rows, length = experiment.batch.num_rows, experiment.batch.segment_length
    context = step.full(step.with_memory(experiment, 64).model.init_context(rows, length))
    validity = [leaf for leaf in jax.tree.leaves(context) if leaf.dtype == bool and leaf.shape[-1] == 64]
    assert validity and all(leaf.all() for leaf in validity)
    without = step.with_memory(experiment, 0).model.init_context(rows, length)
    assert not [leaf for leaf in jax.tree.leaves(without) if leaf.ndim == 4]


def test_a_benchmark_prints_a_table_and_writes_a_record(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "step.json"
    flags = ["--gin_file=smoke", "--memory_sizes=0,64", "--rounds=2", f"--output={output}"]
    assert main._run(["bench", "step", *flags]) == 0
    assert "none" in capsys.readouterr().out
    record = json.loads(output.read_text())
    assert record["results"]["0"]["ratio"] == 1 and record["results"]["64"]["milliseconds"] > 0
    assert {"date", "processor", "cores", "packages"} <= record.keys()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["step", "--memory_sizes=2k"], "--memory_sizes=2k"),
        (["search", "--slots=many"], "--slots=many"),
        (["search", "--gin.A.b=1"], "--gin.A.b=1"),
        (["step", "--output=/nowhere/x.json"], "/nowhere"),
        (["step", "--gin_file=smoke", "--memory_sizes=0,65"], "65"),
    ],
)
def test_a_wrong_flag_is_named(arguments: list[str], told: str, capsys: pytest.CaptureFixture):
    assert main._run(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
