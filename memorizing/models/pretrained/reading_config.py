"""From Hugging Face's config.json to an `Architecture`, family by family.

Both spellings of rotary settings are read: `rope_parameters` of transformers from 5 on, `rope_theta`, `rope_scaling`
and others of the versions before. What is not there has the default of the family's class. Whatever is not implemented
here is refused by name: a model that is almost right is worse than none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from memorizing.errors import Range, UserError
from memorizing.models.layers import MLPKind
from memorizing.models.positions import Rotary
from memorizing.models.pretrained.architecture import Architecture, Family
from memorizing.models.pretrained.settings import HEADS, LAYERS, LENGTH, POSITIVE, SIZE, Settings

SLIDING = "sliding_attention"
FULL = "full_attention"

_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")


def read_config(values: Any, given: str) -> Architecture:
    """What a config.json says.

    Args:
      values: the parsed file.
      given: names it, for messages.

    Raises:
      UserError: a setting is missing, is no possible one, or asks for what is not implemented.
    """
    config = Settings(values, given)
    if config.get("quantization_config") is not None:
        raise UserError(f"{given}: quantization_config: quantised weights are read from GGUF files only")
    model_type = config.get("model_type")
    text = config.part("text_config")
    if model_type == "gemma3" and text is not None:
        config, model_type = text, "gemma3_text"
    read = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if read is None:
        raise UserError(f"{given}: model_type = {model_type!r} is not read; what is: {', '.join(_FAMILIES)}")
    if config.flag("use_bidirectional_attention", False):
        raise config.wrong("use_bidirectional_attention", "false")
    architecture = read(config)
    if architecture.num_heads % architecture.num_kv_heads:
        raise config.wrong("num_key_value_heads", f"a divisor of the {architecture.num_heads} heads")
    for positions in {architecture.positions, *architecture.own_positions}:
        if isinstance(positions, Rotary):
            positions.check(architecture.head_dim)
    return architecture


def _llama(config: Settings) -> Architecture:
    _check_activation(config, "hidden_act", ("silu",), "silu")
    return _of_llama_kind("llama", config)


def _mistral(config: Settings) -> Architecture:
    _check_activation(config, "hidden_act", ("silu",), "silu")
    architecture = _of_llama_kind("mistral", config, head_groups=8)
    if config.get("sliding_window") is None:
        return architecture
    window = config.whole("sliding_window", LENGTH)
    return dataclasses.replace(architecture, windows=(window,) * architecture.num_layers)


def _smollm3(config: Settings) -> Architecture:
    _check_activation(config, "hidden_act", ("silu",), "silu")
    architecture = _of_llama_kind("smollm3", config, is_tied=True, head_groups=4)
    num_layers = architecture.num_layers
    interval = config.whole("no_rope_layer_interval", LENGTH, 4)
    # 0 is a layer without rotary positions.
    has_rotary = config.listed("no_rope_layers", num_layers, (0, 1))
    if has_rotary is None:
        has_rotary = [int((index + 1) % interval != 0) for index in range(num_layers)]
    windows = _layer_windows(config, num_layers, None)
    if windows is None and config.flag("use_sliding_window", False):
        raise config.wrong("use_sliding_window", "false, or true with layer_types,")
    return dataclasses.replace(
        architecture,
        own_positions=tuple(None if rotary else "none" for rotary in has_rotary),
        windows=windows or architecture.windows,
    )


def _qwen2(config: Settings) -> Architecture:
    _check_activation(config, "hidden_act", ("silu",), "silu")
    architecture = _of_llama_kind("qwen2", config, head_groups=32)
    return dataclasses.replace(architecture, attention_bias="qkv", windows=_qwen_windows(config, architecture))


def _qwen3(config: Settings) -> Architecture:
    _check_activation(config, "hidden_act", ("silu",), "silu")
    architecture = _of_llama_kind("qwen3", config, head_dim=128, head_groups=32)
    return dataclasses.replace(architecture, windows=_qwen_windows(config, architecture))


def _gemma(config: Settings) -> Architecture:
    # Files of the first release say 'gelu' in `hidden_act`, and mean the approximation.
    if config.get("hidden_activation") is not None:
        _check_activation(config, "hidden_activation", _TANH_GELU, "gelu_pytorch_tanh")
    else:
        _check_activation(config, "hidden_act", (*_TANH_GELU, "gelu"), "gelu_pytorch_tanh")
    return _of_llama_kind("gemma", config, is_tied=True, head_dim=256, mlp="gated_gelu")


def _gemma2(config: Settings) -> Architecture:
    architecture = _later_gemma("gemma2", config)
    num_layers = architecture.num_layers
    return dataclasses.replace(
        architecture,
        windows=_layer_windows(config, num_layers, [index % 2 == 0 for index in range(num_layers)], 4096),
        attention_logit_cap=_cap(config, "attn_logit_softcapping", 50.0),
        final_logit_cap=_cap(config, "final_logit_softcapping", 30.0),
    )


def _gemma3(config: Settings) -> Architecture:
    architecture = _later_gemma("gemma3_text", config)
    num_layers = architecture.num_layers
    pattern = config.whole("sliding_window_pattern", LENGTH, config.get("_sliding_window_pattern") or 6)
    slides = [bool((index + 1) % pattern) for index in range(num_layers)]
    windows = _layer_windows(config, num_layers, slides, 4096)
    assert windows is not None
    # One setting for each kind of layer.
    whole = _rotary(config, FULL, "rope_theta", 1_000_000.0)
    local = _rotary(config, SLIDING, "rope_local_base_freq", 10_000.0)
    return dataclasses.replace(
        architecture,
        windows=windows,
        positions=whole,
        own_positions=tuple(local if window and local != whole else None for window in windows),
        attention_logit_cap=_cap(config, "attn_logit_softcapping", 0.0),
        final_logit_cap=_cap(config, "final_logit_softcapping", 0.0),
    )


def _later_gemma(family: Family, config: Settings) -> Architecture:
    """What Gemma 2 and 3 have in common."""
    _check_activation(config, "hidden_activation", _TANH_GELU, "gelu_pytorch_tanh")
    architecture = _of_llama_kind(
        family,
        config,
        is_tied=True,
        head_dim=256,
        mlp="gated_gelu",
        heads=(8, 4),
        vocab_size=262_208 if family == "gemma3_text" else 256_000,
        max_length=131_072 if family == "gemma3_text" else 8192,
    )
    scalar = config.number("query_pre_attn_scalar", POSITIVE, 256.0)
    return dataclasses.replace(architecture, attention_scale=scalar**-0.5)


def _gpt_neox(config: Settings) -> Architecture:
    gelu = config.word("hidden_act", ("gelu", *_TANH_GELU), "gelu")
    embed_dim = config.whole("hidden_size", SIZE)
    num_heads = config.whole("num_attention_heads", HEADS)
    num_layers = config.whole("num_hidden_layers", LAYERS)
    return Architecture(
        family="gpt_neox",
        vocab_size=config.whole("vocab_size", SIZE),
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=_head_dim(config, "hidden_size", embed_dim, num_heads),
        mlp_dim=config.whole("intermediate_size", SIZE),
        max_length=config.whole("max_position_embeddings", LENGTH, 2048),
        norm_epsilon=config.number("layer_norm_eps", POSITIVE, 1e-5),
        mlp="exact_gelu" if gelu == "gelu" else "gelu",
        is_tied=config.flag("tie_word_embeddings", False),
        positions=_rotary(config, None, "rotary_emb_base", 10_000.0, share=("rotary_pct", 0.25)),
        windows=(0,) * num_layers,
        own_positions=(None,) * num_layers,
        attention_bias="all" if config.flag("attention_bias", True) else "none",
        mlp_bias=True,
        has_parallel_residuals=config.flag("use_parallel_residual", True),
    )


def _gpt2(config: Settings) -> Architecture:
    _check_activation(config, "activation_function", _TANH_GELU, "gelu_new")
    for name, only in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if config.flag(name, only) is not only:
            raise config.wrong(name, str(only).lower())
    embed_dim = config.whole("n_embd", SIZE)
    num_heads = config.whole("n_head", HEADS)
    num_layers = config.whole("n_layer", LAYERS)
    num_positions = config.whole("n_positions", SIZE)
    return Architecture(
        family="gpt2",
        vocab_size=config.whole("vocab_size", SIZE),
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=_head_dim(config, "n_embd", embed_dim, num_heads),
        mlp_dim=config.whole("n_inner", SIZE, 4 * embed_dim),
        max_length=num_positions,
        norm_epsilon=config.number("layer_norm_epsilon", POSITIVE, 1e-5),
        mlp="gelu",
        is_tied=config.flag("tie_word_embeddings", True),
        positions="learned",
        windows=(0,) * num_layers,
        own_positions=(None,) * num_layers,
        attention_bias="all",
        mlp_bias=True,
    )


_FAMILIES: dict[str, Callable[[Settings], Architecture]] = {
    "llama": _llama,
    "mistral": _mistral,
    "smollm3": _smollm3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
}


def _of_llama_kind(
    family: Family,
    config: Settings,
    is_tied: bool = False,
    head_dim: int | None = None,
    mlp: MLPKind = "gated_silu",
    heads: tuple[int | None, int | None] = (None, None),
    head_groups: int | None = None,
    vocab_size: int | None = None,
    max_length: int = 2048,
) -> Architecture:
    """An architecture with Llama's names of settings; the arguments are the family's defaults."""
    num_layers = config.whole("num_hidden_layers", LAYERS, 26 if family == "gemma3_text" else None)
    embed_dim = config.whole("hidden_size", SIZE, 2304 if family == "gemma3_text" else None)
    num_heads = config.whole("num_attention_heads", HEADS, heads[0])
    default_kv_heads = heads[1] or min(num_heads, head_groups or num_heads)
    if config.get("head_dim") is None and head_dim is None:
        head_dim = _head_dim(config, "hidden_size", embed_dim, num_heads)
    has_bias = config.flag("attention_bias", False) and family != "qwen2"
    return Architecture(
        family=family,
        vocab_size=config.whole("vocab_size", SIZE, vocab_size),
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=config.whole("num_key_value_heads", HEADS, default_kv_heads),
        head_dim=config.whole("head_dim", HEADS, head_dim),
        mlp_dim=config.whole("intermediate_size", SIZE, 9216 if family == "gemma3_text" else None),
        max_length=config.whole("max_position_embeddings", LENGTH, max_length),
        norm_epsilon=config.number("rms_norm_eps", POSITIVE, 1e-6),
        mlp=mlp,
        is_tied=config.flag("tie_word_embeddings", is_tied),
        positions=Rotary() if family == "gemma3_text" else _rotary(config, None, "rope_theta", 10_000.0),
        windows=(0,) * num_layers,
        own_positions=(None,) * num_layers,
        attention_bias="all" if has_bias else "none",
        mlp_bias=config.flag("mlp_bias", False),
    )


def _head_dim(config: Settings, name: str, embed_dim: int, num_heads: int) -> int:
    """D / N, where no setting says another one."""
    if embed_dim % num_heads:
        raise config.wrong(name, f"a multiple of the {num_heads} heads")
    return embed_dim // num_heads


def _check_activation(config: Settings, name: str, allowed: tuple[str, ...], default: str) -> None:
    config.word(name, allowed, default)


def _cap(config: Settings, name: str, default: float) -> float:
    """A soft cap; null is none, and so is a setting that is there as null."""
    if name in config.names and config.get(name) is None:
        return 0.0
    return config.number(name, Range(0, 1e30), default)


def _qwen_windows(config: Settings, architecture: Architecture) -> tuple[int, ...]:
    """Qwen's first layers see everything, and the others slide, if it says so at all."""
    num_layers = architecture.num_layers
    config.listed("layer_types", num_layers, (FULL, SLIDING))
    if not config.flag("use_sliding_window", False) or config.get("sliding_window") is None:
        return architecture.windows
    first = config.whole("max_window_layers", Range(0, 10_000), 28)
    windows = _layer_windows(config, num_layers, [index >= first for index in range(num_layers)])
    assert windows is not None
    return windows


