"""Every search finds the true neighbours, whatever the keys look like.

Approximate search is a setting of the user's; the default has recall 1.0, and the levels and blocks that make it fast
must not show in the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import PartitionSpec as P

from memorizing.errors import UserError
from memorizing.models.attention.base import normalize
from memorizing.models.memory import blocks, slabs
from memorizing.models.memory.external_memory import sharded
from memorizing.models.memory.placement import Placement
from memorizing.models.memory.search import ApproximateSearch, ExactSearch, best_of_all_shards, recall
from memorizing.models.positions import Rotary
from memorizing.runtime.sharding import MeshConfig

T, H, M = 6, 16, 768


class OnTPU(ApproximateSearch):
    """Its program for TPUs, which on CPUs is exact."""

    def top_k(self, queries: jax.Array, keys: jax.Array, valid: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        return self.partial_reduction(queries, keys, valid, k)


class InSlabs(ExactSearch):
    """Its program for TPUs."""

    def top_k(self, queries: jax.Array, keys: jax.Array, valid: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        scores, indices = self.in_slabs(queries[None], keys[None], jnp.asarray(valid)[None], k)
        return scores[0], indices[0]


SEARCHES = [
    ExactSearch(),
    ExactSearch(block_scores=64 * T, group_size=8),
    # The last block of queries is not full.
    ExactSearch(block_queries=T - 1, block_scores=50 * T, group_size=7),
    ExactSearch(block_queries=1, group_size=1),
    InSlabs(slabs=16),
    # Two levels of groups where k is small, and a memory in three parts.
    InSlabs(slabs=4),
    InSlabs(slabs=5, slab_scores=300 * T),
    ApproximateSearch(),
    OnTPU(),
]


def random_keys(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(M, H))


def clustered(rng: np.random.Generator) -> np.ndarray:
    """A few directions with little noise, cluster after cluster: all neighbours lie in one block or group."""
    return np.repeat(rng.normal(size=(8, H)), M // 8, axis=0) + 0.05 * rng.normal(size=(M, H))


def duplicated(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(5, H))[rng.integers(0, 5, M)]


def periodic(rng: np.random.Generator) -> np.ndarray:
    """Equal keys at a distance of 256: searches that bucket slots by a power of two put equals into one bucket."""
    return np.tile(rng.normal(size=(256, H)), (M // 256, 1))


VALID = {
    "empty": np.zeros(M, bool),
    "three": np.isin(np.arange(M), [3, 400, M - 1]),
    "half full": np.arange(M) < M // 2,
    # After a reset the new document has begun to fill the ring in its middle and wrapped around its end.
    "wrapped": (np.arange(M) < 100) | (np.arange(M) >= M - 156),
    "full": np.ones(M, bool),
}


@functools.cache
def compiled(search: ExactSearch | ApproximateSearch, k: int) -> Callable:
    return jax.jit(functools.partial(search.top_k, k=k))


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("k", [1, 32, M + 5])
def test_finds_the_best_scores(search: ExactSearch | ApproximateSearch, dtype: jnp.dtype, k: int):
    for kind in (random_keys, clustered, duplicated, periodic):
        rng = np.random.default_rng(0)
        keys, queries = (normalize(jnp.asarray(x, dtype)) for x in (kind(rng), rng.normal(size=(T, H))))
        reference = np.asarray(queries, np.float64) @ np.asarray(keys, np.float64).T
        for name, valid in VALID.items():
            scores, indices = compiled(search, k)(queries, keys, valid)
            case = f"{kind.__name__}, {name}"
            num_found = min(k, valid.sum())
            assert scores.shape == indices.shape == (T, k), case
            assert (scores[:, num_found:] == -np.inf).all(), case
            assert ((indices >= 0) & (indices < M)).all(), case
            found = indices[:, :num_found]
            assert valid[found].all(), case
            assert all(len(set(row.tolist())) == num_found for row in found), f"{case}: a slot was found twice"
            best = -np.sort(-np.where(valid, reference, -np.inf), axis=-1)[:, :num_found]
            # float32 sums of H = 16 products below 1.
            np.testing.assert_allclose(scores[:, :num_found], best, rtol=0, atol=1e-6, err_msg=case)
            np.testing.assert_allclose(np.take_along_axis(reference, found, -1), best, rtol=0, atol=1e-6, err_msg=case)


# Whole numbers: scores are exact, and equal ones frequent.
small_integers = hnp.arrays(np.float32, (96, 2), elements=st.integers(-2, 2).map(float))


@pytest.mark.parametrize(
    "search",
    [
        ExactSearch(),
        ExactSearch(block_scores=3 * 32, group_size=4),
        ExactSearch(block_queries=2, block_scores=2 * 20, group_size=3),
        InSlabs(slabs=4),
        InSlabs(slabs=2, slab_scores=3 * 48),
    ],
    ids=str,
)
@settings(max_examples=25)
@given(keys=small_integers, valid=hnp.arrays(bool, 96))
def test_of_equal_scores_the_lower_slot_wins(search: ExactSearch, keys: np.ndarray, valid: np.ndarray):
    """Ties decide what is retrieved where text repeats itself.

    The result must not depend on the sizes of blocks and groups.
    """
    queries = np.array([[1, 0], [1, -1], [0, 0]], np.float32)
    reference = np.where(valid, queries @ keys.T, -np.inf)
    expected = np.argsort(-reference, axis=-1, kind="stable")[:, :8]
    scores, indices = compiled(search, 8)(queries, keys, valid)
    np.testing.assert_array_equal(scores, np.take_along_axis(reference, expected, axis=-1))
    np.testing.assert_array_equal(np.where(scores > -np.inf, indices, -1), np.where(scores > -np.inf, expected, -1))


@pytest.mark.parametrize(
    ("same", "is_certain"),
    [
        # As many groups as may be equal to the k-th.
        (slabs._SPARE - 1, True),
        (slabs._SPARE, False),
    ],
)
def test_slabs_tell_where_too_many_groups_are_equally_good(same: int, is_certain: bool):
    """Then, and only then, the slower search in blocks has to run: that is what slabs are fast without."""
    k = 8
    scores = np.linspace(-1, 0, M)
    # Groups of the first slab's slots: one better than the others, the k-th and as many as are equal to it.
    scores[: k + same] = 0.5
    scores[: k - 1] = 1 + np.arange(k - 1)
    keys = jnp.asarray(scores[None, :, None], jnp.float32)
    found = slabs.top_k(jnp.ones((1, 1, 1)), keys, jnp.ones((1, M), bool), k, num_slabs=4, most_scores=M)
    assert bool(found.is_certain[0]) == is_certain
    np.testing.assert_array_equal(found.scores[0, 0], [*range(k - 1, 0, -1), 0.5])


def test_every_head_finds_its_own_slots():
    """Rows with their own empty slots, two heads each, on either platform."""
    rng = np.random.default_rng(0)
    queries = jnp.asarray(rng.normal(size=(6, T, H)), jnp.float32)
    keys = jnp.asarray(rng.normal(size=(6, M, H)), jnp.float32)
    # The second row's keys are so often the same that the slabs are not certain of its heads.
    keys = keys.at[2:4].set(jnp.asarray(duplicated(rng), jnp.float32))
    valid = jnp.asarray(rng.random((3, M)) < 0.5)
    search = ExactSearch(slabs=4, slab_scores=T * M // 2)
    for of_heads in (search.of_heads, search.in_slabs):
        found = jax.jit(functools.partial(of_heads, k=8))(queries, keys, valid)
        for head in range(6):
            scores, indices = compiled(search, 8)(queries[head], keys[head], valid[head // 2])
            np.testing.assert_allclose(found.scores[head], scores, rtol=1e-6)
            np.testing.assert_array_equal(found.indices[head], indices)


@pytest.mark.parametrize("num_filled", [0, 1, 7, 8, 9, 23, 24])
def test_a_memory_that_fills_is_searched_as_far_as_it_is_filled(num_filled: int, monkeypatch: pytest.MonkeyPatch):
    """In three blocks of eight slots, by two queries after two others."""
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(4, H)), rng.normal(size=(24, H))
    num_scored, scores_of = [], blocks.scores_of

    def score_and_tell(queries: Any, keys: Any, valid: Any) -> Any:
        jax.debug.callback(lambda slots: num_scored.append(len(slots)), valid)
        return scores_of(queries, keys, valid)

    monkeypatch.setattr(blocks, "scores_of", score_and_tell)
    search = ExactSearch(block_queries=2, block_scores=2 * 8, group_size=2)
    valid = np.arange(24) < num_filled
    scores, indices = search.top_k(jnp.asarray(queries), jnp.asarray(keys), jnp.asarray(valid), 3)
    jax.effects_barrier()
    assert num_scored == 2 * [8] * -(-num_filled // 8)
    num_found = min(num_filled, 3)
    expected = np.sort(queries @ keys[:num_filled].T, axis=1)[:, ::-1][:, :3]
    np.testing.assert_allclose(scores[:, :num_found], expected, rtol=1e-5)
    assert np.isneginf(scores[:, num_found:]).all()
    assert (np.asarray(indices)[:, :num_found] < num_filled).all()


@pytest.mark.parametrize("is_turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("on_tpu", [False, True], ids=["", "as on TPUs"])
def test_texts_side_by_side_on_a_mesh_find_what_each_finds_alone(on_tpu: bool, is_turned: bool):
    """As `serve` reads them. The memory is so large that slabs have to say whether they are certain."""
    rng = np.random.default_rng(0)
    search = ExactSearch(slabs=4)
    queries = jnp.asarray(rng.normal(size=(3, 4, T, H)), jnp.float32)
    keys = jnp.asarray(rng.normal(size=(3, 4, M, H)), jnp.float32)
    # Of the second text slabs are not certain.
    keys = keys.at[1].set(jnp.asarray(duplicated(rng), jnp.float32))
    valid = jnp.asarray(rng.random((3, 1, M)) < 0.5)

    def of_shard(queries, keys, valid, positions, axis_name):
        placement = Placement(positions, Rotary()) if is_turned else None
        of_heads = search.in_slabs if on_tpu else search.of_heads
        return tuple(of_heads(queries, keys, valid, 8, placement))

    def of_one(queries, keys, valid):
        slots = P("model", "memory", None)
        found = sharded(of_shard, (P("model"), slots, P(None, "memory"), P("memory")), P("model", None, "memory"))
        return found(queries, keys, valid, jnp.arange(M))

    with jax.set_mesh(MeshConfig(data=1, model=2, memory=2).make_mesh(jax.devices()[:4])):
        together = jax.jit(jax.vmap(of_one))(queries, keys, valid)
        alone = [jax.jit(of_one)(queries[text], keys[text], valid[text]) for text in range(3)]
    for text in range(3):
        np.testing.assert_allclose(together[0][text], alone[text][0], rtol=1e-5)
        np.testing.assert_array_equal(together[1][text], alone[text][1])


def test_keys_are_turned_where_they_stand_on_tpus_too():
    rng = np.random.default_rng(0)
    queries = jnp.asarray(rng.normal(size=(4, T, 8)), jnp.float32)
    keys = jnp.asarray(rng.normal(size=(4, 96, 8)), jnp.float32)
    valid = jnp.asarray(rng.random((2, 96)) < 0.7)
    placement = Placement(3 * jnp.arange(96) - 50, Rotary())
    # In two parts.
    search = ExactSearch(slabs=4, slab_scores=T * 48)
    expected, found = (
        jax.jit(functools.partial(of_heads, k=3))(queries, keys, valid, placement=placement)
        for of_heads in (search.of_heads, search.in_slabs)
    )
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
    np.testing.assert_array_equal(found.indices, expected.indices)


@pytest.mark.parametrize("valid", VALID.values(), ids=VALID)
@pytest.mark.parametrize("kind", [random_keys, clustered, duplicated])
def test_recall_is_the_share_of_the_true_neighbours(kind: Callable, valid: np.ndarray):
    """Of a search that overlooks every third slot, and of one that overlooks nothing."""
    rng, k = np.random.default_rng(0), 32
    keys, queries = (normalize(jnp.asarray(x, jnp.float32)) for x in (kind(rng), rng.normal(size=(T, H))))
    measure = jax.jit(lambda found: recall(queries, keys, jnp.asarray(valid), found))
    scores = np.where(valid, np.asarray(queries) @ np.asarray(keys).T, -np.inf)
    best = -np.sort(-scores, axis=-1)[:, :k]
    seen = -np.sort(-np.where(np.arange(M) % 3, scores, -np.inf), axis=-1)[:, :k]
    assert measure(best) == 1
    if kind is not duplicated:  # Equal keys are as good as each other: nobody can tell which were overlooked.
        true = np.isin(seen, best[best > -np.inf]).sum() / max((best > -np.inf).sum(), 1)
        # In a cluster one neighbour of all may be as good as the true one, to rounding.
        np.testing.assert_allclose(measure(seen), true if valid.any() else 1, rtol=0, atol=1.5 / (T * k))
        assert valid.sum() < 100 or true < 0.9


@pytest.fixture(scope="module")
def sharded_best() -> Callable:
    """`scores [rows, M] -> [rows, M]`.

    The scores of the slots that the shards of a memory agree on, -inf for the others; each shard keeps k candidates.
    """
    mesh = MeshConfig(data=1, memory=4).make_mesh(jax.devices()[:4])

    def shard(scores: jax.Array) -> jax.Array:
        best, indices = jax.lax.top_k(scores, 5)
        agreed = best_of_all_shards(best, 5, "memory")
        return jnp.full(scores.shape, -jnp.inf).at[jnp.arange(len(scores))[:, None], indices].max(agreed)

    return jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=P(None, "memory"), out_specs=P(None, "memory")))


@given(scores=hnp.arrays(np.float32, (3, 32), elements=st.sampled_from([-np.inf, -np.inf, -1.0, 0.0, 1.0, 2.0])))
def test_shards_agree_on_the_top_k_of_the_whole_memory(sharded_best: Callable, scores: np.ndarray):
    """With ties, and with shards that hold nothing.

    Exactly the k slots that a search of the unsharded memory returns.
    """
    expected = np.zeros(scores.shape, bool)
    np.put_along_axis(expected, np.argsort(-scores, axis=-1, kind="stable")[:, :5], True, axis=-1)
    np.testing.assert_array_equal(sharded_best(scores), np.where(expected, scores, -np.inf))


def test_all_unsharded_neighbours_are_among_the_best():
    scores = jnp.array([[2.0, 1.0, -jnp.inf]])
    np.testing.assert_array_equal(best_of_all_shards(scores, 3, None), scores)


@pytest.mark.parametrize(
    ("search", "settings"),
    [
        (ExactSearch, {"block_scores": 0}),
        (ExactSearch, {"group_size": 0}),
        (ExactSearch, {"slabs": 0}),
        (ExactSearch, {"slab_scores": 0}),
        (ApproximateSearch, {"recall_target": 0.0}),
        (ApproximateSearch, {"recall_target": 1.1}),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(search: type, settings: dict[str, float]):
    with pytest.raises(UserError, match=next(iter(settings))):
        search(**settings)
