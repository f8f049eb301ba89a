"""A run that goes on equals the run that never stopped.

Parameters, optimizer, randomness, context and the position of every row are saved and restored as one unit. Damage is
found before it is trained on; the message names the damaged checkpoint, and the one before it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import signal
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from memorizing.batch import EvaluationBatch
from memorizing.errors import UserError
from memorizing.evaluation.train_and_evaluate import train_and_evaluate
from memorizing.models.attention.knn import KNNAttention
from memorizing.models.lm_config import LMConfig
from memorizing.runtime.sharding import MeshConfig
from memorizing.runtime.workdir import seal
from memorizing.synthetic import RepeatedPassages
from memorizing.training import checkpoint
from memorizing.training.checkpoint import Checkpointer, paths, read_arrays
from memorizing.training.experiment import BatchConfig, Experiment, LoopConfig
from memorizing.training.identity import open_workdir
from memorizing.training.loop import Preempted
from memorizing.training.optimizer import AdamW, Cosine
from memorizing.training.program import Program
from memorizing.training.state import TrainState

ROWS, LENGTH = 8, 4
EXPERIMENT = Experiment(
    data=RepeatedPassages(vocab_size=32, passage_length=6, num_passages=4, num_documents=2),
    model=LMConfig(
        32, 2, 16, 2, 8, 32, attention_at=((1, KNNAttention(memory_size=16, num_neighbors=4)),), dropout=0.1
    ),
    batch=BatchConfig(tokens_per_step=ROWS * LENGTH, segment_length=LENGTH),
    optimizer=AdamW(Cosine(peak=1e-2, warmup_steps=2, decay_steps=100)),
    mesh=MeshConfig(data=8),
    loop=LoopConfig(num_steps=6, log_every=1, checkpoint_every=2),
)


def with_loop(**fields: Any) -> Experiment:
    return dataclasses.replace(EXPERIMENT, loop=dataclasses.replace(EXPERIMENT.loop, **fields))


class Run:
    """The step of a tiny model on one device, and the states it went through."""

    def __init__(self, num_steps: int) -> None:
        mesh = MeshConfig().make_mesh(jax.devices()[:1])
        self.program = Program(EXPERIMENT, mesh)
        self.stream = EXPERIMENT.data.train_batches(ROWS, range(ROWS), 1, LENGTH, 0)
        state = self.program.init()
        # Copies: the state itself is donated to the next step.
        self.states, self.positions = [copy(state)], [self.stream.get_state()]
        for _ in range(num_steps):
            state = self.step(state)
            self.states.append(copy(state))
            self.positions.append(self.stream.get_state())

    def step(self, state: TrainState) -> TrainState:
        return self.program.step(state, next(self.stream))[0]

    def put(self, step: int) -> TrainState:
        return jax.device_put(self.states[step], jax.tree.map(lambda leaf: leaf.sharding, self.program.abstract_state))


def copy(state: TrainState) -> TrainState:
    return jax.tree.map(np.array, jax.device_get(state))


def assert_same(actual: TrainState, expected: TrainState) -> None:
    actual, expected = paths(actual), paths(expected)
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(np.asarray(actual[path]), leaf, err_msg=path)


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(num_steps=8)


@pytest.fixture
def saved(run: Run, tmp_path: pathlib.Path) -> epath.Path:
    """A workdir with the checkpoints 2, 4 and 6."""
    workdir = epath.Path(tmp_path)
    checkpointer = Checkpointer(workdir)
    for step in (2, 4, 6):
        checkpointer.save(run.put(step), {"segment": step})
    checkpointer.close()
    return workdir


@pytest.fixture
def checkpointer(saved: epath.Path):
    checkpointer = Checkpointer(saved)
    yield checkpointer
    checkpointer.close()


# One unit, restored exactly.


def test_what_is_restored_continues_bit_for_bit(run: Run, checkpointer: Checkpointer):
    restored = checkpointer.restore(run.program.abstract_state)
    assert_same(restored.state, run.states[6])
    assert restored.rows == {"segment": 6}
    run.stream.set_state(run.positions[6])
    state = restored.state
    for step in (7, 8):
        state = run.step(state)
        assert_same(state, run.states[step])


def test_saving_may_overlap_with_steps_that_donate_the_state(run: Run, tmp_path: pathlib.Path):
    """Every checkpoint holds its own step, although the next step overwrites the state during the save."""
    checkpointer = Checkpointer(epath.Path(tmp_path), keep=100)
    run.stream.set_state(run.positions[0])
    state = run.put(0)
    for _ in range(8):
        state = run.step(state)
        checkpointer.save(state, {})
    checkpointer.wait()
    assert checkpointer.steps == list(range(1, 9))
    for step in reversed(range(1, 9)):
        restored = checkpointer.restore(run.program.abstract_state, step)
        assert_same(restored.state, run.states[step])
    checkpointer.close()


def test_keeps_the_newest(run: Run, tmp_path: pathlib.Path):
    """By number, not by name: 10 comes after 9."""
    checkpointer = Checkpointer(epath.Path(tmp_path), keep=2)
    steps = range(4, 12)
    for step, name in zip((0, 1, 2, 3, 4, 5, 6, 6), steps, strict=True):
        state = dataclasses.replace(run.put(step), step=jnp.asarray(name, jnp.int32))
        checkpointer.save(state, {})
    checkpointer.wait()
    assert checkpointer.steps == [10, 11]
    checkpointer.close()


def test_restores_onto_another_mesh(run: Run, checkpointer: Checkpointer):
    """The machines of the continuation need not be those of the start."""
    sharded = Program(EXPERIMENT, MeshConfig(data=2, model=2, memory=2).make_mesh())
    restored = checkpointer.restore(sharded.abstract_state)
    assert_same(restored.state, run.states[6])
    assert jax.tree.map(lambda leaf: leaf.sharding, restored.state) == jax.tree.map(
        lambda leaf: leaf.sharding, sharded.abstract_state
    )


def test_the_context_is_left_out_where_it_is_not_wanted(run: Run, checkpointer: Checkpointer, tmp_path: pathlib.Path):
    """Not saved, or not fitting: the rest is restored all the same."""
    asked = []
    restored = checkpointer.restore(run.program.abstract_state, keeps_context=lambda rows: asked.append(rows))
    assert asked == [{"segment": 6}]
    assert restored.state.context is None
    assert_same(restored.state, run.states[6].replace(context=None))

    small = Checkpointer(epath.Path(tmp_path / "small"), save_context=False)
    small.save(run.put(6), {"segment": 6})
    small.wait()
    restored = small.restore(run.program.abstract_state)
    assert_same(restored.state, run.states[6].replace(context=None))
    assert not (tmp_path / "small" / "checkpoints" / "6" / "context").exists()
    small.close()


def test_going_back_drops_what_came_later(run: Run, checkpointer: Checkpointer):
    """Else the next start would continue from a step of the abandoned run."""
    assert_same(checkpointer.restore(run.program.abstract_state, 2).state, run.states[2])
    assert checkpointer.steps == [2]


def test_a_step_that_is_not_there_is_told(run: Run, checkpointer: Checkpointer):
    with pytest.raises(UserError, match=r"--restore_step=3.*\[2, 4, 6\]"):
        checkpointer.restore(run.program.abstract_state, 3)
    assert checkpointer.steps == [2, 4, 6], "nothing may be deleted"


def test_no_checkpoint_is_a_fresh_start(run: Run, tmp_path: pathlib.Path):
    checkpointer = Checkpointer(epath.Path(tmp_path))
    assert checkpointer.restore(run.program.abstract_state) is None
    checkpointer.close()


# Damage.


def data_files(step: epath.Path, item: str) -> list[pathlib.Path]:
    """The files that hold arrays, the larger ones."""
    files = [file for file in pathlib.Path(step / item).rglob("d/*") if file.is_file()]
    return sorted(files, key=lambda file: -file.stat().st_size)[:4]


@pytest.mark.parametrize("item", ["state", "context"])
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damage_names_the_step_and_the_one_before(run: Run, saved: epath.Path, item: str, damage: str):
    """Wherever the damage is. Where it hits bytes of Orbax's files that are never read, the restored state is right."""
    caught = 0
    for file in data_files(saved / "checkpoints" / "6", item):
        content = file.read_bytes()
        for where in (0.1, 0.4, 0.7, 0.99):
            place = int(where * len(content))
            flipped = content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
            file.write_bytes(flipped if damage == "flip" else content[:place])
            try:
                assert_same(restore_from(saved, run), run.states[6])
            except UserError as error:
                caught += 1
                assert re.search(r"checkpoints/6 .*--restore_step=4", str(error))
                assert len(str(error)) < 500 and "\n" not in str(error)
        file.write_bytes(content)
    assert caught > 4, "the test does no damage"
    assert Checkpointer(saved).steps == [2, 4, 6], "the damaged one may still be of use"
    assert_same(restore_from(saved, run, step=4), run.states[4])


