"""The tiny models of `golden_models` as ours, and files that tests make of them."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

import gguf
import jax
import jax.numpy as jnp
import numpy as np

from memorizing.config.loading import load_experiment
from memorizing.config.pretrained import AttentionKind, bindings_of
from memorizing.context import Inputs
from memorizing.models import language_model
from memorizing.models.pretrained.architecture import Architecture
from memorizing.models.pretrained.gguf_names import FAMILIES, name_in_gguf
from memorizing.models.stack.arrays import unstack
from memorizing.training.checkpoint import paths
from memorizing.training.experiment import Experiment
from memorizing.training.pretrained.loading import load_variables
from memorizing.training.pretrained.source import Source, open_source

GOLDEN = pathlib.Path(__file__).parent / "golden_models"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
LENGTH = 40

_RUN = """
Experiment.model = @LMConfig()
Experiment.data = @RepeatedPassages()
Experiment.batch = @BatchConfig()
"""


def experiment_of(
    source: Source,
    attention: AttentionKind = "full",
    length: int = LENGTH,
    bindings: Sequence[str] = (),
) -> Experiment:
    """A run of one row of an imported model."""
    sizes = [f"BatchConfig.segment_length = {length}", f"BatchConfig.tokens_per_step = {length}"]
    base = "\n".join([_RUN, *sizes, bindings_of(source.architecture, attention)])
    return load_experiment([], bindings, base=base)[0]


def logits_of(experiment: Experiment, params: Mapping, tokens: np.ndarray) -> np.ndarray:
    """Logits of a document that begins with these tokens [B, T], read segment by segment."""
    length = experiment.batch.segment_length
    config = experiment.model

    @jax.jit
    def read(params, tokens, start, context):
        is_real = jnp.ones(tokens.shape, bool)
        output = language_model.apply(config, params, {}, Inputs(tokens, is_real, start), context)
        return output.logits, output.context

    context = config.init_context(len(tokens), length)
    parts = []
    for first in range(0, tokens.shape[1], length):
        start = jnp.full(len(tokens), first == 0)
        logits, context = read(params, jnp.asarray(tokens[:, first : first + length]), start, context)
        parts.append(np.asarray(logits))
    return np.concatenate(parts, axis=1)


def single_layers(experiment: Experiment, params: Mapping) -> dict[str, np.ndarray]:
    """The parameters as a checkpoint gives them, by path."""
    arrays = {path: np.asarray(leaf) for path, leaf in paths({"params": params}).items()}
    return unstack(arrays, experiment.model.stack.stacked_layers)


def loaded(path: str, attention: AttentionKind = "full") -> tuple[Source, Experiment, dict]:
    """A model as it is imported."""
    source = open_source(path)
    experiment = experiment_of(source, attention)
    params, _ = load_variables(source, experiment)
    return source, experiment, params


def expected(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [1, T] of a golden model, and their logits in transformers."""
    with np.load(GOLDEN / name / "expected.npz") as stored:
        return stored["tokens"], stored["logits"]


def write_gguf(
    path: pathlib.Path,
    name: str,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    is_permuted: bool = True,
    tokens: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """A golden model as llama.cpp's converter writes it; its rows in the order of GGUF, unless asked not to.

    Returns:
      The tensors by Hugging Face's name, as the file has them but for that order.
    """
    source = open_source(str(GOLDEN / name))
    architecture = source.architecture
    family = next(theirs for theirs, ours in FAMILIES.items() if ours == architecture.family)
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(architecture.num_layers)
    writer.add_context_length(architecture.max_length)
    writer.add_embedding_length(architecture.embed_dim)
    writer.add_feed_forward_length(architecture.mlp_dim)
    writer.add_head_count(architecture.num_heads)
    if architecture.has_layer_norm:
        writer.add_layer_norm_eps(architecture.norm_epsilon)
    else:
        _add_of_llama_kind(writer, architecture)
    if family == "gptneox":
        writer.add_rope_dimension_count(int(architecture.positions.share * architecture.head_dim))
        writer.add_parallel_residual(architecture.has_parallel_residuals)
    writer.add_vocab_size(architecture.vocab_size)
    if tokens:
        writer.add_token_list(tokens)
    stored = {}
    for tensor_name in source.names:
        tensor = source.file.read(source.names[tensor_name]).astype(np.float32)
        tensor = _as_gemma_has_it(tensor_name, tensor, architecture)
        kept = kind if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        if kept is gguf.GGMLQuantizationType.F32:
            stored[tensor_name] = tensor
        else:
            stored[tensor_name] = gguf.quants.dequantize(gguf.quants.quantize(tensor, kept), kept)
        if is_permuted:
            tensor = _in_order_of_gguf(tensor_name, tensor, architecture)
        in_file = gguf.quants.quantize(tensor, kept) if kept is not gguf.GGMLQuantizationType.F32 else tensor
        writer.add_tensor(name_in_gguf(tensor_name, architecture), in_file, raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _add_of_llama_kind(writer: gguf.GGUFWriter, architecture: Architecture) -> None:
    """Settings that Llama and its kin have, and those with learned biases of norms do not."""
    writer.add_head_count_kv(architecture.num_kv_heads)
    writer.add_key_length(architecture.head_dim)
    writer.add_layer_norm_rms_eps(architecture.norm_epsilon)
    writer.add_rope_freq_base(architecture.positions.theta)
    if architecture.positions.scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(architecture.positions.factor)
    if architecture.has_sandwich_norms:
        _add_of_later_gemma(writer, architecture)


def _in_order_of_gguf(name: str, tensor: np.ndarray, architecture: Architecture) -> np.ndarray:
    """A tensor with its rows as llama.cpp's converter puts them, and GPT-2's matrices transposed."""
    num_heads = {"q_proj": architecture.num_heads, "k_proj": architecture.num_kv_heads}
    part = name.split(".")[-2]
    if architecture.family in ("llama", "smollm3") and part in num_heads:
        halves = tensor.reshape(num_heads[part], 2, architecture.head_dim // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    if part == "query_key_value":
        by_head = tensor.reshape(architecture.num_heads, 3, -1)
        return np.concatenate([by_head[:, kind] for kind in range(3)]).reshape(tensor.shape)
    if architecture.family == "gpt2" and tensor.ndim == 2 and ".h." in name:
        return np.ascontiguousarray(tensor.T)
    return tensor


def _add_of_later_gemma(writer: gguf.GGUFWriter, architecture: Architecture) -> None:
    """Settings that Gemma 2 and 3 alone have."""
    writer.add_sliding_window(max(architecture.windows))
    if architecture.attention_logit_cap:
        writer.add_attn_logit_softcapping(architecture.attention_logit_cap)
    if architecture.final_logit_cap:
        writer.add_final_logit_softcapping(architecture.final_logit_cap)
    if architecture.family == "gemma3_text":
        writer.add_rope_freq_base_swa(architecture.own_positions[0].theta)
        writer.add_sliding_window_pattern(2)


def _as_gemma_has_it(name: str, tensor: np.ndarray, architecture: Architecture) -> np.ndarray:
    """A tensor of Gemma with 1 + scale for a norm's scale, and of any other model as it is.

    GGUF has no setting for the scale of attention. The golden models have another one than 1 / sqrt(H), which queries
    get here.
    """
    if not architecture.is_gemma:
        return tensor
    if name.endswith("norm.weight"):
        tensor = tensor + 1
    gets_scale = "q_norm" if architecture.has_qk_norm else "q_proj"
    if architecture.attention_scale is None or gets_scale not in name:
        return tensor
    return tensor * (architecture.attention_scale * architecture.head_dim**0.5)
