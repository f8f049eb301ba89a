"""A pretrained model's architecture as gin text, with the attention that an imported run begins with."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

from memorizing.models.positions import Rotary
from memorizing.models.pretrained.architecture import Architecture

# What layers see that saw everything, or more than can be kept in front of a short segment: a window, and the first
# positions of the document, without which a model that was trained on whole texts breaks down.
WINDOW, NUM_SINKS = 256, 4
# Layers that slide over no more than this keep their own window.
MAX_OWN_WINDOW = 1024
# Of the memory beside the window, in every layer that has one: positions, and how many of them a query attends to.
MEMORY_SIZE, NUM_NEIGHBORS = 8192, 32

AttentionKind = Literal["memory", "window", "full"]


class _Layer(NamedTuple):
    """What tells the attention of a layer from others.

    Attributes:
      window: positions that a position sees; 0 for all that its mechanism shows.
      positions: its own, or None.
    """

    window: int
    positions: Rotary | Literal["none"] | None

    @property
    def scope(self) -> str:
        """The name of its kind in gin."""
        words = ["sliding" if self.window else "whole"]
        if self.positions == "none":
            words.append("without_positions")
        return "_".join(words)

    @property
    def is_whole(self) -> bool:
        """Whether it sees all that its mechanism shows."""
        return self.window == 0


def bindings_of(architecture: Architecture, attention: AttentionKind) -> str:
    """Gin text that binds `LMConfig`, for a model with the parameters of the architecture.

    Args:
      architecture: of the pretrained model.
      attention: for documents of any length, layers that saw everything see a window, which `XLAttention` binds, and
        sinks, with 'memory' also what a memory finds in the document before them, without any training. 'full': exactly
        what the model was trained with, within a segment.
    """
    lines = [f"LMConfig.{name} = {value!r}" for name, value in _parts(architecture).items()]
    if isinstance(architecture.positions, Rotary):
        lines += ["LMConfig.positions = @Rotary()", *_fields(architecture.positions, "")]
    else:
        lines += ["LMConfig.positions = 'none'", f"LMConfig.learned_positions = ({architecture.max_length},)"]
    return "\n".join([*lines, *_attention(architecture, attention), ""])


def _parts(architecture: Architecture) -> dict[str, object]:
    """The fields of `LMConfig` that are plain values."""
    gemma = architecture.is_gemma
    norm = "layer" if architecture.has_layer_norm else "rms_gemma" if gemma else "rms_llama"
    biases = {"none": (), "qkv": ("qkv",), "all": ("qkv", "output")}[architecture.attention_bias]
    return {
        "vocab_size": architecture.vocab_size,
        "num_layers": architecture.num_layers,
        "embed_dim": architecture.embed_dim,
        "num_heads": architecture.num_heads,
        "num_kv_heads": architecture.num_kv_heads,
        "head_dim": architecture.head_dim,
        "mlp_dim": architecture.mlp_dim,
        "norm": norm,
        "norm_epsilon": architecture.norm_epsilon,
        "qk_norm": norm if architecture.has_qk_norm else "none",
        "mlp": architecture.mlp,
        "biases": (*biases, "mlp") if architecture.mlp_bias else biases,
        "attention_scale": architecture.attention_scale,
        "attention_logit_cap": architecture.attention_logit_cap,
        "final_logit_cap": architecture.final_logit_cap,
        "sandwich_norms": architecture.has_sandwich_norms,
        "residuals": "parallel" if architecture.has_parallel_residuals else "plain",
        "head": "tied" if architecture.is_tied else "untied",
        "scales_embedding": gemma,
    }


def _fields(positions: Rotary, scope: str) -> list[str]:
    """All fields of positions: what one scope does not bind, it would take from the others."""
    name = f"{scope}Rotary"
    return [f"{name}.{field} = {value!r}" for field, value in dataclasses.asdict(positions).items()]


def _attention(architecture: Architecture, attention: AttentionKind) -> list[str]:
    """The mechanisms of the layers, as the shortest pattern that they repeat."""
    layers = [_Layer(*kind) for kind in zip(architecture.windows, architecture.own_positions, strict=True)]
    # A cache has no use for positions that begin anew in every segment.
    if architecture.positions == "learned":
        attention = "full"
    # And a memory none for models that know little more than the window.
    elif attention == "memory" and architecture.max_length <= 2 * WINDOW:
        attention = "window"
    whole = {"memory": "JointMemoryAttention", "window": "XLAttention", "full": "FullAttention"}[attention]
    if attention != "full":
        layers = [layer if layer.window <= MAX_OWN_WINDOW else layer._replace(window=0) for layer in layers]
    lines = _of_whole_layers(architecture, attention) if any(layer.is_whole for layer in layers) else []

    pattern = _pattern(layers)
    is_plain = len(pattern) == 1 and pattern[0].positions is None
    names = []
    for layer in pattern:
        scope = "" if is_plain else f"{layer.scope}/"
        name = whole if layer.is_whole else "XLAttention"
        names.append(f"@{scope}{name}()")
        local = name
        if name == "JointMemoryAttention":
            local = "XLAttention"
            lines.append(f"{scope}{name}.local = @{scope}{local}()")
        bound = _of_layer(layer, scope, f"{scope}{local}")
        lines += [line for line in bound if line not in lines]
    value = names[0] if len(names) == 1 else f"({', '.join(names)})"
    return [f"LMConfig.attention = {value}", *lines]


def _of_whole_layers(architecture: Architecture, attention: AttentionKind) -> list[str]:
    """What is bound for all layers that see all that their mechanism shows."""
    if attention == "full":
        return []
    lines = [f"XLAttention.window = {WINDOW}", f"XLAttention.num_sinks = {NUM_SINKS}"]
    if attention == "memory":
        memory = {
            "memory_size": MEMORY_SIZE,
            "num_neighbors": NUM_NEIGHBORS,
            "mixing": "full",
            "trained_length": architecture.max_length,
        }
        lines += [f"JointMemoryAttention.{name} = {value!r}" for name, value in memory.items()]
    return lines


def _of_layer(layer: _Layer, scope: str, name: str) -> list[str]:
    """What is bound for the layers of a kind alone."""
    lines = []
    if layer.window:
        lines += [f"{name}.window = {layer.window}", f"{name}.same_length = True", f"{name}.num_sinks = 0"]
    if isinstance(layer.positions, Rotary):
        lines += [f"{name}.positions = @{scope}Rotary()", *_fields(layer.positions, scope)]
    elif layer.positions is not None:
        lines.append(f"{name}.positions = {layer.positions!r}")
    return lines


def _pattern(layers: list[_Layer]) -> list[_Layer]:
    """The shortest beginning that, repeated, gives all layers."""
    for length in range(1, len(layers)):
        if all(layer == layers[index % length] for index, layer in enumerate(layers)):
            return layers[:length]
    return layers
