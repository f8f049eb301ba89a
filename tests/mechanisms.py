"""The mechanisms that the contract tests run over, each as a tiny language model with what it promises.

The functions of each model are compiled once a session.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from walk_through import DecayingAverage

from memorizing.context import Context, Inputs
from memorizing.models import language_model
from memorizing.models.attention.adaptive_span import AdaptiveSpanAttention
from memorizing.models.attention.base import Attention
from memorizing.models.attention.compressive import CompressiveAttention
from memorizing.models.attention.full import FullAttention
from memorizing.models.attention.joint_memory import JointMemoryAttention
from memorizing.models.attention.knn import KNNAttention
from memorizing.models.attention.sparse.factorized import SparseAttention
from memorizing.models.attention.sparse.reformer import ReformerAttention
from memorizing.models.attention.sparse.routing import RoutingAttention
from memorizing.models.attention.sparse.sinkhorn import SinkhornAttention
from memorizing.models.attention.transformer_xl import TransformerXLAttention
from memorizing.models.attention.xl import XLAttention
from memorizing.models.language_model import ModelOutput
from memorizing.models.layers import Embedder
from memorizing.models.lm_config import LMConfig
from memorizing.models.losses import next_token_nats
from memorizing.models.memory.continuous_cache import ContinuousCache
from memorizing.models.positions import Rotary
from memorizing.models.recurrent_tokens import RecurrentTokens
from memorizing.training.state import init_variables

ROWS, LENGTH, VOCAB = 3, 8, 32


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """A mechanism, to be held to laws 1-5.

    Attributes:
      name: for the test's id.
      attention: of every layer that `attention_at` does not name, or a pattern.
      attention_at, recurrent_tokens, continuous_cache: as in `LMConfig`.
      carries_context: whether a segment sees anything of the segments before it.
      two_segments_equal_one: whether two segments of T give what one segment of 2T gives.
      gradient_reaches_context: whether gradient flows into the carried state (only ever within a step).
      order_of_sums_depends_on_later_tokens: equal up to rounding, where others are equal bit for bit.
      later_tokens_decide_what_is_seen: of the earlier ones, as published; what they hold themselves is never seen.
      parts: of the layers, as in `LMConfig`.
    """

    name: str
    attention: Attention | tuple[Attention, ...] = FullAttention()
    attention_at: tuple[tuple[int, Attention], ...] = ()
    recurrent_tokens: RecurrentTokens | None = None
    carries_context: bool = True
    two_segments_equal_one: bool = False
    gradient_reaches_context: bool = False
    continuous_cache: ContinuousCache | None = None
    order_of_sums_depends_on_later_tokens: bool = False
    later_tokens_decide_what_is_seen: bool = False
    parts: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def config(self) -> LMConfig:
        """Two layers. The logit scale makes attention sharp, so that whatever leaks shows."""
        return LMConfig(
            vocab_size=VOCAB,
            num_layers=2,
            embed_dim=16,
            num_heads=2,
            head_dim=8,
            mlp_dim=32,
            attention=self.attention,
            attention_at=self.attention_at,
            recurrent_tokens=self.recurrent_tokens,
            continuous_cache=self.continuous_cache,
            initial_logit_scale=4.0,
            **self.parts,
        )

    @functools.cached_property
    def model(self) -> TinyModel:
        return TinyModel(self.config)


XL = XLAttention(window=LENGTH)
JOINT = JointMemoryAttention(3 * LENGTH, num_neighbors=4, local=XLAttention(window=4, num_sinks=2))

# As pretrained models are put together; the scale makes attention sharp.
PRETRAINED = {
    "num_kv_heads": 1,
    "positions": Rotary(theta=100.0, share=0.5),
    "norm": "rms_gemma",
    "mlp": "gated_silu",
    "qk_norm": "rms_gemma",
    "biases": ("qkv", "output", "mlp"),
    "attention_scale": 0.5,
    "attention_logit_cap": 8.0,
    "sandwich_norms": True,
    "head": "untied",
    "final_logit_cap": 3.0,
}

MECHANISMS = (
    Mechanism("full", carries_context=False),
    Mechanism("xl", attention=XL, two_segments_equal_one=True),
    Mechanism("xl of same length", attention=XLAttention(window=LENGTH, same_length=True), two_segments_equal_one=True),
    Mechanism(
        "xl of same length, of pretrained parts",
        attention=(
            XLAttention(window=LENGTH, same_length=True),
            XLAttention(window=LENGTH, same_length=True, positions="none"),
        ),
        two_segments_equal_one=True,
        parts=PRETRAINED,
    ),
    Mechanism("knn over full", attention_at=((1, KNNAttention(memory_size=2 * LENGTH, num_neighbors=4)),)),
    Mechanism(
        "knn over xl",
        attention=XL,
        attention_at=((1, KNNAttention(memory_size=2 * LENGTH, num_neighbors=4, local=XL)),),
    ),
    Mechanism(
        "knn that stores what followed",
        attention=XL,
        attention_at=(
            (1, KNNAttention(2 * LENGTH, num_neighbors=4, stored_value="next", retrieval_loss=0.5, local=XL)),
        ),
    ),
    Mechanism("joint memory over a cache with sinks", attention=JOINT, parts=PRETRAINED),
    Mechanism(
        "joint memory of one key head",
        attention=JOINT.local,
        attention_at=((1, dataclasses.replace(JOINT, heads=(1,))),),
        parts=PRETRAINED | {"num_kv_heads": 2},
    ),
    Mechanism("transformer-xl", attention=TransformerXLAttention(window=LENGTH), two_segments_equal_one=True),
    Mechanism("compressive", attention=CompressiveAttention(window=LENGTH, compressed_size=4, rate=4)),
    Mechanism(
        "rmt with learned positions, the MLP in chunks",
        recurrent_tokens=RecurrentTokens(num_tokens=2),
        gradient_reaches_context=True,
        parts={"learned_positions": (2 * LENGTH,), "mlp_chunks": 4},
    ),
    Mechanism(
        "rmt over xl", attention=XL, recurrent_tokens=RecurrentTokens(num_tokens=2), gradient_reaches_context=True
    ),
    Mechanism(
        "rmt over knn with a gradient into its memory",
        attention_at=((1, KNNAttention(2 * LENGTH, num_neighbors=4, differentiable_memory=True)),),
        recurrent_tokens=RecurrentTokens(num_tokens=2),
        gradient_reaches_context=True,
    ),
    Mechanism(
        "continuous cache over full",
        continuous_cache=ContinuousCache(memory_size=2 * LENGTH, num_neighbors=4, theta=4.0, weight=0.5),
    ),
    Mechanism(
        "gated continuous cache over knn",
        attention_at=((1, KNNAttention(memory_size=2 * LENGTH, num_neighbors=4)),),
        continuous_cache=ContinuousCache(3 * LENGTH, num_neighbors=4, theta=4.0, weight=0.5, mixing="gated"),
    ),
    Mechanism(
        "sparse, strided sets in turn",
        attention=(SparseAttention(sees="first", stride=4), SparseAttention(sees="second", stride=4)),
        carries_context=False,
    ),
    Mechanism(
        "sparse, fixed sets merged",
        attention=SparseAttention(pattern="fixed", stride=4, summary_width=2),
        carries_context=False,
    ),
    Mechanism(
        "knn over sparse",
        attention_at=((1, KNNAttention(2 * LENGTH, num_neighbors=4, local=SparseAttention(sees="split", stride=4))),),
    ),
    Mechanism(
        "reformer",
        attention=ReformerAttention(hash_buckets=2, num_rounds=4, chunk_size=4),
        carries_context=False,
        later_tokens_decide_what_is_seen=True,
    ),
    Mechanism(
        "reformer, strictly causal",
        attention=ReformerAttention(hash_buckets=2, num_rounds=4, chunk_size=4, strictly_causal=True),
        carries_context=False,
        order_of_sums_depends_on_later_tokens=True,
    ),
    Mechanism(
        "routing",
        attention=RoutingAttention(num_clusters=2, cluster_size=4, local=SparseAttention(sees="first", stride=4)),
        carries_context=False,
        later_tokens_decide_what_is_seen=True,
    ),
    Mechanism(
        "routing, strictly causal, beside a cache",
        attention=RoutingAttention(num_clusters=2, cluster_size=4, local=XL, strictly_causal=True),
        order_of_sums_depends_on_later_tokens=True,
    ),
    Mechanism("sinkhorn", attention=SinkhornAttention(block_size=2), carries_context=False),
    Mechanism(
        "sliding window and first positions",
        attention=XLAttention(window=LENGTH, same_length=True, num_sinks=3),
    ),
    Mechanism(
        "adaptive span",
        attention=AdaptiveSpanAttention(window=LENGTH, ramp=3, initial_span=0.5, span_loss=0.01),
        two_segments_equal_one=True,
    ),
    # That of docs/adding-a-mechanism.md.
    Mechanism("decaying average", attention=DecayingAverage(), two_segments_equal_one=True),
)


class TinyModel:
    """A model with parameters, and what tests ask of it. All take a batch of ROWS rows of LENGTH tokens."""

    def __init__(self, config: LMConfig) -> None:
        self.config = config

    @property
    def params(self) -> Any:
        return self.variables["params"]

    @property
    def buffers(self) -> Any:
        return self.variables["buffers"]

    @functools.cached_property
    def variables(self) -> dict[str, Any]:
        return drawn_variables(self.config)

    def fresh_context(self, length: int = LENGTH) -> Context:
        return self.config.init_context(ROWS, length)

    @functools.cached_property
    def forward(self):
        """`(tokens, is_real, start, context) -> (logits, context)`."""
        forward = jax.jit(lambda *inputs: self._apply(*inputs)[:2])
        return functools.partial(forward, self.params)

    @functools.cached_property
    def gradients(self):
        """`(tokens, is_real, start, context) -> (gradient of the loss, gradient of what is carried on)`.

        Each to the parameters and to the floats of the context.
        """

        def outputs(params: Any, floats: list, context: Context, tokens: Any, is_real: Any, start: Any) -> tuple:
            output = self._apply(params, tokens, is_real, start, _with_floats(context, floats))
            loss = jnp.where(is_real, next_token_nats(output.logits, tokens), 0).sum()
            loss += sum(output.report.losses.values())
            return loss, sum((jnp.sum(jnp.sin(leaf)) for leaf in _floats(output.context)), start=jnp.zeros(()))

        @jax.jit
        def gradients(params: Any, context: Context, *inputs: Any) -> tuple:
            _, pull_back = jax.vjp(lambda *args: outputs(*args, context, *inputs), params, _floats(context))
            return pull_back((1.0, 0.0)), pull_back((0.0, 1.0))

        return lambda tokens, is_real, start, context: gradients(self.params, context, tokens, is_real, start)

    @functools.cached_property
    def influence(self):
        """`(tokens, is_real, start, context) -> [B, T, B, S]`.

        How much the logits at (b, t) change with the embedded input at (c, s), by gradient.
        """

        params = self.params

        def outputs(embedded: jax.Array, *inputs: Any) -> jax.Array:
            def replace(next_method, args, kwargs, context):
                if isinstance(context.module, Embedder) and context.method_name == "encode":
                    return embedded
                return next_method(*args, **kwargs)

            with nn.intercept_methods(replace):
                return jnp.square(self._apply(params, *inputs).logits).sum(axis=-1)

        def influence(tokens: jax.Array, *inputs: Any) -> jax.Array:
            embedded = params["embedder"]["table"][tokens]
            return jnp.abs(jax.jacrev(outputs)(embedded, tokens, *inputs)).sum(axis=-1)

        return jax.jit(influence)

    def context_after(self, segments: int, seed: int = 0) -> Context:
        """A context that has seen some segments of random tokens, the rows' documents beginning at different times."""
        rng = np.random.default_rng(seed)
        context = self.fresh_context()
        for segment in range(segments):
            start = np.arange(ROWS) == segment % (ROWS + 1)
            _, context = self.forward(random_tokens(rng), ALL_REAL, start, context)
        return context

    def _apply(self, params: Any, *inputs: Any) -> ModelOutput:
        return apply_model(self.config, params, *inputs, buffers=self.buffers)


