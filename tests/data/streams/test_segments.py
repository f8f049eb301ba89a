"""The streams: rows that stay on their documents, lose no token, and resume exactly wherever they were."""

import json
import tracemalloc
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memorizing.data.errors import DataError
from memorizing.data.streams.order import Line
from memorizing.data.streams.segments import WINDOW, DocumentStream, evaluation_batches

# The order of ten documents in two epochs with seed 17.
GOLDEN_ORDER = [9, 3, 8, 4, 1, 5, 7, 0, 6, 2, 3, 4, 0, 1, 7, 6, 9, 8, 5, 2]
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


class Documents:
    """A split in memory: every token of every document is another one, so that none can be mistaken."""

    # No id means "nothing": the first token of the first document is 0, and what stands before a document is a word.
    start_id = 3

    def __init__(self, lengths):
        self.num_tokens = np.asarray(lengths, np.int64)
        self._ends = np.cumsum(self.num_tokens)
        self.loaded = []

    def __len__(self):
        return len(self.num_tokens)

    def tokens(self, index, start=0, stop=None):
        stop = self.num_tokens[index] if stop is None else stop
        assert 0 <= start <= stop <= self.num_tokens[index]
        self.loaded.append((index, start, stop))
        first = self._ends[index] - self.num_tokens[index]
        return np.arange(first + start, first + stop, dtype=np.uint32)


def stream(documents, num_rows=2, rows=None, num_segments=1, segment_length=8, seed=0):
    rows = range(num_rows) if rows is None else rows
    line = Line([len(documents)], seed)
    return DocumentStream(documents, "fingerprint", line, num_rows, rows, num_segments, segment_length)


def take(batches, count):
    """The next batches as one, joined along their segments: fields [B, count * U, T] or [B, count * U]."""
    taken = [next(batches) for _ in range(count)]
    return type(taken[0])(*(np.concatenate(field, axis=1) for field in zip(*taken, strict=True)))


def documents_of_row(batch, row):
    """The tokens of a row's documents one after another, padding left out; the last one may be cut."""
    found = []
    segments = zip(batch.start_of_document[row], batch.targets[row], batch.is_real[row], strict=True)
    for start, targets, is_real in segments:
        if start:
            found.append([])
        found[-1].extend(targets[is_real].tolist())
    return found


def assert_equal(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 6), st.integers(1, 3), st.integers(1, 16), st.integers(0, 3))
def test_rows_restore_whole_documents_of_permutations(lengths, num_rows, num_segments, segment_length, seed):
    documents = Documents(lengths)
    batch = take(stream(documents, num_rows, None, num_segments, segment_length, seed), 40)
    whole = {tuple(documents.tokens(index)): index for index in range(len(lengths))}
    line = {}
    for row in range(num_rows):
        *complete, last = documents_of_row(batch, row)
        for order, tokens in enumerate(complete):
            line[row + order * num_rows] = whole[tuple(tokens)]
        assert any(list(tokens[: len(last)]) == last for tokens in whole)
    # Every epoch of the line that has been read to its end is a permutation.
    for epoch in range(max(line, default=0) // len(lengths) + 1):
        order = [line.get(epoch * len(lengths) + index) for index in range(len(lengths))]
        seen = [index for index in order if index is not None]
        assert len(set(seen)) == len(seen)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 5), st.integers(1, 3), st.integers(1, 16))
def test_every_input_is_the_token_before_its_target(lengths, num_rows, num_segments, segment_length):
    batch = take(stream(Documents(lengths), num_rows, None, num_segments, segment_length), 20)
    assert batch.tokens.dtype == batch.targets.dtype == np.int32
    assert batch.is_real.dtype == bool
    np.testing.assert_array_equal(batch.loss_weights, batch.is_real.astype(np.float32))
    np.testing.assert_array_equal(batch.tokens[:, :, 1:], batch.targets[:, :, :-1])
    for row in range(num_rows):
        for segment in range(batch.targets.shape[1]):
            # The first token of every segment is scored, given what came before it in the document.
            assert batch.is_real[row, segment, 0]
            carried = (
                Documents.start_id if batch.start_of_document[row, segment] else batch.targets[row, segment - 1, -1]
            )
            assert batch.tokens[row, segment, 0] == carried


@pytest.mark.parametrize(
    ("length", "sizes"), [(1, [1]), (7, [7]), (8, [8]), (9, [8, 1]), (16, [8, 8]), (17, [8, 8, 1])]
)
def test_segments_of_a_document(length, sizes):
    batch = take(stream(Documents([length]), num_rows=1), 2 * len(sizes))
    assert batch.is_real.sum(axis=-1)[0].tolist() == sizes * 2
    assert batch.start_of_document[0].tolist() == ([True] + [False] * (len(sizes) - 1)) * 2
    # Padding is at the end of a segment.
    for is_real, size in zip(batch.is_real[0], sizes * 2, strict=True):
        assert np.all(is_real[:size])


