"""Sparse Transformer attention against the sets that the paper defines (Child et al. 2019, section 4)."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mechanisms import Mechanism

from memorizing.context import Layout, Segment
from memorizing.errors import UserError
from memorizing.models.attention import flash
from memorizing.models.attention.base import LayerDims
from memorizing.models.attention.sparse.factorized import SparseAttention
from memorizing.models.lm_config import LMConfig
from memorizing.models.recurrent_tokens import RecurrentTokens

B, N, H = 2, 4, 8
DIMS = LayerDims(16, N, H, 32, 0.0, 1.0, jnp.dtype(jnp.float32))
PATTERNS = ("strided", "fixed")
SEES = ("first", "second", "merged", "split")
EVERY = [
    SparseAttention(pattern, sees, stride=6, summary_width=2, num_buckets=8, max_distance=12)
    for pattern, sees in itertools.product(PATTERNS, SEES)
]
by_config = pytest.mark.parametrize("config", EVERY, ids=lambda config: f"{config.pattern}-{config.sees}")


def sets(config: SparseAttention, head: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The two sets of keys of each query, bool [n, n], word by word; a query sees itself in both."""
    stride, width = config.stride, config.summary_width
    first, second = np.zeros((2, length, length), bool)
    # The sub-block of a head, counted from the block's end.
    end = stride - head % (stride // width) * width
    for i, j in itertools.product(range(length), range(length)):
        if j <= i and config.pattern == "strided":
            first[i, j] = max(0, i - stride) <= j
            second[i, j] = (i - j) % stride == 0
        elif j <= i:
            first[i, j] = j // stride == i // stride
            second[i, j] = i == j or end - width <= j % stride < end
    return first, second


def mask(config: SparseAttention, length: int) -> np.ndarray:
    """bool [N, n, n]"""
    of_heads = []
    for head in range(N):
        is_second = head >= N // 2
        # Where heads are split, those of the second set count their columns for themselves.
        first, second = sets(config, head - N // 2 if config.sees == "split" and is_second else head, length)
        seen = {"first": first, "second": second, "merged": first | second, "split": second if is_second else first}
        of_heads.append(seen[config.sees])
    return np.stack(of_heads)


@functools.partial(jax.jit, static_argnums=0)
def attend(config: SparseAttention, params: dict, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    segment = Segment(jnp.ones(queries.shape[:2], bool), Layout(queries.shape[1]))
    scale = jnp.arange(1.0, N + 1)
    return config.core(DIMS).apply(params, queries, keys, values, scale, segment, ())[0]


def inputs(length: int, dtype: type = np.float64) -> tuple[dict, tuple[np.ndarray, ...]]:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(N, 8)).astype(dtype)
    arrays = tuple(rng.normal(size=(B, length, N, H)).astype(dtype) for _ in range(3))
    return {"params": {"bias": {"table": table}}}, arrays


def dense(config: SparseAttention, params: dict, queries, keys, values, numpy=np):
    """softmax(scale (q k + bias)) v with the whole n x n mask, as the equations say."""
    length = queries.shape[1]
    distance = np.maximum(np.arange(length)[:, None] - np.arange(length)[None, :], 0)
    # 8 buckets: the distances below 4, and 4 that grow up to 12.
    steps = (np.log(np.maximum(distance, 4) / 4) / np.log(12 / 4) * 4).astype(int)
    buckets = np.where(distance < 4, distance, np.minimum(4 + steps, 7))
    logits = numpy.einsum("bthd,bshd->bhts", queries, keys) + params["params"]["bias"]["table"][:, buckets][None]
    logits = logits * np.arange(1.0, N + 1)[None, :, None, None]
    logits = numpy.where(mask(config, length)[None], logits, -1e9)
    weights = numpy.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return numpy.einsum("bhts,bshd->bthd", weights, values)


@by_config
def test_what_is_visible_is_what_the_paper_defines(config: SparseAttention):
    position = jnp.arange(18)
    np.testing.assert_array_equal(config.visible(N, position, position), mask(config, 18))


@by_config
def test_blocks_give_what_the_dense_mask_gives(config: SparseAttention):
    params, arrays = inputs(18)
    expected = dense(config, params, *arrays)
    single = jax.tree.map(lambda leaf: leaf.astype(np.float32), (params, arrays))
    np.testing.assert_allclose(attend(config, single[0], *single[1]), expected, rtol=0, atol=2e-5)


@by_config
def test_gradients_are_those_of_the_dense_mask(config: SparseAttention):
    params, arrays = inputs(18, np.float32)

    def gradients(function) -> tuple:
        loss = jax.jit(lambda *args: jnp.sum(jnp.sin(function(*args))))
        return jax.grad(loss, argnums=(0, 1, 2, 3))(params, *arrays)

    found = gradients(functools.partial(attend, config))
    expected = gradients(functools.partial(dense, config, numpy=jnp))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-5), found, expected)


