"""What GGUF files call the settings and tensors of the families that are read from them, in Hugging Face's names."""

from __future__ import annotations

import math
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
    "smollm3": "smollm3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gptneox": "gpt_neox",
    "gpt2": "gpt2",
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
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "use_parallel_residual": "use_parallel_residual",
}
# Those that a family has under another name.
_SETTINGS_OF_FAMILY = {
    "gptneox": {"rope.freq_base": "rotary_emb_base"},
    "gpt2": {
        "embedding_length": "n_embd",
        "feed_forward_length": "n_inner",
        "block_count": "n_layer",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "context_length": "n_positions",
    },
}
# Names of Hugging Face's in a layer: its number, the part, and what of it.
_OF_LAYER = re.compile(r"(?:model\.layers|gpt_neox\.layers|transformer\.h)\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    # GPT-NeoX
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
    # GPT-2
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
# Where what attention and MLP add is normalised, as in Gemma 2 and 3, the norm before the MLP has another name.
_SANDWICH_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    # GPT-NeoX
    "gpt_neox.embed_in": "token_embd",
    "gpt_neox.final_layer_norm": "output_norm",
    "embed_out": "output",
    # GPT-2
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}
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
    for name, theirs in (_SETTINGS | _SETTINGS_OF_FAMILY.get(family, {})).items():
        value = settings.get(f"{family}.{name}")
        if value is not None:
            # A float32 of the file has more digits than what it was written from.
            config[theirs] = float(f"{value:.6g}") if name.endswith("epsilon") and isinstance(value, float) else value
    words = settings.get("tokenizer.ggml.tokens")
    config["vocab_size"] = settings.get(f"{family}.vocab_size", len(words) if words else None)
    config["tie_word_embeddings"] = "output.weight" not in tensors
    if family != "qwen2":
        config["attention_bias"] = not {"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"}.isdisjoint(tensors)
        config["mlp_bias"] = "blk.0.ffn_down.bias" in tensors
    scaling = settings.get(f"{family}.rope.scaling.type", "none")
    if scaling != "none":
        config["rope_scaling"] = {"rope_type": scaling, "factor": settings.get(f"{family}.rope.scaling.factor")}
    turned = settings.get(f"{family}.rope.dimension_count")
    if family == "gptneox":
        config["rotary_pct"] = _share_turned(turned, Settings(config, given))
    elif turned is not None and "head_dim" in config and turned != config["head_dim"]:
        raise UserError(f"{given}: {family}.rope.dimension_count = {turned}: only all {config['head_dim']} are turned")
    if family in _LAYERS_OF_LARGEST:
        config["query_pre_attn_scalar"] = _attention_scalar(family, Settings(config, given))
    return config


def _share_turned(turned: Any, config: Settings) -> float:
    """The share of a head that is turned, of the number of elements."""
    head_dim = config.whole("hidden_size", SIZE) // config.whole("num_attention_heads", HEADS)
    if not isinstance(turned, int) or not 0 <= turned <= head_dim:
        raise UserError(
            f"{config.given}: gptneox.rope.dimension_count = {turned!r}: from 0 to the {head_dim} of a head"
        )
    share = turned / max(head_dim, 1)
    # Where the product is rounded down, one element less would be turned.
    return share if int(share * head_dim) == turned else math.nextafter(share, 1)


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
    found = _OF_LAYER.fullmatch(name)
    if found:
        layer, part, kind = found.groups()
        names = _LAYER_TENSORS | (_SANDWICH_NORMS if architecture.has_sandwich_norms else {})
        return f"blk.{layer}.{names[part]}.{kind}"
    part, _, kind = name.rpartition(".")
    return f"{_TENSORS[part]}.{kind}"


def is_transposed(name: str, architecture: Architecture) -> bool:
    """Whether a matrix is [out, in] in GGUF and [in, out] in Hugging Face's files: the linear maps of GPT-2."""
    part = name.removesuffix(".weight").rpartition(".")[-1]
    return architecture.family == "gpt2" and name.endswith(".weight") and part in ("c_attn", "c_proj", "c_fc")


def as_in_hugging_face(name: str, tensor: np.ndarray, architecture: Architecture) -> np.ndarray:
    """A tensor of a GGUF file with the numbers and the order of Hugging Face's.

    Those of Gemma have 1 + scale for a norm's scale; those of GPT-NeoX all queries, all keys and all values, where
    Hugging Face has those of a head together; those of Llama and SmolLM3 the rows of queries and keys in pairs, as
    llama.cpp turns them: element 2 i of a head beside element 2 i + 1, where Hugging Face has them half a head apart.

    Args:
      name: Hugging Face's.
      tensor: of the GGUF file.
      architecture: of the model.
    """
    if architecture.is_gemma and name.endswith("norm.weight"):
        return tensor - 1
    if is_transposed(name, architecture):
        return tensor.T
    part = name.split(".")[-2]
    if part == "query_key_value":
        by_part = tensor.reshape(3, architecture.num_heads, architecture.head_dim, *tensor.shape[1:])
        return by_part.swapaxes(0, 1).reshape(tensor.shape)
    num_heads = {"q_proj": architecture.num_heads, "k_proj": architecture.num_kv_heads}.get(part)
    if architecture.family not in ("llama", "smollm3") or num_heads is None:
        return tensor
    by_pair = tensor.reshape(num_heads, architecture.head_dim // 2, 2, *tensor.shape[1:])
    return by_pair.swapaxes(1, 2).reshape(tensor.shape)
