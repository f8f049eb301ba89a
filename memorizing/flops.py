"""Forward FLOPs of a model, counted on paper: 2 a multiply-add, matrix products and softmax only.

Counted per layer as in the Chinchilla report (Hoffmann et al. 2022, appendix F): queries, keys and values, query times key, softmax, weights times values, output projection, MLP;
and once the vocabulary matrix. A mask saves nothing and an empty cache or memory costs as much as a full one, as in the compiled program.

A mechanism of attention tells its cost by one function, registered with `attention_flops.register(ItsConfig)`.
"""

from __future__ import annotations

import dataclasses
import functools

from memorizing.attention.base import Attention
from memorizing.attention.full import FullAttention
from memorizing.attention.knn import KNNAttention
from memorizing.attention.xl import XLAttention
from memorizing.model import LMConfig

# Per score: exponential, sum, division (Hoffmann et al. 2022).
_SOFTMAX = 3


@dataclasses.dataclass(frozen=True)
class CompressiveCost(Attention):
    """A layer of the Compressive Transformer (Rae et al. 2019) as far as its cost goes: hidden states are remembered, and compressed by a convolution.

    Attributes:
      memory_size: n_m, positions.
      compressed_size: n_cm, slots.
    """

    memory_size: int = 512
    compressed_size: int = 512


def forward_flops(config: LMConfig, length: int, segment_length: int) -> int:
    """FLOPs of one pass over a document of one row.

    Args:
      config: the model.
      length: tokens of the document.
      segment_length: T; the last segment counts as long as it is.
    """
    num_full, rest = divmod(length, segment_length)
    return num_full * segment_flops(config, segment_length) + (segment_flops(config, rest) if rest else 0)


def full_attention_flops(config: LMConfig, length: int) -> int:
    """FLOPs of the same model if every position of the document could see all of it, in one segment."""
    return forward_flops(without_context(config), length, length)


def without_context(config: LMConfig) -> LMConfig:
    """The same model with full attention within a segment and nothing carried to the next."""
    return dataclasses.replace(config, attention=FullAttention(), attention_at=(), recurrent_tokens=None)


def segment_flops(config: LMConfig, segment_length: int) -> int:
    """FLOPs of one segment. Recurrent tokens pass through the layers with it, but nothing is predicted from them."""
    recurrent = config.recurrent_tokens
    num_positions = recurrent.layout(segment_length).size if recurrent else segment_length
    attention = sum(attention_flops(group.attention, config, num_positions) * group.length for group in config.groups)
    projections = _matmul(num_positions, config.embed_dim, 4 * _width(config))
    mlp = _matmul(num_positions, config.embed_dim, 2 * config.mlp_dim)
    logits = _matmul(segment_length, config.embed_dim, config.vocab_size)
    return attention + config.num_layers * (projections + mlp) + logits


@functools.singledispatch
def attention_flops(attention: Attention, config: LMConfig, num_positions: int) -> int:
    """FLOPs of one layer's attention over a segment, without the four projections of the segment's own positions.

    Args:
      attention: the mechanism, by whose class the count is chosen.
      config: widths of the model.
      num_positions: of the segment, recurrent tokens included.

    Raises:
      NotImplementedError: nobody has registered a count for the mechanism.
    """
    raise NotImplementedError(f"no FLOPs count is registered for {type(attention).__name__}")


@attention_flops.register
def _full(attention: FullAttention, config: LMConfig, num_positions: int) -> int:
    return attend(config, num_positions, num_positions)


@attention_flops.register
def _xl(attention: XLAttention, config: LMConfig, num_positions: int) -> int:
    return attend(config, num_positions, attention.window + num_positions)


@attention_flops.register
def _knn(attention: KNNAttention, config: LMConfig, num_positions: int) -> int:
    """The local attention, the score of every slot, and attention to the k nearest; choosing them is no arithmetic."""
    search = _matmul(num_positions, _width(config), attention.memory_size)
    local = attention_flops(attention.local, config, num_positions)
    return local + search + attend(config, num_positions, attention.num_neighbors)


@attention_flops.register
def _compressive(attention: CompressiveCost, config: LMConfig, num_positions: int) -> int:
    """Attention with Transformer-XL's position term over all three parts, keys and values of what is remembered, and a convolution over what leaves the memory."""
    remembered = attention.memory_size + attention.compressed_size
    width = _width(config)
    num_keys = remembered + num_positions
    position_term = _matmul(num_positions, width, num_keys) + _matmul(num_keys, config.embed_dim, width)
    keys_and_values = _matmul(remembered, config.embed_dim, 2 * width)
    # T / c windows of c positions each, D -> D: the rate drops out.
    compression = _matmul(num_positions, config.embed_dim, config.embed_dim)
    return attend(config, num_positions, num_keys) + position_term + keys_and_values + compression


def attend(config: LMConfig, num_queries: int, num_keys: int) -> int:
    """FLOPs of all heads' softmax(q . k) v."""
    scores = num_queries * num_keys * config.num_heads
    return 2 * _matmul(num_queries, _width(config), num_keys) + _SOFTMAX * scores


def _width(config: LMConfig) -> int:
    """Width of all heads together."""
    return config.num_heads * config.head_dim


def _matmul(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def _opt(num_layers: int, embed_dim: int, num_heads: int) -> LMConfig:
    return LMConfig(
        vocab_size=50272,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        head_dim=embed_dim // num_heads,
        mlp_dim=4 * embed_dim,
    )


# OPT (Zhang et al. 2022, table 1), each with full attention / RMT as read from figure 3 of the RMT report (Bulatov et al. 2023), at these lengths. The report counts memory tokens
# among the positions of a segment, so its RMT costs as much as the plain model on segments.
REPORTED_LENGTH = 2_048_000
REPORTED_SEGMENT = 512
OPT = {
    "125M": (_opt(12, 768, 12), 295),
    "1.3B": (_opt(24, 2048, 32), 154),
    "6.7B": (_opt(32, 4096, 32), 82),
    "30B": (_opt(48, 7168, 56), 48),
    "175B": (_opt(96, 12288, 96), 29),
}
