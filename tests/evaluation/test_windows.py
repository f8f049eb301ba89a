"""Evaluation in windows: every token is scored once, with the context it is promised and no other."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mechanisms import apply_model, init_params

from memorizing.batch import Batch, EvaluationBatch
from memorizing.errors import UserError
from memorizing.evaluation.evaluator import Evaluator
from memorizing.evaluation.windows import Windows
from memorizing.models.attention.xl import XLAttention
from memorizing.models.lm_config import LMConfig
from memorizing.models.losses import next_token_nats
from memorizing.runtime.sharding import MeshConfig
from memorizing.synthetic import RepeatedPassages


@dataclasses.dataclass(frozen=True)
class Documents:
    """Held-out documents of any lengths: a row takes the next one as soon as it has read its own.

    So rows change documents at different times.
    """

    documents: tuple[tuple[int, ...], ...]
    vocab_size: int = 1000
    start_id: int = 0
    identity: str = "documents"
    document_bytes: None = None

    @property
    def num_eval_documents(self) -> int:
        return len(self.documents)

    def evaluation_batches(
        self, num_rows: int, segment_length: int, own_rows: range | None = None
    ) -> Iterator[EvaluationBatch]:
        assert own_rows is None, "every row is this host's"
        waiting = list(range(len(self.documents)))
        rows = [(waiting.pop(0) if waiting else -1, 0) for _ in range(num_rows)]
        while any(document >= 0 for document, _ in rows):
            tokens, targets = (np.zeros((num_rows, 1, segment_length), np.int32) for _ in range(2))
            is_real = np.zeros(targets.shape, bool)
            for row, (document, offset) in enumerate(rows):
                ids = self.documents[document] if document >= 0 else ()
                for field, source in ((targets, ids), (tokens, (0, *ids[:-1])), (is_real, [True] * len(ids))):
                    part = source[offset : offset + segment_length] if ids else ()
                    field[row, 0, : len(part)] = part
            document, offset = np.array(rows).T
            starts = np.array([[offset == 0] for _, offset in rows])
            batch = Batch(tokens, targets, is_real.astype(np.float32), is_real, starts)
            yield EvaluationBatch(batch, document, offset)
            for row, (document, offset) in enumerate(rows):
                if document >= 0 and offset + segment_length < len(self.documents[document]):
                    rows[row] = (document, offset + segment_length)
                else:
                    rows[row] = (waiting.pop(0) if waiting else -1, 0)


def numbered(lengths: list[int], first: int = 1) -> Documents:
    """Every token of every document is another one, so that each tells where it stands."""
    ids = iter(range(first, 10**6))
    return Documents(tuple(tuple(next(ids) for _ in range(length)) for length in lengths))


lengths = st.lists(st.integers(1, 14), min_size=1, max_size=5)
windows = st.integers(1, 7).flatmap(lambda width: st.tuples(st.just(width), st.integers(1, width)))


@given(lengths=lengths, window=windows, num_rows=st.integers(1, 3))
def test_every_token_is_scored_once_with_the_context_it_is_promised(
    lengths: list[int], window: tuple[int, int], num_rows: int
):
    (width, stride), source = window, numbered(lengths)
    scored: dict[tuple[int, int], int] = {}
    for batch, document, offset in Windows(source, width, stride).evaluation_batches(num_rows, width):
        assert batch.tokens.shape == batch.targets.shape == batch.loss_weights.shape == (num_rows, 1, width)
        assert batch.start_of_document.all(), "a window would see what was carried from the one before"
        for row in range(num_rows):
            tokens, targets, weights, is_real = (field[row, 0] for field in batch[:4])
            positions = np.flatnonzero(weights)
            if document[row] < 0:
                assert not len(positions)
                continue
            ids = source.documents[document[row]]
            for count, position in enumerate(positions):
                place = int(offset[row]) + count
                assert (int(document[row]), place) not in scored
                assert targets[position] == ids[place]
                # What the model sees: the inputs of the real positions up to this one.
                seen = tokens[: position + 1][is_real[: position + 1]]
                before = [0, *ids][place + 1 - len(seen) : place + 1]
                np.testing.assert_array_equal(seen, before)
                num_seen = int(np.count_nonzero(seen))
                assert num_seen >= min(width - stride, place)
                scored[int(document[row]), place] = num_seen
    assert scored.keys() == {(i, place) for i, length in enumerate(lengths) for place in range(length)}


@given(lengths=lengths, width=st.integers(1, 7), num_rows=st.integers(1, 3))
def test_with_a_stride_of_the_width_the_document_is_cut_into_chunks(lengths: list[int], width: int, num_rows: int):
    source = numbered(lengths)
    chunks, plain = (list(each.evaluation_batches(num_rows, width)) for each in (Windows(source, width, width), source))
    assert len(chunks) == len(plain)
    for chunk, segment in zip(chunks, plain, strict=True):
        for one, other in zip((*chunk.batch[:4], *chunk[1:]), (*segment.batch[:4], *segment[1:]), strict=True):
            np.testing.assert_array_equal(one, other)
        assert chunk.batch.start_of_document.all()


@pytest.mark.parametrize(("width", "stride"), [(8, 8), (8, 4), (8, 2), (6, 1)])
def test_an_answer_is_in_view_up_to_the_promised_distance(width: int, stride: int):
    """A token that a token `delta` before it determines: known everywhere for delta up to width - stride + 1.

    And not beyond, where a window begins its scored part.
    """
    source = numbered([40])

    def known(delta: int) -> float:
        hits = []
        for batch, _, _ in Windows(source, width, stride).evaluation_batches(1, width):
            for position in np.flatnonzero(batch.loss_weights[0, 0]):
                cause = batch.targets[0, 0, position] - delta
                if cause >= 1:
                    hits.append(cause in batch.tokens[0, 0, : position + 1])
        return float(np.mean(hits))

    for delta in range(1, width + 2):
        assert (known(delta) == 1) == (delta <= width - stride + 1), delta
    assert known(width + 1) == 0


@functools.cache
def params(model: LMConfig) -> dict:
    return jax.jit(lambda: init_params(model, 1, 4, jax.random.key(0)))()


def test_the_loss_is_that_of_a_forward_pass_over_each_tokens_window():
    """Written out: for each token a window of its own from an empty context.

    Also of a model that would carry something from window to window.
    """
    width, stride = 6, 2
    model = LMConfig(40, 2, 8, 2, 4, 16, attention=XLAttention(window=6), initial_logit_scale=4.0)
    source = numbered([11, 5, 12, 1])

    @jax.jit
    def nats(tokens: jax.Array, targets: jax.Array) -> jax.Array:
        context = model.init_context(1, tokens.shape[1])
        flags = jnp.ones(tokens.shape, bool)
        output = apply_model(model, params(model), tokens, flags, flags[:, 0], context)
        return next_token_nats(output.logits, targets)[0, -1]

    params(model)
    expected = []
    for ids in source.documents:
        inputs = [0, *ids]
        for place in range(len(ids)):
            # The window ends with the stride that the token belongs to; later tokens of it do not count.
            end = (place // stride + 1) * stride
            first = max(0, end - width)
            window = np.array([inputs[first : place + 1], ids[first : place + 1]], np.int32)
            expected.append(float(nats(window[:1], window[1:])))
    evaluator = Evaluator(model, 2, width, MeshConfig().make_mesh(jax.devices()[:1]))
    evaluation = evaluator.run(params(model), {}, Windows(source, width, stride))
    bounds = np.cumsum([0, *map(len, source.documents)])
    values = np.array(expected)
    np.testing.assert_array_equal(evaluation.tokens, np.diff(bounds))
    np.testing.assert_allclose(evaluation.nats, [values[a:b].sum() for a, b in itertools.pairwise(bounds)], rtol=1e-5)


def test_training_is_on_chunks():
    source = RepeatedPassages(vocab_size=16, passage_length=8, num_passages=2)
    windows, plain = (each.train_batches(2, range(2), 3, 4, 0) for each in (Windows(source, 4, 2), source))
    for _ in range(3):
        chunk, segment = next(windows), next(plain)
        np.testing.assert_array_equal(chunk.tokens, segment.tokens)
        np.testing.assert_array_equal(chunk.loss_weights, segment.loss_weights)
        assert chunk.start_of_document.shape == (2, 3)
        assert chunk.start_of_document.all()
    windows.set_state(plain.get_state())
    assert windows.get_state() == plain.get_state()


@pytest.mark.parametrize(("width", "stride"), [(4, 0), (4, 5)])
def test_an_impossible_stride_is_told(width: int, stride: int):
    with pytest.raises(UserError, match=rf"stride = {stride}.*width = {width}"):
        Windows(numbered([3]), width, stride)


def test_a_width_that_is_not_the_segment_length_is_told():
    with pytest.raises(UserError, match=r"width = 4 has to be BatchConfig\.segment_length, which is 8"):
        next(Windows(numbered([3]), 4, 2).evaluation_batches(1, 8))
