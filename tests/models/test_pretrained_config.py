"""Configurations of pretrained models: what is read, and what is refused in one line."""

from __future__ import annotations

import copy
import json
import pathlib
import random
from typing import Any

import pytest
from pretrained_models import GOLDEN, NAMES

from memorizing.errors import UserError
from memorizing.models.positions import Rotary
from memorizing.models.pretrained.architecture import Architecture
from memorizing.models.pretrained.reading_config import read_config

# As the files on the hub spell them, of versions of transformers before 5.
LLAMA_32_1B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
}
GEMMA_3_4B = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}
PYTHIA_70M = {
    "model_type": "gpt_neox",
    "vocab_size": 50304,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "hidden_act": "gelu",
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
}


def read(config: dict[str, Any], **changed: Any) -> Architecture:
    return read_config(config | changed, "config.json")


def test_llama_3_2():
    read_one = read(LLAMA_32_1B)
    assert read_one.positions == Rotary(500000.0, 1.0, "llama3", 32.0, 1.0, 4.0, 8192)
    assert (read_one.num_heads, read_one.num_kv_heads, read_one.is_tied) == (32, 8, True)


def test_the_text_model_of_a_multimodal_one():
    """What its file leaves out has the defaults of the family; every sixth layer sees everything."""
    read_one = read(GEMMA_3_4B)
    assert (read_one.vocab_size, read_one.num_heads, read_one.num_kv_heads, read_one.head_dim) == (262208, 8, 4, 256)
    assert read_one.windows[:7] == (1024, 1024, 1024, 1024, 1024, 0, 1024)
    assert read_one.positions == Rotary(1e6, 1.0, "linear", 8.0)
    assert read_one.own_positions[:6] == (*[Rotary(1e4)] * 5, None)
    assert read_one.attention_scale == 256**-0.5


def test_pythia():
    read_one = read(PYTHIA_70M)
    assert read_one.positions == Rotary(10000.0, 0.25)
    assert read_one.has_parallel_residuals and read_one.mlp == "exact_gelu" and not read_one.is_tied


def test_smollm3_has_layers_without_positions():
    config = LLAMA_32_1B | {"model_type": "smollm3", "num_hidden_layers": 8, "rope_scaling": None}
    assert read(config).own_positions == (None, None, None, "none") * 2
    assert read(config, no_rope_layers=[0, 1] * 4).own_positions == ("none", None) * 4


def test_old_spellings_of_types():
    scaling = {"type": "linear", "factor": 2.0}
    assert read(LLAMA_32_1B, rope_scaling=scaling).positions == Rotary(500000.0, 1.0, "linear", 2.0)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model_type": "llama4"}, ["model_type = 'llama4'", "qwen3"]),
        ({"model_type": None}, ["model_type = None"]),
        ({"model_type": ["llama"]}, ["model_type"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_type = 'yarn'", "llama3"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, ["low_freq_factor = None"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "GGUF"]),
        ({"hidden_act": "relu"}, ["hidden_act = 'relu'", "silu"]),
        ({"hidden_size": None}, ["hidden_size = None"]),
        ({"hidden_size": 2**40}, ["hidden_size", "16,777,216"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers = True"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers"]),
        ({"num_key_value_heads": 5}, ["num_key_value_heads = 5", "32 heads"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps"]),
        ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps = '1e-5'"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings = 1", "true or false"]),
        ({"model_type": "qwen3", "layer_types": ["linear_attention"] * 16}, []),
        ({"model_type": "gemma2", "layer_types": ["chunked_attention"] * 16}, ["layer_types"]),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ({"head_dim": 63}, ["63"]),
    ],
)
def test_what_is_refused(changed: dict[str, Any], words: list[str]):
    with pytest.raises(UserError) as refused:
        read(LLAMA_32_1B, **changed)
    message = str(refused.value)
    assert "\n" not in message and len(message) < 300
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize("name", NAMES)
def test_damaged_configurations_are_told_in_one_line(name: str):
    """Settings of other types and sizes, or missing: read as something else, or refused; no other error."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    rng = random.Random(0)
    values = [None, True, -1, 0, 1.5, 2**70, 1e400, float("nan"), "x", [], [1], {}, {"a": 1}, {"rope_type": []}]
    for key in config:
        for value in values:
            _read_or_refuse(config | {key: value})
        _read_or_refuse({other: config[other] for other in config if other != key})
    for _ in range(100):
        damaged = copy.deepcopy(config)
        for key in rng.sample(sorted(damaged), 3):
            damaged[key] = rng.choice(values)
        _read_or_refuse(damaged)


def _read_or_refuse(config: Any) -> None:
    try:
        read_config(config, "config.json")
    except UserError as error:
        assert "\n" not in str(error)


def test_a_configuration_that_is_no_object():
    for value in (None, 1, [], "x"):
        with pytest.raises(UserError, match="no object"):
            read_config(value, "config.json")


def test_golden_models_say_which_version_made_them():
    for name in NAMES:
        config = json.loads(pathlib.Path(GOLDEN / name / "config.json").read_text())
        assert config["transformers_version"]