def test_a_damaged_only_checkpoint_says_that_there_is_no_other(run: Run, tmp_path: pathlib.Path):
    checkpointer = Checkpointer(epath.Path(tmp_path))
    checkpointer.save(run.put(1), {})
    checkpointer.close()
    for file in data_files(epath.Path(tmp_path) / "checkpoints" / "1", "state"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoints/1 .*no older one"):
        restore_from(epath.Path(tmp_path), run)


def test_what_orbax_does_not_notice_the_checksums_do(run: Run, saved: epath.Path):
    """Here it is the record that is wrong: to the comparison that is the same as a wrong array."""
    record = pathlib.Path(saved / "checkpoints" / "6" / "data" / "metadata")
    data = json.loads(record.read_text())
    data["checksums"]["state"]["params/final_norm/scale"] ^= 1
    del data["sha256"]
    record.write_text(json.dumps(seal(data)))
    with pytest.raises(UserError, match=r"checkpoints/6 .*checksum.*params/final_norm/scale.*--restore_step=4"):
        restore_from(saved, run)


def test_checkpoints_of_the_first_edition_are_refused_in_one_line(run: Run, saved: epath.Path):
    """They did not say what they were, and had other parameters: to read them would end in a traceback, or worse."""
    for step in (2, 4, 6):
        record = pathlib.Path(saved / "checkpoints" / str(step) / "data" / "metadata")
        data = json.loads(record.read_text())
        del data["format"], data["sha256"]
        record.write_text(json.dumps(data))
    for read in (lambda: restore_from(saved, run), lambda: checkpoint.read_arrays(saved)):
        with pytest.raises(UserError, match=r"checkpoints/6 was written by another version of memorizing") as told:
            read()
        assert "\n" not in str(told.value)


def test_a_workdir_of_the_first_edition_is_refused_in_one_line(tmp_path: pathlib.Path):
    experiment = Experiment(data=RepeatedPassages())
    open_workdir(str(tmp_path), experiment, "")
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    open_workdir(str(tmp_path), experiment, "")
    record = tmp_path / "experiment.json"
    described = json.loads(record.read_text())
    del described["format"], described["sha256"]
    record.write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"another version of memorizing.*choose another --workdir"):
        open_workdir(str(tmp_path), experiment, "")


