"""Checkpoints: parameters, optimizer, step, randomness, context and every row's position as one unit, with checksums.

Built on Orbax's CheckpointManager: asynchronous, atomic (a step is there as a whole or not at all), any file system
that etils.epath can name. Orbax does not notice a flipped bit; the checksums do. They lie in the checkpoint's record,
with the positions of the rows and a list of all that was saved, and the record has a digest of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from memorizing.array_typing import Checksum, Tree
from memorizing.errors import UserError, first_line
from memorizing.models.stack.arrays import unstack
from memorizing.runtime.failures import find_lost_infrastructure
from memorizing.runtime.workdir import CHECKPOINTS as FOLDER
from memorizing.runtime.workdir import DamagedRecord, OtherFormat, checkpoint_record, is_complete, seal, unseal
from memorizing.training.state import TrainState


class NotFinite(Exception):
    """A value that was to be saved is not finite."""


class _Damaged(Exception):
    """A checkpoint is not what was saved. The message goes on from its name."""


class Restored(NamedTuple):
    """What a checkpoint gave back.

    Attributes:
      state: the training state; its context is None if none was saved, or none that fits this run.
      rows: what was saved as `rows`: the position of every row's stream.
    """

    state: TrainState
    rows: dict[str, Any]


class Checkpointer:
    """Saves and restores the checkpoints of one workdir."""

    def __init__(
        self,
        workdir: epath.Path,
        keep: int = 3,
        save_context: bool = True,
        stacked_layers: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """
        Args:
          workdir: the run's folder; checkpoints lie in `workdir/checkpoints/STEP`.
          keep: how many of the newest steps stay.
          save_context: whether the context is saved. It can be far larger than the parameters (a memory of 262144 for
            256 rows: 256 GiB); without it a run continues with empty memories at document starts.
          stacked_layers: of the model: see `Stack`; it is saved with the arrays, so that they can be read layer by
            layer.
        """
        _quiet_orbax()
        self._folder = workdir / FOLDER
        self._save_context = save_context
        self._stacked_layers = {name: list(layers) for name, layers in (stacked_layers or {}).items()}
        if jax.process_index() == 0:
            # What a killed process was writing: the run holds the workdir, so that no other one lives. Orbax's
            # own cleaning runs in a thread, which fails if the program ends.
            for unfinished in self._folder.glob("*.orbax-checkpoint-tmp"):
                unfinished.rmtree()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=("state", "context", "data"))

    @property
    def steps(self) -> list[int]:
        """Complete steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, rows: dict[str, Any], file_bytes: int | None = None) -> None:
        """Starts saving; the state may be donated as soon as this returns.

        Args:
          state: its step names the checkpoint. A step that is there already is not saved again.
          rows: JSON-able position of every row's stream.
          file_bytes: about the size of the files, where memory is short: as much of the arrays is gathered before it is
            written. None: Orbax's own, which takes as much memory again as the arrays.

        Raises:
          NotFinite: a parameter or the optimizer's state is not; nothing is saved.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        parts = _parts(state)
        if not self._save_context:
            del parts["context"]
        # An update can overflow although the loss and the gradient that it came from did not.
        broken = [path for path, is_finite in _by_path(_is_finite, parts["state"]).items() if not is_finite]
        if broken:
            raise NotFinite(f"step {step}: {broken[0]} is no longer finite")
        record = {
            "step": step,
            "rows": rows,
            "stacked_layers": self._stacked_layers,
            "checksums": {name: _named_checksums(part) for name, part in parts.items()},
        }
        items: dict[str, Any] = {name: ocp.args.StandardSave(part) for name, part in parts.items()}
        if file_bytes is not None:
            # The same format; only this form has the setting.
            items = {
                name: ocp.args.PyTreeSave(part, ocdbt_target_data_file_size=file_bytes) for name, part in parts.items()
            }
        self._manager.save(step, args=ocp.args.Composite(**items, data=ocp.args.JsonSave(seal(record))))

    def restore(
        self,
        abstract: TrainState,
        step: int | None = None,
        keeps_context: Callable[[dict[str, Any]], bool] = lambda _: True,
    ) -> Restored | None:
        """The newest checkpoint, or None if there is none.

        Args:
          abstract: shapes, dtypes and shardings of the state to restore.
          step: another than the newest step; later ones are then deleted, since the run goes on from here.
          keeps_context: told `rows`, says whether the saved context fits this run.

        Raises:
          UserError: there is no such step, or it is damaged; the message names an older one.
        """
        # A save that was begun counts.
        self.wait()
        if step is not None and step not in self.steps:
            raise UserError(f"--restore_step={step}: {self._folder} has the steps {self.steps or 'none'}")
        chosen = step if step is not None else self._manager.latest_step()
        if chosen is None:
            return None
        with _told(self._folder, chosen, self.steps, "--restore_step", self._give_up):
            restored = self._read(chosen, abstract, keeps_context)
        for later in [other for other in self.steps if other > chosen]:
            self._manager.delete(later)
        return restored

    def wait(self) -> None:
        """Returns when the last save is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def _give_up(self) -> None:
        # Of several processes only this one may have failed: nothing that waits for the others.
        if jax.process_count() == 1:
            self.close()

    def _read(self, step: int, abstract: TrainState, keeps_context: Callable[[dict[str, Any]], bool]) -> Restored:
        record = _read_record(self._folder, step)
        parts = _parts(abstract)
        if "context" not in record["checksums"] or not keeps_context(record["rows"]):
            del parts["context"]
        items = {name: ocp.args.StandardRestore(part) for name, part in parts.items()}
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        for name in parts:
            _check(found[name], record["checksums"][name])
        state = dataclasses.replace(abstract, **found["state"], context=found.get("context"))
        return Restored(state, record["rows"])


