"""Whatever is changed, cut off or missing in a checkpoint: it is refused in one line, or what is restored is right.

By `train`, which names `--restore_step`, and by whoever opens a finished run, where it is `--step`.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import random
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import damages
from etils import epath

from memorizing.errors import UserError
from memorizing.runtime.workdir import DamagedRecord, OtherFormat, seal, unseal
from memorizing.training.checkpoint import Checkpointer, Restored, paths, read_arrays
from memorizing.training.state import TrainState

# Orbax leaves tasks of a read that failed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROWS = {"num_rows": 2, "segment_length": 4, "seed": 7, "stream": {"position": [1, 2], "offset": [12, 40]}}
LAYERS = {"layers_00_01": [0, 1]}
RECORD = pathlib.Path("data", "metadata")


def state_at(step: int) -> TrainState:
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params={"layers_00_01": {"kernel": jnp.arange(8.0).reshape(2, 4) + step}},
        buffers={},
        opt_state={"count": jnp.asarray(step, jnp.int32)},
        rng=jnp.asarray([step, 1], jnp.uint32),
        context={"clock": jnp.asarray(step, jnp.int32), "layers_00_01": jnp.arange(6.0).reshape(2, 3)},
    )


ABSTRACT = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), jax.jit(state_at)(0)
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A workdir with the checkpoints 2 and 4."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpointer = Checkpointer(epath.Path(workdir), stacked_layers=LAYERS)
    for step in (2, 4):
        checkpointer.save(state_at(step), ROWS)
    checkpointer.close()
    return workdir


@pytest.fixture
def workdir(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """One of its own, to be damaged."""
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def restore(workdir: pathlib.Path) -> Restored:
    checkpointer = Checkpointer(epath.Path(workdir), stacked_layers=LAYERS)
    try:
        return checkpointer.restore(ABSTRACT)
    finally:
        checkpointer.close()


def told_by_training(workdir: pathlib.Path) -> str:
    """How a training refuses step 4; where it does not, what it gives is what was saved."""
    try:
        restored = restore(workdir)
    except UserError as error:
        check_told(error, "--restore_step=2")
        return str(error)
    assert restored.rows == ROWS
    found, expected = paths(restored.state), paths(state_at(4))
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    return ""


def told_by_readers(workdir: pathlib.Path) -> str:
    """How whoever opens a finished run refuses step 4; where it does not, what is read is what was saved."""
    try:
        arrays = read_arrays(epath.Path(workdir))
    except UserError as error:
        check_told(error, "--step=2")
        return str(error)
    assert arrays["step"] == 4
    np.testing.assert_array_equal(arrays["params/layer_01/kernel"], [8.0, 9.0, 10.0, 11.0])
    return ""


def check_told(error: UserError, advice: str) -> None:
    message = str(error)
    assert "\n" not in message and len(message) < 500
    assert re.search(rf"checkpoints/4 .*; the one before it is that of step 2: .*{advice}$", message), message


def is_refused(workdir: pathlib.Path) -> bool:
    """Whether a reader refuses step 4."""
    return bool(told_by_training(workdir) + told_by_readers(workdir))


def files(workdir: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in (workdir / "checkpoints" / "4").rglob("*") if path.is_file())


# The record: every bit of it.


def test_every_flipped_bit_of_the_record_is_found(workdir: pathlib.Path):
    """Rows, seed, list of contents, step, format: all that the promise covers. White space means nothing."""
    file = workdir / "checkpoints" / "4" / RECORD
    text = file.read_bytes()
    record = unseal(text.decode())
    assert record["rows"] == ROWS and record["step"] == 4
    found = 0
    for changed in damages(file):
        try:
            assert unseal(changed.decode()) == record
        except (DamagedRecord, OtherFormat, UnicodeDecodeError):
            found += 1
    assert found > 8.5 * len(text)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", "3", '{"format": 3}', '{"format": 4}', "[" * 100_000])
def test_what_is_no_record_is_found(text: str):
    with pytest.raises(DamagedRecord):
        unseal(text)


def test_a_record_is_what_json_makes_of_it():
    record = {1: (2, 3), "b": 0.1, "nan": float("nan"), "é": "\ud800"}
    assert str(unseal(json.dumps(seal(record)))) == str(
        {"format": 3, "1": [2, 3], "b": 0.1, "nan": float("nan"), "é": "\ud800"}
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"position": [1, 2]', '"position": [1, 3]'),
        ('"seed": 7', '"seed": 3'),
        ('"stream"', '"strean"'),
        ('"context"', '"contexu"'),
        ('"layers_00_01": [0, 1]', '"layers_00_01": [1, 0]'),
    ],
)
def test_a_change_of_what_the_record_says_is_refused(workdir: pathlib.Path, old: str, new: str):
    """Each of these was once restored, or ended in a traceback."""
    record = workdir / "checkpoints" / "4" / RECORD
    text = record.read_text()
    assert old in text
    record.write_text(text.replace(old, new, 1))
    assert is_refused(workdir)


def test_a_renamed_checkpoint_is_refused(workdir: pathlib.Path):
    (workdir / "checkpoints" / "4").rename(workdir / "checkpoints" / "5")
    with pytest.raises(UserError, match=r"checkpoints/5 was saved as step 4; .*--restore_step=2"):
        restore(workdir)


def test_an_older_step_that_is_damaged_too_is_not_advised(workdir: pathlib.Path):
    for step in (2, 4):
        (workdir / "checkpoints" / str(step) / RECORD).write_text("[]")
    with pytest.raises(UserError, match="there is no older one"):
        restore(workdir)
    with pytest.raises(UserError, match="there is no older one"):
        read_arrays(epath.Path(workdir))


# The files of Orbax.


def test_every_file_that_is_missing_or_empty_is_refused_or_not_needed(workdir: pathlib.Path):
    refused = []
    for file in files(workdir):
        content = file.read_bytes()
        for damage in (file.unlink, lambda file=file: file.write_bytes(b"")):
            damage()
            refused.append(is_refused(workdir))
            file.write_bytes(content)
    assert sum(refused) > 10
    assert not is_refused(workdir)


def test_flips_and_truncations_in_every_file_are_refused_or_change_nothing(workdir: pathlib.Path):
    rng = random.Random(0)
    refused = []
    for file in files(workdir):
        content = file.read_bytes()
        for _ in range(8):
            place = rng.randrange(len(content))
            flipped = content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
            file.write_bytes(rng.choice([flipped, content[:place]]))
            refused.append(is_refused(workdir))
        file.write_bytes(content)
    assert sum(refused) > 40


@pytest.mark.nightly
@pytest.mark.parametrize("bits", [*([bit] for bit in range(8)), []], ids=[*map(str, range(8)), "beginnings"])
def test_every_bit_and_every_beginning_of_every_file(workdir: pathlib.Path, bits: list[int]):
    """Some minutes each. The two readers take turns."""
    readers = itertools.cycle([told_by_training, told_by_readers])
    refused = []
    for file in files(workdir):
        for _ in damages(file, bits=bits, num_beginnings=0 if bits else None):
            refused.append(bool(next(readers)(workdir)))
    assert sum(refused) > len(refused) / 4
    assert not is_refused(workdir)