def restore_from(workdir: epath.Path, run: Run, step: int | None = None) -> TrainState:
    checkpointer = Checkpointer(workdir)
    try:
        return checkpointer.restore(run.program.abstract_state, step).state
    finally:
        checkpointer.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32", "uint8"])
def test_every_flipped_bit_changes_the_checksum(dtype: str):
    """Every bit of every element, one at a time."""
    array = np.random.default_rng(0).integers(0, 256, (5, 7, jnp.dtype(dtype).itemsize), np.uint8)
    # [N, N] bytes, each row with another one changed
    places = np.eye(array.size, dtype=np.uint8)
    flipped = np.concatenate([array.reshape(-1) ^ (places << bit) for bit in range(8)])
    # [8 N, 5, 7]
    arrays = flipped.view(dtype).reshape(-1, 5, 7)
    checksums = jax.vmap(checkpoint._checksum)(jnp.asarray(arrays))
    assert not np.any(np.asarray(checksums) == checkpoint._checksum(jnp.asarray(array.view(dtype)[..., 0])))


@given(
    array=hnp.arrays(np.float32, (3, 5), elements=st.sampled_from([-1.5, -1.0, 0.0, 1.0, 1.5, 2.0])),
    first=st.integers(0, 14),
    second=st.integers(0, 14),
)
def test_two_exchanged_values_change_the_checksum(array: np.ndarray, first: int, second: int):
    """Also a value and its negative, which differ by one bit."""
    exchanged = array.copy().reshape(-1)
    exchanged[[first, second]] = exchanged[[second, first]]
    exchanged = exchanged.reshape(array.shape)
    if (array != exchanged).any():
        assert checkpoint._checksum(jnp.asarray(array)) != checkpoint._checksum(jnp.asarray(exchanged))


# The loop around it.


def test_a_run_in_two_parts_is_the_run_in_one(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Here it was stopped in an evaluation, which it then does again.

    With other rows, or without a saved context, it goes on with what it has, and says so.
    """
    experiment = with_loop(evaluate_every=4)
    train_and_evaluate(experiment, str(tmp_path / "whole"))
    read = RepeatedPassages.evaluation_batches

    def interrupted(*arguments: Any) -> Iterator[EvaluationBatch]:
        for batch in read(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch, pytest.raises(Preempted, match="saved at step 4"):
        patch.setattr(RepeatedPassages, "evaluation_batches", interrupted)
        train_and_evaluate(experiment, str(tmp_path / "parts"))
    train_and_evaluate(experiment, str(tmp_path / "parts"))
    assert "continuing from step 4" in capsys.readouterr().out
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    logged = [[(line["step"], line["kind"], line["loss"]) for line in map(json.loads, part)] for part in lines]
    assert logged[0] == logged[1] and (4, "evaluation") in [line[:2] for line in logged[0]]
    whole, parts = (read_arrays(epath.Path(tmp_path / name)) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for path, array in whole.items():
        np.testing.assert_array_equal(array, parts[path], err_msg=path)

    wider = dataclasses.replace(
        with_loop(num_steps=7), batch=dataclasses.replace(EXPERIMENT.batch, tokens_per_step=2 * ROWS * LENGTH)
    )
    train_and_evaluate(wider, str(tmp_path / "parts"))
    out = capsys.readouterr().out
    assert "continuing from step 6" in out
    assert "memories are empty, every row starts a document" in out
