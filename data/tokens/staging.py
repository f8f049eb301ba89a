"""A folder that is made in many steps and seen only when it is whole.

What is to become the folder NAME grows in `.NAME.partial` beside it, which is renamed when all is done. Whoever stops
before that, by a kill or an error that is not the user's, finds there what was done and goes on. An object store knows no
renaming: there the folder grows in its place, and is no cache before its last file is written.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from memorizing.data.errors import DataError
from memorizing.data.tokens import paths

_WORK = "work"
_PLAN = "plan.json"


class Staging:
    """The growing folder.

    Attributes:
      path: of what will be the folder.
      work: of a folder in it for what is needed only on the way; it is removed at the end.
    """

    def __init__(self, path: epath.PathLike) -> None:
        self.path = epath.Path(path)
        self.work = self.path / _WORK


@contextlib.contextmanager
def staged(
    target: str, last: str, plan: Mapping[str, Any], replace: bool = False, wait: Callable[[], None] = lambda: None
) -> Iterator[Staging | None]:
    """A folder to write into that becomes `target` when the block ends well.

    When the block raises DataError everything is removed. After any other end it is kept, and the next call with the
    same plan goes on with it.

    Args:
      target: the folder to make, local or remote.
      last: name of the file without which a reader takes the folder for unfinished; the block writes it last.
      plan: what the folder is made from, JSON-able; what was begun by another plan is thrown away.
      replace: whether a folder that is there gives way.
      wait: called when another process is at work on the same folder, which has to end first.

    Yields:
      The folder; or None, where another process has finished it in the meantime.

    Raises:
      DataError: `target` cannot be written, found out before the block runs.
    """
    remote = paths.is_remote(target)
    with _held(epath.Path(target) if remote else _partial(target), target, wait) as folder:
        if (epath.Path(target) / last).exists() and not replace:
            if not remote:
                folder.rmtree()
            yield None
            return
        with _growing(folder, last, plan) as staging:
            yield staging
        staging.work.rmtree()
        if not remote:
            _rename(pathlib.Path(folder), pathlib.Path(target), replace)


@contextlib.contextmanager
def scratch(target: str, plan: Mapping[str, Any], wait: Callable[[], None] = lambda: None) -> Iterator[Staging]:
    """A folder for what is needed on the way to the file `target`; see `staged`. It is removed at the end."""
    with _held(_partial(target), target, wait) as folder, _growing(folder, _PLAN, plan) as staging:
        yield staging
        folder.rmtree()


@contextlib.contextmanager
def _held(folder: epath.Path, target: str, wait: Callable[[], None]) -> Iterator[epath.Path]:
    with contextlib.ExitStack() as stack:
        if not paths.is_remote(folder):
            try:
                stack.enter_context(_locked(os.fspath(folder), wait))
            except OSError as error:
                raise DataError(
                    f"cannot write {target!r}: {error.strerror}; name another place with --output"
                ) from None
        yield folder


@contextlib.contextmanager
def _growing(folder: epath.Path, last: str, plan: Mapping[str, Any]) -> Iterator[Staging]:
    staging = Staging(folder)
    _begin(staging, last, json.loads(json.dumps(plan)))
    try:
        yield staging
    except DataError:
        folder.rmtree()
        raise


def private_folder(beside: epath.PathLike) -> contextlib.AbstractContextManager[pathlib.Path]:
    """A folder of this process alone, on the same file system as a local path, so that files can be moved there at once."""
    return _private_folder(None if paths.is_remote(beside) else os.path.dirname(beside))


def publish(local: pathlib.Path, target: epath.PathLike) -> None:
    """Moves a finished file to its place."""
    if paths.is_remote(target):
        epath.Path(local).copy(target, overwrite=True)
    else:
        os.replace(local, target)


def save_arrays(path: epath.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a .npz file, which is there as a whole or not at all."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    save(path, content.getvalue())


def save(path: epath.PathLike, content: bytes) -> None:
    """Writes a file, which is there as a whole or not at all."""
    with private_folder(path) as folder:
        (folder / "file").write_bytes(content)
        publish(folder / "file", path)


def load_arrays(path: epath.PathLike, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Reads some arrays of a .npz file; those that it does not have are left out."""
    with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in names if name in arrays}


@contextlib.contextmanager
def _private_folder(parent: str | None) -> Iterator[pathlib.Path]:
    with tempfile.TemporaryDirectory(prefix=".private-", dir=parent) as folder:
        yield pathlib.Path(folder)


def _partial(target: str) -> epath.Path:
    path = epath.Path(target if paths.is_remote(target) else os.path.abspath(target))
    return path.parent / f".{path.name}.partial"


@contextlib.contextmanager
def _locked(folder: str, wait: Callable[[], None]) -> Iterator[None]:
    """Makes a folder and holds it for this process; the system lets go of it when the process ends, however it ends."""
    while True:
        os.makedirs(folder, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY)
            break
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Who held it may have renamed or removed it.
        if os.path.exists(folder) and os.path.samestat(os.stat(folder), os.fstat(descriptor)):
            yield
            return
    finally:
        os.close(descriptor)
    with _locked(folder, wait):
        yield


def _begin(staging: Staging, last: str, plan: dict[str, Any]) -> None:
    """Empties the folder unless it was begun by the same plan."""
    path = staging.work / _PLAN
    if path.exists() and json.loads(path.read_text()) == plan:
        return
    if staging.path.exists():
        # The last file goes first: without it nobody takes the rest for a cache.
        (staging.path / last).unlink(missing_ok=True)
        for entry in list(staging.path.iterdir()):
            entry.rmtree() if entry.is_dir() else entry.unlink()
    staging.work.mkdir(parents=True, exist_ok=True)
    save(path, json.dumps(plan, indent=2).encode())


def _rename(folder: pathlib.Path, target: pathlib.Path, replace: bool) -> None:
    if replace and target.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        folder.rename(target)
        shutil.rmtree(old)
    else:
        folder.rename(target)
