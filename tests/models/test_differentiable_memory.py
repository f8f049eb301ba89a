"""Gradients into what earlier segments of a step stored, against references without a memory's machinery."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mechanisms import drawn_variables

from memorizing import context as context_lib
from memorizing.batch import Batch
from memorizing.context import Layout, Rngs, Segment
from memorizing.models.attention.base import LayerDims, normalize
from memorizing.models.attention.external import MemoryAttention
from memorizing.models.attention.full import FullAttention
from memorizing.models.attention.joint_memory import JointMemoryAttention
from memorizing.models.attention.knn import KNNAttention
from memorizing.models.lm_config import LMConfig
from memorizing.models.positions import Rotary
from memorizing.runtime.sharding import MeshConfig
from memorizing.synthetic import RepeatedPassages
from memorizing.training import step
from memorizing.training.checkpoint import paths
from memorizing.training.experiment import BatchConfig, Experiment
from memorizing.training.program import Program
from memorizing.training.step import Carried

U, B, T, N, H, K = 5, 3, 4, 2, 8, 3
# The last segment no longer finds the first one.
M = 3 * T
DIMS = LayerDims(8, N, H, 16, 0.0, 1.0, jnp.dtype(jnp.float32))
FULL = FullAttention()
PARAMS = {"bias": {"table": jnp.zeros((N, FULL.num_buckets))}}

# Row 1 begins a document at the third segment, row 2 has one that ends within the second.
STARTS = np.zeros((U, B), bool)
STARTS[2, 1] = STARTS[2, 2] = True
IS_REAL = np.ones((U, B, T), bool)
IS_REAL[1, 2, 2:] = False


# A layer.


def layer_inputs() -> tuple[jax.Array, ...]:
    """Queries, keys and values [U, B, T, N, H], and the scale of the logits [N]."""
    queries, keys, values = np.random.default_rng(0).normal(size=(3, U, B, T, N, H))
    unit_queries, unit_keys = (normalize(jnp.asarray(array, jnp.float32)) for array in (queries, keys))
    return unit_queries, unit_keys, jnp.asarray(values, jnp.float32), jnp.array([4.0, 8.0])


def segment(clock: Any, is_real: Any) -> Segment:
    return Segment(jnp.asarray(is_real), Layout(T), tokens=jnp.zeros((B, T), jnp.int32), clock=clock)


def read(attention: KNNAttention, queries: Any, keys: Any, values: Any, scale: Any) -> jax.Array:
    """What the layer makes of the segments of a step, [U, B, T, N, H]."""
    core = attention.core(DIMS)
    params = {"params": PARAMS | {"gate": jnp.zeros(N)}}

    def read_segment(state: Any, inputs: tuple) -> tuple[Any, jax.Array]:
        clock, start, is_real, *of_segment = inputs
        state = context_lib.reset_rows(attention.prepare_state(state, clock), attention.fresh_state(), start)
        y, state, _ = core.apply(params, *of_segment, scale, segment(clock, is_real), state)
        return state, y

    segments = (jnp.arange(U), STARTS, IS_REAL, queries, keys, values)
    return jax.lax.scan(read_segment, attention.init_state(DIMS, B, T), segments)[1]


def stored_before(number: int, row: int, stores_next: bool) -> list[tuple[int, int]]:
    """The positions of a row whose (key, value) segment `number` may find, counted from the first segment's first."""
    real = IS_REAL[:, row].reshape(-1)
    document = np.repeat(np.cumsum(STARTS[:, row]), T)
    pairs = [(p - stores_next, p) for p in range(max(number * T - M, 0), number * T)]
    return [
        (key, value)
        for key, value in pairs
        if key >= 0 and real[key] and real[value] and document[key] == document[value] == document[number * T]
    ]


