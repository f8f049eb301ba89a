"""A folder that is made in many steps and visible only when it is complete.

The folder NAME is made as `.NAME.partial` beside it, which is renamed at the end. If a process is killed before that,
or stops by an error that is not the user's, the next one continues with what it finds there. An object store cannot
rename: there the folder is made in its final place, and is no cache before its last file is written.
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
    """A folder that is being made.

    Attributes:
      path: of the folder, until it is complete.
      work: of a folder in it for temporary files; it is removed at the end.
    """

    def __init__(self, path: epath.PathLike) -> None:
        self.path = epath.Path(path)
        self.work = self.path / _WORK


@contextlib.contextmanager
def staged(
    target: str, last: str, plan: Mapping[str, Any], replace: bool = False, wait: Callable[[], None] = lambda: None
) -> Iterator[Staging | None]:
    """A folder to write into that becomes `target` when the block ends without an error.

    When the block raises DataError everything is removed. After any other error it stays, and the next call with the
    same plan continues with it.

    Args:
      target: the folder to make, local or remote.
      last: name of the file without which the folder counts as unfinished; the block writes it last.
      plan: what the folder is made from, JSON-able; what was begun with another plan is removed.
      replace: whether to replace a folder that exists.
      wait: called when another process is working on the same folder, before this one waits for it to end.

    Yields:
      The folder; or None, where another process has finished it in the meantime.

    Raises:
      DataError: `target` cannot be written; raised before the block runs.
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
    """A folder for temporary files while the file `target` is made; see `staged`. It is removed at the end."""
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
    """A temporary folder of this process alone.

    It is on the file system of `beside`, if that is local, so that a file can be moved there in one step.
    """
    return _private_folder(None if paths.is_remote(beside) else os.path.dirname(beside))


def publish(local: pathlib.Path, target: epath.PathLike) -> None:
    """Moves a finished file to its place."""
    if paths.is_remote(target):
        epath.Path(local).copy(target, overwrite=True)
    else:
        os.replace(local, target)


def save_arrays(path: epath.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a .npz file in one step: it is never there in part."""
    content = io.BytesIO()
    # The stubs of NumPy take the names for the option `allow_pickle`.
    np.savez(content, **arrays)  # pyright: ignore[reportArgumentType]
    save(path, content.getvalue())


def save(path: epath.PathLike, content: bytes) -> None:
    """Writes a file in one step: it is never there in part."""
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
    """Makes a folder and locks it for this process. However the process ends, the system releases the lock."""
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
        # The process that had the lock may have renamed or removed the folder.
        if os.path.exists(folder) and os.path.samestat(os.stat(folder), os.fstat(descriptor)):
            yield
            return
    finally:
        os.close(descriptor)
    with _locked(folder, wait):
        yield


def _begin(staging: Staging, last: str, plan: dict[str, Any]) -> None:
    """Empties the folder unless it was begun with the same plan."""
    path = staging.work / _PLAN
    if path.exists() and json.loads(path.read_text()) == plan:
        return
    if staging.path.exists():
        # The last file is removed first: without it the rest does not count as a cache.
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
