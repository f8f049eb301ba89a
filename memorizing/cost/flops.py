"""Forward FLOPs of a model, counted on paper: 2 for each multiply-add, matrix products and softmax only.

Counted per layer as in the Chinchilla report (Hoffmann et al. 2022, appendix F): queries, keys and values, query times
key, softmax, weights times values, output projection, MLP; and once the vocabulary matrix. A mechanism of attention
counts its own (`Attention.flops`).
"""

from __future__ import annotations

from memorizing.models.attention.base import matmul_flops
from memorizing.models.lm_config import LMConfig


def forward_flops(config: LMConfig, length: int, segment_length: int) -> int:
    """FLOPs of one pass over a document of one row.

    Args:
      config: the model.
      length: tokens of the document.
      segment_length: T; the last segment counts as long as it is.
    """
    num_full, rest = divmod(length, segment_length)
    flops = num_full * segment_flops(config, segment_length)
    if rest:
        flops += segment_flops(config, rest)
    return flops


def full_attention_flops(config: LMConfig, length: int) -> int:
    """FLOPs of the same model if every position of the document could see all of it, in one segment."""
    return forward_flops(config.without_context(), length, length)


def segment_flops(config: LMConfig, segment_length: int) -> int:
    """FLOPs of one segment. Recurrent tokens pass through the layers with it, but nothing is predicted from them.

    Raises:
      NotImplementedError: a mechanism does not tell its FLOPs.
    """
    dims = config.dims
    layout = config.layout(segment_length)
    attention = 0
    for group in config.groups:
        attention += group.attention.flops(dims, layout) * len(group.layers)
    # A gated MLP has a second projection up.
    num_matrices = 3 if config.mlp.startswith("gated") else 2
    mlp = matmul_flops(layout.size, config.embed_dim, num_matrices * config.mlp_dim)
    # A memory in the place of the MLP.
    num_memories = len(config.product_keys_at)
    memory = config.product_keys.flops(config.embed_dim, layout.size) if config.product_keys else 0
    logits = matmul_flops(segment_length, config.embed_dim, config.vocab_size)
    cache = config.continuous_cache.flops(config.embed_dim, segment_length) if config.continuous_cache else 0
    feed_forward = (config.num_layers - num_memories) * mlp + num_memories * memory
    return attention + feed_forward + logits + cache


def _opt(num_layers: int, embed_dim: int, num_heads: int) -> LMConfig:
    return LMConfig(
        vocab_size=50272,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        head_dim=embed_dim // num_heads,
        mlp_dim=4 * embed_dim,
    )


# OPT (Zhang et al. 2022, table 1), each with the ratio of full attention to RMT as read from figure 3 of the RMT report
# (Bulatov et al. 2023), at these lengths. The report counts memory tokens among the positions of a segment, so its RMT
# costs as much as the plain model on segments.
REPORTED_LENGTH = 2_048_000
REPORTED_SEGMENT = 512
OPT = {
    "125M": (_opt(12, 768, 12), 295),
    "1.3B": (_opt(24, 2048, 32), 154),
    "6.7B": (_opt(32, 4096, 32), 82),
    "30B": (_opt(48, 7168, 56), 48),
    "175B": (_opt(96, 12288, 96), 29),
}
