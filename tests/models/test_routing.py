"""Routing Transformer attention (Roy et al. 2021) against its equations, and its centroids through training."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mechanisms import LENGTH, MECHANISMS, ROWS, VOCAB, Mechanism, random_tokens

from memorizing.batch import Batch
from memorizing.context import Layout, Segment
from memorizing.errors import UserError
from memorizing.models.attention.base import LayerDims
from memorizing.models.attention.full import FullAttention
from memorizing.models.attention.knn import KNNAttention
from memorizing.models.attention.sparse import clusters
from memorizing.models.attention.sparse.clusters import Clusters
from memorizing.models.attention.sparse.routing import RoutingAttention
from memorizing.models.lm_config import LMConfig
from memorizing.runtime.sharding import MeshConfig
from memorizing.synthetic import RepeatedPassages
from memorizing.training.checkpoint import paths
from memorizing.training.experiment import BatchConfig, Experiment
from memorizing.training.optimizer import Adafactor, Cosine
from memorizing.training.program import Program

B, T, N, H = 2, 12, 3, 8
DIMS = LayerDims(16, N, H, 32, 0.0, 1.0, jnp.dtype(jnp.float32))
ALONE = RoutingAttention(num_clusters=3, cluster_size=4, num_local_heads=0, num_buckets=8, max_distance=12)
IS_REAL = np.arange(T) < np.array([T, 7])[:, None]


def case(config: RoutingAttention, seed: int = 0) -> tuple[dict, np.ndarray]:
    """Parameters and buffers, and x, float64."""
    rng = np.random.default_rng(seed)
    params = {
        "query": {"kernel": rng.normal(size=(16, N, H))},
        "value": {"kernel": rng.normal(size=(16, N, H))},
        "output": {"kernel": rng.normal(size=(N, H, 16))},
        "scale": np.array([1.0, 2.0, 4.0]),
        "routing": {"bias": {"table": rng.normal(size=(N, 8))}},
    }
    size = config.num_clusters
    buffers = {"routing": {"sums": rng.normal(size=(N, size, H)), "counts": np.ones((N, size))}}
    return {"params": params, "buffers": buffers}, rng.normal(size=(B, T, 16))


@functools.partial(jax.jit, static_argnums=0)
def apply(config: RoutingAttention, variables: dict, x: jax.Array, is_real: jax.Array) -> jax.Array:
    variables, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (variables, x))
    return config.layer(DIMS).apply(variables, x, Segment(is_real, Layout(T)), ())[0]


def reference(config: RoutingAttention, variables: dict, x: np.ndarray, is_real: np.ndarray) -> np.ndarray:
    """The layer in loops over rows, heads, clusters and positions."""
    params = variables["params"]
    vectors = np.einsum("btd,dnh->btnh", x, params["query"]["kernel"])
    vectors /= np.sqrt(np.sum(vectors**2, axis=-1, keepdims=True) + 1e-6)
    values = np.einsum("btd,dnh->btnh", x, params["value"]["kernel"])
    centroids = variables["buffers"]["routing"]["sums"]
    y = np.zeros_like(vectors)
    for b, n in np.ndindex(B, N):
        similar = vectors[b, :, n] @ centroids[n].T
        real = np.flatnonzero(is_real[b])
        seen: list[list[np.ndarray]] = [[] for _ in range(T)]
        if config.strictly_causal:
            nearest = similar.argmax(axis=-1)
            for i in real:
                same = [j for j in real if j <= i and nearest[j] == nearest[i]]
                seen[i].append(np.array(same[-config.cluster_size :]))
        else:
            for cluster in range(config.num_clusters):
                order = sorted(real, key=lambda j: -similar[j, cluster])
                members = np.sort(order[: config.cluster_size])
                for i in members:
                    seen[i].append(members[members <= i])
        for i in real:
            for keys in seen[i]:
                distance = i - keys
                steps = (np.log(np.maximum(distance, 4) / 4) / np.log(12 / 4) * 4).astype(int)
                bucket = np.where(distance < 4, distance, np.minimum(4 + steps, 7))
                bias = params["routing"]["bias"]["table"][n, bucket]
                logits = params["scale"][n] * (vectors[b, keys, n] @ vectors[b, i, n] + bias)
                weights = np.exp(logits - logits.max())
                y[b, i, n] += weights @ values[b, keys, n] / weights.sum() / len(seen[i])
    return np.einsum("btnh,nhd->btd", y, params["output"]["kernel"])


@pytest.mark.parametrize("strictly_causal", [False, True], ids=["as published", "strictly causal"])
@pytest.mark.parametrize("num_clusters", [1, 3])
def test_the_layer_is_that_of_the_equations(strictly_causal: bool, num_clusters: int):
    config = dataclasses.replace(ALONE, strictly_causal=strictly_causal, num_clusters=num_clusters)
    variables, x = case(config)
    found = np.asarray(apply(config, variables, x, IS_REAL))
    expected = reference(config, variables, x, IS_REAL)
    np.testing.assert_allclose(found[IS_REAL], expected[IS_REAL], rtol=0, atol=2e-4)


@pytest.mark.parametrize("strictly_causal", [False, True], ids=["as published", "strictly causal"])
def test_one_cluster_of_the_whole_segment_is_full_attention(strictly_causal: bool):
    """With normalised keys that are the queries."""
    config = dataclasses.replace(ALONE, num_clusters=1, cluster_size=T, strictly_causal=strictly_causal)
    variables, x = case(config)
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), variables["params"])
    shared = {
        "query": params["query"],
        "key": params["query"],
        "value": params["value"],
        "output": params["output"],
        "scale": params["scale"],
        "core": params["routing"],
    }
    full = FullAttention(num_buckets=8, max_distance=12).layer(DIMS)
    is_real = np.ones((B, T), bool)
    expected = full.apply({"params": shared}, x.astype(np.float32), Segment(jnp.asarray(is_real), Layout(T)), ())[0]
    np.testing.assert_allclose(apply(config, variables, x, is_real), expected, rtol=0, atol=1e-4)


def test_a_rotation_moves_no_vector_to_another_cluster_if_the_centroids_turn_with_it():
    config = dataclasses.replace(ALONE, random_projection=True)
    variables, x = case(config)
    layer = config.layer(DIMS)
    segment = Segment(jnp.ones((B, T), bool), Layout(T))
    made = layer.init(jax.random.key(0), jnp.asarray(x, jnp.float32), segment, ())
    turn = made["buffers"]["routing"]["turn"]
    np.testing.assert_allclose(np.einsum("nhj,nkj->nhk", turn, turn), np.stack([np.eye(H)] * N), atol=1e-5)
    turned = jax.tree.map(np.copy, variables)
    turned["buffers"]["routing"]["sums"] = np.einsum("nch,nhj->ncj", variables["buffers"]["routing"]["sums"], turn)
    turned["buffers"]["routing"]["turn"] = turn
    np.testing.assert_allclose(
        apply(config, turned, x, IS_REAL), apply(ALONE, variables, x, IS_REAL), rtol=0, atol=1e-3
    )


# The centroids.


def test_running_averages_find_the_centres_of_a_mixture():
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.normal(size=(8, 4)))[0].T
    running = Clusters(jnp.asarray(centres + 0.3 * rng.normal(size=centres.shape), jnp.float32)[None], jnp.ones((1, 4)))

    @jax.jit
    def step(running: Clusters, vectors: jax.Array) -> tuple[Clusters, jax.Array]:
        nearest = jnp.argmax(clusters.similarities(running, vectors), axis=-1)
        is_real = jnp.ones(vectors.shape[:2], bool)
        away = clusters.distortion(running, vectors, nearest, is_real)
        return clusters.update(running, vectors, nearest, is_real, decay=0.9), away

    distortions = []
    for _ in range(100):
        vectors = centres[rng.integers(0, 4, (2, 64))] + 0.05 * rng.normal(size=(2, 64, 8))
        running, away = step(running, jnp.asarray(vectors, jnp.float32)[:, :, None])
        distortions.append(float(away))
    np.testing.assert_allclose(running.centroids[0], centres, atol=0.02)
    assert distortions[-1] < 0.05 * distortions[0]


def test_a_centroid_that_nothing_is_near_to_keeps_its_place():
    running = clusters.init(1, 2, 4, jax.random.key(0))
    vectors = jnp.ones((1, 6, 1, 4))
    for _ in range(50):
        running = clusters.update(running, vectors, jnp.zeros((1, 1, 6), int), jnp.ones((1, 6), bool), 0.5)
    assert np.isfinite(running.centroids).all()
    np.testing.assert_allclose(running.centroids[0, 0], np.ones(4), atol=1e-3)


ROUTING = next(each for each in MECHANISMS if each.name == "routing").attention
STRICT = dataclasses.replace(ROUTING, strictly_causal=True)


def test_later_tokens_decide_what_is_seen_as_published_and_not_with_strict_causality():
    """The effect is there to be measured; contents never leak, as the contract tests show by gradient."""
    changes = {}
    for config in (ROUTING, STRICT):
        model = Mechanism("", attention=dataclasses.replace(config, num_local_heads=0)).model
        rng = np.random.default_rng(0)
        largest = []
        for _ in range(10):
            tokens = random_tokens(rng)
            later = tokens.copy()
            later[:, LENGTH // 2 :] = random_tokens(rng)[:, LENGTH // 2 :]
            flags = np.ones((ROWS, LENGTH), bool)
            ours, theirs = (
                model.forward(each, flags, flags[:, 0], model.fresh_context())[0] for each in (tokens, later)
            )
            largest.append(np.abs(ours - theirs)[:, : LENGTH // 2].max())
        changes[config.strictly_causal] = max(largest)
    assert changes[False] > 0.01 and changes[True] < 1e-5


# In training.

MODEL = LMConfig(VOCAB, 4, 16, 4, 8, 32, attention=dataclasses.replace(ROUTING, decay=0.9), initial_logit_scale=4.0)
# Of batches. Among those of seeds 0 to 2 two positions are almost equally similar to a centroid: rounding decides which
# one it takes, and so how a mesh adds shows.
SEEDS = range(3, 6)
EXPERIMENT = Experiment(
    data=RepeatedPassages(vocab_size=VOCAB),
    model=MODEL,
    batch=BatchConfig(tokens_per_step=8 * LENGTH, segment_length=LENGTH),
    optimizer=Adafactor(learning_rate=Cosine(peak=0.01, warmup_steps=1, decay_steps=100)),
)


def batch(seed: int, num_segments: int = 1) -> Batch:
    rng = np.random.default_rng(seed)
    shape = (8 // num_segments, num_segments, LENGTH)
    tokens, targets = (rng.integers(1, VOCAB, shape, np.int32) for _ in range(2))
    is_real = np.ones(shape, bool)
    is_real[1, -1, 5:] = False
    return Batch(tokens, targets, is_real.astype(np.float32), is_real, np.ones(shape[:2], bool))


@functools.cache
def train(experiment: Experiment, num_devices: int = 1) -> tuple[Any, list[float]]:
    mesh = experiment.mesh.make_mesh(jax.devices()[:num_devices])
    with jax.set_mesh(mesh):
        program = Program(experiment, mesh)
        state, losses = program.init(), []
        for seed in SEEDS:
            placed = jax.device_put(batch(seed, experiment.batch.num_segments), program.rows)
            state, metrics = program.step(state, placed)
            losses.append(float(metrics["loss"]))
    return jax.device_get(state), losses


def changed(name: str, **fields: Any) -> Experiment:
    return dataclasses.replace(EXPERIMENT, **{name: dataclasses.replace(getattr(EXPERIMENT, name), **fields)})


@pytest.mark.parametrize(
    ("experiment", "num_devices"),
    [
        pytest.param(dataclasses.replace(EXPERIMENT, mesh=MeshConfig(data=4, model=2)), 8, id="data 4 x model 2"),
        pytest.param(changed("model", remat="layer"), 1, id="recomputed"),
    ],
)
def test_centroids_are_the_same_on_every_mesh_and_when_layers_are_recomputed(experiment: Experiment, num_devices: int):
    (expected, expected_losses), (found, losses) = train(EXPERIMENT), train(experiment, num_devices)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    fresh = paths(jax.device_get(Program(EXPERIMENT, EXPERIMENT.mesh.make_mesh(jax.devices()[:1])).init()).buffers)
    for path, leaf in paths(expected.buffers).items():
        np.testing.assert_allclose(paths(found.buffers)[path], leaf, rtol=0, atol=1e-5, err_msg=path)
        assert np.abs(leaf - fresh[path]).max() > 1e-2, "the test cannot see what it forbids"


@pytest.mark.parametrize("microbatches, segments", [(2, 1), (1, 2)])
def test_centroids_go_from_part_to_part_of_a_step(microbatches: int, segments: int):
    state, losses = train(changed("batch", num_microbatches=microbatches, num_segments=segments))
    assert np.isfinite(losses).all()
    # Each part adds its share of the vectors: 8 rows of 8, less 3 that are not real, among two layers' worth of counts.
    one, two = 0.9 ** (3 * np.array([1, 2]))
    counts = paths(state.buffers)["layers_00_03/attention/routing/counts"].sum(axis=-1)
    before = train(EXPERIMENT)[0]
    once = paths(before.buffers)["layers_00_03/attention/routing/counts"].sum(axis=-1)
    np.testing.assert_allclose(once, 2 * one + 61 * (1 - one), rtol=1e-4)
    assert (np.abs(counts - (2 * two + 30.5 * (1 - two))) < 4).all()


def test_the_step_runs_in_bfloat16():
    _, losses = train(changed("model", dtype="bfloat16"))
    np.testing.assert_allclose(losses, train(EXPERIMENT)[1], rtol=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RoutingAttention(cluster_size=9).check(8), "cluster_size = 9 is more than the segment length 8"),
        (lambda: dataclasses.replace(STRICT, cluster_size=5).check(8), "cluster_size = 5 does not divide"),
        (lambda: ROUTING.check(10), "SparseAttention.stride = 4 does not divide"),
        (
            lambda: RoutingAttention(num_local_heads=2).layer(DIMS) and RoutingAttention(num_local_heads=3).split(DIMS),
            "one has to route",
        ),
        (lambda: RoutingAttention(local=KNNAttention()), r"RoutingAttention.local = @KNNAttention\(\)"),
        (lambda: RoutingAttention(decay=1.5), "decay = 1.5"),
        (lambda: KNNAttention(local=RoutingAttention()), r"KNNAttention.local = @RoutingAttention\(\)"),
    ],
)
def test_what_does_not_fit_is_refused(make, message: str):
    with pytest.raises(UserError, match=message):
        make()
