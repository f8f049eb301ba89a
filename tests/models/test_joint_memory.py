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


def compiled(config: LMConfig, **options: Any) -> tuple[jax.Array, dict]:
    """The same, with parameters that lie as in training on the mesh that is set."""
    params = parameters(config)
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
    ],
)
def test_what_cannot_work_is_refused(build: Callable[[], Any], message: str):
    with pytest.raises(UserError, match=message):
        build()
