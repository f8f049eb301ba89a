"""Files by folder, pattern or name, local or wherever fsspec reaches (gs://, s3://, ...), as a stream.

No list of all files is ever made: a folder may hold ten million.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import posixpath
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import IO, Any, NamedTuple

import fsspec

from memorizing.data.errors import DataError
from memorizing.data.formats import archives
from memorizing.errors import first_line

HIDDEN = "hidden"
EXCLUDED = "excluded folder"
UNREADABLE = "unreadable"
EXPECTED = "a folder, a file, or a pattern such as 'notes/**/*.md'; several with commas between"


class Found(NamedTuple):
    """A file, or something that is left out.

    Attributes:
      name: its path below what was named, with slashes; the unit of a key.
      path: to open it.
      reason: why it is left out, or None.
      is_named: whether the user named this file, or a pattern of its name, and not a folder that it is in.
    """

    name: str
    path: str
    reason: str | None = None
    is_named: bool = False


class Root(NamedTuple):
    """One of the things that a user names.

    Attributes:
      path: absolute, or a URL.
      label: stands before the names of its files; "" where there is only one root.
      is_pattern: whether it is a pattern of paths.
    """

    path: str
    label: str
    is_pattern: bool


def is_url(path: str) -> bool:
    return "://" in path


def absolute(source: str) -> str:
    """The same source without the current folder in it."""
    return ",".join(path if is_url(path) else os.path.abspath(path) for path in _split(source))


def roots(source: str) -> list[Root]:
    """What a source names.

    Args:
      source: paths, patterns or URLs, with commas between.

    Raises:
      DataError: one of them is not there.
    """
    paths = _split(source)
    if not paths:
        raise DataError(f"source={source!r}: give {EXPECTED}")
    names = [posixpath.basename(_base(path).rstrip("/")) for path in paths]
    labels = [name if names.count(name) == 1 else path.strip("/") for name, path in zip(names, paths, strict=True)]
    found = []
    for path, label in zip(paths, labels, strict=True):
        is_pattern = glob.has_magic(path) and not _exists(path)
        if not _exists(_base(path)):
            raise DataError(f"no file or folder {path!r}; give {EXPECTED}")
        found.append(Root(path, label if len(paths) > 1 else "", is_pattern))
    return found


def files(root: Root, exclude: Collection[str]) -> Iterator[Found]:
    """Yields everything below a root, in no particular order.

    Symbolic links below it are not followed: they may lead outside, or in a circle.

    Args:
      root: of `roots`.
      exclude: names of folders that are left out, at any depth.
    """
    if root.is_pattern:
        found_there = _matching(root.path, exclude)
    elif _is_folder(root.path):
        found_there = _below(root.path, exclude)
    else:
        name = "" if root.label else posixpath.basename(root.path)
        found_there = iter([Found(name, root.path, is_named=True)])
    for found in found_there:
        yield found._replace(name=posixpath.join(root.label, found.name).rstrip("/"))


def open_file(path: str) -> IO[bytes]:
    """Opens a file, local or remote, and decompresses it if it is compressed."""
    if not is_url(path):
        return archives.decompressed(open(path, "rb"))
    system, name = _filesystem(path)
    return archives.decompressed(system.open(name, "rb"))


def printable(name: str) -> str:
    """A name that has a UTF-8 form; a file's name may be any bytes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _split(source: str) -> list[str]:
    """Paths with commas between; what is there under a name with a comma is one path."""
    if "," in source and _exists(source):
        return [source]
    return [path.strip() for path in source.split(",") if path.strip()]


def _filesystem(path: str) -> tuple[Any, str]:
    """The file system of a URL, and what it calls it. Raises DataError where it cannot be reached."""
    try:
        return fsspec.core.url_to_fs(path)
    # Each file system has errors of its own.
    except Exception as error:
        raise DataError(f"{path!r} cannot be reached: {first_line(error)}") from None


def _exists(path: str) -> bool:
    if not is_url(path):
        return os.path.exists(path)
    system, name = _filesystem(path)
    try:
        return system.exists(name)
    except Exception as error:
        raise DataError(f"{path!r} cannot be reached: {first_line(error)}") from None


def _is_folder(path: str) -> bool:
    if not is_url(path):
        return os.path.isdir(path)
    system, name = _filesystem(path)
    return system.isdir(name)


def _matching(pattern: str, exclude: Collection[str]) -> Iterator[Found]:
    """What matches a pattern, or lies in a folder that does. `**` stands for any number of folders."""
    base = _base(pattern)
    parts = [part for part in pattern.removeprefix(base).split("/") if part]
    for found in _below(base, exclude, lambda folder: _may_hold(parts, folder.split("/"))):
        names = found.name.split("/")
        if _fits(parts, names, whole=False):
            yield found._replace(is_named=_fits(parts, names, whole=True))


def _fits(pattern: Sequence[str], names: Sequence[str], whole: bool) -> bool:
    """Whether a path, or unless `whole` a folder that it lies in, matches a pattern."""
    if not pattern:
        return not names or not whole
    if pattern[0] == "**":
        return any(_fits(pattern[1:], names[skipped:], whole) for skipped in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], pattern[0]) and _fits(pattern[1:], names[1:], whole)


def _may_hold(pattern: Sequence[str], names: Sequence[str]) -> bool:
    """Whether something in a folder may match a pattern."""
    for part, name in zip(pattern, names, strict=False):
        if part == "**":
            return True
        if not fnmatch.fnmatchcase(name, part):
            return False
    return True


def _base(path: str) -> str:
    """The part of a pattern before its first sign of one; a path itself."""
    if not glob.has_magic(path) or (not is_url(path) and os.path.exists(path)):
        return path
    parts = path.split("/")
    first = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:first]) or ("/" if path.startswith("/") else ".")


def _below(top: str, exclude: Collection[str], enter: Callable[[str], bool] = lambda folder: True) -> Iterator[Found]:
    """Everything in a folder and in those folders in it that `enter` lets in, each before those in it."""
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            for name, path, kind in _entries(top, folder):
                inside = posixpath.join(folder, name)
                if name.startswith("."):
                    yield Found(inside, path, HIDDEN)
                elif kind == "link":
                    yield Found(inside, path, archives.SYMBOLIC_LINK)
                elif kind == "directory" and name in exclude:
                    yield Found(inside, path, EXCLUDED)
                elif kind == "directory" and enter(inside):
                    pending.append(inside)
                elif kind == "file":
                    yield Found(inside, path)
        except OSError:
            yield Found(folder or posixpath.basename(top), top, UNREADABLE)


def _entries(top: str, folder: str) -> Iterator[tuple[str, str, str]]:
    """Name, path and kind of what lies in a folder. Other kinds than files and folders are none: a pipe has no end."""
    path = posixpath.join(top, folder) if folder else top
    if is_url(top):
        system, name = _filesystem(path)
        for entry in system.ls(name, detail=True):
            url = system.unstrip_protocol(entry["name"])
            yield posixpath.basename(url.rstrip("/")), url, entry["type"]
        return
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_symlink():
                kind = "link"
            elif entry.is_dir(follow_symlinks=False):
                kind = "directory"
            else:
                kind = "file" if entry.is_file(follow_symlinks=False) else "none"
            yield entry.name, entry.path, kind
