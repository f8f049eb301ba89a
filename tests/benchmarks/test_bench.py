"""What `memorizing bench` measures is what it says, and it leaves a record that can be read."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from memorizing import main
from memorizing.benchmarks import accelerator, bench, data, future, measure, scaling, search, step
from memorizing.benchmarks.estimated import growth
from memorizing.benchmarks.reading import stream
from memorizing.config.loading import load_experiment
from memorizing.cost.compiled_cost import Traffic
from memorizing.cost.plan import DoesNotFit, Plan
from memorizing.errors import UserError
from memorizing.models.attention.sparse.reformer import ReformerAttention
from memorizing.models.attention.sparse.routing import RoutingAttention
from memorizing.models.attention.sparse.sinkhorn import SinkhornAttention
from memorizing.training.experiment import Experiment


def test_recall_counts_true_neighbours():
    queries, keys = search.random_vectors(256, 8)
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
    model = step.with_memory(experiment, 64).model
    context = step.full(model, model.init_context(rows, length))
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


def test_reading_and_writing_are_measured(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "text.json"
    flags = ["--gin_file=smoke", "--read=70", "--written=9", "--num_samples=2", "--rounds=2", f"--output={output}"]
    assert main._run(["bench", "text", *flags]) == 0
    assert "tokens/s" in capsys.readouterr().out
    results = json.loads(output.read_text())["results"]
    assert results["read"]["tokens_per_second"] > 0 and results["written"]["tokens_per_second"] > 0
    compared = [flag for flag in flags if not flag.startswith("--written")]
    assert main._run(["bench", "text", *compared, "--written=0", "--memory_sizes=0,64"]) == 0
    results = json.loads(output.read_text())["results"]
    assert list(results) == ["read, no memory", "read, memory 64"] and results["read, no memory"]["ratio"] == 1


def test_an_accelerator_is_measured_in_one_go(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, monkeypatch):
    """What there is no time for is left out, and so is what fails: the others' figures are there."""
    small = ("text", "--gin_file=smoke", "--read=32", "--written=2", "--rounds=2")
    parts = [
        accelerator.Part("small", small),
        accelerator.Part("wrong", ("search", "--slots=1"), False),
        accelerator.Part("long", ("stream",)),
    ]
    monkeypatch.setattr(accelerator, "PARTS", parts)
    start, times = time.monotonic(), iter([0.0, 0.0, 0.0, 200.0])
    monkeypatch.setattr(accelerator.time, "monotonic", lambda: start + next(times, 200.0))
    output = tmp_path / "all.json"
    flags = ["--only=small,wrong,long", "--minutes=3", f"--workdir={tmp_path}", f"--output={output}"]
    assert main._run(["bench", "accelerator", *flags, "--gin.LMConfig.num_layers=3"]) == 0
    told = capsys.readouterr().out
    assert "small: done" in told and "wrong: failed with exit code 2" in told and "long: no time left" in told
    assert list(json.loads(output.read_text())["results"]) == ["small"]


def test_the_parts_for_an_accelerator_are_benchmarks_of_runs_that_exist():
    for part in accelerator.PARTS:
        parser = argparse.ArgumentParser()
        bench.add_arguments(parser)
        flags, bindings = [], []
        for flag in part.command:
            (bindings if flag.startswith("--gin.") else flags).append(flag)
        options = parser.parse_args(flags)
        assert part.takes_run == hasattr(options, "gin_file")
        if part.takes_run:
            load_experiment(
                options.gin_file, [binding.removeprefix("--gin.") for binding in bindings], base="CACHE = None"
            )


def test_a_stream_is_timed_in_blocks_that_begin_side_by_side():
    """What happens between blocks is in no block's time, and a block that is cut short is not counted."""

    class Slow:
        def evaluation_batches(self, num_rows: int, segment_length: int) -> Iterator[int]:
            for i in range(2 * stream.BLOCK + 5):
                time.sleep(1e-3)
                yield i

    waits = []
    blocks = stream.InBlocks(Slow(), lambda: waits.append(time.sleep(0.2)))
    assert list(blocks.evaluation_batches(1, 32)) == list(range(2 * stream.BLOCK + 5))
    assert len(waits) == 3 and len(blocks.seconds) == 2
    assert all(1e-3 <= seconds < 0.1 for seconds in blocks.seconds)


