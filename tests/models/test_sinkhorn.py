"""Sparse Sinkhorn Attention: the matrix and the attention against their definitions, written position by position."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memorizing.context import Rngs
from memorizing.models.attention.sparse import sinkhorn
from memorizing.models.attention.sparse.sinkhorn import SinkhornAttention

ROWS, HEADS, WIDTH, SIZE, BLOCKS = 2, 2, 4, 3, 5
LENGTH = SIZE * BLOCKS
CONFIG = SinkhornAttention(block_size=SIZE, num_iterations=4, temperature=0.5)
SCALE = np.array([1.0, 2.0])


def balanced_by_definition(scores: np.ndarray) -> np.ndarray:
    """Of one head, with sums over what is before: [m, m]."""
    matrix = np.exp(scores.astype(np.float64) / CONFIG.temperature) * np.tri(BLOCKS, k=-1)
    for _ in range(CONFIG.num_iterations):
        for i in range(1, BLOCKS):
            matrix[i] = matrix[i] / matrix[i].sum()
        columns = matrix.copy()
        for i, j in np.argwhere(np.tri(BLOCKS, k=-1)):
            matrix[i, j] = columns[i, j] / sum(columns[before, j] for before in range(i + 1))
    return matrix


def drawn() -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Queries, keys and values; scores; a bias by distance."""
    rng = np.random.default_rng(0)
    stream = {name: rng.normal(size=(ROWS, LENGTH, HEADS, WIDTH)) for name in ("queries", "keys", "values")}
    scores = np.abs(rng.normal(size=(ROWS, HEADS, BLOCKS, BLOCKS)))
    return stream, scores, rng.normal(size=(HEADS, LENGTH))


def test_the_matrix_is_balanced_by_rows_and_by_columns_so_far():
    _, scores, _ = drawn()
    matrix = np.asarray(sinkhorn.balanced(CONFIG, jnp.asarray(scores), None))
    expected = [[balanced_by_definition(of_head) for of_head in of_row] for of_row in scores]
    np.testing.assert_allclose(matrix, expected, atol=1e-5)
    assert not np.any(matrix * np.triu(np.ones((BLOCKS, BLOCKS)))), "a block gets itself or a later one"


def test_later_scores_do_not_change_what_earlier_blocks_get():
    _, scores, _ = drawn()
    later = scores.copy()
    later[:, :, 3:] *= 7
    one, other = (np.asarray(sinkhorn.balanced(CONFIG, jnp.asarray(each), None)) for each in (scores, later))
    np.testing.assert_array_equal(one[:, :, :3], other[:, :, :3])
    assert np.any(one[:, :, 3:] != other[:, :, 3:])


def test_low_temperatures_sort():
    """Scores that ask for a permutation get it, but for the first block, which has nothing before it."""
    asked = np.zeros((1, 1, BLOCKS, BLOCKS))
    # Every block the one before it.
    asked[..., range(1, BLOCKS), range(BLOCKS - 1)] = 1.0
    sharp = SinkhornAttention(block_size=SIZE, temperature=0.02)
    matrix = np.asarray(sinkhorn.balanced(sharp, jnp.asarray(asked), None))
    np.testing.assert_allclose(matrix[0, 0], np.eye(BLOCKS, k=-1), atol=1e-6)


def test_noise_is_each_rows_own_and_none_in_evaluation():
    scores = jnp.zeros((ROWS, HEADS, BLOCKS, BLOCKS))

    def with_noise(*rows: int) -> np.ndarray:
        return np.asarray(sinkhorn.balanced(CONFIG, scores, Rngs(jax.random.key(1), jnp.asarray(rows))))

    quiet = np.asarray(sinkhorn.balanced(CONFIG, scores, None))
    noisy = with_noise(4, 5)
    np.testing.assert_array_equal(quiet[0], quiet[1])
    assert np.any(noisy[0] != noisy[1])
    np.testing.assert_array_equal(noisy[1], with_noise(5, 4)[0])


@pytest.mark.parametrize("temperature", [0.5, 5.0])
def test_attention_is_one_softmax_over_the_own_block_and_the_mixture(temperature: float):
    config = SinkhornAttention(block_size=SIZE, temperature=temperature)
    stream, scores, by_distance = drawn()
    sorting = sinkhorn.balanced(config, jnp.asarray(scores), None)
    arrays = {name: jnp.asarray(each, jnp.float32) for name, each in stream.items()}
    y = sinkhorn.attend_in_blocks(config, **arrays, sorting=sorting, scale=SCALE, by_distance=jnp.asarray(by_distance))

    expected = np.zeros(y.shape)
    shares = np.asarray(sorting, np.float64)
    for row, t, head in np.ndindex(ROWS, LENGTH, HEADS):
        block = t // SIZE
        query, keys, values = (stream[name][row, :, head] for name in ("queries", "keys", "values"))
        own = range(block * SIZE, t + 1)
        logits = [(query[t] @ keys[s] + by_distance[head, t - s]) * SCALE[head] for s in own]
        seen = [values[s] for s in own]
        for place in range(SIZE if block else 0):
            places = range(place, LENGTH, SIZE)
            mixed_key, mixed_value = (
                sum(shares[row, head, block, j] * of[s] for j, s in enumerate(places)) for of in (keys, values)
            )
            logits.append(query[t] @ mixed_key * SCALE[head])
            seen.append(mixed_value)
        weights = np.exp(np.array(logits) - max(logits))
        expected[row, t, head] = weights / weights.sum() @ np.array(seen)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_weights_of_some_positions_give_what_the_blocks_give():
    """In a decode step, and on the page of `inspect`."""
    stream, scores, by_distance = drawn()
    sorting = sinkhorn.balanced(CONFIG, jnp.asarray(scores), None)
    queries, keys, values = (jnp.asarray(each, jnp.float32) for each in stream.values())
    in_blocks = sinkhorn.attend_in_blocks(CONFIG, queries, keys, values, sorting, SCALE, jnp.asarray(by_distance))
    some = jnp.array([0, 2, 7, 14])
    weights = sinkhorn.weights_of_some(CONFIG, queries[:, some], keys, sorting, SCALE, by_distance, some)
    np.testing.assert_allclose(jnp.einsum("BNtS,BSNH->BtNH", weights, values), in_blocks[:, some], atol=1e-5)
    is_later = np.arange(LENGTH)[None, :] > np.asarray(some)[:, None]
    assert not np.any(np.asarray(weights) * is_later)


def test_what_scores_a_block_is_the_mean_of_all_that_is_before_it():
    x = np.random.default_rng(0).normal(size=(ROWS, LENGTH, 6))
    means = sinkhorn.mean_before(jnp.asarray(x), SIZE)
    assert not np.any(means[:, 0])
    for block in range(1, BLOCKS):
        np.testing.assert_allclose(means[:, block], x[:, : block * SIZE].mean(axis=1), atol=1e-6)
