"""What a checkpoint's configuration says about its model, in our words."""

from __future__ import annotations

import dataclasses
from typing import Literal

from memorizing.models.layers import MLPKind
from memorizing.models.positions import Rotary

Family = Literal[
    "llama",
    "mistral",
    "smollm3",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "gpt2",
]
GEMMAS = ("gemma", "gemma2", "gemma3_text")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model of one of the families that are read.

    Attributes:
      family: `model_type` of Hugging Face's configuration.
      vocab_size, num_layers, embed_dim, num_heads, num_kv_heads, head_dim, mlp_dim: V, L, D, N, K, H, F. The heads
        together need not be as wide as the model.
      max_length: positions that the model was trained for.
      norm_epsilon: of all norms.
      mlp: kind of the MLP.
      is_tied: whether the logits are made by the table of the embedding.
      positions: of layers that have none of their own.
      windows: of each layer, the positions that a position sees, its own included; 0 for all.
      own_positions: of each layer: 'none', other rotary ones than `positions`, or None for those.
      attention_bias: which projections of attention have biases.
      mlp_bias: whether those of the MLP have.
      attention_scale: factor of the logits of attention; None: 1 / sqrt(H).
      attention_logit_cap, final_logit_cap: soft caps; 0 for none.
      has_parallel_residuals: whether attention and MLP read the same x.
    """

    family: Family
    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_length: int
    norm_epsilon: float
    mlp: MLPKind
    is_tied: bool
    positions: Rotary | Literal["learned"]
    windows: tuple[int, ...]
    own_positions: tuple[Rotary | Literal["none"] | None, ...]
    attention_bias: Literal["none", "qkv", "all"] = "none"
    mlp_bias: bool = False
    attention_scale: float | None = None
    attention_logit_cap: float = 0.0
    final_logit_cap: float = 0.0
    has_parallel_residuals: bool = False

    @property
    def is_gemma(self) -> bool:
        """Whether norms multiply by 1 + scale and embeddings by sqrt(D)."""
        return self.family in GEMMAS

    @property
    def has_sandwich_norms(self) -> bool:
        """Whether what attention and MLP add is normalised."""
        return self.family in ("gemma2", "gemma3_text")

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalised, with a learned scale."""
        return self.family in ("qwen3", "gemma3_text")

    @property
    def has_layer_norm(self) -> bool:
        """Whether norms subtract the mean and have a bias."""
        return self.family in ("gpt_neox", "gpt2")
