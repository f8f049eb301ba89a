"""What the memory of each key head is worth: compared with losses of models whose memories are open otherwise."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from mechanisms import PRETRAINED

from memorizing.benchmarks.reading import heads
from memorizing.config.loading import load_experiment
from memorizing.context import Inputs
from memorizing.errors import UserError
from memorizing.evaluation.finished_run import FinishedRun
from memorizing.models import language_model
from memorizing.models.attention.joint_memory import JointMemoryAttention
from memorizing.models.attention.xl import XLAttention
from memorizing.models.lm_config import LMConfig
from memorizing.models.losses import next_token_nats
from memorizing.synthetic import RepeatedPassages
from memorizing.training.experiment import BatchConfig, Experiment
from memorizing.training.state import init_variables

LENGTH, ROWS = 4, 2
DATA = RepeatedPassages(vocab_size=16, passage_length=6, num_passages=3, num_documents=2)
JOINT = JointMemoryAttention(4 * LENGTH, 2, local=XLAttention(window=2, num_sinks=1), mixing="full")
MODEL = LMConfig(
    DATA.vocab_size,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    head_dim=8,
    mlp_dim=24,
    attention=JOINT.local,
    attention_at=((1, JOINT),),
    **PRETRAINED | {"num_kv_heads": 2},
)


@pytest.fixture(scope="module")
def params() -> Any:
    """Larger than at the start, so that the memory matters."""
    fresh = jax.jit(lambda: init_variables(MODEL, ROWS, LENGTH, jax.random.key(0)))()["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: np.asarray(leaf + rng.normal(size=leaf.shape) / 3, np.float32), fresh)


def run_of(model: LMConfig, params: Any, folder: pathlib.Path) -> FinishedRun:
    experiment = Experiment(DATA, model, BatchConfig(ROWS * LENGTH, LENGTH))
    return FinishedRun(epath.Path(folder), experiment, params, {}, 0, "", "")


def test_it_is_the_change_of_the_loss(params: Any, tmp_path: pathlib.Path):
    """... as in evaluation: without dropout."""
    worth = heads.worth_of_heads(run_of(dataclasses.replace(MODEL, dropout=0.5), params, tmp_path), ROWS)
    assert list(worth) == [1] and worth[1].shape == (2,)
    learned = dataclasses.replace(MODEL, attention_at=((1, dataclasses.replace(JOINT, mixing="learned")),))

    @jax.jit
    def read(openings: jax.Array, batch: Any, context: Any) -> tuple[jax.Array, Any]:
        core = {"alpha": jnp.arctanh(openings), "beta": np.zeros(4, np.float32)}
        layer = params["layer_01"]
        opened = params | {"layer_01": layer | {"attention": layer["attention"] | {"core": core}}}
        inputs = Inputs(batch.tokens[:, 0], batch.is_real[:, 0], batch.start_of_document[:, 0])
        output = language_model.apply(learned, opened, {}, inputs, context)
        nats = next_token_nats(output.logits, batch.targets[:, 0])
        return (nats * batch.loss_weights[:, 0]).sum(), output.context

    def loss(key_head: int, change: float) -> float:
        openings = np.full(4, heads.HALF, np.float32)
        openings[2 * key_head : 2 * key_head + 2] += change
        context, total, count = learned.init_context(ROWS, LENGTH), 0.0, 0.0
        for batch, _, _ in DATA.evaluation_batches(ROWS, LENGTH):
            nats, context = read(openings, batch, context)
            total, count = total + float(nats), count + float(batch.loss_weights.sum())
        return total / count

    step = 0.02
    expected = [(loss(head, -step) - loss(head, step)) / (2 * step) for head in range(2)]
    assert max(map(abs, expected)) > 1e-3, "the test cannot see what it compares"
    np.testing.assert_allclose(worth[1], expected, rtol=0.02, atol=2e-5)


def test_settings_are_those_of_the_run(tmp_path: pathlib.Path):
    """Whatever it has beyond the defaults; layers that differ otherwise are refused."""
    text = heads.settings(MODEL, {1: (0,)})
    experiment, _ = load_experiment(["smoke"], [*_bindings(text), *PARTS])
    assert experiment.model.stack.mechanisms[1] == dataclasses.replace(JOINT, heads=(0,))
    again = heads.settings(
        dataclasses.replace(MODEL, attention_at=((1, dataclasses.replace(JOINT, heads=(0,))),)), {1: (0,)}
    )
    assert again == text
    other = dataclasses.replace(MODEL, attention=XLAttention(window=3))
    with pytest.raises(UserError, match="layers of this run differ"):
        heads.settings(other, {1: (0,)})


def test_settings_give_the_best_heads_a_memory_and_nobody_else():
    worth = {3: np.array([0.1, -0.2, 0.3]), 7: np.array([0.05, 0.2, 0.0]), 9: np.array([-0.1, 0.0, -0.3])}
    chosen = heads.best_heads(worth, 3)
    assert chosen == {3: (0, 2), 7: (1,)}
    assert heads.best_heads(worth, 9) == {3: (0, 2), 7: (0, 1)}, "what is worth nothing gets none"
    text = heads.settings(MODEL, chosen)
    experiment, _ = load_experiment(["smoke"], [*_bindings(text), *PARTS])
    mechanisms = experiment.model.stack.mechanisms
    assert {index: each.heads for index, each in enumerate(mechanisms) if each.memory_size} == chosen
    assert all(type(each) is XLAttention for index, each in enumerate(mechanisms) if index not in chosen)


PARTS = [
    "LMConfig.num_layers=8",
    "LMConfig.num_heads=6",
    "LMConfig.num_kv_heads=3",
    "LMConfig.qk_norm='none'",
]


def _bindings(text: str) -> list[str]:
    """Gin text of bindings, some over several lines."""
    return [line.replace("\n", " ") for line in text.replace("\n    ", " ").replace("\n)", ")").splitlines()]


def test_a_model_without_such_a_memory_is_refused(params: Any, tmp_path: pathlib.Path):
    local = MODEL.without_memory()
    with pytest.raises(UserError, match="no layer whose heads could have a memory"):
        heads.worth_of_heads(run_of(local, params, tmp_path), ROWS)
