"""What a model is for: what a document showed long ago is remembered.

And the evaluation that says so counts every token once.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mechanisms import apply_model, init_params
from paces import pass_at_once

from memorizing.batch import Batch, EvaluationBatch
from memorizing.evaluation.evaluator import Evaluator
from memorizing.evaluation.reading import num_rows_side_by_side
from memorizing.models.attention.knn import KNNAttention
from memorizing.models.attention.xl import XLAttention
from memorizing.models.lm_config import LMConfig
from memorizing.models.losses import next_token_nats
from memorizing.runtime.sharding import MeshConfig
from memorizing.synthetic import RepeatedPassages

VOCAB, LENGTH = 32, 16


@dataclasses.dataclass(frozen=True)
class Permutations(RepeatedPassages):
    """Passages in which every token has one successor."""

    def document(self, split: str, index: int) -> np.ndarray:
        passage = np.random.default_rng(index).permutation(np.arange(1, self.vocab_size, dtype=np.int32))
        return np.resize(passage[: self.passage_length], self.document_length)


def successor_model(memory_size: int) -> tuple[LMConfig, dict]:
    """A model whose weights are written by hand: to predict what followed the token when it was last seen.

    The first half of the activations says which token this is, the second which one was before it. Layer 0 fills the
    second half: its bias looks one position back. Layer 1 asks for a position whose previous token is this one, and
    answers with its token; the gate takes the memory's answer where there is any.
    """
    config = LMConfig(
        vocab_size=VOCAB,
        num_layers=2,
        embed_dim=2 * VOCAB,
        num_heads=1,
        head_dim=VOCAB,
        mlp_dim=1,
        attention=XLAttention(window=LENGTH),
        attention_at=((1, KNNAttention(memory_size, num_neighbors=4)),),
    )
    identity, nothing = np.eye(VOCAB), np.zeros((VOCAB, VOCAB))
    this, previous = np.concatenate([identity, nothing]), np.concatenate([nothing, identity])

    def layer(query: np.ndarray, key: np.ndarray, output: np.ndarray, bias: np.ndarray, **core: np.ndarray) -> dict:
        kernels = {"query": query[:, None], "key": key[:, None], "value": this[:, None], "output": output.T[None]}
        attention = {name: {"kernel": kernel} for name, kernel in kernels.items()}
        norm = {"scale": np.ones(2 * VOCAB)}
        return {
            "attention_norm": norm,
            "attention": attention | {"scale": np.full(1, 50.0), "core": {"bias": {"table": bias}, **core}},
            "mlp_norm": norm,
            "mlp": {"up": {"kernel": np.zeros((2 * VOCAB, 1))}, "down": {"kernel": np.zeros((1, 2 * VOCAB))}},
        }

    one_back = np.eye(32)[None, 1]
    params = {
        "embedder": {"table": this.T},
        # Norms make the activations of one token sqrt(2 V) large.
        "layer_00": layer(0 * this, 0 * this, previous / np.sqrt(2 * VOCAB), one_back),
        "layer_01": layer(this, previous, 5 * this, 0 * one_back, gate=np.full(1, 100.0)),
        "final_norm": {"scale": np.full(2 * VOCAB, 20.0)},
    }
    return config, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


@pytest.mark.parametrize(
    ("memory_size", "ablation", "remembers"),
    [(4 * LENGTH, "none", True), (4 * LENGTH, "memory_cleared", False), (LENGTH, "none", False)],
    ids=["memory", "memory cleared", "memory shorter than the distance"],
)
def test_the_memory_is_what_predicts_later_passages(memory_size: int, ablation: str, remembers: bool):
    """A passage comes again after 28 tokens, segments have 16.

    Without the memory, or with one that has forgotten, these weights are worse than a guess.
    """
    config, params = successor_model(memory_size)
    source = Permutations(VOCAB, passage_length=28, num_passages=8, num_documents=3)
    mesh = MeshConfig().make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        evaluation = Evaluator(config, 3, LENGTH, mesh).run(params, {}, source, ablation)
    loss = evaluation.nats_by_position / evaluation.tokens_by_position
    late = evaluation.bin_starts >= 2 * LENGTH
    assert late.sum() > 1
    assert (loss[late] < 0.01).all() if remembers else (loss[late] > np.log(VOCAB)).all()
    assert loss[0] > np.log(VOCAB), "nobody knows the first passage"


@dataclasses.dataclass(frozen=True)
class Documents:
    """Held-out documents of given lengths, read in groups: rows of a group that run out early hold padding."""

    lengths: tuple[int, ...] = (23, 5, 16, 1, 40)
    document_bytes: tuple[int, ...] = (46, 10, 32, 2, 80)

    def document(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(1, VOCAB, self.lengths[index], np.int32)

    def evaluation_batches(self, num_rows: int, segment_length: int) -> Iterator[EvaluationBatch]:
        for first in range(0, len(self.lengths), num_rows):
            group = range(first, min(first + num_rows, len(self.lengths)))
            for offset in range(0, max(self.lengths[index] for index in group), segment_length):
                targets = np.zeros((num_rows, 1, segment_length), np.int32)
                tokens, is_real, document = targets.copy(), targets.astype(bool), np.full(num_rows, -1)
                for row, index in enumerate(group):
                    if offset < self.lengths[index]:
                        document[row] = index
                    text = np.concatenate([[0], self.document(index)])
                    part = text[offset + 1 : offset + 1 + segment_length]
                    targets[row, 0, : len(part)] = part
                    tokens[row, 0, : len(part)] = text[offset : offset + len(part)]
                    is_real[row, 0, : len(part)] = True
                starts = np.full((num_rows, 1), offset == 0)
                batch = Batch(tokens, targets, is_real.astype(np.float32), is_real, starts)
                yield EvaluationBatch(batch, document, np.full(num_rows, offset))


def test_evaluation_is_that_of_one_document_after_another():
    """Whole documents, from an empty context, each token once; by document and by position."""
    local = XLAttention(window=4)
    model = LMConfig(VOCAB, 2, 16, 2, 8, 32, local, ((1, KNNAttention(16, 4, local)),), initial_logit_scale=4.0)
    length, source = 8, Documents()
    params = jax.jit(lambda: init_params(model, 2, length, jax.random.key(0)))()

    @jax.jit
    def segment(tokens: jax.Array, targets: jax.Array, context: dict) -> tuple:
        real, start = targets != 0, jnp.zeros(1, bool)
        logits, context, *_ = apply_model(model, params, tokens, real, start, context)
        return jnp.where(real, next_token_nats(logits, targets), 0), context

    nats = []
    for index in range(len(source.lengths)):
        text = np.concatenate([[0], source.document(index)])
        padded = np.pad(text, (0, -(len(text) - 1) % length))
        context = model.init_context(1, length)
        nats.append([])
        for offset in range(0, len(padded) - 1, length):
            tokens, targets = padded[None, offset : offset + length], padded[None, offset + 1 : offset + 1 + length]
            loss, context = segment(tokens, targets, context)
            nats[-1].extend(np.asarray(loss[0], np.float64))

    mesh = MeshConfig().make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        evaluation = Evaluator(model, 2, length, mesh).run(params, {}, source)
    np.testing.assert_array_equal(evaluation.tokens, source.lengths)
    np.testing.assert_allclose(evaluation.nats, [sum(document) for document in nats], rtol=1e-5)
    np.testing.assert_array_equal(evaluation.bin_starts, [0, 8, 16, 32])
    for index, (first, last) in enumerate([(0, 8), (8, 16), (16, 32), (32, 64)]):
        expected = [value for document in nats for value in document[first:last]]
        np.testing.assert_allclose(evaluation.nats_by_position[index], sum(expected), rtol=1e-5)
        assert evaluation.tokens_by_position[index] == sum(min(max(n - first, 0), last - first) for n in source.lengths)
    values, total = evaluation.values(), sum(map(sum, nats))
    assert values["loss"] == pytest.approx(total / 85, rel=1e-5)
    assert values["perplexity"] == pytest.approx(np.exp(total / 85), rel=1e-4)
    assert values["bits_per_byte"] == pytest.approx(total / np.log(2) / 170, rel=1e-5)


@pytest.mark.parametrize("ablation", ["none", "memory_of_another_document"])
def test_figures_do_not_depend_on_how_many_segments_are_passed_at_once(ablation: str, monkeypatch: pytest.MonkeyPatch):
    """Documents of other lengths, that end and begin anywhere among them."""
    model = LMConfig(VOCAB, 1, 16, 2, 8, 32, XLAttention(window=4), ((0, KNNAttention(16, 4)),))
    length, source = 8, Documents()
    params = jax.jit(lambda: init_params(model, 2, length, jax.random.key(0)))()
    mesh = MeshConfig().make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        evaluator = Evaluator(model, 2, length, mesh)
        pass_at_once(monkeypatch, 1)
        expected = list(evaluator.read(params, {}, source, ablation))
        for at_once in (2, 3, 8):
            pass_at_once(monkeypatch, at_once)
            jax.tree.map(np.testing.assert_array_equal, list(evaluator.read(params, {}, source, ablation)), expected)
    assert np.std(expected[0].scores.nats) > 0


@pytest.mark.parametrize(
    ("sizes", "at_most", "devices", "num_rows"),
    [
        # The longest document takes as long as two rows need for the others.
        ([58_742, 17_178, 17_101, 13_074, 9_536], 32, 1, 2),
        ([58_742, 17_178, 17_101, 13_074, 9_536], 32, 2, 2),
        ([58_742, 17_178, 17_101, 13_074, 9_536], 32, 4, 4),
        ([58_742, 17_178, 17_101, 13_074, 9_536], 1, 1, 1),
        # One row less, and one of them would read two.
        ([100, 101, 99, 98, 102, 100], 32, 1, 6),
        ([100] * 1000, 8, 1, 8),
        ([1] * 2000 + [10_000], 32, 1, 2),
        ([0, 0], 8, 1, 2),
        (None, 8, 1, 5),
        (None, 8, 4, 8),
    ],
)
def test_no_more_rows_are_read_than_are_busy(sizes: list[int] | None, at_most: int, devices: int, num_rows: int):
    number = 5 if sizes is None else len(sizes)
    source = types.SimpleNamespace(
        num_eval_documents=number, document_bytes=None if sizes is None else np.array(sizes, np.int64)
    )
    mesh = types.SimpleNamespace(shape={"data": devices})
    assert num_rows_side_by_side(source, at_most, mesh) == num_rows