def test_tokens_of_a_cache_are_counted(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    data.write_cache(tmp_path / "cache", np.full(300, 2_000))
    output = tmp_path / "data.json"
    assert main._run(["bench", "data", f"--cache={tmp_path / 'cache'}", "--seconds=0.05", f"--output={output}"]) == 0
    rows = json.loads(output.read_text())["results"]["rows"]
    assert [row["read_ahead"] for row in rows] == [False, True]
    assert all(row["longest_document"] == 2_000 and row["tokens_per_second"] > 0 for row in rows)
    assert "cache" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["step", "--memory_sizes=2k"], "--memory_sizes=2k"),
        (["search", "--slots=many"], "--slots=many"),
        (["search", "--gin.A.b=1"], "--gin.A.b=1"),
        (["step", "--output=/nowhere/x.json"], "/nowhere"),
        (["step", "--gin_file=smoke", "--memory_sizes=0,65"], "65"),
        (["step", "--gin_file=smoke", "--memory_sizes=0", "--rounds=1"], "--rounds=1"),
        (["search", "--slots=8192,16"], "--slots=16"),
        (["search", "--head_dim=0"], "--head_dim=0"),
        (["stream", "--tokens=4096"], "--tokens=4096"),
        (["stream", "--gin_file=smoke"], "RepeatedPassages"),
        (["scaling", "--slice=v9:1x1", "--lengths=16"], "TPU"),
        (["accelerator", "--only=step,flight"], "flight"),
        (["accelerator", "--minutes=soon"], "--minutes"),
        (["data", "--seconds=0"], "--seconds=0"),
        (["data", "--gin.A.b=1"], "--gin.A.b=1"),
        (["data", "--cache=/nowhere"], "/nowhere"),
    ],
)
def test_a_wrong_flag_is_named(arguments: list[str], told: str, capsys: pytest.CaptureFixture):
    assert main._run(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error


def test_growth_with_the_length_is_measured_and_drawn(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    picture, output = tmp_path / "scaling.png", tmp_path / "scaling.json"
    flags = ["--lengths=16,32", "--mechanisms=sparse", "--max_full=16", "--rounds=1", f"--picture={picture}"]
    assert main._run(["bench", "scaling", *flags, f"--output={output}"]) == 0
    assert "full / it at 16" in capsys.readouterr().out
    results = json.loads(output.read_text())["results"]
    assert results["full"]["seconds"].keys() == {"16"} and results["sparse"]["seconds"].keys() == {"16", "32"}
    assert picture.stat().st_size > 1000


def test_the_exponent_is_that_of_the_upper_half():
    bent = {64: 5.0, 128: 5.0, 256: 4.0, 512: 16.0}
    assert scaling.exponent(bent) == pytest.approx(2)
    assert scaling.exponent({64: 1.0}) is None


def test_ways_to_keep_activations_are_compared(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "activations.json"
    flags = ["--layers=4", "--length=16", "--width=32", "--rounds=1", f"--output={output}"]
    assert main._run(["bench", "activations", *flags]) == 0
    assert "reversible" in capsys.readouterr().out
    results = json.loads(output.read_text())["results"]
    assert len(results) == 5 and all(of_way["4"]["mebibytes"] > 0 for of_way in results.values())


def test_a_record_is_not_measured_again(tmp_path: pathlib.Path):
    path = tmp_path / "record.json"
    scaling.Record(path, "2 heads").add("full", 1024, 0.5)
    again = scaling.Record(path, "2 heads")
    assert again.seconds("full", 1024) == 0.5 and again.seconds("full", 2048) is None
    assert scaling.Record(path, "4 heads").seconds("full", 1024) is None
    path.write_text("no figures")
    with pytest.raises(UserError, match="name another file"):
        scaling.Record(path, "2 heads")


def test_only_forms_as_published_depend_on_the_future():
    """Strictly causal ones and fixed patterns see the same whatever follows. Of all forms there are examples."""
    length = 64
    reformer = ReformerAttention(hash_buckets=4, chunk_size=8)
    routing = RoutingAttention(num_clusters=8, cluster_size=8, num_local_heads=0)
    for published in (reformer, routing):
        seen, moved = future.changes(published, length, seed=0)
        assert seen > 0.02 and 0 < moved < 1
        strict = dataclasses.replace(published, strictly_causal=True)
        assert future.changes(strict, length, seed=0) == (0, 0)
    assert future.changes(SinkhornAttention(block_size=8), length, seed=0) == (0, 0)
    assert len(future.telling(length)) == 6


def test_growth_plans_every_case_once_and_goes_on_where_one_does_not_fit(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    asked = []

    def planned(experiment: Experiment, topology: str, num_slices: int) -> Plan:
        memory = experiment.model.attention_at[0][1].memory_size
        rows = experiment.batch.num_rows
        asked.append((memory, rows, topology, num_slices, experiment.mesh.model, experiment.mesh.memory))
        if memory == 1_048_576 and rows == 256:
            raise DoesNotFit(topology, "RESOURCE_EXHAUSTED: too much", [])
        columns, lines = map(int, topology.partition(":")[2].split("x"))
        return Plan(
            topology=topology,
            num_slices=num_slices,
            device_kind="TPU v5e",
            num_devices=num_slices * columns * lines,
            num_rows=rows,
            tokens_per_step=512 * rows,
            rows_per_device=8,
            compile_seconds=1.0,
            hbm={},
            hbm_total=2**30,
            hbm_limit=16 * 2**30,
            model_flops=1e12,
            memory_flops=0.0,
            seconds=0.1,
            memory_seconds=0.01,
            moving_seconds=0.0,
            rare_seconds=0.0,
            collectives={"all-reduce": Traffic(1, 2**30)},
            moves={},
            advice=[],
        )

    monkeypatch.setattr(growth, "plan", planned)
    output, picture = tmp_path / "growth.json", tmp_path / "growth.png"
    assert main._run(["bench", "growth", f"--output={output}", f"--picture={picture}"]) == 0
    assert len(asked) == len(set(asked)) == len({case for cases in growth.CASES.values() for case in cases})
    assert (8192, 1, "v5e:4x8", 1, 8, 4) in asked and (8192, 4096, "v5e:16x16", 2, 1, 1) in asked
    assert "does not fit" in capsys.readouterr().out
    results = json.loads(output.read_text())["results"]
    assert [case["fits"] for case in results["slots"]] == [True, True, True, False, True]
    assert [case["num_devices"] for case in results["devices"]] == [8, 32, 128, 256, 512]
    assert picture.read_bytes().startswith(b"\x89PNG")
