"""The tensors of a checkpoint: their names and shapes, and how each becomes parameters of ours and back.

Names are those of Hugging Face's files, one table a family. Torch's linear maps are [out, in]; ours are einsums, of
which the heads are axes of their own. Nothing is computed: tensors are reshaped, transposed and split, so that they
come back bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from memorizing.models.pretrained.architecture import Architecture
from memorizing.models.stack.arrays import layer_name

# A memory's parameters in a file that has them, under their own names.
OWN = "memorizing."

Form = Callable[[np.ndarray], np.ndarray]


class Tensor(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
      name: in the file.
      shape: there.
      paths: of the parameters that it holds, such as `params/layer_03/mlp/up/kernel`.
      split: the tensor as these parameters.
      join: these parameters as the tensor.
    """

    name: str
    shape: tuple[int, ...]
    paths: tuple[str, ...]
    split: Callable[[np.ndarray], Sequence[np.ndarray]]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]


def tensors_of(architecture: Architecture) -> list[Tensor]:
    """All tensors of a checkpoint, from the embedding to the head."""
    family = _FAMILIES.get(architecture.family, _llama_kind)
    return family(architecture)


def is_ignorable(name: str) -> bool:
    """Whether a tensor holds nothing that a model learned, or belongs to a part that is not read."""
    return _IGNORABLE.search(name) is not None


