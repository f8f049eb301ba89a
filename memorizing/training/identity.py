"""Which experiment a folder belongs to: a run goes on only in the folder of the same experiment."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from etils import epath

from memorizing.batch import text_of
from memorizing.errors import UserError
from memorizing.runtime.workdir import (
    EXPERIMENT,
    FORMAT,
    VOCABULARY,
    checkpoint_steps,
    read_record,
    resolve,
    write_config,
    write_record,
)
from memorizing.training.experiment import Experiment

# The parts that may change when a run goes on: its length, the machines it runs on, how rows are laid out. Of the loop
# the seed may not.
_MAY_CHANGE = ("batch", "mesh", "loop")


def open_workdir(path: str, experiment: Experiment, config_text: str, restore_step: int | None = None) -> epath.Path:
    """Creates the folder of a run, or checks that it holds this experiment, and writes the files that describe the run.

    These are `config.gin`, `experiment.json`, and `vocabulary.json` where the data is text.

    Args:
      path: of the folder.
      experiment: that is to be run there.
      config_text: its resolved configuration.
      restore_step: from which it is to go on; None for the newest checkpoint.

    Raises:
      UserError: the folder cannot be written, or holds another experiment, or a longer run.
    """
    workdir = resolve(path)
    record = workdir / EXPERIMENT
    described = identity(experiment)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Without a checkpoint there is nothing yet that could be mixed up.
        steps = checkpoint_steps(workdir)
        if record.exists() and steps:
            _check_same(read_record(record), described, path)
        # The files that follow say what was run.
        _check_length(steps if restore_step is None else [restore_step], experiment.loop.num_steps, path)
        write_config(workdir, config_text)
        write_record(record, described)
        text = text_of(experiment.data)
        if text is not None:
            vocabulary = text.vocabulary
            write_record(
                workdir / VOCABULARY,
                {"name": vocabulary.name, "size": vocabulary.size, "digest": vocabulary.digest},
            )
    except OSError as error:
        raise UserError(f"--workdir={path}: cannot be written ({error.strerror or error})") from error
    return workdir


def identity(experiment: Experiment) -> dict[str, Any]:
    """What makes two experiments the same: `{'data': ..., 'LMConfig.embed_dim': 64, ...}`, JSON-able."""
    flat: dict[str, Any] = {"format": FORMAT, "data": experiment.data.identity, "LoopConfig.seed": experiment.loop.seed}
    for field in dataclasses.fields(experiment):
        if field.name not in (*_MAY_CHANGE, "data"):
            flat |= _flatten(getattr(experiment, field.name))
    # Once through JSON, so that it compares equal to what is read back.
    return json.loads(json.dumps(flat))


def _check_length(steps: list[int], num_steps: int, path: str) -> None:
    """Raises UserError where a run has already done more than it is to do."""
    if steps and max(steps) > num_steps:
        raise UserError(
            f"LoopConfig.num_steps = {num_steps}, but the run in --workdir={path} has done {max(steps)}: give at least "
            "as many, an earlier --restore_step, or another --workdir"
        )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of dataclasses and tuples, by their path."""
    if dataclasses.is_dataclass(value):
        kind = type(value).__name__
        name = prefix or kind
        flat: dict[str, Any] = {name: kind}
        for field in dataclasses.fields(value):
            flat |= _flatten(getattr(value, field.name), f"{name}.{field.name}")
        return flat
    if isinstance(value, tuple):
        flat = {f"{prefix}.length": len(value)}
        for index, item in enumerate(value):
            flat |= _flatten(item, f"{prefix}[{index}]")
        return flat
    return {prefix: value}


def _check_same(there: dict[str, Any], here: dict[str, Any], path: str) -> None:
    """Raises UserError unless two identities are equal; the message names the first difference."""
    names = {**there, **here}
    changed = [name for name in names if there.get(name) != here.get(name)]
    if changed:
        first = changed[0]
        more = f" (and {len(changed) - 1} more differences)" if len(changed) > 1 else ""
        raise UserError(
            f"--workdir={path} holds another experiment: "
            f"{first} is {there.get(first)!r} there and {here.get(first)!r} here{more}; choose another --workdir"
        )
