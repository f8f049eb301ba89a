"""Files, folders and archives of raw corpora, as streams. Nothing is ever extracted to a disk.

A source is a folder or an archive of files. Both are read in the same way, one member after the other, and only one
is open at a time. What cannot be read is skipped and counted under its name (see `documents.damaged`). Where an archive
is damaged, everything before that place is still read.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import lzma
import os
import posixpath
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple, cast

from etils import epath

from memorizing.data.documents import damaged
from memorizing.data.errors import DataError

try:
    # In the standard library from Python 3.14 on as `compression.zstd`.
    from backports import zstd
except ImportError:
    try:
        from compression import zstd  # pyright: ignore[reportMissingImports]
    except ImportError:
        zstd = None

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")

# What the standard library raises on damaged input.
READ_ERRORS = (
    *(EOFError, OSError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, NotImplementedError),
    *((zstd.ZstdError,) if zstd else ()),
)

SYMBOLIC_LINK = "symbolic link"
# What one member, or one line, may become: an archive of a megabyte can hold a text of gigabytes.
MAX_BYTES = 256 << 20
TOO_LARGE = "too large"
# How the message ends where an archive could not be read to its end.
REST_IS_LOST = "the rest of it is lost"


class Member(NamedTuple):
    """A regular file in a folder or in an archive.

    Attributes:
      name: its relative path in the folder or archive, with slashes and without "..".
      label: names it in messages.
      open: opens it; it stays open until the next member is asked for.
    """

    name: str
    label: str
    open: Callable[[], IO[bytes]]


def is_archive(name: str) -> bool:
    """Whether a file's name is that of an archive."""
    return name.lower().endswith(SUFFIXES)


def is_folder(path: str) -> bool:
    return epath.Path(path).is_dir()


def exists(path: str) -> bool:
    return epath.Path(path).exists()


def listing(path: str, expected: str) -> list[str]:
    """Names in a folder, sorted.

    Args:
      path: of the folder.
      expected: completes the error message "give ...".

    Raises:
      DataError: there is no such folder, or it cannot be read.
    """
    if not exists(path):
        raise DataError(f"no folder {path!r}; give {expected}")
    if not is_folder(path):
        raise DataError(f"{path!r} is no folder; give {expected}")
    try:
        return sorted(entry.name for entry in epath.Path(path).iterdir())
    except OSError as error:
        raise DataError(f"cannot read the folder {path!r}: {error.strerror}") from None


def open_file(path: str) -> IO[bytes]:
    """Opens a file, and decompresses it if its first bytes are those of gzip, bzip2, xz or zstd."""
    return decompressed(_open_as_it_is(epath.Path(path)))


def decompressed(file: IO[bytes]) -> IO[bytes]:
    """Decompresses a file, which can seek, if it is compressed by gzip, bzip2, xz or zstd; any other stays as it is."""
    start = file.read(6)
    file.seek(0)
    openers = (
        *((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open)),
        (b"\x28\xb5\x2f\xfd", zstd.open if zstd else _zstd_is_missing),
    )
    for magic, opener in openers:
        if start.startswith(magic):
            # A GzipFile has all methods of an IO[bytes]; its type says less.
            return cast(IO[bytes], opener(file, "rb"))
    return file


def _zstd_is_missing(file: IO[bytes], mode: str) -> IO[bytes]:
    raise OSError("zstd, which needs pip install 'memorizing[documents]'")


def _open_as_it_is(path: epath.Path) -> IO[bytes]:
    return cast(IO[bytes], path.open("rb"))


def members(path: str, skipped: Counter[str], accept: Callable[[str], bool] = lambda name: True) -> Iterator[Member]:
    """Yields the regular files of a folder, sorted, or of an archive, in its own order.

    Symbolic links are not followed: they may lead outside, or in a circle. A path that leaves the archive is damage.

    Args:
      path: of the folder or archive, local or gs://.
      skipped: counts what was left out, by reason.
      accept: tells from its name whether a file is wanted; the others are passed over unread and not counted.
    """
    if is_folder(path):
        yield from _folder_members(path, "", skipped, accept)
        return
    label = posixpath.basename(path)
    found = _zip_members if path.lower().endswith(".zip") else tar_members
    try:
        with _open_as_it_is(epath.Path(path)) as file:
            unpacked = decompressed(file)
            for member in found(unpacked, label, skipped):
                if accept(member.name):
                    yield member
            drain(unpacked)
    except READ_ERRORS as error:
        skipped[damaged(label, f"{why(error)}; {REST_IS_LOST}")] += 1