def plain_name(name: str) -> str:
    """A tensor's name without what some files put before it.

    Multimodal Gemma 3 has its text model under `language_model.model.` or `model.language_model.`; GPT-2's first file
    lacks `transformer.`.
    """
    name = re.sub(r"^(language_model\.model\.|model\.language_model\.)", "model.", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    return re.sub(r"^(?=(wte|wpe|ln_f|h\.\d+)\.)", "transformer.", name)


# Causal masks and frequencies that older files hold, the other parts of multimodal models, and what is ours.
_IGNORABLE = re.compile(
    r"rotary_emb\.inv_freq$|\.attn\.(bias|masked_bias)$|\.attention\.(bias|masked_bias)$"
    r"|^(model\.)?(vision_tower|multi_modal_projector|audio_tower)\.|^memorizing\."
)


def _llama_kind(architecture: Architecture) -> list[Tensor]:
    """Llama, Mistral, SmolLM, Qwen and Gemma."""
    sizes = _Sizes(architecture)
    vocabulary = (architecture.vocab_size, architecture.embed_dim)
    tensors = [_same("model.embed_tokens.weight", vocabulary, "embedder/table")]
    for index in range(architecture.num_layers):
        tensors += _llama_layer(architecture, sizes, f"model.layers.{index}.", layer_name(index))
    tensors.append(_same("model.norm.weight", (architecture.embed_dim,), "final_norm/scale"))
    if not architecture.is_tied:
        tensors.append(_same("lm_head.weight", vocabulary, "embedder/output_table"))
    return tensors


def _llama_layer(architecture: Architecture, sizes: _Sizes, prefix: str, layer: str) -> list[Tensor]:
    width = (architecture.embed_dim,)
    if architecture.has_sandwich_norms:
        norms = {
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "attention_output_norm",
            "pre_feedforward_layernorm": "mlp_norm",
            "post_feedforward_layernorm": "mlp_output_norm",
        }
    else:
        norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    tensors = [_same(f"{prefix}{name}.weight", width, f"{layer}/{ours}/scale") for name, ours in norms.items()]

    heads = {
        "q_proj": ("query", sizes.num_heads),
        "k_proj": ("key", sizes.kv_heads),
        "v_proj": ("value", sizes.kv_heads),
    }
    for name, (ours, num_heads) in heads.items():
        tensors.append(
            sizes.to_heads(f"{prefix}self_attn.{name}.weight", num_heads, f"{layer}/attention/{ours}/kernel")
        )
        if architecture.attention_bias != "none":
            path = f"{layer}/attention/{ours}/bias"
            tensors.append(sizes.head_bias(f"{prefix}self_attn.{name}.bias", num_heads, path))
    tensors.append(sizes.from_heads(f"{prefix}self_attn.o_proj.weight", f"{layer}/attention/output/kernel"))
    if architecture.attention_bias == "all":
        tensors.append(_same(f"{prefix}self_attn.o_proj.bias", width, f"{layer}/attention/output/bias"))
    if architecture.has_qk_norm:
        for name, ours in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
            path = f"{layer}/attention/{ours}/scale"
            tensors.append(_same(f"{prefix}self_attn.{name}.weight", (architecture.head_dim,), path))

    hidden = (architecture.mlp_dim,)
    maps = {
        "gate_proj": ("gate", hidden, width),
        "up_proj": ("up", hidden, width),
        "down_proj": ("down", width, hidden),
    }
    for name, (ours, out, inner) in maps.items():
        tensors.append(_transposed(f"{prefix}mlp.{name}.weight", out + inner, f"{layer}/mlp/{ours}/kernel"))
        if architecture.mlp_bias:
            tensors.append(_same(f"{prefix}mlp.{name}.bias", out, f"{layer}/mlp/{ours}/bias"))
    return tensors


def _gpt_neox(architecture: Architecture) -> list[Tensor]:
    sizes = _Sizes(architecture)
    embed_dim, mlp_dim = architecture.embed_dim, architecture.mlp_dim
    vocabulary = (architecture.vocab_size, embed_dim)
    tensors = [_same("gpt_neox.embed_in.weight", vocabulary, "embedder/table")]
    for index in range(architecture.num_layers):
        prefix, layer = f"gpt_neox.layers.{index}.", layer_name(index)
        attention = f"{layer}/attention"
        tensors += [
            *_layer_norm(f"{prefix}input_layernorm", embed_dim, f"{layer}/attention_norm"),
            *_layer_norm(f"{prefix}post_attention_layernorm", embed_dim, f"{layer}/mlp_norm"),
            sizes.query_key_value_by_head(f"{prefix}attention.query_key_value.weight", attention),
            sizes.from_heads(f"{prefix}attention.dense.weight", f"{attention}/output/kernel"),
            _transposed(f"{prefix}mlp.dense_h_to_4h.weight", (mlp_dim, embed_dim), f"{layer}/mlp/up/kernel"),
            _same(f"{prefix}mlp.dense_h_to_4h.bias", (mlp_dim,), f"{layer}/mlp/up/bias"),
            _transposed(f"{prefix}mlp.dense_4h_to_h.weight", (embed_dim, mlp_dim), f"{layer}/mlp/down/kernel"),
            _same(f"{prefix}mlp.dense_4h_to_h.bias", (embed_dim,), f"{layer}/mlp/down/bias"),
        ]
        if architecture.attention_bias == "all":
            tensors += [
                sizes.query_key_value_bias_by_head(f"{prefix}attention.query_key_value.bias", attention),
                _same(f"{prefix}attention.dense.bias", (embed_dim,), f"{attention}/output/bias"),
            ]
    tensors += _layer_norm("gpt_neox.final_layer_norm", embed_dim, "final_norm")
    if not architecture.is_tied:
        tensors.append(_same("embed_out.weight", vocabulary, "embedder/output_table"))
    return tensors


def _gpt2(architecture: Architecture) -> list[Tensor]:
    """GPT-2, whose linear maps are [in, out]."""
    sizes = _Sizes(architecture)
    embed_dim, mlp_dim = architecture.embed_dim, architecture.mlp_dim
    vocabulary = (architecture.vocab_size, embed_dim)
    tensors = [
        _same("transformer.wte.weight", vocabulary, "embedder/table"),
        _same("transformer.wpe.weight", (architecture.max_length, embed_dim), POSITION_TABLE),
    ]
    for index in range(architecture.num_layers):
        prefix, layer = f"transformer.h.{index}.", layer_name(index)
        attention = f"{layer}/attention"
        tensors += [
            *_layer_norm(f"{prefix}ln_1", embed_dim, f"{layer}/attention_norm"),
            *_layer_norm(f"{prefix}ln_2", embed_dim, f"{layer}/mlp_norm"),
            sizes.query_key_value_in_columns(f"{prefix}attn.c_attn.weight", attention),
            sizes.query_key_value_bias_in_columns(f"{prefix}attn.c_attn.bias", attention),
            sizes.from_heads_in_rows(f"{prefix}attn.c_proj.weight", f"{attention}/output/kernel"),
            _same(f"{prefix}attn.c_proj.bias", (embed_dim,), f"{attention}/output/bias"),
            _same(f"{prefix}mlp.c_fc.weight", (embed_dim, mlp_dim), f"{layer}/mlp/up/kernel"),
            _same(f"{prefix}mlp.c_fc.bias", (mlp_dim,), f"{layer}/mlp/up/bias"),
            _same(f"{prefix}mlp.c_proj.weight", (mlp_dim, embed_dim), f"{layer}/mlp/down/kernel"),
            _same(f"{prefix}mlp.c_proj.bias", (embed_dim,), f"{layer}/mlp/down/bias"),
        ]
    tensors += _layer_norm("transformer.ln_f", embed_dim, "final_norm")
    if not architecture.is_tied:
        tensors.append(_same("lm_head.weight", vocabulary, "embedder/output_table"))
    return tensors


_FAMILIES = {"gpt_neox": _gpt_neox, "gpt2": _gpt2}
POSITION_TABLE = "positions/table"
_HEADS = ("query", "key", "value")


class _Sizes:
    """The maps between a model's width and its heads."""

    def __init__(self, architecture: Architecture) -> None:
        self.embed_dim = architecture.embed_dim
        self.num_heads = architecture.num_heads
        self.kv_heads = architecture.num_kv_heads
        self.head_dim = architecture.head_dim

    def to_heads(self, name: str, num_heads: int, path: str) -> Tensor:
        """[N H, D] as [D, N, H]."""
        shape = (num_heads * self.head_dim, self.embed_dim)
        by_head = (num_heads, self.head_dim, self.embed_dim)
        return _single(
            name,
            shape,
            path,
            lambda tensor: tensor.reshape(by_head).transpose(2, 0, 1),
            lambda kernel: kernel.transpose(1, 2, 0).reshape(shape),
        )

    def head_bias(self, name: str, num_heads: int, path: str) -> Tensor:
        """[N H] as [N, H]."""
        shape = (num_heads * self.head_dim,)
        by_head = (num_heads, self.head_dim)
        return _single(name, shape, path, lambda tensor: tensor.reshape(by_head), lambda bias: bias.reshape(shape))

    def from_heads(self, name: str, path: str) -> Tensor:
        """[D, N H] as [N, H, D]."""
        shape = (self.embed_dim, self.num_heads * self.head_dim)
        by_head = (self.embed_dim, self.num_heads, self.head_dim)
        return _single(
            name,
            shape,
            path,
            lambda tensor: tensor.reshape(by_head).transpose(1, 2, 0),
            lambda kernel: kernel.transpose(2, 0, 1).reshape(shape),
        )

    def from_heads_in_rows(self, name: str, path: str) -> Tensor:
        """[N H, D] as [N, H, D]."""
        shape = (self.num_heads * self.head_dim, self.embed_dim)
        by_head = (self.num_heads, self.head_dim, self.embed_dim)
        return _single(name, shape, path, lambda tensor: tensor.reshape(by_head), lambda kernel: kernel.reshape(shape))

    def query_key_value_by_head(self, name: str, attention: str) -> Tensor:
        """[N 3 H, D], head by head its query, key and value, as three kernels [D, N, H]."""
        shape = (3 * self.num_heads * self.head_dim, self.embed_dim)
        by_head = (self.num_heads, 3, self.head_dim, self.embed_dim)

        def split(tensor: np.ndarray) -> list[np.ndarray]:
            # [3, D, N, H]
            return list(tensor.reshape(by_head).transpose(1, 3, 0, 2))

        def join(kernels: Sequence[np.ndarray]) -> np.ndarray:
            return np.stack(kernels).transpose(2, 0, 3, 1).reshape(shape)

        return Tensor(name, shape, _kernels(attention), split, join)

    def query_key_value_bias_by_head(self, name: str, attention: str) -> Tensor:
        """[N 3 H] as three biases [N, H]."""
        shape = (3 * self.num_heads * self.head_dim,)
        by_head = (self.num_heads, 3, self.head_dim)

        def split(tensor: np.ndarray) -> list[np.ndarray]:
            return list(tensor.reshape(by_head).swapaxes(0, 1))

        def join(biases: Sequence[np.ndarray]) -> np.ndarray:
            return np.stack(biases, axis=1).reshape(shape)

        return Tensor(name, shape, _biases(attention), split, join)

    def query_key_value_in_columns(self, name: str, attention: str) -> Tensor:
        """[D, 3 N H], all queries, all keys, all values, as three kernels [D, N, H]."""
        shape = (self.embed_dim, 3 * self.num_heads * self.head_dim)
        by_head = (self.embed_dim, 3, self.num_heads, self.head_dim)

        def split(tensor: np.ndarray) -> list[np.ndarray]:
            return list(tensor.reshape(by_head).swapaxes(0, 1))

        def join(kernels: Sequence[np.ndarray]) -> np.ndarray:
            return np.stack(kernels, axis=1).reshape(shape)

        return Tensor(name, shape, _kernels(attention), split, join)

    def query_key_value_bias_in_columns(self, name: str, attention: str) -> Tensor:
        """[3 N H] as three biases [N, H]."""
        shape = (3 * self.num_heads * self.head_dim,)
        by_head = (3, self.num_heads, self.head_dim)

        def join(biases: Sequence[np.ndarray]) -> np.ndarray:
            return np.stack(biases).reshape(shape)

        return Tensor(name, shape, _biases(attention), lambda tensor: list(tensor.reshape(by_head)), join)


def _kernels(attention: str) -> tuple[str, ...]:
    return tuple(f"params/{attention}/{name}/kernel" for name in _HEADS)


def _biases(attention: str) -> tuple[str, ...]:
    return tuple(f"params/{attention}/{name}/bias" for name in _HEADS)


def _single(name: str, shape: tuple[int, ...], path: str, split: Form, join: Form) -> Tensor:
    """A tensor that is one parameter."""
    return Tensor(name, shape, (f"params/{path}",), lambda tensor: [split(tensor)], lambda arrays: join(arrays[0]))


def _same(name: str, shape: tuple[int, ...], path: str) -> Tensor:
    """A tensor that is a parameter as it is."""
    return _single(name, shape, path, lambda tensor: tensor, lambda array: array)


def _transposed(name: str, shape: tuple[int, ...], path: str) -> Tensor:
    """[out, in] as [in, out]."""
    return _single(name, shape, path, np.transpose, np.transpose)


def _layer_norm(name: str, width: int, path: str) -> list[Tensor]:
    return [_same(f"{name}.weight", (width,), f"{path}/scale"), _same(f"{name}.bias", (width,), f"{path}/bias")]
