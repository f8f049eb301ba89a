"""The folder of a run: its name, the files that describe the run, and records that tell when they were changed.

A record is a dict in JSON that says in which format it is and holds the digest of all that it says.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from memorizing.errors import UserError
from memorizing.runtime.json_lines import is_remote, read_lines, replace_text

# The files that describe a run: its configuration as gin text, and records.
CONFIG = "config.gin"
EXPERIMENT = "experiment.json"
VOCABULARY = "vocabulary.json"
# A line a step and kind, see `MetricWriter`; what every line has.
METRICS = "metrics.jsonl"
METRIC_NAMES = ("step", "kind")
# What befell it, and what TensorBoard reads.
EVENTS = "events.jsonl"
TENSORBOARD = "events"
# The folder of its checkpoints, one a step.
CHECKPOINTS = "checkpoints"

# Of records, and so of workdirs and checkpoints. 1 (which did not say so) had other parameters, 2 no digests.
FORMAT = 3

_DIGEST = "sha256"
# The last line of a configuration.
_DIGEST_LINE = "\n# The digest of these lines, sha256: "


class DamagedRecord(Exception):
    """A record is not what was written."""


class OtherFormat(Exception):
    """A record was written by another version of the library. The message says so, without naming the record."""


# What reads and writes object stores, and the extra that it comes with.
_STORES = {"gs": ("gcsfs", "pip install 'memorizing[gcs]'"), "s3": ("s3fs", "pip install s3fs")}


def resolve(path: str) -> epath.Path:
    """A folder as an absolute path; names of other file systems (gs://...) stay as they are.

    Raises:
      UserError: what reads and writes that file system is not installed.
    """
    scheme, separator, _ = path.partition("://")
    if not separator:
        return epath.Path(path).expanduser().absolute()
    if scheme in _STORES:
        library, how = _STORES[scheme]
        if importlib.util.find_spec(library) is None:
            raise UserError(f"{path}: to read and write {scheme}:// takes {library}: {how}")
    see_what_others_write()
    return epath.Path(path)


def see_what_others_write() -> None:
    """Has object stores list what is there now: a file that another machine has changed was read to its old length.

    It also keeps etils from reading them through TensorFlow, which this library never loads.
    """
    import fsspec.config

    os.environ.setdefault("EPATH_USE_TF", "false")
    for scheme in ("gs", "gcs", "s3", "s3a"):
        fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON-able record with its format and its digest, for `unseal`."""
    # Once through JSON, so that it is what will be read.
    content = json.loads(json.dumps({"format": FORMAT, **record}))
    return {**content, _DIGEST: _digest_of(content)}


def unseal(text: str) -> dict[str, Any]:
    """What was sealed, from its JSON text, its format included.

    Raises:
      DamagedRecord: it is not what was written.
      OtherFormat: it was written by another version of the library.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        raise DamagedRecord from None
    if not isinstance(record, dict):
        raise DamagedRecord
    digest = record.pop(_DIGEST, None)
    if digest == _digest_of(record):
        return record
    found = record.get("format", 1)
    if record and digest is None and found in range(1, FORMAT):
        raise OtherFormat(f"was written by another version of memorizing (format {found}, this one reads {FORMAT})")
    raise DamagedRecord


def write_record(path: epath.Path, record: Mapping[str, Any]) -> None:
    """Writes a record, sealed: the old or the new one is there as a whole."""
    replace_text(path, json.dumps(seal(record), indent=2) + "\n")


def read_record(path: epath.Path) -> dict[str, Any]:
    """A record that a run has written to its folder.

    Raises:
      UserError: it is damaged, or of another version.
    """
    try:
        return unseal(path.read_text())
    except (DamagedRecord, UnicodeDecodeError):
        raise UserError(
            f"{path} is damaged: restore it, or delete it to go on without the check that it is for"
        ) from None
    except OtherFormat as error:
        raise UserError(f"{path} {error}: go on with that version, or choose another --workdir") from None


def not_yet_there(workdir: epath.Path) -> list[str]:
    """Of the files and folders that a run writes before its first step, those that its folder does not have."""
    names = (CONFIG, EXPERIMENT, VOCABULARY, METRICS, EVENTS, TENSORBOARD, CHECKPOINTS)
    return [name for name in names if not (workdir / name).exists()]


def take_back(workdir: epath.Path, names: Sequence[str]) -> None:
    """Removes what a run has written to its folder, unless anything was trained there, or measured.

    Args:
      workdir: the run's folder.
      names: what was `not_yet_there` before the run: anything else is not its own.
    """
    if checkpoint_steps(workdir) or read_lines(workdir / METRICS):
        return
    for path in (workdir / name for name in names):
        if path.is_dir():
            path.rmtree()
        else:
            path.unlink(missing_ok=True)


def checkpoint_steps(workdir: epath.Path) -> list[int]:
    """The steps of which a run's folder has checkpoints, complete or not."""
    return [int(child.name) for child in (workdir / CHECKPOINTS).glob("*") if child.name.isdigit()]


def checkpoint_record(folder: epath.Path, step: int) -> epath.Path:
    """Where a checkpoint says what it holds: a record. `folder`: of the checkpoints of a run."""
    # What Orbax writes of `JsonSave`.
    return folder / str(step) / "data" / "metadata"


def is_complete(folder: epath.Path, step: int) -> bool:
    """Whether a checkpoint was written to its end. `folder`: of the checkpoints of a run."""
    # Elsewhere it has its name only then; an object store has no folders that could be renamed.
    return not is_remote(folder) or (folder / str(step) / "commit_success.txt").exists()


def write_config(workdir: epath.Path, text: str) -> None:
    """Writes the configuration of a run; it is a gin file that tells when it was changed."""
    replace_text(workdir / CONFIG, f"{text}{_DIGEST_LINE}{_sha256(text)}\n")


def read_config(workdir: epath.Path) -> str:
    """The configuration that a run was written with.

    Raises:
      UserError: the file is not what was written.
    """
    path = workdir / CONFIG
    # The lines as they are: gin does not care how they end, the digest does.
    text, _, digest = path.read_bytes().decode(errors="replace").rpartition(_DIGEST_LINE)
    if digest != f"{_sha256(text)}\n":
        raise UserError(
            f"{path} is not as it was written: restore it (the command that trained the run writes it again), and "
            "change what is in it by --gin.NAME=VALUE"
        )
    return text


def _digest_of(record: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(record, sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
