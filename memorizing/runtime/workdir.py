"""The folder of a run: its name, the files that describe the run, and how their records are read."""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from memorizing.errors import UserError

# The files that describe a run: its configuration as gin text, and records in JSON.
CONFIG = "config.gin"
EXPERIMENT = "experiment.json"
VOCABULARY = "vocabulary.json"


def resolve(path: str) -> epath.Path:
    """A folder as an absolute path; names of other file systems (gs://...) stay as they are."""
    return epath.Path(path) if "://" in path else epath.Path(path).expanduser().absolute()


def read_record(path: epath.Path, *names: str) -> dict[str, Any]:
    """A record that a run has written to its folder.

    Args:
      path: of a JSON file.
      *names: keys that it has to have.

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
