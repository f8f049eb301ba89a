"""What GGUF files call the settings and tensors of the families that are read from them, in Hugging Face's names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from memorizing.errors import UserError
from memorizing.models.positions import Rotary
from memorizing.models.pretrained.architecture import Architecture, Family
from memorizing.models.pretrained.settings import HEADS, SIZE, Settings

# Families by GGUF's name of their architecture. Mistral's models are Llamas there.
FAMILIES: dict[str, Family] = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
ROTARY_FACTORS = "rope_freqs.weight"

_SETTINGS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Where what attention and MLP add is normalised, as in Gemma 2 and 3, the norm before the MLP has another name.
_SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Layers of those Gemmas, of 27B, whose attention divides by the square root of D / N and not of H.
_LAYERS_OF_LARGEST = {"gemma2": 46, "gemma3": 62}
# Llama 3.1 and 3.2, whose settings GGUF keeps as a tensor of factors only.
_LLAMA3 = [{"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0} for factor in (8.0, 32.0)]


def config_of(settings: Mapping[str, Any], tensors: Collection[str], given: str) -> dict[str, Any]:
    """The settings of a GGUF file as a config.json would have them.

    Args:
      settings: of the file.
      tensors: names in the file.
      given: names the file, for messages.

    Raises:
      UserError: the file's model is of no family that is read, or has what is not implemented.
    """
    family = settings.get("general.architecture")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"{given}: general.architecture = {family!r} is not read; what is: {', '.join(FAMILIES)}")
    if settings.get(f"{family}.expert_count"):
        raise UserError(
            f"{given}: {family}.expert_count = {settings[f'{family}.expert_count']}: no mixtures of experts"
        )
    config: dict[str, Any] = {"model_type": FAMILIES[family]}
    for name, theirs in _SETTINGS.items():
        value = settings.get(f"{family}.{name}")
        if value is not None:
            config[theirs] = value
    # A float32 of the file has more digits than what it was written from.
    if isinstance(config.get("rms_norm_eps"), float):
        config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    words = settings.get("tokenizer.ggml.tokens")
    config["vocab_size"] = settings.get(f"{family}.vocab_size", len(words) if words else None)
    config["tie_word_embeddings"] = "output.weight" not in tensors
    if family != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_down.bias" in tensors
    scaling = settings.get(f"{family}.rope.scaling.type", "none")
    if scaling != "none":
        config["rope_scaling"] = {"rope_type": scaling, "factor": settings.get(f"{family}.rope.scaling.factor")}
    turned = settings.get(f"{family}.rope.dimension_count")
    if turned is not None and "head_dim" in config and turned != config["head_dim"]:
        raise UserError(f"{given}: {family}.rope.dimension_count = {turned}: only all {config['head_dim']} are turned")
    if family in _LAYERS_OF_LARGEST:
        config["query_pre_attn_scalar"] = _attention_scalar(family, Settings(config, given))
    return config


def _attention_scalar(family: str, config: Settings) -> int:
    """What the logits of attention are divided by the square root of, which GGUF does not say: llama.cpp knows it."""
    if config.get("num_hidden_layers") == _LAYERS_OF_LARGEST[family]:
        return config.whole("hidden_size", SIZE) // config.whole("num_attention_heads", HEADS)
    return config.whole("head_dim", HEADS, 256)


def llama3_scaling(factors: np.ndarray, config: Mapping[str, Any], given: str) -> dict[str, Any]:
    """The scaling of rotary positions that a file's factors [d / 2] come from.

    Raises:
      UserError: it is none that is known.
    """
    num_turned = 2 * len(factors)
    theta = float(config["rope_theta"])
    plain = Rotary(theta).frequencies(num_turned)
    for scaling in _LLAMA3:
        rotary = Rotary(
            theta,
            scaling="llama3",
            factor=scaling["factor"],
            low_factor=scaling["low_freq_factor"],
            high_factor=scaling["high_freq_factor"],
            original_length=8192,
        )
        if np.allclose(plain / rotary.frequencies(num_turned), factors, rtol=1e-3):
            return {"rope_type": "llama3", "original_max_position_embeddings": 8192, **scaling}
    raise UserError(f"{given}: {ROTARY_FACTORS} are not those of Llama 3.1 or 3.2")


def name_in_gguf(name: str, architecture: Architecture) -> str:
    """What a GGUF file calls a tensor of Hugging Face's name."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if found:
        layer, part, kind = found.groups()
        names = _LAYER_TENSORS | (_SANDWICH_NORMS if architecture.has_sandwich_norms else {})
        return f"blk.{layer}.{_reversed(names)[part]}.{kind}"
    part, _, kind = name.rpartition(".")
    return f"{_reversed(_TENSORS)[part]}.{kind}"


def _reversed(names: Mapping[str, str]) -> dict[str, str]:
    return {theirs: name for name, theirs in names.items()}


def as_in_hugging_face(name: str, tensor: np.ndarray, architecture: Architecture) -> np.ndarray:
    """A tensor of a GGUF file with the numbers and the order of Hugging Face's.

    The files of Llama have the rows of queries and keys in pairs, as llama.cpp turns them: element 2 i of a head beside
    element 2 i + 1, where Hugging Face has them half a head apart. Those of Gemma have 1 + scale for a norm's scale.

    Args:
      name: Hugging Face's.
      tensor: of the GGUF file.
      architecture: of the model.
    """
    if architecture.is_gemma and name.endswith("norm.weight"):
        return tensor - 1
    part = name.split(".")[-2]
    num_heads = {"q_proj": architecture.num_heads, "k_proj": architecture.num_kv_heads}.get(part)
    if architecture.family != "llama" or num_heads is None:
        return tensor
    by_pair = tensor.reshape(num_heads, architecture.head_dim // 2, 2, *tensor.shape[1:])
    return by_pair.swapaxes(1, 2).reshape(tensor.shape)