def reference(attention: KNNAttention, queries: Any, keys: Any, values: Any, scale: Any) -> jax.Array:
    """`read` position by position from lists of what is stored; the gate is a half."""
    core, all_y = FULL.core(DIMS), []
    hold = (lambda array: array) if attention.differentiable_memory else jax.lax.stop_gradient
    # [B, positions, N, H]
    all_keys, all_values = (hold(jnp.moveaxis(array, 0, 1).reshape(B, U * T, N, H)) for array in (keys, values))
    for u in range(U):
        of_segment = (queries[u], keys[u], values[u], scale, segment(jnp.asarray(u), IS_REAL[u]), ())
        local, *_ = core.apply({"params": PARAMS}, *of_segment)
        rows = []
        for b in range(B):
            pairs = stored_before(u, b, attention.stores_next)
            if not pairs:
                rows.append(local[b])
                continue
            key_at, value_at = np.transpose(pairs)
            scores = jnp.einsum("TNH,SNH->NTS", queries[u, b], all_keys[b, key_at])
            _, nearest = jax.lax.top_k(jax.lax.stop_gradient(scores), min(K, len(pairs)))
            logits = scale[:, None, None] * jnp.take_along_axis(scores, nearest, axis=-1)
            # [N, T, K, H]
            found = jnp.moveaxis(all_values[b, value_at], 1, 0)[jnp.arange(N)[:, None, None], nearest]
            memory = jnp.einsum("NTK,NTKH->TNH", jax.nn.softmax(logits), found)
            rows.append((memory + local[b]) / 2)
        all_y.append(jnp.stack(rows))
    return jnp.stack(all_y)


@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize("stored_value", ["own", "next"])
def test_gradients_are_those_of_attention_to_lists_of_what_is_stored(stored_value: Any, differentiable: bool):
    """Over several segments, the ring's end, a document's end and padding."""
    attention = KNNAttention(M, K, FULL, differentiable_memory=differentiable, stored_value=stored_value)
    inputs = layer_inputs()
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(U, B, T, N, H)), jnp.float32)

    def loss(make_y: Any, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = make_y(attention, *inputs)
        return jnp.sum(weights * y), y

    (gradients, y), (expected, expected_y) = (
        jax.jit(jax.grad(functools.partial(loss, make_y), argnums=(0, 1, 2, 3), has_aux=True))(*inputs)
        for make_y in (read, reference)
    )
    np.testing.assert_allclose(y, expected_y, rtol=0, atol=1e-5)
    for name, gradient, wanted in zip(("queries", "keys", "values", "scale"), gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=2e-5, err_msg=name)


def test_gradients_end_with_the_document_and_at_the_steps_begin():
    """The loss of the last segment: what it can find gets a gradient through the memory, and nothing else does."""
    attention = KNNAttention(M, M, FULL, differentiable_memory=True)
    queries, *others = layer_inputs()

    def loss(keys: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(read(attention, queries, keys, values, scale)[-1]))

    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1)))(*others):
        # [U, B, T]
        reached = np.abs(np.asarray(gradient)).max(axis=(3, 4)) > 0
        for b in range(B):
            before = {position for position, _ in stored_before(U - 1, b, stores_next=False)}
            expected = [position in before for position in range((U - 1) * T)]
            np.testing.assert_array_equal(reached[:-1, b].reshape(-1), expected)


# A step of a whole model.

VOCAB, ROWS, SEGMENTS = 32, 8, 3
KNN = KNNAttention(4 * T, 4 * T, stored_value="next", retrieval_loss=0.5, differentiable_memory=True)
JOINT = JointMemoryAttention(4 * T, 4 * T, mixing="full", differentiable_memory=True)


def model_of(attention: MemoryAttention) -> LMConfig:
    # Without kinks.
    parts: dict[str, Any] = {"mlp": "gated_silu"}
    if isinstance(attention, JointMemoryAttention):
        parts |= {"qk_norm": "none", "positions": Rotary(theta=100.0), "num_kv_heads": 1}
    return LMConfig(VOCAB, 2, 16, N, H, 32, attention_at=((0, attention),), initial_logit_scale=4.0, **parts)


def experiment_of(attention: MemoryAttention, num_segments: int = SEGMENTS) -> Experiment:
    return Experiment(
        data=RepeatedPassages(vocab_size=VOCAB),
        model=model_of(attention),
        batch=BatchConfig(ROWS * num_segments * T, T, num_segments),
    )


def batch(num_segments: int = SEGMENTS) -> Batch:
    """Random documents of which half begin with a step's last segment, with a padded end before it."""
    tokens, targets = np.random.default_rng(2).integers(1, VOCAB, (2, ROWS, num_segments, T), np.int32)
    start = np.zeros((ROWS, num_segments), bool)
    start[::2, -1] = True
    is_real = np.ones(targets.shape, bool)
    is_real[::2, -2:-1, T - 1 :] = False
    return Batch(tokens, targets, is_real.astype(np.float32), is_real, start)


