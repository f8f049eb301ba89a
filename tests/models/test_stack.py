"""The stack of layers.

What a layer is called, what it starts from and what it computes does not depend on how layers are scanned.

Also what comes with it: buffers, and random numbers by name.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from mechanisms import LENGTH, ROWS, random_tokens

from memorizing.batch import Batch
from memorizing.context import Inputs, Report, Rngs, Segment
from memorizing.errors import UserError
from memorizing.models import language_model
from memorizing.models.attention.base import Attention, LayerDims
from memorizing.models.attention.full import FullAttention
from memorizing.models.attention.knn import KNNAttention
from memorizing.models.attention.xl import XLAttention
from memorizing.models.lm_config import LMConfig
from memorizing.models.stack.arrays import unstack
from memorizing.runtime.workdir import seal, unseal
from memorizing.training.checkpoint import Checkpointer, paths, read_arrays
from memorizing.training.optimizer import AdamW
from memorizing.training.state import TrainState, init_train_state, init_variables
from memorizing.training.step import make_train_step

FULL, XL = FullAttention(), XLAttention(window=LENGTH)
KNN = KNNAttention(memory_size=2 * LENGTH, num_neighbors=4)
SMALL = LMConfig(vocab_size=32, num_layers=6, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=32)


@dataclasses.dataclass(frozen=True)
class Alone(XLAttention):
    """The same mechanism, in layers that stand alone."""

    stackable: ClassVar[bool] = False


def members(*pattern: Attention, exceptions: tuple = (), num_layers: int = 6) -> list[list[range]]:
    """Layers of each run, by group."""
    config = dataclasses.replace(SMALL, num_layers=num_layers, attention=pattern, attention_at=exceptions)
    return [[group.layers for group in run.groups] for run in config.stack.runs]


def test_what_repeats_is_scanned_whatever_stands_in_it():
    assert members(FULL) == [[range(6)]]
    assert members(FULL, XL) == [[range(0, 6, 2), range(1, 6, 2)]]
    assert members(FULL, FULL, XL) == [[range(0, 6, 3), range(1, 6, 3), range(2, 6, 3)]]
    assert members(FULL, exceptions=((3, KNN),)) == [[range(3)], [range(3, 4)], [range(4, 6)]]
    # After the exception the pattern goes on where it was.
    alone = [[range(index, index + 1)] for index in range(12)]
    after_exception = members(FULL, XL, exceptions=((3, KNN),), num_layers=12)
    assert after_exception == [*alone[:4], [range(4, 12, 2), range(5, 12, 2)]]
    # A memory is never stacked, and a pattern that does not repeat is not scanned.
    assert members(KNN, num_layers=2) == alone[:2]
    assert members(FULL, XL, num_layers=2) == alone[:2]


PATTERNS = ((FULL,), (FULL, XL), (XL, XL, FULL))
EXCEPTIONS = ((), ((2, KNN),), ((0, KNN), (5, KNN)))
# Each pattern and each exception once; the other pairs every night.
ONCE = tuple(zip(PATTERNS, EXCEPTIONS, strict=True))


@pytest.mark.parametrize(
    ("pattern", "exceptions"),
    [
        pytest.param(*pair, marks=() if pair in ONCE else pytest.mark.nightly)
        for pair in itertools.product(PATTERNS, EXCEPTIONS)
    ],
)
def test_names_and_first_parameters_depend_on_the_layer_only(pattern: tuple, exceptions: tuple):
    """A layer has one name, and starts from the same values, wherever a memory sits and whatever is scanned."""

    def by_layer(config: LMConfig) -> dict[str, np.ndarray]:
        variables = jax.jit(lambda: init_variables(config, ROWS, LENGTH, jax.random.key(0)))()
        arrays = {path: np.asarray(leaf) for path, leaf in paths(variables["params"]).items()}
        return unstack(arrays, config.stack.stacked_layers)

    config = dataclasses.replace(SMALL, attention=pattern, attention_at=exceptions)
    ours, theirs = by_layer(config), by_layer(SMALL)
    gates = {f"layer_{index:02d}/attention/core/gate" for index, _ in exceptions}
    assert ours.keys() - theirs.keys() == gates and theirs.keys() <= ours.keys()
    for path, array in theirs.items():
        np.testing.assert_array_equal(ours[path], array, err_msg=path)


@functools.cache
def outputs(config: LMConfig) -> tuple[np.ndarray, dict]:
    """Logits of three segments and the last context, from parameters that depend on their path and layer only."""
    variables = jax.jit(lambda: init_variables(config, ROWS, LENGTH, jax.random.key(0)))()

    @jax.jit
    def run(tokens: jax.Array) -> tuple:
        def segment(context: dict, tokens: jax.Array) -> tuple:
            inputs = Inputs(tokens, jnp.ones(tokens.shape, bool), jnp.zeros(ROWS, bool))
            output = language_model.apply(config, variables["params"], {}, inputs, context)
            return output.context, output.logits

        return jax.lax.scan(segment, config.init_context(ROWS, LENGTH), tokens)

    rng = np.random.default_rng(0)
    context, logits = run(jnp.asarray([random_tokens(rng) for _ in range(3)]))
    return np.asarray(logits), context


@pytest.mark.parametrize("remat", ["none", "layer"])
@pytest.mark.parametrize("others", [(FULL,), (XLAttention(window=4),)], ids=["pattern of two kinds", "of two windows"])
def test_scanned_layers_compute_what_single_ones_do(others: tuple, remat: str):
    scanned = dataclasses.replace(SMALL, attention=(XL, *others), remat=remat, initial_logit_scale=4.0)
    alone = dataclasses.replace(scanned, attention=(Alone(window=LENGTH), *others))
    assert len(scanned.stack.runs) == 1 and len(alone.stack.runs) == 6
    np.testing.assert_allclose(outputs(scanned)[0], outputs(alone)[0], rtol=0, atol=1e-5)


def test_a_pattern_is_not_empty():
    with pytest.raises(UserError, match=r"LMConfig.attention = \(\)"):
        dataclasses.replace(SMALL, attention=())


# Buffers and random numbers.


@dataclasses.dataclass(frozen=True)
class Counting(Attention):
    """Adds noise, and counts in a buffer how many real positions it has seen in training."""

    def layer(self, dims: LayerDims, name: str | None = None) -> nn.Module:
        return CountingLayer(dims, name=name)


class CountingLayer(nn.Module):
    dims: LayerDims

    @nn.compact
    def __call__(self, x: jax.Array, segment: Segment, state: tuple) -> tuple[jax.Array, tuple, Report]:
        count = self.variable("buffers", "count", lambda: jnp.zeros(()))
        if self.is_mutable_collection("buffers") and not self.is_initializing():
            count.value += segment.is_real.sum()
        weight = self.param("weight", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), x.shape[-1:])
        noise = jnp.zeros_like(x)
        if segment.rngs is not None:
            shared = jax.random.normal(segment.rngs.stream("shared"), x.shape[1:])[None]
            own = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(segment.rngs.row_streams("own"))
            noise = shared + own
        return x * weight[None, None] + noise, state, Report(metrics={"noise": noise.sum()})


COUNTING = dataclasses.replace(SMALL, num_layers=4, attention=Counting(), dropout=0.25)
OPTIMIZER = AdamW().build(COUNTING.stack.stacked_layers)


def batch(num_segments: int = 2) -> Batch:
    rng = np.random.default_rng(0)
    tokens, targets = (rng.integers(1, 32, (4, num_segments, LENGTH), np.int32) for _ in range(2))
    is_real = np.ones(tokens.shape, bool)
    is_real[1, -1, 3:] = False
    return Batch(tokens, targets, is_real.astype(np.float32), is_real, np.ones((4, num_segments), bool))


@functools.cache
def step(config: LMConfig, num_microbatches: int = 1) -> Any:
    return jax.jit(make_train_step(config, OPTIMIZER, num_microbatches))


def state(config: LMConfig = COUNTING, seed: int = 0) -> TrainState:
    return jax.jit(lambda: init_train_state(config, OPTIMIZER, 4, LENGTH, seed))()


@pytest.mark.parametrize("num_microbatches", [1, 2, 4])
def test_buffers_are_carried_through_segments_and_microbatches_and_steps(num_microbatches: int):
    after, _ = step(COUNTING, num_microbatches)(state(), batch())
    after, _ = step(COUNTING, num_microbatches)(after, batch())
    counts = paths(after.buffers)["layers_00_03/attention/count"]
    np.testing.assert_array_equal(counts, np.full(4, 2 * batch().is_real.sum()))


def test_buffers_are_frozen_in_evaluation_and_reset_by_nothing():
    after, _ = step(COUNTING)(state(), batch())
    segment = jax.tree.map(lambda leaf: leaf[:, 0], batch())
    inputs = Inputs(segment.tokens, segment.is_real, segment.start_of_document)
    output = language_model.apply(COUNTING, after.params, after.buffers, inputs, after.context)
    jax.tree.map(np.testing.assert_array_equal, output.buffers, after.buffers)
    assert jax.tree.leaves(after.buffers)[0].all()


def test_buffers_are_saved_with_checksums_and_come_back(tmp_path: pathlib.Path):
    after, _ = step(COUNTING)(state(), batch())
    workdir = epath.Path(tmp_path)
    checkpointer = Checkpointer(workdir, stacked_layers=COUNTING.stack.stacked_layers)
    checkpointer.save(after, {})
    restored = checkpointer.restore(jax.eval_shape(lambda: after)).state
    checkpointer.close()
    jax.tree.map(np.testing.assert_array_equal, restored.buffers, after.buffers)
    # Read layer by layer, as another model reads them.
    arrays = read_arrays(workdir, only=("buffers/",))
    assert arrays.keys() == {f"buffers/layer_{index:02d}/attention/count" for index in range(4)}
    record = tmp_path / "checkpoints" / "1" / "data" / "metadata"
    data = unseal(record.read_text())
    data["checksums"]["state"]["buffers/layers_00_03/attention/count"] ^= 1
    record.write_text(json.dumps(seal(data)))
    with pytest.raises(UserError, match=r"checksum.*buffers/layers_00_03/attention/count"):
        read_arrays(workdir, only=("buffers/",))


def test_recomputed_layers_update_their_buffers_once():
    recomputed = dataclasses.replace(COUNTING, remat="layer")
    for config in (COUNTING, recomputed):
        after, _ = step(config)(state(config), batch())
        np.testing.assert_array_equal(jax.tree.leaves(after.buffers)[0], np.full(4, batch().is_real.sum()))


@pytest.mark.parametrize("variant", ["microbatches", "recomputed", "alone"])
def test_random_numbers_are_a_function_of_seed_step_segment_layer_row_and_name(variant: str):
    """Dropout and noise are the same numbers however the batch is split, and whatever is recomputed or scanned."""
    config, num_microbatches = COUNTING, 1
    if variant == "microbatches":
        num_microbatches = 2
    elif variant == "recomputed":
        config = dataclasses.replace(COUNTING, remat="layer")
    else:
        config = dataclasses.replace(COUNTING, attention=CountingAlone())
    optimizer = AdamW().build(config.stack.stacked_layers)
    fresh = jax.jit(lambda: init_train_state(config, optimizer, 4, LENGTH, 0))()
    expected, expected_metrics = step(COUNTING)(state(), batch())
    found, metrics = jax.jit(make_train_step(config, optimizer, num_microbatches))(fresh, batch())
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-6)
    ours, theirs = (
        unstack({path: np.asarray(leaf) for path, leaf in paths(each.params).items()}, of.stack.stacked_layers)
        for each, of in ((found, config), (expected, COUNTING))
    )
    for path, array in theirs.items():
        np.testing.assert_allclose(ours[path], array, rtol=0, atol=2e-5, err_msg=path)


class CountingAlone(Counting):
    stackable: ClassVar[bool] = False


def test_random_numbers_differ_where_they_should():
    def losses(seed: int, times: int) -> list[float]:
        now, values = state(seed=seed), []
        # The same parameters again and again: only the step differs.
        for _ in range(times):
            after, metrics = step(COUNTING)(now, batch())
            values.append(float(metrics["loss"]))
            now = now.replace(step=after.step)
        return values

    first = losses(0, 3)
    assert len(set(first)) == 3 and first == losses(0, 3)
    rngs = Rngs(jax.random.key(0), jnp.arange(2))
    keys = [
        rngs.stream("a"),
        rngs.stream("b"),
        rngs.of_layer(0).stream("a"),
        rngs.of_layer(1).stream("a"),
        *rngs.row_streams("a"),
        *rngs.row_streams("b"),
    ]
    assert len({tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}) == len(keys)


# The parts of a layer.


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ({"norm": "layer"}, {"attention_norm/bias", "mlp_norm/bias"}),
        ({"mlp": "gated_silu"}, {"mlp/gate/kernel"}),
        ({"mlp": "gated_gelu"}, {"mlp/gate/kernel"}),
        ({"mlp": "gelu"}, set()),
        ({"mlp": "quick_gelu"}, set()),
        ({"initial_outputs": "by_depth"}, set()),
        ({"qk_norm": "none"}, set()),
        ({"positions": "none"}, set()),
    ],
)
def test_parts_of_a_layer_are_choices(parts: dict, names: set[str]):
    """Each changes what a layer computes, and has the parameters that it needs and no others."""

    def of_layer(config: LMConfig) -> set[str]:
        variables = jax.eval_shape(lambda: init_variables(config, ROWS, LENGTH, jax.random.key(0)))
        return {path.partition("/")[2] for path in paths(variables["params"]) if path.startswith("layers")}

    config = dataclasses.replace(SMALL, **parts)
    assert of_layer(config) - of_layer(SMALL) == names
    gone = {"qk_norm": {"attention/scale"}, "positions": {"attention/core/bias/table"}}
    assert of_layer(SMALL) - of_layer(config) == gone.get(next(iter(parts)), set())
    assert np.abs(outputs(config)[0] - outputs(SMALL)[0]).max() > 1e-3


def test_a_memory_needs_keys_of_one_length():
    with pytest.raises(UserError, match=r"LMConfig.qk_norm = 'none'.*external memory"):
        dataclasses.replace(SMALL, attention_at=((1, KNN),), qk_norm="none")


def test_equal_layers_that_stand_alone_are_traced_once(monkeypatch: pytest.MonkeyPatch):
    """Where their parameters are created: of a pretrained model with a memory everywhere there are dozens."""
    traced, init_state = [], KNNAttention.init_state

    def counted(mechanism: KNNAttention, *arguments: Any) -> Any:
        traced.append(mechanism)
        return init_state(mechanism, *arguments)

    monkeypatch.setattr(KNNAttention, "init_state", counted)
    attention = KNNAttention(memory_size=24, num_neighbors=3)
    config = LMConfig(
        vocab_size=7, num_layers=4, embed_dim=12, num_heads=3, head_dim=4, mlp_dim=20, attention=attention
    )
    variables = language_model.abstract_variables(config, 1, 8)
    assert sum(name.startswith("layer_") for name in variables["params"]) == 4
    assert len(traced) == 1
