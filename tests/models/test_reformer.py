"""Reformer's attention against its equations (Kitaev et al. 2020, section 2 and appendix A)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mechanisms import LENGTH, ROWS, Mechanism, random_tokens

from memorizing.context import Layout, Rngs, Segment
from memorizing.errors import UserError
from memorizing.models.attention.base import LayerDims
from memorizing.models.attention.knn import KNNAttention
from memorizing.models.attention.sparse import reformer
from memorizing.models.attention.sparse.reformer import ReformerAttention
from memorizing.models.lm_config import LMConfig

B, T, N, H = 2, 16, 2, 8
DIMS = LayerDims(16, N, H, 32, 0.0, 1.0, jnp.dtype(jnp.float32))
CONFIG = ReformerAttention(hash_buckets=4, num_rounds=3, chunk_size=4, num_buckets=8, max_distance=12)
STRICT = dataclasses.replace(CONFIG, strictly_causal=True)
IS_REAL = np.arange(T) < np.array([T, 11])[:, None]
by_form = pytest.mark.parametrize("config", [CONFIG, STRICT], ids=["as published", "strictly causal"])


def case(num_rounds: int, seed: int = 0) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray]:
    """Queries, keys of length 1, values; the hashes of each round; the bias by distance."""
    rng = np.random.default_rng(seed)
    queries, values = rng.normal(size=(2, B, T, N, H))
    keys = queries / np.linalg.norm(queries, axis=-1, keepdims=True)
    return (queries, keys, values), rng.integers(0, 4, (num_rounds, B, N, T)), rng.normal(size=(N, T))


def found(config: ReformerAttention, hashes: np.ndarray, is_real: np.ndarray) -> np.ndarray:
    """Which keys a query finds in one round, bool [T, T], of one row and head."""
    real = np.flatnonzero(is_real)
    seen = np.zeros((T, T), bool)
    # By bucket and then by time.
    order = sorted(real, key=lambda i: (hashes[i], i))
    for rank, i in enumerate(order):
        same = [j for j in order[: rank + 1] if hashes[j] == hashes[i]]
        if config.strictly_causal:
            seen[i, same[-config.chunk_size :]] = True
        else:
            first = max(0, (rank // config.chunk_size - 1) * config.chunk_size)
            seen[i, [j for j in order[first : rank + 1] if j in same]] = True
    return seen


def reference(config: ReformerAttention, arrays: tuple, hashes: np.ndarray, by_distance: np.ndarray) -> np.ndarray:
    """softmax over what is found in any round, itself only where nothing else is."""
    queries, keys, values = arrays
    y = np.zeros_like(values)
    for b, n in np.ndindex(B, N):
        seen = np.any([found(config, of_round[b, n], IS_REAL[b]) for of_round in hashes], axis=0)
        for i in np.flatnonzero(IS_REAL[b]):
            visible = [j for j in np.flatnonzero(seen[i]) if j != i] or [i]
            logits = (n + 1) * (keys[b, visible, n] @ queries[b, i, n] + by_distance[n, i - np.array(visible)])
            weights = np.exp(logits - logits.max())
            y[b, i, n] = weights @ values[b, visible, n] / weights.sum()
    return y


@functools.partial(jax.jit, static_argnums=0)
def attend(config: ReformerAttention, arrays: tuple, hashes: jax.Array, by_distance: jax.Array) -> jax.Array:
    scale = jnp.arange(1.0, N + 1)
    queries, keys, values = (jnp.asarray(each, jnp.float32) for each in arrays)
    by_distance = jnp.asarray(by_distance, jnp.float32)
    return reformer.attend_in_rounds(config, queries, keys, values, hashes, scale, by_distance, jnp.asarray(IS_REAL))


@by_form
@pytest.mark.parametrize("num_rounds", [1, 3])
def test_rounds_together_are_a_softmax_over_whatever_is_found_in_any(config: ReformerAttention, num_rounds: int):
    """So each pair counts once, in however many rounds it is found."""
    config = dataclasses.replace(config, num_rounds=num_rounds)
    arrays, hashes, by_distance = case(num_rounds)
    y = np.asarray(attend(config, arrays, hashes, by_distance))
    np.testing.assert_allclose(y[IS_REAL], reference(config, arrays, hashes, by_distance)[IS_REAL], rtol=0, atol=1e-4)


@by_form
def test_one_bucket_is_full_attention(config: ReformerAttention):
    """With shared queries and keys, and itself only at the first position."""
    config = dataclasses.replace(config, hash_buckets=1, chunk_size=T)
    arrays, hashes, by_distance = case(3)
    y = np.asarray(attend(config, arrays, np.zeros_like(hashes), by_distance))
    queries, keys, values = arrays
    logits = np.einsum("bthd,bshd->bhts", queries, keys)
    distance = np.arange(T)[:, None] - np.arange(T)[None, :]
    logits = (logits + by_distance[:, np.maximum(distance, 0)]) * np.arange(1, N + 1)[:, None, None]
    logits = np.where(distance > 0, logits, np.where(distance == 0, -1e5, -np.inf))
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    expected = np.einsum("bhts,bshd->bthd", weights / weights.sum(axis=-1, keepdims=True), values)
    np.testing.assert_allclose(y[IS_REAL], expected[IS_REAL], rtol=0, atol=1e-4)


def test_gradients_are_finite_and_reach_what_is_found():
    arrays, hashes, by_distance = case(3)
    arrays = tuple(each.astype(np.float32) for each in arrays)
    gradients = jax.grad(lambda *args: jnp.sum(jnp.square(attend(CONFIG, *args))), argnums=(0, 2), allow_int=False)
    of_arrays, of_bias = gradients(arrays, hashes, by_distance.astype(np.float32))
    for leaf in (*of_arrays, of_bias):
        assert np.isfinite(leaf).all() and np.any(leaf)


# Hashing.


def rngs(seed: int) -> Rngs:
    return Rngs(jax.random.key(seed), jnp.arange(1))


def test_vectors_that_point_the_same_way_collide_more_often():
    rng = np.random.default_rng(0)
    config = ReformerAttention(hash_buckets=8, num_rounds=256)
    x, other = rng.normal(size=(2, 64, 16))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    other -= np.sum(other * x, axis=-1, keepdims=True) * x
    other /= np.linalg.norm(other, axis=-1, keepdims=True)
    shares = []
    for cosine in (-1.0, -0.5, 0.0, 0.5, 0.9, 1.0):
        near = cosine * x + np.sqrt(1 - cosine**2) * other
        pair = jnp.asarray(np.stack([x, near])[:, :, None], jnp.float32)
        first, second = jnp.moveaxis(reformer.angular_hash(config, pair, rngs(0)), 1, 0)
        shares.append(float(jnp.mean(first == second)))
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    # At a right angle no bucket is likelier than another.
    assert shares[2] == pytest.approx(1 / 8, abs=0.02)


def test_the_key_that_is_most_similar_is_found_more_often_with_more_rounds():
    rng = np.random.default_rng(0)
    vectors = jnp.asarray(rng.normal(size=(1, 128, 1, 8)), jnp.float32)
    similar = np.array(vectors[0, :, 0] @ vectors[0, :, 0].T)
    similar[np.triu_indices(128)] = -np.inf
    best = similar[1:].argmax(axis=-1)
    recalls = []
    for num_rounds in (1, 2, 4, 8, 16):
        config = ReformerAttention(hash_buckets=8, num_rounds=num_rounds)
        hashes = np.asarray(reformer.angular_hash(config, vectors, rngs(1)))[:, 0, 0]
        recalls.append((hashes[:, 1:] == hashes[:, best]).any(axis=0).mean())
    assert recalls == sorted(recalls) and recalls[0] < 0.8 and recalls[-1] > 0.95


def test_two_hashes_make_up_a_bucket():
    vectors = jax.random.normal(jax.random.key(0), (1, 512, 1, 8))
    config = dataclasses.replace(CONFIG, hash_buckets=(4, 6))
    hashes = np.asarray(reformer.angular_hash(config, vectors, None))
    assert set(np.unique(hashes)) == set(range(24))
    first = dataclasses.replace(CONFIG, hash_buckets=4)
    np.testing.assert_array_equal(hashes // 6, reformer.angular_hash(first, vectors, None))


def test_hashes_are_drawn_by_name_in_training_and_fixed_in_evaluation():
    vectors = jax.random.normal(jax.random.key(0), (1, 64, 2, 8))

    def hashes(of: Rngs | None) -> np.ndarray:
        return np.asarray(reformer.angular_hash(CONFIG, vectors, of))

    np.testing.assert_array_equal(hashes(rngs(0)), hashes(rngs(0)))
    assert (hashes(rngs(0)) != hashes(rngs(1))).any() and (hashes(rngs(0)) != hashes(rngs(0).of_layer(1))).any()
    np.testing.assert_array_equal(hashes(None), hashes(None))
    assert set(np.unique(hashes(None))) == set(range(4))


def test_hashes_are_kept_for_the_backward_pass():
    """Computed again, a hash could round to another bucket, and the gradient would be that of another function."""
    x = jnp.ones((1, T, 16))
    segment = Segment(jnp.ones((1, T), bool), Layout(T), rngs=rngs(0))
    layer = CONFIG.layer(DIMS)
    params = layer.init(jax.random.key(0), x, segment, ())

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("neighbours"))
    def loss(params: dict) -> jax.Array:
        return jnp.sum(jnp.square(layer.apply(params, x, segment, ())[0]))

    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert text.count("argmax") == 1


# Causality.


def test_later_tokens_decide_what_is_seen_as_published_and_not_with_strict_causality():
    """The effect is there to be measured; contents never leak, as the contract tests show by gradient."""
    changes = {}
    for strictly_causal in (False, True):
        config = ReformerAttention(hash_buckets=2, num_rounds=1, chunk_size=2, strictly_causal=strictly_causal)
        model = Mechanism("", attention=config).model
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
        changes[strictly_causal] = max(largest)
    assert changes[False] > 0.01 and changes[True] < 1e-5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReformerAttention(hash_buckets=(4, 3)), r"hash_buckets = \(4, 3\): an even number"),
        (lambda: ReformerAttention(hash_buckets=0), "hash_buckets = 0: an even number"),
        (lambda: ReformerAttention(hash_buckets=7), "hash_buckets = 7: an even number"),
        (lambda: ReformerAttention(num_rounds=0), "num_rounds = 0: at least 1"),
        (lambda: ReformerAttention(chunk_size=6).check(16), "chunk_size = 6 does not divide .* 16.*segments of 18"),
        (lambda: KNNAttention(local=ReformerAttention()), r"KNNAttention.local = @ReformerAttention\(\)"),
        (lambda: LMConfig(attention=ReformerAttention()).check_can_decode(), "strictly_causal = True"),
    ],
)
def test_what_does_not_fit_is_refused(make, message: str):
    with pytest.raises(UserError, match=message):
        make()