def gradient_of(experiment: Experiment, num_devices: int = 1) -> Any:
    """The gradient of a step that begins with empty memories."""
    drawn = drawn_variables(experiment.model)["params"]
    mesh = experiment.mesh.make_mesh(jax.devices()[:num_devices])
    with jax.set_mesh(mesh):
        program = Program(experiment, mesh)
        place = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state.params)
        params = jax.device_put(drawn, place)

        @jax.jit
        def gradient(params: Any, context: Any, batch: Batch) -> Any:
            rngs = Rngs(jax.random.key(0), jnp.arange(ROWS))
            parts = experiment.batch.num_microbatches
            return step.batch_gradient(experiment.model, params, batch, Carried(context, {}), rngs, parts)[0]

        placed = jax.device_put(batch(experiment.batch.num_segments), program.rows)
        return paths(jax.device_get(gradient(params, program.init_context(), placed)))


@pytest.mark.parametrize("attention", [KNN, JOINT], ids=["knn", "joint"])
def test_the_gradient_of_a_step_is_that_of_finite_differences(attention: MemoryAttention):
    """Every slot is a neighbour, so that no choice stands between: all that remains is differentiated.

    Along a random change of the keys and values of the layer with the memory. Without the gradient into the memory the
    result is another.
    """
    config = model_of(attention)
    params = drawn_variables(config)["params"]
    rng = np.random.default_rng(3)

    def change(path: tuple, leaf: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        is_changed = names[0] == "layer_00" and names[-2] in ("key", "value")
        return jnp.asarray(is_changed * rng.normal(size=leaf.shape), jnp.float32)

    direction = jax.tree_util.tree_map_with_path(change, params)

    @jax.jit
    def loss(distance: float) -> jax.Array:
        moved = jax.tree.map(lambda leaf, change: leaf + distance * change, params, direction)
        carried = Carried(config.init_context(ROWS, T), {})
        rngs = Rngs(jax.random.key(0), jnp.arange(ROWS))
        return step.batch_loss(config, moved, batch(), carried, rngs, batch().loss_weights.sum())[0]

    def slope(attention: MemoryAttention) -> float:
        gradient = gradient_of(experiment_of(attention))
        return sum(float(np.sum(gradient[path] * leaf)) for path, leaf in paths(direction).items())

    near, far = ((loss(distance) - loss(-distance)) / (2 * distance) for distance in (0.002, 0.004))
    # Richardson's extrapolation: the error of the fourth order is left, and rounding.
    measured = float((4 * near - far) / 3)
    assert slope(attention) == pytest.approx(measured, rel=0.01)
    stopped = slope(dataclasses.replace(attention, differentiable_memory=False))
    assert abs(stopped / measured - 1) > 0.5, "the test cannot see what it checks"


@pytest.mark.parametrize("attention", [KNN, pytest.param(JOINT, marks=pytest.mark.nightly)], ids=["knn", "joint"])
def test_it_is_the_same_on_a_mesh_in_microbatches_and_when_layers_are_computed_again(attention: MemoryAttention):
    """On a mesh whose devices hold a segment of the memory each, so that gradients go from one to the other."""
    experiment = experiment_of(attention)
    expected = gradient_of(experiment)
    on_mesh = dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, remat="layer"),
        batch=dataclasses.replace(experiment.batch, num_microbatches=2),
        mesh=MeshConfig(data=2, memory=4),
    )
    for path, gradient in gradient_of(on_mesh, 8).items():
        np.testing.assert_allclose(gradient, expected[path], rtol=1e-3, atol=2e-5, err_msg=path)


def test_with_one_segment_a_step_it_changes_nothing():
    """What the memory holds is then from earlier steps."""
    config = model_of(KNN)
    params = drawn_variables(config)["params"]

    def two_steps(attention: MemoryAttention) -> list[Any]:
        config, carried, gradients = model_of(attention), Carried(model_of(attention).init_context(ROWS, T), {}), []

        @jax.jit
        def one_step(carried: Carried, batch: Batch) -> tuple:
            return step.batch_gradient(config, params, batch, carried, Rngs(jax.random.key(0), jnp.arange(ROWS)), 1)[:2]

        for index in range(2):
            of_step = jax.tree.map(lambda leaf, index=index: leaf[:, index : index + 1], batch())
            gradient, carried = one_step(carried, of_step)
            gradients.append(gradient)
        return gradients

    stopped = two_steps(dataclasses.replace(KNN, differentiable_memory=False))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), two_steps(KNN), stopped)
