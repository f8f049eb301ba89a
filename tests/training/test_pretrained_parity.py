"""Pretrained models compute what they computed elsewhere, and come back byte for byte.

Tiny models of all families, whose logits transformers has computed once: see golden_models/regenerate.py.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from pretrained_models import GOLDEN, NAMES, expected, experiment_of, loaded, logits_of, single_layers, write_gguf

from memorizing.models.pretrained.reading_config import read_config
from memorizing.models.pretrained.tensors import tensors_of
from memorizing.runtime.weight_files.safetensors_file import SafetensorsFile
from memorizing.training.pretrained.export import export
from memorizing.training.pretrained.loading import load_variables
from memorizing.training.pretrained.run_folder import Origin
from memorizing.training.pretrained.source import Source, open_source

# The rest of what transformers rounds to float32 on the way.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest):
    """Each model, with its name: source, experiment and parameters."""
    return request.param, *loaded(str(GOLDEN / request.param))


def exported(source: Source, experiment, params, folder: pathlib.Path, **settings) -> pathlib.Path:
    origin = Origin(epath.Path(source.name), source.name, source.config, source.dtype, ())
    export(origin, single_layers(experiment, params), str(folder), **settings)
    return folder


def test_logits_are_those_of_transformers(golden):
    name, _, experiment, params = golden
    tokens, logits = expected(name)
    found = logits_of(experiment, params, tokens)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, logits, rtol=0, atol=TOLERANCE)


def test_a_round_trip_gives_every_byte_back(golden, tmp_path: pathlib.Path):
    name, source, experiment, params = golden
    folder = exported(source, experiment, params, tmp_path / name)
    before = SafetensorsFile(epath.Path(GOLDEN / name / "model.safetensors"))
    after = SafetensorsFile(epath.Path(folder / "model.safetensors"))
    assert after.tensors.keys() == before.tensors.keys()
    for tensor in before.tensors:
        assert before.read(tensor).tobytes() == after.read(tensor).tobytes(), tensor
    config = json.loads((folder / "config.json").read_text())
    assert read_config(config, "after") == source.architecture


def test_old_and_new_spellings_say_the_same(golden, tmp_path: pathlib.Path):
    """transformers before 5 and from 5 on; what is written has both."""
    name, source, experiment, params = golden
    folder = exported(source, experiment, params, tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    new = {key: value for key, value in config.items() if key not in OLD_SPELLINGS}
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    assert read_config(new, "new") == source.architecture
    assert read_config(old, "old") == source.architecture


OLD_SPELLINGS = ("rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_pct", "rotary_emb_base")


def test_the_tensors_of_a_family_are_all_parameters(golden):
    """None is left as it was at the start."""
    _, source, experiment, params = golden
    covered = {path for tensor in tensors_of(source.architecture) for path in tensor.paths}
    assert covered == single_layers(experiment, params).keys()


def test_segments_of_a_document_are_read_as_the_whole():
    """An imported run reads in windows: as long as a window holds all that came before, nothing is lost."""
    source = open_source(str(GOLDEN / "llama_tied"))
    experiment = experiment_of(source, "window", length=8)
    params, _ = load_variables(source, experiment)
    tokens, logits = expected("llama_tied")
    found = logits_of(experiment, params, tokens)
    np.testing.assert_allclose(found, logits, rtol=0, atol=TOLERANCE)


def test_sliding_layers_keep_their_window():
    """Gemma's layers of both kinds, with their own positions, in segments as a whole."""
    source = open_source(str(GOLDEN / "gemma3"))
    experiment = experiment_of(source, "window", length=8)
    params, _ = load_variables(source, experiment)
    tokens, logits = expected("gemma3")
    found = logits_of(experiment, params, tokens)
    np.testing.assert_allclose(found, logits, rtol=0, atol=TOLERANCE)