def test_rows_go_on_when_others_end():
    # The trap of interleaving readers: documents of 3, 1, 2 and 4 segments in two rows.
    documents = Documents([24, 8, 16, 32])
    batch = take(stream(documents), 20)
    for row in range(2):
        *complete, _ = documents_of_row(batch, row)
        for tokens in complete:
            assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
            assert len(tokens) in documents.num_tokens


def test_a_document_of_more_than_a_million_tokens():
    documents = Documents([1_200_007, 3])
    batches = stream(documents, num_rows=1, num_segments=100, segment_length=4096)
    whole = next(tokens for tokens in documents_of_row(take(batches, 5), 0) if len(tokens) > 3)
    assert whole == list(range(1_200_007))
    # 500 segments, and the document has 293: every token is read once each time the row comes to it, a window at a
    # time.
    read = [(start, stop) for index, start, stop in documents.loaded if index == 0]
    assert max(stop - start for start, stop in read) == WINDOW
    assert sum(stop - start for start, stop in read) <= 2 * 1_200_007


def test_fewer_documents_than_rows():
    batch = take(stream(Documents([5, 9]), num_rows=7), 30)
    for row in range(7):
        for tokens in documents_of_row(batch, row)[:-1]:
            assert tokens in ([0, 1, 2, 3, 4], list(range(5, 14)))
    # Rows 0 and 1 hold the first permutation, rows 2 and 3 the second one.
    starts = batch.targets[:, 0, 0]
    assert set(starts[:2]) == set(starts[2:4]) == set(starts[4:6]) == {0, 5}


def test_seed_makes_the_order_and_epochs_differ():
    documents = Documents([8] * 50)

    def order(seed):
        return take(stream(documents, num_rows=1, seed=seed), 100).targets[0, :, 0].tolist()

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert sorted(order(0)[:50]) == sorted(order(0)[50:])
    assert order(0)[:50] != order(0)[50:]


def test_order_of_documents_is_the_same_for_ever():
    # A stored position means nothing if the permutations change: this order is part of the format of checkpoints.
    batch = take(stream(Documents([8] * 10), num_rows=1, seed=17), 20)
    assert (batch.targets[0, :, 0] // 8).tolist() == GOLDEN_ORDER


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 5), st.integers(1, 3), st.integers(1, 16), st.integers(0, 60))
def test_resumes_exactly_anywhere(lengths, num_rows, num_segments, segment_length, steps):
    def fresh():
        return stream(Documents(lengths), num_rows, None, num_segments, segment_length, seed=3)

    whole = fresh()
    for _ in range(steps):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    expected = take(whole, 20)
    resumed, moved_back = fresh(), whole
    for batches in (resumed, moved_back):
        batches.set_state(state)
        assert batches.get_state() == state
        assert_equal(take(batches, 20), expected)


def test_resumes_in_the_middle_of_a_document():
    documents = Documents([1000, 900])
    whole = stream(documents)
    take(whole, 50)
    state = whole.get_state()
    assert state["offset"] == [400, 400]
    resumed = stream(documents)
    resumed.set_state(state)
    batch = next(resumed)
    assert not batch.start_of_document.any()
    np.testing.assert_array_equal(batch.tokens[:, 0, 0] + 1, batch.targets[:, 0, 0])
    assert_equal(batch, next(whole))


def test_taking_a_state_does_not_let_it_move():
    batches = stream(Documents([1000]))
    state = batches.get_state()
    before = json.dumps(state)
    next(batches)
    assert json.dumps(state) == before
    batches.set_state(state)
    next(batches)
    assert json.dumps(state) == before


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 3), st.integers(1, 4))
def test_hosts_share_the_rows_of_one_stream(lengths, rows_per_host, num_hosts):
    num_rows = rows_per_host * num_hosts
    one = stream(Documents(lengths), num_rows)
    hosts = [
        stream(Documents(lengths), num_rows, range(host * rows_per_host, (host + 1) * rows_per_host))
        for host in range(num_hosts)
    ]
    for _ in range(30):
        expected, shares = next(one), [next(host) for host in hosts]
        assert_equal(expected, [np.concatenate(field) for field in zip(*shares, strict=True)])
        assert all(host.get_state() == one.get_state() for host in hosts)


def test_another_number_of_hosts_goes_on_where_one_stopped():
    lengths = [3, 50, 17, 8, 120]
    one = stream(Documents(lengths), num_rows=4)
    take(one, 13)
    second_half = stream(Documents(lengths), num_rows=4, rows=range(2, 4))
    second_half.set_state(one.get_state())
    assert_equal([field[2:] for field in take(one, 30)], take(second_half, 30))