def _layer_windows(
    config: Settings,
    num_layers: int,
    slides: list[bool] | None,
    default_window: int | None = None,
) -> tuple[int, ...] | None:
    """The window of each layer, as `layer_types` has it, or else as `slides`; None where neither says it."""
    kinds = config.listed("layer_types", num_layers, (FULL, SLIDING))
    if kinds is not None:
        slides = [kind == SLIDING for kind in kinds]
    if slides is None:
        return None
    if not any(slides):
        return (0,) * num_layers
    window = config.whole("sliding_window", LENGTH, default_window)
    return tuple(window if slide else 0 for slide in slides)


def _rotary(
    config: Settings,
    kind: Literal["full_attention", "sliding_attention"] | None,
    theta_name: str,
    default_theta: float,
    share: tuple[str, float] = ("partial_rotary_factor", 1.0),
) -> Rotary:
    """Rotary positions in either spelling.

    Args:
      config: the model's settings.
      kind: of the layers, where each kind has its own.
      theta_name: of the older spelling, where theta is.
      default_theta: where neither spelling says it.
      share: name of the share that is turned in the older spelling, and its default.
    """
    share_name, default_share = share
    theta = config.number(theta_name, POSITIVE, default_theta)
    turned = config.number(share_name, Range(0, 1), config.get("partial_rotary_factor") or default_share)
    parameters = config.part("rope_parameters")
    if parameters is not None and kind is not None:
        parameters = parameters.part(kind)
    if parameters is None and kind != SLIDING:
        parameters = config.part("rope_scaling")
    if parameters is None:
        return Rotary(theta, turned)
    theta = parameters.number("rope_theta", POSITIVE, theta)
    turned = parameters.number("partial_rotary_factor", Range(0, 1), turned)
    # Older files say `type`.
    name = "rope_type" if parameters.get("rope_type") is not None else "type"
    scaling = parameters.word(name, ("default", "linear", "llama3"), "default")
    if scaling == "default":
        return Rotary(theta, turned)
    factor = parameters.number("factor", POSITIVE)
    if scaling == "linear":
        return Rotary(theta, turned, "linear", factor)
    return Rotary(
        theta,
        turned,
        "llama3",
        factor,
        parameters.number("low_freq_factor", POSITIVE),
        parameters.number("high_freq_factor", POSITIVE),
        parameters.whole("original_max_position_embeddings", LENGTH),
    )
