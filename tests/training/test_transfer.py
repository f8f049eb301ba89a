"""Starting from another run: into a larger memory, and from a model without one (the paper has a section on each).

What a memory adds starts fresh, everything else is the other run's.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from mechanisms import LENGTH as SEGMENT
from mechanisms import Mechanism

from memorizing.errors import UserError
from memorizing.models.attention import MECHANISMS
from memorizing.models.attention.external import MemoryAttention
from memorizing.models.attention.knn import KNNAttention
from memorizing.models.lm_config import LMConfig
from memorizing.models.memory.continuous_cache import ContinuousCache
from memorizing.models.recurrent_tokens import RecurrentTokens
from memorizing.models.stack.arrays import unstack
from memorizing.training import transfer
from memorizing.training.checkpoint import Checkpointer, paths
from memorizing.training.optimizer import Adafactor
from memorizing.training.state import TrainState, init_train_state

LENGTH = 4
MEMORY = KNNAttention(memory_size=8, num_neighbors=2)
PLAIN = LMConfig(vocab_size=16, num_layers=4, embed_dim=8, num_heads=2, head_dim=4, mlp_dim=12)
# Layers 0 and 1 are stacked, 2 and 3 stand alone; without the memory all four are one stack.
WITH_MEMORY = dataclasses.replace(PLAIN, attention_at=((2, MEMORY),))


@functools.cache
def state(config: LMConfig, seed: int) -> TrainState:
    optimizer = Adafactor().build(config.stack.stacked_layers)
    return jax.jit(lambda: init_train_state(config, optimizer, 2, LENGTH, seed))()


def saved(config: LMConfig, workdir: pathlib.Path) -> tuple[str, TrainState]:
    """A checkpoint of step 7 whose every array is recognisable."""
    numbers = iter(range(1, 1000))
    there = jax.tree.map(lambda leaf: leaf + jnp.asarray(next(numbers), leaf.dtype), state(config, 0))
    there = there.replace(step=jnp.asarray(7, jnp.int32))
    checkpointer = Checkpointer(epath.Path(workdir), stacked_layers=config.stack.stacked_layers)
    checkpointer.save(there, {})
    checkpointer.close()
    return str(workdir), there


def by_layer(config: LMConfig, tree: Any) -> dict[str, np.ndarray]:
    """Arrays of single layers by path."""
    arrays = {path: np.asarray(leaf) for path, leaf in paths(tree).items()}
    return unstack(arrays, config.stack.stacked_layers)


def test_into_a_larger_memory(tmp_path: pathlib.Path):
    workdir, there = saved(WITH_MEMORY, tmp_path)
    larger = dataclasses.replace(WITH_MEMORY, attention_at=((2, dataclasses.replace(MEMORY, memory_size=32)),))
    started = transfer.start_from(workdir, state(larger, 1), larger, LENGTH)
    for name in ("params", "opt_state", "step"):
        for path, leaf in paths({name: getattr(there, name)}).items():
            np.testing.assert_array_equal(paths({name: getattr(started, name)})[path], leaf, err_msg=path)
    assert started.context["layer_02"].memory.keys.shape[2] == 32
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(started.context)), "the context starts empty"


def test_from_a_model_without_memory_layer_by_layer(tmp_path: pathlib.Path):
    """The layers are stacked otherwise; the gate, and it alone, is new."""
    workdir, there = saved(PLAIN, tmp_path)
    started = transfer.start_from(workdir, state(WITH_MEMORY, 1), WITH_MEMORY, LENGTH)
    ours, theirs = (
        by_layer(config, {"params": tree.params, "opt_state": tree.opt_state})
        for config, tree in ((WITH_MEMORY, started), (PLAIN, there))
    )
    new = {path for path in ours if path not in theirs}
    assert {path for path in new if path.startswith("params")} == {"params/layer_02/attention/core/gate"}
    assert all(path.endswith("/core/gate") for path in new)
    np.testing.assert_array_equal(ours["params/layer_02/attention/core/gate"], 0)
    for path in ours.keys() - new:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
    # Each layer got its own: in the stack they differ.
    kernels = [ours[f"params/layer_{layer:02d}/mlp/up/kernel"] for layer in range(4)]
    assert all(np.any(kernels[0] != kernel) for kernel in kernels[1:])


@pytest.mark.parametrize("with_optimizer", [True, False])
@pytest.mark.parametrize(
    ("change", "own"),
    [
        ({"attention_at": ((2, MEMORY),)}, "layer_02/attention/core/gate"),
        ({"recurrent_tokens": RecurrentTokens(2)}, "recurrent_tokens/"),
        ({"continuous_cache": ContinuousCache(8, num_neighbors=2, mixing="learned")}, "continuous_cache/"),
    ],
    ids=["memory", "recurrent tokens", "continuous cache"],
)
def test_a_model_goes_on_without_what_carried_its_context(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, change: dict, own: str, with_optimizer: bool
):
    """Layer by layer the same, also where the layers are stacked otherwise; what stays behind is told."""
    config = dataclasses.replace(PLAIN, **change)
    workdir, there = saved(config, tmp_path)
    started = transfer.start_from(workdir, state(PLAIN, 1), PLAIN, LENGTH, with_optimizer)
    assert f"going on without its memory: params/{own}" in capsys.readouterr().out
    ours = by_layer(PLAIN, {"params": started.params})
    theirs = by_layer(config, {"params": there.params})
    left_behind = theirs.keys() - ours.keys()
    assert left_behind and all(path.startswith(f"params/{own}") for path in left_behind)
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


def test_every_memory_names_what_it_adds():
    """What stays behind is found by these names."""
    for mechanism in MECHANISMS:
        if not issubclass(mechanism, MemoryAttention):
            continue
        config = dataclasses.replace(PLAIN, attention_at=((2, mechanism(memory_size=512)),))
        names = {f"layer_02/attention/core/{name}" for name in mechanism.own_parameters}
        assert transfer.memory_parameters(config, 8) == names != set()


def test_a_start_from_another_run_knows_segments_of_any_mechanism(mechanism: Mechanism):
    """Some need segments of some length, with an external memory or without."""
    config = mechanism.config
    names = transfer.memory_parameters(config, SEGMENT)
    assert bool(names) >= any(each.memory_size for each in config.stack.mechanisms)


def test_the_optimizer_may_start_anew(tmp_path: pathlib.Path):
    workdir, there = saved(PLAIN, tmp_path)
    fresh = state(PLAIN, 1)
    started = transfer.start_from(workdir, fresh, PLAIN, LENGTH, with_optimizer=False)
    assert started.step == 0
    assert started.opt_state is fresh.opt_state
    np.testing.assert_array_equal(started.params["embedder"]["table"], there.params["embedder"]["table"])


@pytest.mark.parametrize(
    ("change", "parameter"),
    [
        ({"mlp_dim": 20}, r"params/layer_00/mlp/down/kernel.*\(12, 8\).*\(20, 8\)"),
        ({"num_layers": 5}, "params/layer_04/"),
        ({"vocab_size": 20}, r"params/embedder/table.*\(16, 8\).*\(20, 8\)"),
    ],
)
def test_a_mismatch_names_the_parameter(tmp_path: pathlib.Path, change: dict, parameter: str):
    workdir, _ = saved(PLAIN, tmp_path)
    with pytest.raises(UserError, match=rf"LoopConfig.start_from.*({parameter})"):
        changed = dataclasses.replace(PLAIN, **change)
        transfer.start_from(workdir, state(changed, 1), changed, LENGTH)


def test_a_model_with_fewer_layers_does_not_take_a_part_of_another(tmp_path: pathlib.Path):
    """A mismatch of anything but the memory is an error (issue), also one that would load."""
    workdir, _ = saved(PLAIN, tmp_path)
    with pytest.raises(UserError, match=r"params/layer_03/"):
        fewer = dataclasses.replace(PLAIN, num_layers=3)
        transfer.start_from(workdir, state(fewer, 1), fewer, LENGTH)


@pytest.mark.parametrize("folder", ["", "checkpoints"])
def test_a_folder_without_checkpoint_is_told(tmp_path: pathlib.Path, folder: str):
    (tmp_path / "run" / folder).mkdir(parents=True)
    with pytest.raises(UserError, match=r"checkpoint"):
        transfer.start_from(str(tmp_path / "run"), state(PLAIN, 1), PLAIN, LENGTH)
