"""The control "memory of another document": what is read is another document's memory, and nothing else of it."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from mechanisms import apply_model, init_params
from test_evaluation import LENGTH, VOCAB, Documents, Permutations, successor_model

from memorizing.batch import EvaluationBatch
from memorizing.evaluation.another_document import OtherDocuments
from memorizing.evaluation.evaluator import Evaluation, Evaluator
from memorizing.models.attention.knn import KNNAttention
from memorizing.models.attention.xl import XLAttention
from memorizing.models.lm_config import LMConfig
from memorizing.models.losses import next_token_nats
from memorizing.models.memory.continuous_cache import CONTINUOUS_CACHE, ContinuousCache
from memorizing.runtime.sharding import MeshConfig

T = 8
LOCAL = XLAttention(window=4)
MODEL = LMConfig(
    VOCAB,
    2,
    16,
    2,
    8,
    32,
    LOCAL,
    ((1, KNNAttention(2 * T, 4, LOCAL)),),
    continuous_cache=ContinuousCache(4 * T, num_neighbors=4),
    initial_logit_scale=4.0,
)


@pytest.fixture(scope="module")
def params() -> dict:
    return jax.jit(lambda: init_params(MODEL, 2, T, jax.random.key(0)))()


def evaluate(config: LMConfig, params: dict, source: Documents, num_rows: int, length: int) -> Evaluation:
    mesh = MeshConfig().make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        return Evaluator(config, num_rows, length, mesh).run(params, {}, source, "memory_of_another_document")


def by_hand(params: dict, source: Documents) -> list[float]:
    """Nats of every document, read alone while the next one is read beside it, over and over."""
    apply = jax.jit(lambda *inputs: apply_model(MODEL, params, *inputs)[:2])
    segments: list[list[EvaluationBatch]] = [[] for _ in source.lengths]
    for segment in source.evaluation_batches(1, T):
        segments[segment.document[0]].append(segment)
    nats = []
    for document, own_segments in enumerate(segments):
        own = other = MODEL.init_context(1, T)
        others, total = segments[(document + 1) % len(segments)], 0.0
        for index, segment in enumerate(own_segments):
            states = {
                "layer_01": own["layer_01"].replace(
                    memory=other["layer_01"].memory, last_segment=other["layer_01"].last_segment
                ),
                CONTINUOUS_CACHE: own[CONTINUOUS_CACHE].replace(
                    memory=other[CONTINUOUS_CACHE].memory, last_segment=other[CONTINUOUS_CACHE].last_segment
                ),
            }
            batch, beside = segment.batch, others[index % len(others)].batch
            start = np.array([index == 0])
            logits, own = apply(batch.tokens[:, 0], batch.is_real[:, 0], start, own | states)
            _, other = apply(beside.tokens[:, 0], beside.is_real[:, 0], start, other)
            total += float((next_token_nats(logits, batch.targets[:, 0]) * batch.loss_weights[:, 0]).sum())
        nats.append(total)
    return nats


@pytest.mark.parametrize("num_rows", [1, 3])
def test_every_document_reads_what_the_next_one_has_written(params: dict, num_rows: int):
    """Of documents that run alone in the end, too, and of such that are longer than the other one."""
    source = Documents()
    evaluation = evaluate(MODEL, params, source, num_rows, T)
    expected = by_hand(params, source)
    np.testing.assert_allclose(evaluation.nats, expected, rtol=1e-5)
    mesh = MeshConfig().make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        own = Evaluator(MODEL, num_rows, T, mesh).run(params, {}, source)
    np.testing.assert_array_equal(own.tokens, evaluation.tokens)
    differs = np.abs(own.nats - evaluation.nats) > 1e-4
    # Those of one segment read no memory.
    np.testing.assert_array_equal(differs, np.array(source.lengths) > T)


def test_a_memory_of_another_document_does_not_remember_this_one():
    config, params = successor_model(4 * LENGTH)
    source = Permutations(VOCAB, passage_length=28, num_passages=8, num_documents=3)
    evaluation = evaluate(config, params, source, 3, LENGTH)
    loss = evaluation.nats_by_position / evaluation.tokens_by_position
    assert (loss[evaluation.bin_starts >= 2 * LENGTH] > np.log(VOCAB)).all()


def test_the_cache_alone_is_left_where_the_memories_of_layers_are_cleared(params: dict):
    """The baseline: what the cache gives in the place of the model's memory."""
    without = dataclasses.replace(MODEL, attention_at=((1, KNNAttention(T, 4, LOCAL)),))
    mesh = MeshConfig().make_mesh(jax.devices()[:1])

    def nats(config: LMConfig, ablation: str) -> np.ndarray:
        with jax.set_mesh(mesh):
            return Evaluator(config, 3, T, mesh).run(params, {}, Documents(), ablation).nats

    only_cache, nothing = nats(MODEL, "memory_of_layers_cleared"), nats(MODEL, "memory_cleared")
    assert np.abs(only_cache - nothing).max() > 1e-2
    # Whatever size the layer's memory has.
    np.testing.assert_allclose(nats(without, "memory_of_layers_cleared"), only_cache, rtol=1e-6)


def test_one_document_has_no_other():
    source = Documents((23,), (46,))
    with pytest.raises(ValueError, match="two held-out documents"):
        OtherDocuments(source, 1, T)
