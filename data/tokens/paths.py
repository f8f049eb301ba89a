"""Where vocabularies and token caches are when the user names no place, and local copies of remote ones."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import platform
import re
import shutil
import tempfile

from etils import epath

from memorizing.data.corpora.catalogue import STANDARD_LIBRARY


def cache_home() -> pathlib.Path:
    """The user's folder for what can be made again: `memorizing` in XDG_CACHE_HOME, by default `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(home) if home else pathlib.Path.home() / ".cache") / "memorizing"


def vocabulary_path(num_pieces: int) -> str:
    """Where the SentencePiece model of a size is, unless the user names a place: one for all corpora."""
    return os.fspath(cache_home() / "vocabularies" / f"spm{num_pieces}.model")


def default_cache_path(task: str, source: str, vocabulary_file: str | None = None) -> str:
    """Where the token cache of a Task over a source is, unless the user names a place.

    Sources of the same name in different folders, the standard libraries of different Pythons, and caches of different
    vocabularies that the user gave, have different places.
    """
    given = [os.path.abspath(vocabulary_file)] if vocabulary_file else []
    if source == STANDARD_LIBRARY:
        name = f"{STANDARD_LIBRARY}-{platform.python_version()}"
    else:
        # What lies in a store is the same from every folder.
        absolute = source if is_remote(source) else os.path.abspath(source)
        name = re.sub(r"[^\w.-]+", "-", os.path.basename(absolute))
        given.insert(0, absolute)
    digest = f"-{hashlib.sha256(os.pathsep.join(given).encode()).hexdigest()[:8]}" if given else ""
    return os.fspath(cache_home() / f"{task}-{name}{digest}")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in an object store (gs://...), where nothing can be renamed or mapped into memory."""
    return "://" in os.fspath(path)


def local_copy(path: str, last: str, identity: str) -> str:
    """A local copy of a remote folder, made once a machine.

    Args:
      path: of the remote folder.
      last: name of the file without which the folder is unfinished.
      identity: hash of its content.
    """
    target = cache_home() / "copies" / identity
    if not (target / last).exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = pathlib.Path(tempfile.mkdtemp(prefix=f".{identity}.partial-", dir=target.parent))
        try:
            for file in epath.Path(path).iterdir():
                if not file.is_dir():
                    file.copy(copy / file.name)
            with contextlib.suppress(OSError):  # Another process may have been faster.
                copy.rename(target)
        finally:
            shutil.rmtree(copy, ignore_errors=True)
    return os.fspath(target)
