"""Models whose layers carry nothing, sparse, hashing or routing: trained, resumed, evaluated, written with."""

from __future__ import annotations

import json
import pathlib

import pytest
from test_generate import write_cache

from memorizing import main

CONFIG = """
include 'runs/smoke.gin'
include 'models/{name}_tiny.gin'
import memorizing.data.gin_registry
Experiment.data = @CachedCorpus()
CachedCorpus.task = 'github_bytes'
CachedCorpus.path = '{cache}'
VOCAB_SIZE = 259
LMConfig.num_layers = 2
LMConfig.embed_dim = 16
LMConfig.num_heads = 4
LMConfig.head_dim = 8
LMConfig.mlp_dim = 32
LMConfig.dropout = 0.1
"""
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """With a token cache, and the runs that tests share."""
    folder = tmp_path_factory.mktemp("runs")
    write_cache(folder / "cache")
    return folder


def train(folder: pathlib.Path, name: str, steps: int, run: str) -> pathlib.Path:
    config = folder / f"{name}.gin"
    config.write_text(CONFIG.format(name=name, cache=folder / "cache"))
    bindings = [f"--gin.LoopConfig.num_steps={steps}", "--gin.LoopConfig.checkpoint_every=3"]
    assert main._run(["train", f"--gin_file={config}", f"--workdir={folder / run}", *bindings]) == 0
    return folder / run


def finished(folder: pathlib.Path, name: str) -> pathlib.Path:
    """A run of all steps at once."""
    run = folder / name
    return run if run.exists() else train(folder, name, STEPS, name)


def checksums(run: pathlib.Path) -> dict[str, int]:
    record = run / "checkpoints" / str(STEPS) / "data" / "metadata"
    return json.loads(record.read_text())["checksums"]["state"]


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.nightly) for name in ("sparse", "reformer")), "routing"]
)
def test_it_is_trained_evaluated_and_written_with(name: str, folder: pathlib.Path, capsys: pytest.CaptureFixture):
    run = finished(folder, name)
    assert main._run(["evaluate", f"--workdir={run}"]) == 0
    assert "written to" in capsys.readouterr().out
    written = []
    for _ in range(2):
        assert main._run(["generate", f"--workdir={run}", "--prompt=Was in der", "--num_tokens=24", "--seed=1"]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] and len(written[0]) > 10


def test_a_stopped_run_goes_on_bit_for_bit_with_its_centroids(folder: pathlib.Path):
    undisturbed = checksums(finished(folder, "routing"))
    train(folder, "routing", STEPS // 2, "stopped")
    resumed = checksums(train(folder, "routing", STEPS, "stopped"))
    assert resumed == undisturbed
    assert any("sums" in path for path in resumed), "the test cannot see what it forbids"