def files(folder: str, *names: str) -> Iterator[Member]:
    """Yields those of the named files that a folder has."""
    for name in names:
        path = epath.Path(folder) / name
        if path.is_file():
            yield Member(name, name, functools.partial(_open_as_it_is, path))


def read_bytes(member: Member, skipped: Counter[str], max_bytes: int | None = None) -> bytes | None:
    """The bytes of a member; None, counted, where it is damaged or larger than `max_bytes` (default: `MAX_BYTES`)."""
    limit = MAX_BYTES if max_bytes is None else max_bytes
    try:
        with member.open() as file:
            content = file.read(limit + 1)
    except READ_ERRORS as error:
        skipped[damaged(member.label, why(error))] += 1
        return None
    if len(content) > limit:
        skipped[TOO_LARGE] += 1
        return None
    return content


def read_text(member: Member, skipped: Counter[str]) -> str | None:
    """The text of a member, without a byte order mark; None, counted, where it is damaged or not UTF-8."""
    content = read_bytes(member, skipped)
    if content is None:
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        skipped[damaged(member.label, f"not UTF-8 at byte {error.start:,}")] += 1
        return None


def why(error: BaseException) -> str:
    """One of `READ_ERRORS` in a line, for a message."""
    if isinstance(error, EOFError) or "unexpected end of data" in str(error):
        return "it ends early"
    system_message = error.strerror if isinstance(error, OSError) else None
    text = system_message or str(error) or type(error).__name__
    return " ".join(text.split())


def drain(file: IO[bytes]) -> None:
    """Reads the rest of a file, at whose end gzip and xz have a checksum.

    Raises:
      READ_ERRORS: the checksum is wrong.
    """
    while file.read(1 << 20):
        pass


def tar_members(file: IO[bytes], label: str, skipped: Counter[str]) -> Iterator[Member]:
    """Yields the regular files of a tar, without a list of all members in memory.

    Args:
      file: the tar, not compressed.
      label: names it in messages.
      skipped: counts what was left out, by reason.

    Raises:
      READ_ERRORS: it is damaged.
    """
    with tarfile.TarFile(fileobj=file, tarinfo=_StrictTarInfo) as tar:
        while (info := tar.next()) is not None:
            # TarFile would remember every member.
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  the stubs of tarfile lack it
            is_link = info.issym() or info.islnk()
            if not _is_allowed(info.name, is_link, label, skipped) or not info.isreg():
                continue
            yield Member(
                posixpath.normpath(info.name),
                f"{label}: {info.name}",
                functools.partial(_open_regular, tar, info),
            )


def _open_regular(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    """Opens a member that is a regular file: only of others does tarfile return None."""
    return cast(IO[bytes], tar.extractfile(info))


class _StrictTarInfo(tarfile.TarInfo):
    """Raises on a damaged header, which tarfile would take for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        # The stubs of tarfile lack these three errors.
        except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
            raise
        except (
            tarfile.EmptyHeaderError,  # pyright: ignore[reportAttributeAccessIssue]
            tarfile.TruncatedHeaderError,  # pyright: ignore[reportAttributeAccessIssue]
        ):
            raise EOFError from None
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def _zip_members(file: IO[bytes], label: str, skipped: Counter[str]) -> Iterator[Member]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            is_link = (info.external_attr >> 16) & 0o170000 == 0o120000
            if not _is_allowed(info.filename, is_link, label, skipped) or info.is_dir():
                continue
            if info.flag_bits & 1:
                skipped[damaged(f"{label}: {info.filename}", "it is encrypted")] += 1
                continue
            yield Member(
                posixpath.normpath(info.filename),
                f"{label}: {info.filename}",
                functools.partial(archive.open, info),
            )


def _is_allowed(name: str, is_link: bool, label: str, skipped: Counter[str]) -> bool:
    if is_link:
        skipped[SYMBOLIC_LINK] += 1
        return False
    if name.startswith("/") or ".." in name.split("/"):
        skipped[damaged(f"{label}: {name}", "the path leaves the archive")] += 1
        return False
    return True


def _folder_members(root: str, folder: str, skipped: Counter[str], accept: Callable[[str], bool]) -> Iterator[Member]:
    try:
        entries = sorted(epath.Path(posixpath.join(root, folder)).iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        skipped[damaged(folder or root, why(error))] += 1
        return
    for entry in entries:
        name = posixpath.join(folder, entry.name)
        # An object store has no links, and os.path finds none there.
        if os.path.islink(entry):
            skipped[SYMBOLIC_LINK] += 1
        elif entry.is_dir():
            yield from _folder_members(root, name, skipped, accept)
        elif accept(name) and entry.is_file():
            yield Member(name, name, functools.partial(_open_as_it_is, entry))
