"""A memory beside a pretrained model's attention: what it leaves alone, and what it shows.

What it computes is compared with a float64 reference in test_parts.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mechanisms import PRETRAINED, apply_model

from memorizing.errors import UserError
from memorizing.models import language_model
from memorizing.models.attention.joint_memory import JointMemoryAttention
from memorizing.models.attention.sparse.factorized import SparseAttention
from memorizing.models.attention.xl import XLAttention
from memorizing.models.lm_config import LMConfig
from memorizing.models.losses import next_token_nats
from memorizing.models.memory import external_memory
from memorizing.models.memory.external_memory import Memory
from memorizing.runtime import sharding
from memorizing.runtime.sharding import MeshConfig
from memorizing.synthetic import RepeatedPassages
from memorizing.training.experiment import BatchConfig, Experiment
from memorizing.training.state import init_variables

ROWS, LENGTH, SEGMENTS, VOCAB, K = 2, 4, 5, 32, 3
LOCAL = XLAttention(window=2, num_sinks=1)
JOINT = JointMemoryAttention(4 * LENGTH, K, local=LOCAL)
MODEL = LMConfig(
    VOCAB,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    head_dim=8,
    mlp_dim=24,
    attention=LOCAL,
    attention_at=((1, JOINT),),
    **PRETRAINED | {"num_kv_heads": 2},
)
MESH = MeshConfig(data=2, model=2, memory=2)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (SEGMENTS, ROWS, LENGTH), np.int32)


def with_memory(config: LMConfig, **changes: Any) -> LMConfig:
    """The same model with another memory."""
    return dataclasses.replace(config, attention_at=((1, dataclasses.replace(JOINT, **changes)),))


def parameters(config: LMConfig) -> Any:
    """The same for all models but for what a memory adds, which is as at the start."""
    shapes = jax.eval_shape(lambda: init_variables(config, ROWS, LENGTH, jax.random.key(0)))["params"]

    def draw(path: tuple, leaf: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path[-2:])
        if "alpha" in name or "beta" in name:
            return np.zeros(leaf.shape, np.float32)
        # Of stacked layers all have the same.
        shape = leaf.shape[1:] if "layers" in str(path[0]) else leaf.shape
        rng = np.random.default_rng(sum(name.encode()))
        return np.broadcast_to(rng.normal(size=shape) / 3 + (len(shape) == 1), leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def read(
    config: LMConfig, params: Any, change: Callable[[Memory], Memory] = lambda memory: memory
) -> tuple[jax.Array, dict]:
    """Logits of all segments [SEGMENTS, B, T, V], and what was retrieved."""

    def step(context: Any, segment: tuple) -> tuple:
        tokens, start = segment
        context = config.map_memories(context, change)
        output = apply_model(config, params, tokens, jnp.ones(tokens.shape, bool), start, context)
        return output.context, (output.logits, output.report.retrieved)

    # Row 1 begins another document.
    starts = jnp.zeros((SEGMENTS, ROWS), bool).at[2, 1].set(True)
    return jax.lax.scan(step, config.init_context(ROWS, LENGTH), (TOKENS, starts))[1]


def compiled(
    config: LMConfig, opened: Callable[[Any], Any] = lambda params: params, **options: Any
) -> tuple[jax.Array, dict]:
    """The same, with parameters that lie as in training on the mesh that is set."""
    params = opened(parameters(config))
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        boxed = jax.eval_shape(lambda: language_model.init(config, ROWS, LENGTH, jax.random.key(0)))
        params = jax.device_put(params, sharding.variable_shardings(mesh, boxed, MESH.parameter_rules)["params"])
    return jax.jit(functools.partial(read, config, **options))(params)


@pytest.mark.parametrize(
    ("dtype", "mesh"),
    [
        pytest.param("float32", None, id="float32"),
        pytest.param("bfloat16", None, id="bfloat16"),
        pytest.param("bfloat16", MESH, id="bfloat16, 8 devices"),
        pytest.param("float32", MESH, id="float32, 8 devices", marks=pytest.mark.nightly),
    ],
)
@pytest.mark.usefixtures("optimized")
def test_a_finished_model_that_gets_a_memory_computes_the_same_bits(dtype: str, mesh: MeshConfig | None):
    """... until its memory is trained."""
    config = dataclasses.replace(MODEL, dtype=dtype)
    with jax.set_mesh(mesh.make_mesh()) if mesh else contextlib.nullcontext():
        logits, _ = compiled(config)
        without, _ = compiled(config.without_memory())
    np.testing.assert_array_equal(np.asarray(logits), np.asarray(without))


def test_an_empty_memory_contributes_nothing():
    """... bit for bit, also where it is read in full."""
    full = with_memory(MODEL, mixing="full")
    without, _ = compiled(MODEL.without_memory())
    cleared, _ = compiled(full, change=external_memory.cleared)
    np.testing.assert_array_equal(np.asarray(cleared), np.asarray(without))
    opened, _ = compiled(full)
    assert np.abs(np.asarray(opened - without))[2:, 0].max() > 1e-2, "the test cannot see what it forbids"


def test_at_the_start_only_the_opening_has_a_gradient_of_its_own():
    def loss(config: LMConfig, params: Any) -> jax.Array:
        logits, _ = read(config, params)
        return next_token_nats(logits.reshape(-1, LENGTH, VOCAB), TOKENS.reshape(-1, LENGTH)).sum()

    def gradient(config: LMConfig) -> Any:
        return jax.jit(jax.grad(functools.partial(loss, config)))(parameters(config))

    of_joint = gradient(MODEL)
    # Of another kind than the other layer, which without a memory it would be stacked with.
    none = dataclasses.replace(LOCAL, num_buckets=16)
    of_local = gradient(dataclasses.replace(MODEL, attention_at=((1, none),)))
    core = of_joint["layer_01"]["attention"].pop("core")
    assert np.abs(core["alpha"]).min() > 1e-4 and not np.any(core["beta"])
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4), of_joint, of_local
    )


@pytest.mark.parametrize("mesh", [None, MESH], ids=["one device", "8 devices"])
def test_with_all_neighbours_it_is_full_attention(mesh: MeshConfig | None):
    """Within the trained length: nothing is seen twice, nothing is left out, and all of it where it stands."""
    everything = XLAttention(window=SEGMENTS * LENGTH)
    full = dataclasses.replace(MODEL, attention_at=((1, everything),))
    local = XLAttention(window=2)
    joint = with_memory(MODEL, num_neighbors=4 * LENGTH, local=local, mixing="full", trained_length=SEGMENTS * LENGTH)
    expected, _ = compiled(full)
    with jax.set_mesh(mesh.make_mesh()) if mesh else contextlib.nullcontext():
        logits, _ = compiled(joint)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("num_kv_heads", "heads", "mesh"),
    [
        pytest.param(2, (1,), None, id="one of two key heads"),
        pytest.param(4, (0, 3), None, id="two of four"),
        pytest.param(4, (0, 3), MESH, id="two of four, 8 devices"),
    ],
)
def test_a_memory_of_some_heads_is_one_that_is_closed_in_the_others(
    num_kv_heads: int, heads: tuple[int, ...], mesh: MeshConfig | None
):
    of_all = dataclasses.replace(MODEL, num_kv_heads=num_kv_heads)
    of_some = with_memory(of_all, heads=heads)
    group = MODEL.num_heads // num_kv_heads
    is_open = np.isin(np.arange(MODEL.num_heads) // group, heads)

    def open_heads(params: Any) -> Any:
        layer = params["layer_01"]
        core = {"alpha": np.where(is_open, 0.7, 0.0), "beta": np.where(is_open, 0.3, 0.1)}
        attention = layer["attention"] | {"core": {name: value.astype(np.float32) for name, value in core.items()}}
        return params | {"layer_01": layer | {"attention": attention}}

    with jax.set_mesh(mesh.make_mesh()) if mesh else contextlib.nullcontext():
        expected, retrieved_by_all = compiled(of_all, opened=open_heads)
        logits, retrieved = compiled(of_some, opened=open_heads)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
    # What an inspector sees of them is the same; of the others that they have found nothing.
    scores = np.asarray(retrieved["layer_01"].neighbours.scores)
    all_scores = np.asarray(retrieved_by_all["layer_01"].neighbours.scores)
    np.testing.assert_allclose(scores[..., is_open, :], all_scores[..., is_open, :], atol=2e-5)
    assert np.all(scores[..., ~is_open, :] == -np.inf) and np.any(all_scores[..., ~is_open, :] > -np.inf)
    memory = of_some.init_context(ROWS, LENGTH)["layer_01"].memory
    assert memory.keys.shape == (ROWS, len(heads), 4 * LENGTH, MODEL.head_dim)


def test_what_is_seen_anyway_is_not_retrieved():
    """Neither the cache nor the sinks, nor anything of the segment or of another document."""
    _, retrieved = compiled(MODEL)
    neighbours = retrieved["layer_01"].neighbours
    slots, scores = np.asarray(neighbours.slots), np.asarray(neighbours.scores)
    assert slots.shape == (SEGMENTS, ROWS, LENGTH, MODEL.num_heads, K)
    for segment in range(SEGMENTS):
        for row in range(ROWS):
            first = segment - 2 if row == 1 and segment >= 2 else segment
            found = scores[segment, row] > -np.inf
            back = external_memory.positions_back(slots[segment, row][found], segment, 4 * LENGTH, LENGTH)
            # Of a document's positions before the segment, one is the sink, and two are in the cache.
            num_candidates = max(first * LENGTH - 3, 0)
            assert found.sum() == LENGTH * MODEL.num_heads * min(num_candidates, K)
            assert np.all(back > LOCAL.window) and np.all(first * LENGTH - back >= LOCAL.num_sinks)
    assert len(np.unique(slots[-1, 0])) > K, "the test cannot see what it forbids"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: JointMemoryAttention(local=SparseAttention()),
            r"local = @SparseAttention\(\).*cannot share a softmax",
        ),
        (lambda: JointMemoryAttention(local=XLAttention(same_length=True)), "XLAttention.same_length = False"),
        (
            lambda: JointMemoryAttention(512, local=XLAttention(window=512)).check(256),
            "memory_size = 512.*nothing is left",
        ),
        (lambda: JointMemoryAttention(trained_length=256).check(256), "trained_length = 256"),
        (lambda: dataclasses.replace(MODEL, qk_norm="l2", attention_scale=None), "LMConfig.num_kv_heads = 2.*'l2'"),
        (
            lambda: Experiment(RepeatedPassages(), MODEL, BatchConfig(8, LENGTH), mesh=MeshConfig(2, 4)).make_mesh(),
            "num_kv_heads",
        ),
        (lambda: with_memory(MODEL, heads=(0, 2)), r"heads = \(0, 2\): different key heads from 0 to 1"),
        (lambda: with_memory(MODEL, heads=(1, 1)), r"heads = \(1, 1\)"),
        (
            lambda: Experiment(
                RepeatedPassages(), with_memory(MODEL, heads=(1,)), BatchConfig(8, LENGTH), mesh=MeshConfig(2, 2)
            ).make_mesh(jax.devices()[:4]),
            "key heads that have a memory = 1",
        ),
    ],
)
def test_what_cannot_work_is_refused(build: Callable[[], Any], message: str):
    with pytest.raises(UserError, match=message):
        build()
