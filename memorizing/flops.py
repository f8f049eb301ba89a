"""Forward FLOPs of a model, counted on paper: 2 a multiply-add, matrix products and softmax only.

Counted per layer as in the Chinchilla report (Hoffmann et al. 2022, appendix F): queries, keys and values, query times key, softmax, weights times values, output projection, MLP;
and once the vocabulary matrix. A mask saves nothing and an empty cache or memory costs as much as a full one, as in the compiled program.

A mechanism of attention tells its cost by one function, registered with `attention_flops.register(ItsConfig)`.
"""

from __future__ import annotations

import dataclasses
import functools

from memorizing.attention.base import Attention
from memorizing.attention.compressive import CompressiveAttention
from memorizing.attention.full import FullAttention
from memorizing.attention.knn import KNNAttention
from memorizing.attention.transformer_xl import TransformerXLAttention
from memorizing.attention.xl import XLAttention
from memorizing.context import Layout
from memorizing.model import LMConfig

# Per score: exponential, sum, division (Hoffmann et al. 2022).
_SOFTMAX = 3


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
    layout = recurrent.layout(segment_length) if recurrent else Layout(segment_length)
    attention = sum(attention_flops(group.attention, config, layout) * group.length for group in config.groups)
    projections = _matmul(layout.size, config.embed_dim, 4 * _width(config))
    mlp = _matmul(layout.size, config.embed_dim, 2 * config.mlp_dim)
    logits = _matmul(segment_length, config.embed_dim, config.vocab_size)
    return attention + config.num_layers * (projections + mlp) + logits


@functools.singledispatch
def attention_flops(attention: Attention, config: LMConfig, layout: Layout) -> int:
    """FLOPs of one layer's attention over a segment, without the four projections of the segment's own positions.

    Args:
      attention: the mechanism, by whose class the count is chosen.
      config: widths of the model.
      layout: positions of the segment.

    Raises:
      NotImplementedError: nobody has registered a count for the mechanism.
    """
    raise NotImplementedError(f"no FLOPs count is registered for {type(attention).__name__}")


@attention_flops.register
def _full(attention: FullAttention, config: LMConfig, layout: Layout) -> int:
    return attend(config, layout.size, layout.size)


@attention_flops.register
def _xl(attention: XLAttention, config: LMConfig, layout: Layout) -> int:
    return attend(config, layout.size, attention.window + layout.size)


@attention_flops.register
def _knn(attention: KNNAttention, config: LMConfig, layout: Layout) -> int:
    """The local attention, the score of every slot, and attention to the k nearest; choosing them is no arithmetic."""
    local = attention_flops(attention.local, config, layout)
    search = _matmul(layout.size, _width(config), attention.memory_size)
    return local + search + attend(config, layout.size, attention.num_neighbors)


@attention_flops.register
def _transformer_xl(attention: TransformerXLAttention, config: LMConfig, layout: Layout) -> int:
    return _relative_attention(config, layout, attention.window)


@attention_flops.register
def _compressive(attention: CompressiveAttention, config: LMConfig, layout: Layout) -> int:
    """Transformer-XL's attention over all that is remembered, and the compression of as many positions as enter; auxiliary losses are a matter of training."""
    remembered = attention.window + attention.compressed_size
    # T / c windows of c positions each, D -> D: the rate drops out. 'dilated' has two convolutions of width 3 before it.
    kernel_widths = {"conv": 1, "dilated": 1 + 2 * 3}.get(attention.compressor, 0)
    compression = kernel_widths * _matmul(layout.length, config.embed_dim, config.embed_dim)
    return _relative_attention(config, layout, remembered) + compression


def _relative_attention(config: LMConfig, layout: Layout, num_cached: int) -> int:
    """Attention to cached hidden states and the segment, with the cached states' keys and values and the position term (Dai et al. 2019, section 3.3)."""
    num_keys = num_cached + layout.size
    # From every query to every key, later ones included.
    num_distances = layout.size + num_keys - 1
    keys_and_values = _matmul(num_cached, config.embed_dim, 2 * _width(config))
    encodings = _matmul(num_distances, config.embed_dim, _width(config))
    position_term = _matmul(layout.size, _width(config), num_distances)
    return attend(config, layout.size, num_keys) + keys_and_values + encodings + position_term


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
