"""The order of documents: permutations that are computed, and mixtures with exact rates."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memorizing.data.errors import DataError
from memorizing.data.streams import order
from memorizing.data.streams.order import Line

GOLDEN_MIXTURE = [7, 2, 3, 6, 5, 1, 0, 4, 8, 1, 2, 5]
GOLDEN_LARGE = [927331, 7797888, 1757827]


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permutations_are_permutations(size, key):
    index = np.arange(size)
    found = order.permuted(index, np.full(size, size), np.full(size, key, np.uint64))
    np.testing.assert_array_equal(np.sort(found), index)


def test_permutations_look_random():
    size, epochs = 1000, 200
    line = Line([size], seed=0).documents_at(np.arange(size * epochs)).reshape(epochs, size)
    # Every place sees every tenth of the documents about as often.
    counts = np.stack([np.bincount(place // 100, minlength=10) for place in line.T])
    chi_squared = ((counts - epochs / 10) ** 2 / (epochs / 10)).sum(axis=1)
    assert 8 < chi_squared.mean() < 10
    # Neighbours are strangers: as many steps up as down, and no preferred distance.
    assert abs((np.diff(line, axis=1) > 0).mean() - 0.5) < 0.01
    distances = np.bincount(np.diff(line, axis=1).ravel() % size, minlength=size)[1:]
    assert distances.std() < 2 * np.sqrt(distances.mean())
    # All six orders of three documents are about as frequent.
    small = Line([3], seed=0).documents_at(np.arange(3 * 6000)).reshape(-1, 3) @ np.asarray([9, 3, 1])
    assert np.all(np.abs(np.unique(small, return_counts=True)[1] - 1000) < 150)


def test_ten_million_documents_take_no_memory():
    positions = np.random.default_rng(0).integers(0, 10**12, 1000)
    tracemalloc.start()
    line = Line([10_000_000], seed=3)
    documents = line.documents_at(positions)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert documents.min() >= 0 and documents.max() < 10_000_000
    assert len(set(documents.tolist())) > 990
    # Positions do not depend on what else is asked for.
    np.testing.assert_array_equal(line.documents_at(positions[500:501]), documents[500:501])


def test_mixture_keeps_its_rates_and_every_corpus_its_permutations():
    sizes, weights = [7, 100, 1000], [1.0, 2.0, 5.0]
    line = Line(sizes, 5, weights)
    assert line.identity["places"] == [1, 2, 5]
    documents = line.documents_at(np.arange(3 * 65536))
    corpus = np.searchsorted(np.cumsum(sizes), documents, side="right")
    # Exactly in every block, and about so within one.
    for block in corpus.reshape(3, 65536):
        assert np.bincount(block).tolist() == [8192, 16384, 40960]
    assert abs((corpus[:4000] == 2).mean() - 0.625) < 0.03
    # Of each corpus, blocks hold whole epochs in some order, and hence each document equally often.
    for index, size in enumerate(sizes):
        found = documents[corpus == index] - sum(sizes[:index])
        counts = np.bincount(found, minlength=size)
        assert counts.max() - counts.min() <= 1
    assert np.any(documents[:65536] != Line(sizes, 6, weights).documents_at(np.arange(65536)))


def test_the_smallest_rate_still_gets_a_place():
    line = Line([3, 3], 0, [1e-9, 1.0])
    assert line.identity["places"] == [1, 65535]
    assert np.sum(line.documents_at(np.arange(65536)) < 3) == 1


def test_mixtures_are_the_same_for_ever():
    # As for one corpus, see test_segments: part of the format of checkpoints.
    assert Line([4, 5], 17, [0.5, 0.5]).documents_at(np.arange(12)).tolist() == GOLDEN_MIXTURE
    assert Line([10**7], 17).documents_at(np.asarray([0, 10**7 - 1, 10**11])).tolist() == GOLDEN_LARGE


def test_nothing_to_train_on_is_told():
    with pytest.raises(DataError, match="no documents"):
        Line([3, 0], 0, [0.5, 0.5])