@pytest.mark.parametrize(
    "config, length",
    [
        (SparseAttention("strided", "first", stride=128), 256),
        (SparseAttention("strided", "merged", stride=2), 256),
        (SparseAttention("fixed", "split", stride=128, summary_width=64), 256),
    ],
    ids=["blocks and those before", "columns", "blocks"],
)
def test_kernels_give_what_plain_blocks_give(
    config: SparseAttention, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, for blocks or columns of 128 positions; also where a query sees none of the second set."""
    rng = np.random.default_rng(0)
    params = {"params": {"bias": {"table": jnp.asarray(rng.normal(size=(N, config.num_buckets)), jnp.float32)}}}
    arrays = [jnp.asarray(rng.normal(size=(1, length, N, H)), jnp.float32) for _ in range(3)]
    segment = Segment(jnp.ones((1, length), bool), Layout(length))
    served = []
    kernels = flash.attention
    monkeypatch.setattr(flash, "attention", lambda *args: served.append(args[1].shape) or kernels(*args))

    def values_and_gradients(kernel: flash.KernelKind) -> tuple:
        core = config.core(dataclasses.replace(DIMS, attention_kernel=kernel))

        @jax.jit
        def both(*args) -> tuple:
            attended, pull_back = jax.vjp(
                lambda params, *arrays: core.apply(params, *arrays, jnp.arange(1.0, N + 1) / N, segment, ())[0], *args
            )
            return attended, pull_back(jnp.cos(jnp.arange(attended.size)).reshape(attended.shape))

        return both(params, *arrays)

    expected = values_and_gradients("none")
    assert not served
    found = values_and_gradients("interpreted")
    assert served == [(2, 128, N // 2 if config.sees == "split" else N, H)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), found, expected)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [16, 36])
def test_every_earlier_position_is_reached_in_two_steps_and_no_later_one(pattern: str, length: int):
    config = SparseAttention(pattern, stride=int(length**0.5), summary_width=2)
    for head in range(2):
        first, second = sets(config, head, length)
        if pattern == "strided":
            np.testing.assert_array_equal((second.astype(int) @ first) > 0, np.tri(length, dtype=bool))
        # The summaries of a block pass on what its positions saw; the heads' columns come together.
        assert not np.triu(first | second, 1).any()
    if pattern == "fixed":
        every = np.stack([np.logical_or(*sets(config, head, length)) for head in range(config.stride // 2)]).any(axis=0)
        np.testing.assert_array_equal((every.astype(int) @ every) > 0, np.tri(length, dtype=bool))


@pytest.mark.parametrize("length, entries", [(16, 110), (256, 6392), (1024, 50160)])
def test_the_strided_sets_have_as_many_entries_as_the_formula_says(length: int, entries: int):
    stride = int(length**0.5)
    config = SparseAttention("strided", "first", stride)
    both = [dataclasses.replace(config, sees=sees).visible(1, *2 * [jnp.arange(length)]).sum() for sees in SEES[:2]]
    blocks = length // stride
    assert sum(both) == (stride + 1) * (length - stride / 2) + stride * blocks * (blocks + 1) / 2 == entries


@pytest.mark.parametrize("pattern", PATTERNS)
def test_cost_grows_as_the_length_to_the_power_of_one_and_a_half(pattern: str):
    """What is computed, with a stride of the root of the length: FLOPs beyond the projections."""
    none = dataclasses.replace(DIMS, embed_dim=1)
    lengths = 4.0 ** np.arange(5, 9)
    costs = [SparseAttention(pattern, stride=int(n**0.5), summary_width=1).flops(none, Layout(int(n))) for n in lengths]
    exponents = np.diff(np.log(costs)) / np.diff(np.log(lengths))
    np.testing.assert_allclose(exponents, 1.5, atol=0.05)


def test_heads_take_different_summary_columns():
    config = SparseAttention("fixed", stride=8, summary_width=2)
    assert [config.summary_columns(head).tolist() for head in range(5)] == [[6, 7], [4, 5], [2, 3], [0, 1], [6, 7]]


@by_config
def test_no_array_of_all_queries_by_all_keys_is_made(config: SparseAttention):
    length = 256
    long = dataclasses.replace(config, stride=16)
    arrays = (jnp.zeros((1, length, N, H)),) * 3
    params = {"params": {"bias": {"table": jnp.zeros((N, 8))}}}
    program = jax.make_jaxpr(functools.partial(attend.__wrapped__, long))(params, *arrays)
    largest = max(
        value.aval.size for equation in program.jaxpr.eqns for value in equation.outvars if hasattr(value.aval, "size")
    )
    assert largest < N * length * length / 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SparseAttention(stride=6).check(16),
            "SparseAttention.stride = 6 does not divide .* 16.*segments of 18",
        ),
        (lambda: SparseAttention(stride=0), "SparseAttention.stride = 0: at least 1"),
        (lambda: SparseAttention("fixed", stride=8, summary_width=3), "summary_width = 3: expected a divisor"),
        (
            lambda: LMConfig(attention=SparseAttention(stride=4), recurrent_tokens=RecurrentTokens()).check(16),
            r"LMConfig.recurrent_tokens with @SparseAttention\(\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message: str):
    with pytest.raises(UserError, match=message):
        make()


def test_a_stride_of_the_whole_segment_is_full_attention():
    full, sparse = (
        dataclasses.replace(Mechanism("").config, **kwargs)
        for kwargs in ({}, {"attention": SparseAttention(stride=8, sees="first")})
    )
    model, other = Mechanism("full").model, Mechanism("sparse", attention=sparse.attention).model
    assert model.config == full
    tokens = np.random.default_rng(0).integers(1, 32, (3, 8), np.int32)
    flags = np.ones(tokens.shape, bool)
    logits, expected = (each.forward(tokens, flags, flags[:, 0], each.fresh_context())[0] for each in (other, model))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