def drawn_variables(config: LMConfig) -> dict[str, Any]:
    """Parameters and buffers, drawn by numpy: to compile an initialisation takes longer than most tests.

    No promise rests on a value that happens to be 0 or 1 at the start, as the gate's bias and the norms' scales are.
    """
    shapes = jax.eval_shape(lambda: init_variables(config, 1, LENGTH, jax.random.key(0)))
    # With 0 the decoding tests meet two memories that are equally near, and rounding decides which one is read.
    rng = np.random.default_rng(1)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        *_, module, name = (key.key for key in path)
        is_logit_scale = name == "scale" and module in ("attention", "core")
        center = config.initial_logit_scale if is_logit_scale else leaf.ndim == 1
        return jnp.asarray(center + rng.normal(size=leaf.shape) / 4, jnp.float32)

    params = jax.tree_util.tree_map_with_path(draw, shapes["params"])
    # Counts are positive.
    buffers = jax.tree.map(lambda leaf: jnp.exp(rng.normal(size=leaf.shape)), shapes["buffers"])
    return shapes | {"params": params, "buffers": buffers}


def apply_model(
    config: LMConfig,
    params: Any,
    tokens: Any,
    is_real: Any,
    start_of_document: Any,
    context: Context,
    buffers: Any = None,
) -> ModelOutput:
    """One segment of a model, as evaluation reads it."""
    return language_model.apply(config, params, buffers or {}, Inputs(tokens, is_real, start_of_document), context)


def init_params(config: LMConfig, num_rows: int, segment_length: int, key: jax.Array) -> Any:
    return init_variables(config, num_rows, segment_length, key)["params"]


def _floats(context: Context) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(context) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _with_floats(context: Context, floats: list[jax.Array]) -> Context:
    new = iter(floats)
    return jax.tree.map(lambda leaf: next(new) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, context)


ALL_REAL = np.ones((ROWS, LENGTH), bool)
NO_START = np.zeros(ROWS, bool)


def random_tokens(rng: np.random.Generator, length: int = LENGTH) -> np.ndarray:
    return rng.integers(1, VOCAB, (ROWS, length), np.int32)
