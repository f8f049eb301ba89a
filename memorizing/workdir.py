"""The folder of a run: that it can be written, and that it belongs to this experiment."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from etils import epath

from memorizing.batch import text_of
from memorizing.checkpoint import FOLDER
from memorizing.errors import UserError
from memorizing.experiment import Experiment
from memorizing.json_lines import replace_text

# The files that `memorizing.config.runs` opens a run by.
CONFIG, VOCABULARY = "config.gin", "vocabulary.json"

# What may change when a run goes on: its length, the machines it runs on, how rows are laid out.
_MAY_CHANGE = ("batch", "mesh", "loop")


def open_workdir(path: str, experiment: Experiment, config_text: str) -> epath.Path:
    """Creates the folder or checks that it holds this experiment, and writes `config.gin` and `experiment.json` there, with `vocabulary.json` where the data is text.

    Raises:
      UserError: the folder cannot be written, or holds another experiment.
    """
    workdir = resolve(path)
    identity = _identity(experiment)
    record = workdir / "experiment.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Without a checkpoint there is nothing yet that could be mixed up.
        if record.exists() and any(child.name.isdigit() for child in (workdir / FOLDER).glob("*")):
            _check_same(read_record(record), identity, path)
        (workdir / CONFIG).write_text(config_text)
        replace_text(record, json.dumps(identity, indent=2) + "\n")
        if text := text_of(experiment.data):
            described = {name: getattr(text.vocabulary, name) for name in ("name", "size", "digest")}
            replace_text(workdir / VOCABULARY, json.dumps(described, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--workdir={path}: cannot be written ({error.strerror or error})") from error
    return workdir


def read_record(path: epath.Path, *names: str) -> dict[str, Any]:
    """A record that a run has left in its folder.

    Args:
      path: of a JSON file.
      *names: what it has to hold.

    Raises:
      UserError: it is damaged.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError:
        record = None
    if not isinstance(record, dict) or not record.keys() >= {*names}:
        raise UserError(f"{path} is damaged: restore it, or delete it to go on without the check that it is for")
    return record


def resolve(path: str) -> epath.Path:
    """A folder as an absolute path; names of other file systems (gs://...) stay as they are."""
    return epath.Path(path) if "://" in path else epath.Path(path).expanduser().absolute()


def _identity(experiment: Experiment) -> dict[str, Any]:
    """What makes two experiments the same: `{'LMConfig.embed_dim': 64, ...}`."""
    flat: dict[str, Any] = {"data": experiment.data.identity}
    for field in dataclasses.fields(experiment):
        if field.name not in (*_MAY_CHANGE, "data"):
            flat |= _flatten(getattr(experiment, field.name))
    # Once through JSON, so that it compares equal to what is read back.
    return json.loads(json.dumps(flat))


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        kind = type(value).__name__
        flat = {prefix or kind: kind}
        for field in dataclasses.fields(value):
            flat |= _flatten(getattr(value, field.name), f"{prefix or kind}.{field.name}")
        return flat
    if isinstance(value, tuple):
        flat = {f"{prefix}.length": len(value)}
        for index, item in enumerate(value):
            flat |= _flatten(item, f"{prefix}[{index}]")
        return flat
    return {prefix: value}


def _check_same(there: dict[str, Any], here: dict[str, Any], path: str) -> None:
    changed = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if changed:
        name = changed[0]
        more = f" (and {len(changed) - 1} more differences)" if len(changed) > 1 else ""
        raise UserError(
            f"--workdir={path} holds another experiment: {name} is {there.get(name)!r} there and {here.get(name)!r} here{more}; "
            "choose another --workdir"
        )
