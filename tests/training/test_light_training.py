"""Training a few parameters of a finished model: groups of parameters, and low-rank changes of projections."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest
from mechanisms import PRETRAINED, apply_model

from memorizing.batch import Batch
from memorizing.errors import UserError
from memorizing.models.attention.joint_memory import JointMemoryAttention
from memorizing.models.attention.sparse.factorized import SparseAttention
from memorizing.models.layers import Lora
from memorizing.models.lm_config import LMConfig
from memorizing.models.stack.arrays import unstack
from memorizing.synthetic import RepeatedPassages
from memorizing.training.checkpoint import paths
from memorizing.training.experiment import BatchConfig, Experiment
from memorizing.training.optimizer import AdamW, Cosine, ParameterGroup
from memorizing.training.state import init_train_state
from memorizing.training.step import make_train_step
from memorizing.training.transfer import memory_parameters, merge_lora

ROWS, LENGTH, VOCAB = 2, 4, 16
MODEL = LMConfig(
    VOCAB,
    num_layers=3,
    embed_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=8,
    attention_at=((2, JointMemoryAttention(2 * LENGTH, 2, trained_length=64)),),
    lora=Lora(rank=2, projections=("query", "output", "down")),
    **PRETRAINED,
)
MEMORY = ParameterGroup("core/(alpha|beta)$", learning_rate=10.0, decays=False)
LORA = ParameterGroup("/lora_")
FROZEN = ParameterGroup("", learning_rate=0.0)
SCHEDULE = Cosine(peak=0.01, warmup_steps=0, decay_steps=100)


def single(config: LMConfig, params: Any) -> dict[str, np.ndarray]:
    """Parameters by the names of single layers."""
    return unstack({path: np.asarray(leaf) for path, leaf in paths(params).items()}, config.stack.stacked_layers)


def random_batch(rng: np.random.Generator) -> Batch:
    tokens = rng.integers(0, VOCAB, (ROWS, 2, LENGTH), np.int32)
    return Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=2),
        loss_weights=np.ones(tokens.shape, np.float32),
        is_real=np.ones(tokens.shape, bool),
        start_of_document=np.zeros(tokens.shape[:2], bool),
    )


def test_only_what_is_trained_changes_and_costs():
    optimizer = AdamW(SCHEDULE, groups=(MEMORY, LORA, FROZEN))
    batch = BatchConfig(ROWS * LENGTH, LENGTH)
    experiment = Experiment(RepeatedPassages(vocab_size=VOCAB), MODEL, batch, optimizer)
    rule = experiment.make_optimizer()
    before = jax.jit(lambda: init_train_state(MODEL, rule, ROWS, LENGTH, 0))()
    # Two segments: the second one reads what the first one wrote.
    batch = random_batch(np.random.default_rng(0))
    after, _ = jax.jit(make_train_step(MODEL, rule, hold=experiment.hold_frozen))(before, batch)

    old, new = single(MODEL, before.params), single(MODEL, after.params)
    changed = {name for name in old if np.any(old[name] != new[name])}
    # A of a low-rank change has no gradient as long as B is 0, and beta none as long as alpha is.
    assert changed == {name for name in old if name.endswith(("/lora_b", "/alpha"))}
    moments = [path for path, leaf in paths(after.opt_state).items() if leaf.ndim > 1]
    assert moments and not [path for path in moments if "kernel" in path or "table" in path]
    # The first update of Adam is the learning rate.
    np.testing.assert_allclose(np.abs(new["layer_02/attention/core/alpha"]), 10 * 0.01, rtol=1e-3)
    largest = max(np.abs(new[name]).max() for name in changed if name.endswith("lora_b"))
    np.testing.assert_allclose(largest, 0.01, rtol=1e-3)


def test_low_rank_changes_begin_as_none_and_are_merged():
    forward = jax.jit(apply_model, static_argnums=0)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH), np.int32)
    rest = (tokens, np.ones(tokens.shape, bool), np.ones(ROWS, bool), MODEL.init_context(ROWS, LENGTH))
    rule = AdamW(SCHEDULE).build()
    params = jax.jit(lambda: init_train_state(MODEL, rule, ROWS, LENGTH, 0).params)()
    plain, merged = merge_lora(MODEL, params)
    assert plain.lora is None
    expected = forward(plain, merged, *rest).logits
    np.testing.assert_array_equal(forward(MODEL, params, *rest).logits, expected)

    def moved(path: tuple, leaf: jax.Array) -> jax.Array:
        is_change = path[-1].key.startswith("lora_")
        return leaf + jax.random.normal(jax.random.key(leaf.size), leaf.shape) / 4 if is_change else leaf

    params = jax.tree_util.tree_map_with_path(moved, params)
    _, merged = merge_lora(MODEL, params)
    logits = forward(MODEL, params, *rest).logits
    np.testing.assert_allclose(forward(plain, merged, *rest).logits, logits, rtol=0, atol=1e-5)
    assert np.abs(logits - expected).max() > 1e-2


def test_a_finished_model_may_lack_what_is_trained_lightly():
    added = memory_parameters(MODEL, LENGTH)
    assert {name.split("/")[-1] for name in added} == {"alpha", "beta", "lora_a", "lora_b"}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((ParameterGroup("layer_01/"),), r"layer_00/.* and layer_01/.* lie in one array"),
        ((ParameterGroup("core/gate"),), r"ParameterGroup.pattern = 'core/gate': no parameter"),
        ((FROZEN, LORA), "'/lora_': no parameter has such a name that no group before it has"),
    ],
)
def test_groups_that_cannot_work_are_refused(groups: tuple[ParameterGroup, ...], message: str):
    rule = AdamW(SCHEDULE, groups=groups).build(MODEL.stack.stacked_layers)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(functools.partial(init_train_state, MODEL, rule, ROWS, LENGTH, 0))


def test_a_group_may_be_optional():
    """As in a gin file that is named after any run: `models/with_recall` names gates."""
    gates = ParameterGroup("core/gate", learning_rate=10.0, is_optional=True)
    rule = AdamW(SCHEDULE, groups=(gates,)).build(MODEL.stack.stacked_layers)
    jax.eval_shape(functools.partial(init_train_state, MODEL, rule, ROWS, LENGTH, 0))


def test_what_is_no_pattern_and_what_has_no_such_projections_is_refused():
    with pytest.raises(UserError, match=r"ParameterGroup.pattern = '\('"):
        ParameterGroup("(")
    with pytest.raises(UserError, match=r"LMConfig.lora with @SparseAttention\(\)"):
        LMConfig(attention=SparseAttention(), lora=Lora())
