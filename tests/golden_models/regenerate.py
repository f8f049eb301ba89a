"""Makes the tiny models in this folder, one of each family, with the logits that transformers computes for them.

    pip install -e '.[test,pretrained,parity]' && python tests/golden_models/regenerate.py

Every parameter is random, also norms and biases, so that none can be left out or exchanged unnoticed. Texts are longer
than every window and than the length that rotary positions were scaled from. Heads together are wider than the model,
and are more than the key heads. What a test compares with is in `expected.npz`; the version of transformers in the
model's config.json.
"""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

FOLDER = pathlib.Path(__file__).parent
LENGTH, VOCAB_SIZE, WINDOW = 40, 64, 8

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 300.0, "factor": 8.0}
_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = {**_GROUPED, "sliding_window": WINDOW, "query_pre_attn_scalar": 20}

# Name of the model: its family, and its settings.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_tied": ("llama", {**_GROUPED, "rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "llama_untied": ("llama", {**_GROUPED, "rope_parameters": _LINEAR, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": WINDOW}),
    "smollm3": ("smollm3", {**_GROUPED, "no_rope_layers": [1, 0, 1]}),
    "qwen2": (
        "qwen2",
        {
            **_SIZES,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("qwen3", _GROUPED),
    "gemma": ("gemma", _GROUPED),
    "gemma2": ("gemma2", {**_GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "gemma3": (
        "gemma3_text",
        {
            **_GEMMA,
            "layer_types": _KINDS,
            "rope_parameters": {
                "full_attention": _LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "gpt_neox_parallel": ("gpt_neox", {**_SIZES, "hidden_size": 32}),
    "gpt_neox_sequential": ("gpt_neox", {**_SIZES, "hidden_size": 32, "use_parallel_residual": False}),
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCAB_SIZE, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_inner": 40, "n_positions": 48},
    ),
}
# Of the files; others are bfloat16.
DTYPES = {"llama_untied": torch.float32, "gpt2": torch.float16}


def make(name: str) -> AutoModelForCausalLM:
    """A model in float32 whose numbers its file holds exactly."""
    family, settings = MODELS[name]
    config = AutoConfig.for_model(family, **settings, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(sorted(MODELS).index(name))
    is_gemma = family.startswith("gemma")
    for path, parameter in model.named_parameters():
        is_norm_scale = parameter.ndim == 1 and path.endswith("weight")
        size = 0.5 if "embed" in path or "wte" in path else 0.3
        random = size * torch.randn(parameter.shape, generator=generator)
        if is_norm_scale and not is_gemma:
            random = 1 + random
        parameter.data = random.to(DTYPES.get(name, torch.bfloat16)).float()
    return model


def logits_of(model: AutoModelForCausalLM, tokens: np.ndarray) -> np.ndarray:
    """Of tokens [B, T], float32 [B, T, V]."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.float().numpy()


def main() -> None:
    print(f"transformers {transformers.__version__}")
    for name in MODELS:
        folder = FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        model = make(name)
        tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (1, LENGTH), np.int32)
        logits = logits_of(model, tokens)
        model.to(DTYPES.get(name, torch.bfloat16)).save_pretrained(folder)
        (folder / "generation_config.json").unlink()
        np.savez_compressed(folder / "expected.npz", tokens=tokens, logits=logits)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{name}: {size:,} bytes, logits up to {np.abs(logits).max():.2f}")


if __name__ == "__main__":
    main()