def test_a_host_reads_the_documents_of_its_own_rows_only():
    documents = Documents([8] * 40)
    # One epoch over four rows: ten documents each.
    take(stream(documents, num_rows=4, rows=range(1, 2)), 10)
    assert len({index for index, *_ in documents.loaded}) == len(documents.loaded) == 10


@pytest.mark.parametrize(
    "change",
    [
        {"cache": "another"},
        {"seed": 1},
        {"order": "another"},
        {"num_rows": 4},
        {"position": [0]},
        {"position": [1, 0]},
        {"position": [-2, -1]},
        {"offset": [0, 0, 0]},
        {"offset": [0, -8]},
        {"offset": [0, 1000]},
        {"position": []},
    ],
)
def test_positions_of_other_streams_are_refused(change):
    batches = stream(Documents([100, 100]))
    take(batches, 3)
    before = batches.get_state()
    with pytest.raises(DataError):
        batches.set_state(before | change)
    assert batches.get_state() == before


@pytest.mark.parametrize(
    "wrong", [{"num_rows": 0}, {"rows": range(1, 3)}, {"num_segments": 0}, {"segment_length": 0}, {"documents": []}]
)
def test_streams_that_cannot_be_are_refused(wrong):
    settings = {"documents": [8]} | wrong
    with pytest.raises(DataError):
        stream(Documents(settings.pop("documents")), **settings)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 6), st.integers(1, 16))
def test_evaluation_scores_every_token_of_every_document_once(lengths, num_rows, segment_length):
    documents = Documents(lengths)
    found = defaultdict(list)
    started, row_of = [], {}
    for batch, document, offset in evaluation_batches(documents, num_rows, segment_length):
        assert batch.targets.shape == (num_rows, 1, segment_length)
        assert document.dtype == np.int32 and offset.dtype == np.int64
        np.testing.assert_array_equal(batch.loss_weights, batch.is_real.astype(np.float32))
        np.testing.assert_array_equal(batch.tokens[:, :, 1:], batch.targets[:, :, :-1])
        for row, index in enumerate(document):
            targets = batch.targets[row, 0]
            if index < 0:
                assert not targets.any() and not batch.is_real[row].any()
                assert not batch.tokens[row].any() and not batch.start_of_document[row, 0]
                continue
            assert batch.start_of_document[row, 0] == (offset[row] == 0) == (index not in row_of)
            assert row_of.setdefault(index, row) == row
            assert offset[row] == len(found[index])
            assert batch.tokens[row, 0, 0] == (found[index][-1] if found[index] else Documents.start_id)
            if offset[row] == 0:
                started.append(lengths[index])
            found[index].extend(targets[batch.is_real[row, 0]].tolist())
    assert {index: tokens for index, tokens in found.items()} == {
        index: documents.tokens(index).tolist() for index in range(len(lengths))
    }
    assert started == sorted(lengths, reverse=True)


def test_evaluation_fills_rows_that_are_free_first():
    # In segments: 5, 3, 2 and 2 in two rows take 5 + 2 and 3 + 2, or 7 steps only if the order is kept blindly.
    lengths = [16, 40, 16, 24]
    assert len(list(evaluation_batches(Documents(lengths), 2, 8))) == 7
    # A book beside many short documents costs no more than the book.
    assert len(list(evaluation_batches(Documents([8] * 30 + [800]), 2, 8))) == 100


def test_evaluation_of_nothing_is_nothing():
    assert list(evaluation_batches(Documents([]), 2, 8)) == []


def test_hosts_share_the_rows_of_an_evaluation():
    documents = Documents([16, 40, 16, 24, 3, 9])
    whole = list(evaluation_batches(documents, 4, 8))
    shares = [list(evaluation_batches(documents, 4, 8, rows)) for rows in (range(0, 1), range(1, 4))]
    for expected, *parts in zip(whole, *shares, strict=True):
        for part in ("document", "offset"):
            np.testing.assert_array_equal(
                getattr(expected, part), np.concatenate([getattr(share, part) for share in parts])
            )
        assert_equal(
            expected.batch, [np.concatenate(field) for field in zip(*[share.batch for share in parts], strict=True)]
        )


class Many:
    """Ten million documents of which nothing is kept but their lengths."""

    num_tokens = np.full(10_000_000, 20, np.int32)
    start_id = 0

    def __len__(self):
        return len(self.num_tokens)

    def tokens(self, index, start=0, stop=None):
        return np.full((20 if stop is None else stop) - start, index % 1000 + 1, np.uint16)


def test_ten_million_documents_cost_nothing_but_their_lengths():
    documents = Many()
    tracemalloc.start()
    batches = stream(documents, num_rows=64, num_segments=2)
    for _ in range(20):
        next(batches)
    state = batches.get_state()
    resumed = stream(documents, num_rows=64, rows=range(32, 64), num_segments=2)
    resumed.set_state(state)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    assert_equal([field[32:] for field in next(batches)], next(resumed))
    assert len(json.dumps(state)) < 3000