def test_bfloat16_is_near():
    source, _, params = loaded(str(GOLDEN / "qwen3"))
    in_bfloat16 = experiment_of(source, bindings=["LMConfig.dtype = 'bfloat16'"])
    tokens, logits = expected("qwen3")
    found = logits_of(in_bfloat16, params, tokens)
    assert TOLERANCE < np.abs(found - logits).mean() < 0.05


def test_parameters_lie_on_the_mesh():
    """Sharded over heads and data, with the same numbers."""
    source, _, whole = loaded(str(GOLDEN / "llama_untied"))
    bindings = ["MeshConfig.model = 2", "MeshConfig.parameters = 'fsdp'", "Experiment.mesh = @MeshConfig()"]
    sharded, _ = load_variables(source, experiment_of(source, bindings=bindings))
    specs = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(sharded)}
    assert any("model" in spec for spec in specs)
    assert any("data" in spec for spec in specs)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(sharded), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize(
    "name", ["llama_untied", "qwen3", "gemma", "gemma2", "gemma3", "gpt_neox_parallel", "gpt_neox_sequential", "gpt2"]
)
def test_gguf_has_the_same_logits(name: str, tmp_path: pathlib.Path):
    write_gguf(tmp_path / "model.gguf", name)
    _, experiment, params = loaded(str(tmp_path / "model.gguf"))
    tokens, logits = expected(name)
    found = logits_of(experiment, params, tokens)
    np.testing.assert_allclose(found, logits, rtol=0, atol=TOLERANCE)


def test_gguf_of_smollm3_has_the_layers_without_positions_of_its_family(tmp_path: pathlib.Path):
    """Every fourth, which GGUF does not say; the golden model has its second, a choice that such a file cannot keep."""
    folder = tmp_path / "smollm3"
    shutil.copytree(GOLDEN / "smollm3", folder)
    config = json.loads((folder / "config.json").read_text())
    del config["no_rope_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    write_gguf(tmp_path / "model.gguf", "smollm3")
    tokens, _ = expected("smollm3")
    of_file, of_folder = (
        logits_of(experiment, params, tokens)
        for _, experiment, params in (loaded(str(tmp_path / "model.gguf")), loaded(str(folder)))
    )
    np.testing.assert_array_equal(of_file, of_folder)
    four_layers = read_config(config | {"num_hidden_layers": 4, "layer_types": None}, "four layers")
    assert four_layers.own_positions == (None, None, None, "none")


@pytest.mark.parametrize("name", ["llama_untied", "gpt_neox_parallel"])
def test_gguf_has_rows_in_another_order(name: str, tmp_path: pathlib.Path):
    """A file whose rows are as they should not be gives another model: they have to be put in order."""
    write_gguf(tmp_path / "model.gguf", name, is_permuted=False)
    _, experiment, params = loaded(str(tmp_path / "model.gguf"))
    tokens, logits = expected(name)
    assert np.abs(logits_of(experiment, params, tokens) - logits).max() > 0.1


def test_large_models_are_split_over_files(tmp_path: pathlib.Path):
    source, experiment, params = loaded(str(GOLDEN / "qwen2"))
    folder = exported(source, experiment, params, tmp_path / "split", max_file_bytes=10_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len({*index["weight_map"].values()}) > 2
    assert not (folder / "model.safetensors").exists()
    again = open_source(str(folder))
    assert index["metadata"]["total_size"] == sum(path.stat().st_size for path in folder.glob("*.safetensors")) - sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors")
    )
    for name in source.names:
        np.testing.assert_array_equal(source.file.read(name), again.file.read(name))


# With torch: what `golden_models` holds is made anew, and what we write is read by transformers.


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs the extra parity")
def test_transformers_reads_what_is_written(golden, tmp_path: pathlib.Path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    name, source, experiment, params = golden
    folder = exported(source, experiment, params, tmp_path / name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens, logits = expected(name)
    with torch.no_grad():
        found = model(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5)
    shutil.rmtree(folder)