def read_arrays(workdir: epath.Path, step: int | None = None, only: tuple[str, ...] = ("",)) -> dict[str, np.ndarray]:
    """Everything but the context of a checkpoint, as host arrays of single layers by path, of any model.

    Paths are `params/embedder/table`, `params/layer_03/mlp/up/kernel`, `step` and so on. Changes nothing there.

    Args:
      workdir: the run's folder.
      step: which checkpoint; None for the newest.
      only: beginnings of the paths that are wanted, such as `params/`; the rest is not read.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    _quiet_orbax()
    folder = workdir / FOLDER
    options = ocp.CheckpointManagerOptions(read_only=True)
    handlers = {"state": ocp.PyTreeCheckpointHandler()}
    if not folder.exists():
        raise UserError(f"{workdir} has no checkpoint: there is no folder {folder}")
    with ocp.CheckpointManager(folder, options=options, item_handlers=handlers) as manager:
        steps = sorted(manager.all_steps())
        if not steps:
            raise UserError(f"{folder} has no checkpoint")
        if step is not None and step not in steps:
            raise UserError(f"{folder} has no step {step}, but {', '.join(map(str, steps))}")
        step = steps[-1] if step is None else step
        with _told(folder, step, steps, "--step"):
            record = _read_record(folder, step)
            arrays = _read_wanted(manager, step, only)
            checksums = record["checksums"]["state"]
            _check(arrays, {path: checksum for path, checksum in checksums.items() if path.startswith(only)})
    return unstack(arrays, record["stacked_layers"])


def saved_steps(workdir: epath.Path) -> list[int]:
    """The complete checkpoints of a run, oldest first, of which the record is right."""
    folder = workdir / FOLDER
    with contextlib.suppress(OSError):
        steps = sorted(int(child.name) for child in folder.glob("*") if child.name.isdigit())
        return [step for step in steps if is_complete(folder, step) and _has_good_record(folder, step)]
    return []


def weights_digest(workdir: epath.Path, step: int) -> str:
    """What tells the parameters and buffers of a checkpoint from others: a digest of their checksums, hexadecimal."""
    checksums = _read_record(workdir / FOLDER, step)["checksums"]["state"]
    weights = {path: checksum for path, checksum in checksums.items() if path.startswith(("params/", "buffers/"))}
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _told(
    folder: epath.Path, step: int, steps: Iterable[int], flag: str, give_up: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Reads a checkpoint in the block, and tells the user what is wrong with it, and which older one is not.

    Args:
      folder: of the checkpoints.
      step: what is read.
      steps: that are there.
      flag: with which the user can name another one.
      give_up: called before.

    Raises:
      UserError: it cannot be read.
    """
    name = folder / str(step)
    try:
        yield
    except OtherFormat as error:
        give_up()
        raise UserError(
            f"checkpoint {name} {error}: go on with that version, or train anew in another --workdir"
        ) from None
    except Exception as error:
        if find_lost_infrastructure(error, has_progressed=False):
            raise
        give_up()
        what = str(error) if isinstance(error, _Damaged) else f"cannot be read ({first_line(error)[:120]})"
        older = max((other for other in steps if other < step and _has_good_record(folder, other)), default=None)
        advice = (
            "there is no older one" if older is None else f"the one before it is that of step {older}: {flag}={older}"
        )
        raise UserError(f"checkpoint {name} {what}; {advice}") from error


