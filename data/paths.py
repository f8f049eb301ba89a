"""Where caches lie when the user does not say, and folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath

from .corpora import STANDARD_LIBRARY
from .errors import DataError


def cache_home() -> pathlib.Path:
    """The user's folder for what can be made again: `memorizing` in XDG_CACHE_HOME, by default `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(home) if home else pathlib.Path.home() / ".cache") / "memorizing"


def default_cache_path(task: str, source: str) -> str:
    """Where the token cache of a Task over a source lies unless the user names a place.

    Sources of the same name in different folders, and the standard libraries of different Pythons, have different
    places.
    """
    if source == STANDARD_LIBRARY:
        return os.fspath(cache_home() / f"{task}-{STANDARD_LIBRARY}-{platform.python_version()}")
    absolute = os.path.abspath(source)
    name = re.sub(r"[^\w.-]+", "-", os.path.basename(absolute))
    return os.fspath(cache_home() / f"{task}-{name}-{hashlib.sha256(absolute.encode()).hexdigest()[:8]}")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in an object store (gs://...), where nothing can be renamed or mapped into memory."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def written_whole(target: str, last: str, replace: bool = False) -> Iterator[pathlib.Path]:
    """A folder to write into that becomes `target` when the block ends well, and vanishes when it does not.

    Args:
      target: the folder to make, local or remote.
      last: name of the file without which a reader takes the folder for unfinished; in an object store it is copied
        after all others.
      replace: whether a folder that is there gives way.

    Raises:
      DataError: `target` cannot be written, found out before the block runs.
    """
    remote = is_remote(target)
    parent = None if remote else os.path.dirname(os.path.abspath(target))
    try:
        if parent is not None:
            os.makedirs(parent, exist_ok=True)
        # Beside the target, since a rename must not cross file systems; the name tells a person what was left by a
        # kill.
        staging = pathlib.Path(tempfile.mkdtemp(prefix=f".{os.path.basename(target)}.partial-", dir=parent))
    except OSError as error:
        raise DataError(f"cannot write {target!r}: {error.strerror}; name another place with --output") from None
    try:
        yield staging
        if remote:
            _upload(staging, epath.Path(target), last)
        else:
            _rename(staging, pathlib.Path(target), last, replace)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def local_copy(path: str, last: str, identity: str) -> str:
    """A local copy of a remote folder, made once a machine.

    Args:
      path: of the remote folder.
      last: as in `written_whole`.
      identity: hash of its content.
    """
    target = cache_home() / "copies" / identity
    if not (target / last).exists():
        with written_whole(os.fspath(target), last) as staging:
            for file in epath.Path(path).iterdir():
                file.copy(staging / file.name)
    return os.fspath(target)


def _upload(staging: pathlib.Path, target: epath.Path, last: str) -> None:
    target.mkdir(parents=True, exist_ok=True)
    (target / last).unlink(missing_ok=True)
    for file in sorted(staging.iterdir(), key=lambda file: (file.name == last, file.name)):
        epath.Path(file).copy(target / file.name, overwrite=True)


def _rename(staging: pathlib.Path, target: pathlib.Path, last: str, replace: bool) -> None:
    staging.chmod(0o755)  # mkdtemp makes it private.
    if replace and target.exists():
        old = staging.with_name(staging.name + ".old")
        target.rename(old)
        staging.rename(target)
        shutil.rmtree(old)
        return
    try:
        staging.rename(target)
    except OSError:
        # Another process was faster; the same source and settings have given it the same folder.
        if not (target / last).exists():
            raise
