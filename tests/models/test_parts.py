"""Layers put together from parts, as other people's models have them, against a float64 reference.

The reference is written from the equations: it reads a whole document at once, and turns each query by its distance to
each key. The model reads segment by segment, and turns queries and keys by positions that begin anew in each.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mechanisms import apply_model

from memorizing.errors import UserError
from memorizing.models.attention.full import FullAttention
from memorizing.models.attention.joint_memory import JointMemoryAttention
from memorizing.models.attention.knn import KNNAttention
from memorizing.models.attention.sparse.factorized import SparseAttention
from memorizing.models.attention.xl import XLAttention
from memorizing.models.layers import RMSNorm
from memorizing.models.lm_config import LMConfig
from memorizing.models.positions import Rotary
from memorizing.models.stack.arrays import unstack
from memorizing.training.checkpoint import paths
from memorizing.training.state import init_variables

LENGTH, SEGMENTS, VOCAB = 6, 4, 31
BASE = LMConfig(
    VOCAB, num_layers=2, embed_dim=12, num_heads=4, head_dim=6, mlp_dim=16, qk_norm="none", num_kv_heads=2, head="tied"
)
SLIDING = XLAttention(window=5, same_length=True)
EVERYTHING = XLAttention(window=LENGTH * SEGMENTS)
LLAMA3 = Rotary(theta=100.0, scaling="llama3", factor=4.0, low_factor=1.0, high_factor=4.0, original_length=64)
# Memories whose oldest slots are overwritten.
JOINT = JointMemoryAttention(2 * LENGTH, num_neighbors=3, local=XLAttention(window=2), mixing="full")
MODELS = {
    "qwen with sinks": dataclasses.replace(
        BASE,
        attention=(XLAttention(window=4, num_sinks=3), dataclasses.replace(SLIDING, num_sinks=2)),
        positions=Rotary(),
        norm="rms_llama",
        mlp="gated_silu",
        biases=("qkv",),
        qk_norm="rms_llama",
        head="tied",
    ),
    "gpt-neox": dataclasses.replace(
        BASE,
        attention=(SLIDING, dataclasses.replace(EVERYTHING, positions="none")),
        num_kv_heads=None,
        positions=Rotary(share=0.34),
        norm="layer",
        mlp="exact_gelu",
        biases=("qkv", "output", "mlp"),
        residuals="parallel",
        head="untied",
    ),
    "gpt-2": dataclasses.replace(
        BASE,
        attention=FullAttention(),
        num_kv_heads=None,
        positions="none",
        learned_positions=(LENGTH,),
        norm="layer",
        mlp="gelu",
        biases=("qkv", "output", "mlp"),
        head="tied",
    ),
    "llama 3 with a memory, beyond the trained length": dataclasses.replace(
        BASE,
        attention=dataclasses.replace(JOINT, trained_length=2 * LENGTH + 3),
        positions=LLAMA3,
        norm="rms_llama",
        norm_epsilon=0.1,
        mlp="gated_silu",
        attention_scale=1.0,
        head="untied",
    ),
    "gemma 2 and 3 with trained memories, one beside sinks": dataclasses.replace(
        BASE,
        attention=(
            dataclasses.replace(
                JOINT,
                mixing="learned",
                distances="constant",
                trained_length=20,
                local=XLAttention(window=2, num_sinks=2, positions=Rotary(theta=20.0)),
            ),
            dataclasses.replace(JOINT, mixing="learned", local=FullAttention()),
        ),
        positions=Rotary(theta=1000.0, scaling="linear", factor=8.0),
        norm="rms_gemma",
        mlp="gated_gelu",
        qk_norm="rms_gemma",
        attention_scale=0.3,
        attention_logit_cap=1.5,
        sandwich_norms=True,
        head="tied",
        scales_embedding=True,
        final_logit_cap=2.0,
    ),
}


@functools.cache
def parameters(config: LMConfig) -> Any:
    """Parameters, all of them random: those that begin as 0 or 1 would hide what is missing or swapped."""

    @jax.jit
    def init() -> Any:
        params = init_variables(config, 1, LENGTH, jax.random.key(0))["params"]
        keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
        return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), params)

    return init()


def read(config: LMConfig, tokens: np.ndarray) -> np.ndarray:
    """Logits of a document [positions], read in segments."""
    step = jax.jit(functools.partial(apply_model, config))
    context = config.init_context(1, LENGTH)
    logits = []
    for start in range(0, len(tokens), LENGTH):
        part = tokens[None, start : start + LENGTH]
        output = step(parameters(config), part, np.ones(part.shape, bool), np.array([start == 0]), context)
        context = output.context
        logits.append(np.asarray(output.logits[0]))
    return np.concatenate(logits)


class Reference:
    """A model in float64."""

    def __init__(self, config: LMConfig) -> None:
        self.config = config
        arrays = {path: np.asarray(leaf) for path, leaf in paths(parameters(config)).items()}
        single = unstack(arrays, config.stack.stacked_layers)
        self.params = {path: array.astype(np.float64) for path, array in single.items()}

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        config, params = self.config, self.params
        x = params["embedder/table"][tokens]
        if config.scales_embedding:
            x = x * math.sqrt(config.embed_dim)
        if config.learned_positions:
            x = x + params["positions/table"][np.arange(len(tokens)) % LENGTH]
        for index, mechanism in enumerate(config.stack.mechanisms):
            x = self.layer(f"layer_{index:02d}", mechanism, x)
        head = params["embedder/output_table" if config.head == "untied" else "embedder/table"]
        return self.capped(self.norm("final_norm", x) @ head.T, config.final_logit_cap)

    def layer(self, name: str, mechanism: Any, x: np.ndarray) -> np.ndarray:
        def part(which: str, x: np.ndarray) -> np.ndarray:
            y = self.norm(f"{name}/{which}_norm", x)
            y = self.attend(f"{name}/attention", mechanism, y) if which == "attention" else self.mlp(f"{name}/mlp", y)
            return self.norm(f"{name}/{which}_output_norm", y) if self.config.sandwich_norms else y

        if self.config.residuals == "parallel":
            return x + part("attention", x) + part("mlp", x)
        x = x + part("attention", x)
        return x + part("mlp", x)

    def linear(self, name: str, x: np.ndarray, axes: int = 1) -> np.ndarray:
        y = np.tensordot(x, self.params[f"{name}/kernel"], axes)
        return y + self.params.get(f"{name}/bias", 0.0)

    def norm(self, name: str, x: np.ndarray, kind: str | None = None) -> np.ndarray:
        kind = kind or self.config.norm
        scale = self.params[f"{name}/scale"]
        if kind == "layer":
            centered = x - x.mean(-1, keepdims=True)
            normalized = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + self.config.norm_epsilon)
            return normalized * scale + self.params[f"{name}/bias"]
        normalized = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config.norm_epsilon)
        return normalized * (scale + 1 if kind == "rms_gemma" else scale)

    def mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        kind = self.config.mlp
        tanh_gelu = lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))  # noqa: E731
        activation = {
            "silu": lambda x: x / (1 + np.exp(-x)),
            "gelu": tanh_gelu,
            "exact_gelu": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
        }[kind.removeprefix("gated_")]
        if kind.startswith("gated_"):
            hidden = activation(self.linear(f"{name}/gate", x)) * self.linear(f"{name}/up", x)
        else:
            hidden = activation(self.linear(f"{name}/up", x))
        return self.linear(f"{name}/down", hidden)

    def attend(self, name: str, mechanism: Any, x: np.ndarray) -> np.ndarray:
        config = self.config
        queries, keys, values = (self.linear(f"{name}/{which}", x) for which in ("query", "key", "value"))
        if config.qk_norm != "none":
            queries = self.norm(f"{name}/query_norm", queries, config.qk_norm)
            keys = self.norm(f"{name}/key_norm", keys, config.qk_norm)
        # Every query head with a key head of its own.
        copies = config.num_heads // config.dims.kv_heads
        keys, values = keys.repeat(copies, axis=1), values.repeat(copies, axis=1)
        memory = mechanism if isinstance(mechanism, JointMemoryAttention) else None
        local = memory.local if memory else mechanism
        visible, distances = self.seen(local, len(x))
        rotary = config.positions if local.positions is None else local.positions
        # [N, T, S]
        logits = self.logits(queries, keys, distances, rotary)
        local_y, local_sum = attention(logits, visible, values)
        if not memory:
            return self.linear(f"{name}/output", local_y, axes=2)

        held, far = self.remembered(memory, visible, distances)
        logits = self.logits(queries, keys, far, rotary)
        found = nearest(np.where(held, logits, -np.inf), memory.num_neighbors)
        memory_y, memory_sum = attention(logits, found, values)
        alpha = np.tanh(self.params[f"{name}/core/alpha"]) if memory.mixing == "learned" else 1.0
        beta = self.params[f"{name}/core/beta"] if memory.mixing == "learned" else 0.0
        share = alpha * memory_sum * np.exp(beta) / (memory_sum * np.exp(beta) + local_sum)
        return self.linear(f"{name}/output", local_y + share[..., None] * (memory_y - local_y), axes=2)

    def logits(self, queries: np.ndarray, keys: np.ndarray, distances: np.ndarray, rotary: Any) -> np.ndarray:
        # [T, S, N, H]
        turned = np.broadcast_to(queries[:, None], (len(queries), *keys.shape))
        if isinstance(rotary, Rotary):
            turned = turn(rotary, turned, distances[:, :, None, None])
        logits = np.einsum("tsnh,snh->nts", turned, keys) * self.config.dims.fixed_logit_scale
        return self.capped(logits, self.config.attention_logit_cap)

    def remembered(
        self, memory: JointMemoryAttention, visible: np.ndarray, distances: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which earlier positions the memory shows each position, and at what distance."""
        query, key = np.indices(visible.shape)
        start = query // LENGTH * LENGTH
        held = (key < start) & (key >= start - memory.memory_size) & ~visible
        if memory.distances == "constant":
            return held, np.full_like(key, memory.trained_length)
        return held, np.minimum(query - key, query - start + memory.trained_length - LENGTH)

    def seen(self, mechanism: Any, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
        """Which earlier positions each position sees, and at what distance."""
        query, key = np.arange(num_positions)[:, None], np.arange(num_positions)[None, :]
        start = query // LENGTH * LENGTH
        if isinstance(mechanism, FullAttention):
            return (key <= query) & (key >= start), query - key
        first = query - mechanism.window + 1 if mechanism.same_length else start - mechanism.window
        is_sink = (key < mechanism.num_sinks) & (key < first)
        before_cache = np.minimum(start, mechanism.window + mechanism.num_sinks)
        distances = np.where(is_sink, query - start + before_cache - key, query - key)
        return (key <= query) & ((key >= first) | is_sink), distances

    def capped(self, logits: np.ndarray, cap: float) -> np.ndarray:
        return cap * np.tanh(logits / cap) if cap else logits


def attention(logits: np.ndarray, visible: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Attention to the visible keys [T, N, H], and its sum of exponentials [T, N]; zeros where there are none."""
    weights = np.where(visible, np.exp(logits), 0.0)
    total = weights.sum(-1)
    return np.einsum("nts,snh->tnh", weights / np.maximum(total, 1e-300)[..., None], values), total.T


def nearest(logits: np.ndarray, num_neighbors: int) -> np.ndarray:
    """Which keys are among the nearest of each query, of those with a logit above -inf."""
    threshold = np.sort(logits, axis=-1)[..., -num_neighbors, None]
    return (logits >= threshold) & (logits > -np.inf)


def turn(rotary: Rotary, x: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Pairs (i, i + d / 2) as complex numbers, turned."""
    d = int(rotary.share * x.shape[-1])
    frequencies = rotary.theta ** (-np.arange(0, d, 2) / d)
    if rotary.scaling == "linear":
        frequencies = frequencies / rotary.factor
    if rotary.scaling == "llama3":
        wavelengths = 2 * math.pi / frequencies
        length, low, high = rotary.original_length, rotary.low_factor, rotary.high_factor
        smooth = (length / wavelengths - low) / (high - low)
        mixed = (1 - smooth) * frequencies / rotary.factor + smooth * frequencies
        mixed = np.where(wavelengths > length / low, frequencies / rotary.factor, mixed)
        frequencies = np.where(wavelengths < length / high, frequencies, mixed)
    pairs = (x[..., : d // 2] + 1j * x[..., d // 2 : d]) * np.exp(1j * distance * frequencies)
    return np.concatenate([pairs.real, pairs.imag, x[..., d:]], axis=-1)


@pytest.mark.parametrize("name", MODELS)
def test_a_document_in_segments_is_what_the_equations_say(name: str):
    config = MODELS[name]
    # All different: of equal keys it would not be known which are the nearest.
    tokens = np.random.default_rng(0).permutation(VOCAB)[: LENGTH * SEGMENTS]
    expected = Reference(config)(tokens)
    np.testing.assert_allclose(read(config, tokens), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("rotary", [Rotary(theta=30.0), Rotary(theta=30.0, share=0.5), LLAMA3])
def test_products_of_turned_vectors_depend_on_the_distance_alone(rotary: Rotary):
    rng = np.random.default_rng(0)
    query, key = jnp.asarray(rng.normal(size=(2, 1, 8)), jnp.float32)
    products = [
        jnp.sum(rotary.turn(query, jnp.array([first + 3])) * rotary.turn(key, jnp.array([first])))
        for first in (-7, 0, 1, 40)
    ]
    np.testing.assert_allclose(products, products[0], rtol=1e-5)
    assert abs(jnp.sum(rotary.turn(query, jnp.array([4])) * key) - products[0]) > 1e-3


def test_in_bfloat16_norms_round_where_their_families_round():
    """Llama brings what is normalised to bfloat16 before it is scaled, Gemma after."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 64)), jnp.bfloat16)
    scale = jnp.asarray(np.random.default_rng(1).normal(size=64), jnp.float32)
    wide = np.asarray(x, np.float32)
    normalized = wide / np.sqrt((wide**2).mean() + 1e-6)
    rounded = jnp.asarray(normalized, jnp.bfloat16)
    expected = {
        "rms_llama": rounded * scale.astype(jnp.bfloat16)[None, None],
        "rms_gemma": (normalized * (1 + scale)[None, None]).astype(jnp.bfloat16),
        "rms": (normalized * scale[None, None]).astype(jnp.bfloat16),
    }
    for kind, wanted in expected.items():
        y = RMSNorm(kind=kind).apply({"params": {"scale": scale}}, x)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(wanted, np.float32), err_msg=kind)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, r"LMConfig.num_kv_heads = 3 does not divide LMConfig.num_heads = 4"),
        ({"attention": SparseAttention(stride=3)}, r"LMConfig.num_kv_heads with @SparseAttention\(\)"),
        ({"attention": KNNAttention(), "qk_norm": "l2"}, r"LMConfig.num_kv_heads with @KNNAttention\(\)"),
        ({"attention_scale": 0.5, "qk_norm": "l2"}, r"LMConfig.attention_scale = 0.5 with LMConfig.qk_norm = 'l2'"),
        ({"positions": Rotary(share=0.5)}, r"Rotary.share = 0.5 of LMConfig.head_dim = 6: 3 elements"),
        ({"attention": XLAttention(positions=Rotary(share=0.1))}, r"0 elements are turned"),
        ({"attention": XLAttention(), "learned_positions": (8,)}, r"learned_positions = \(8,\) with @XLAttention\(\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict, message: str):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(BASE, **change)


def test_segments_longer_than_the_table_of_positions_are_refused():
    with pytest.raises(UserError, match=r"learned_positions = \(6,\): 6 positions are fewer than the segment length 7"):
        MODELS["gpt-2"].check(7)