def _read_record(folder: epath.Path, step: int) -> dict[str, Any]:
    """What a checkpoint says of itself: its step, rows, layers, and the checksums of all arrays, by part and path.

    Raises:
      _Damaged: it is not what was saved.
      OtherFormat: it was saved by another version of the library.
    """
    path = checkpoint_record(folder, step)
    try:
        record = unseal(path.read_text())
    except (DamagedRecord, UnicodeDecodeError):
        raise _Damaged(f"is not as it was saved ({path.relative_to(folder / str(step))} is damaged)") from None
    if record["step"] != step:
        raise _Damaged(f"was saved as step {record['step']}")
    return record


def _has_good_record(folder: epath.Path, step: int) -> bool:
    try:
        _read_record(folder, step)
    except (_Damaged, OtherFormat, OSError):
        return False
    return True


def _check(arrays: Tree, expected: Mapping[str, int]) -> None:
    """Raises _Damaged unless these are the arrays that were saved."""
    found = _named_checksums(arrays)
    for path in sorted({*found, *expected}):
        if found.get(path) != expected.get(path):
            raise _Damaged(f"does not have the checksum it was saved with ({path})")


def _read_wanted(manager: ocp.CheckpointManager, step: int, only: tuple[str, ...]) -> dict[str, np.ndarray]:
    structure = manager.item_metadata(step)["state"].tree
    wanted = [path.startswith(only) for path in paths(structure)]
    leaves, treedef = jax.tree.flatten(structure)
    item = treedef.unflatten([leaf if want else ocp.PLACEHOLDER for leaf, want in zip(leaves, wanted, strict=True)])
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), structure)
    restore = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy)
    found = manager.restore(step, args=ocp.args.Composite(state=restore))["state"]
    return {path: leaf for path, leaf in paths(found).items() if path.startswith(only)}


def _quiet_orbax() -> None:
    """Orbax tells of every save at level INFO, and of one that failed in tracebacks; the error itself reaches us ..."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # ... and leaves tasks of a failed read to an event loop that is no longer there.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def paths(tree: Tree) -> dict[str, Any]:
    """The leaves of a tree by their path, written with slashes."""
    return {
        "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _parts(state: TrainState) -> dict[str, Tree]:
    return {
        "state": {
            "step": state.step,
            "params": state.params,
            "buffers": state.buffers,
            "opt_state": state.opt_state,
            "rng": state.rng,
        },
        "context": state.context,
    }


def _named_checksums(tree: Tree) -> dict[str, int]:
    return {path: int(checksum) for path, checksum in _by_path(_checksum, tree).items()}


def _by_path(of_leaf: Callable[[jax.Array], jax.Array], tree: Tree) -> dict[str, np.ndarray]:
    """What a function says of every leaf.

    Leaves are taken one by one, each waited for: what is computed on the way can be as large, and many small programs
    that reduce over a mesh at once can block each other.
    """
    return {path: jax.device_get(of_leaf(leaf)) for path, leaf in paths(tree).items()}


@jax.jit
def _is_finite(leaf: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(leaf))


@jax.jit
def _checksum(array: jax.Array) -> Checksum:
    """Sum of the array's elements, their bits mixed with their place by a bijection.

    Any single flipped bit changes it, and an exchange of two elements changes it almost certainly.
    """
    if array.dtype == jnp.bool_:
        bits = array.astype(jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(array, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize])
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis in range(array.ndim):
        place = place * jnp.uint32(1_000_003) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    # The finalizer of MurmurHash3.
    mixed = bits.astype(jnp.uint32) ^ (place * jnp.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
