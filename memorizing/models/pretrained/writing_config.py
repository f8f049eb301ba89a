"""From an `Architecture` to Hugging Face's config.json, in both spellings of rotary settings.

Versions of transformers before 5 do not know `rope_parameters`, and would read a file that has only these with a wrong
theta, in silence.
"""

from __future__ import annotations

from typing import Any

from memorizing.models.positions import Rotary
from memorizing.models.pretrained.architecture import Architecture
from memorizing.models.pretrained.reading_config import FULL, SLIDING

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_GELU = {"exact_gelu": "gelu", "gelu": "gelu_new"}


def write_config(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """The settings of a config.json.

    Args:
      architecture: of the model.
      dtype: of the tensors, in Torch's words: float32, bfloat16 or float16.
    """
    family = architecture.family
    config: dict[str, Any] = {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "dtype": dtype,
        # Before transformers 5.
        "torch_dtype": dtype,
        "vocab_size": architecture.vocab_size,
        "tie_word_embeddings": architecture.is_tied,
    }
    if family == "gpt2":
        return config | _gpt2(architecture)
    config |= {
        "hidden_size": architecture.embed_dim,
        "intermediate_size": architecture.mlp_dim,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_heads,
        "max_position_embeddings": architecture.max_length,
    }
    if family == "gpt_neox":
        return config | _gpt_neox(architecture)
    return config | _llama_kind(architecture)


def _gpt2(architecture: Architecture) -> dict[str, Any]:
    return {
        "n_embd": architecture.embed_dim,
        "n_layer": architecture.num_layers,
        "n_head": architecture.num_heads,
        "n_inner": architecture.mlp_dim,
        "n_positions": architecture.max_length,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": architecture.norm_epsilon,
    }


def _gpt_neox(architecture: Architecture) -> dict[str, Any]:
    rotary = _rotary_of(architecture)
    return {
        "hidden_act": _GELU[architecture.mlp],
        "layer_norm_eps": architecture.norm_epsilon,
        "use_parallel_residual": architecture.has_parallel_residuals,
        "attention_bias": architecture.attention_bias == "all",
        "rotary_pct": rotary.share,
        "rotary_emb_base": rotary.theta,
        "rope_theta": rotary.theta,
        "rope_scaling": _scaling(rotary),
        "rope_parameters": _parameters(rotary) | {"partial_rotary_factor": rotary.share},
    }


def _llama_kind(architecture: Architecture) -> dict[str, Any]:
    rotary = _rotary_of(architecture)
    config: dict[str, Any] = {
        "num_key_value_heads": architecture.num_kv_heads,
        "head_dim": architecture.head_dim,
        "rms_norm_eps": architecture.norm_epsilon,
        "attention_bias": architecture.attention_bias == "all",
        "mlp_bias": architecture.mlp_bias,
        "rope_theta": rotary.theta,
        "rope_scaling": _scaling(rotary),
        "rope_parameters": _parameters(rotary),
    }
    if architecture.is_gemma:
        name = "hidden_act" if architecture.family == "gemma" else "hidden_activation"
        config[name] = "gelu_pytorch_tanh"
    else:
        config["hidden_act"] = "silu"
    return config | _windows(architecture) | _own(architecture)


def _windows(architecture: Architecture) -> dict[str, Any]:
    """What says which layers see how far."""
    windows = architecture.windows
    size = max(windows)
    family = architecture.family
    if family in ("llama", "gemma"):
        return {}
    if family == "mistral":
        return {"sliding_window": size or None}
    kinds = [SLIDING if window else FULL for window in windows]
    config: dict[str, Any] = {"sliding_window": size or None, "layer_types": kinds}
    if family in ("qwen2", "qwen3", "smollm3"):
        config["use_sliding_window"] = size > 0
    if family in ("qwen2", "qwen3"):
        config["max_window_layers"] = windows.index(size) if size else architecture.num_layers
    return config


def _own(architecture: Architecture) -> dict[str, Any]:
    """The settings that a family has for itself."""
    family = architecture.family
    if family == "smollm3":
        return {"no_rope_layers": [int(own != "none") for own in architecture.own_positions]}
    if not architecture.has_sandwich_norms:
        return {}
    assert architecture.attention_scale is not None
    scalar = architecture.attention_scale**-2
    config: dict[str, Any] = {
        # A whole number, that the root of it has not changed.
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar,
        "attn_logit_softcapping": architecture.attention_logit_cap or None,
        "final_logit_softcapping": architecture.final_logit_cap or None,
    }
    if family == "gemma3_text":
        rotary = _rotary_of(architecture)
        local = next((own for own in architecture.own_positions if isinstance(own, Rotary)), rotary)
        config["rope_local_base_freq"] = local.theta
        config["rope_parameters"] = {FULL: _parameters(rotary), SLIDING: _parameters(local)}
    return config


def _rotary_of(architecture: Architecture) -> Rotary:
    assert isinstance(architecture.positions, Rotary)
    return architecture.positions


def _parameters(rotary: Rotary) -> dict[str, Any]:
    """The spelling of transformers from 5 on."""
    scaling = _scaling(rotary) or {"rope_type": "default"}
    share = {} if rotary.share == 1 else {"partial_rotary_factor": rotary.share}
    return {"rope_theta": rotary.theta, **scaling, **share}


def _scaling(rotary: Rotary) -> dict[str, Any] | None:
    """The older spelling of what is done to the frequencies."""
    if rotary.scaling == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": rotary.scaling, "factor": rotary.factor}
    if rotary.scaling == "llama3":
        scaling |= {
            "low_freq_factor": rotary.low_factor,
            "high_freq_factor": rotary.high_factor,
            "original_max_position_embeddings": rotary.original_length,
        }
    return scaling
