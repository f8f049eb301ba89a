"""The GitHub corpus of Wu et al. 2022 (section 4.1): one document a repository, read from a folder of checkouts.

The files of a repository are joined depth-first: files and sub-directories of each directory in random order, the files
of a directory before its sub-directories, and each directory in one piece, so that code that belongs together is near.
The random order is the order of hashes of the paths, salted with the repository's name: it is the same on every
machine, and a file that is added leaves the others in their order. Files are separated by one newline and nothing else:
no names, no marks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator

from . import source_files
from .documents import Document
from .errors import DataError

SEPARATOR = "\n"


@dataclasses.dataclass(frozen=True)
class GithubReader:
    """A folder of repositories.

    Attributes:
      root: every sub-folder is one repository.
      languages: which source files are read, out of `source_files.SUFFIXES`.
      single_files: whether a source file that lies in `root` is a repository too.
      exclude: names of further directories to leave out, at any depth.
      min_bytes: repositories with less source than this are left out.
      max_bytes: no further file of a repository is read when it would exceed this many bytes.
      max_file_bytes: larger files are left out.
    """

    root: str
    languages: tuple[str, ...] = tuple(source_files.SUFFIXES)
    single_files: bool = False
    exclude: tuple[str, ...] = ()
    min_bytes: int = 1 << 10
    max_bytes: int = 32 << 20
    max_file_bytes: int = 1 << 20

    def shards(self) -> list[str]:
        """Names of the repositories; see `documents.Reader`."""
        suffixes = source_files.suffixes_of(self.languages)
        try:
            entries = sorted(os.scandir(self.root), key=lambda entry: entry.name)
        except FileNotFoundError:
            raise DataError(f"no folder {self.root!r}; give a folder that holds one sub-folder a repository") from None
        except OSError as error:
            raise DataError(f"cannot read the folder {self.root!r}: {error.strerror}") from None
        return [
            entry.name
            for entry in entries
            if entry.is_symlink() or entry.is_dir() or (self.single_files and _is_source(entry, suffixes))
        ]

    def documents(self, shard: str, skipped: Counter[str]) -> Iterator[Document]:
        """Yields one repository, or none; see `documents.Reader`."""
        path = os.path.join(self.root, shard)
        if os.path.islink(path):
            skipped["symbolic link"] += 1
        elif os.path.isdir(path) and self._is_excluded(shard):
            skipped["vendored or excluded directory"] += 1
        else:
            key = _printable(shard)
            texts = list(self._texts(path, key, skipped))
            text = SEPARATOR.join(texts)
            if len(text.encode()) < self.min_bytes:
                skipped["repository too small"] += 1
            else:
                yield Document(key, text, {"num_files": len(texts)})

    def _texts(self, repository: str, key: str, skipped: Counter[str]) -> Iterator[str]:
        """Texts of a repository's source files, until the cap is reached."""
        num_bytes = 0
        for path in self._files(repository, key, skipped):
            text, reason = source_files.read_text(path, self.max_file_bytes)
            if reason is None:
                size = len(text.encode()) + len(SEPARATOR)
                if num_bytes + size <= self.max_bytes:
                    num_bytes += size
                    yield text
                    continue
                reason = "repository too large"
            skipped[reason] += 1

    def _files(self, repository: str, key: str, skipped: Counter[str]) -> Iterator[str]:
        """Paths of the files of the languages, in the order of the document; a stack, so that no depth is too deep."""
        suffixes = source_files.suffixes_of(self.languages)
        if os.path.isfile(repository):
            yield repository
            return

        def shuffled(paths: list[str]) -> list[str]:
            return sorted(paths, key=lambda path: _hash(key, os.path.relpath(path, repository)))

        pending = [repository]
        while pending:
            files, directories = self._list(pending.pop(), suffixes, skipped)
            yield from shuffled(files)
            pending.extend(reversed(shuffled(directories)))

    def _list(self, directory: str, suffixes: frozenset[str], skipped: Counter[str]) -> tuple[list[str], list[str]]:
        """Source files and sub-directories of a directory.

        Symbolic links are not followed: they may lead outside, or in a circle.
        """
        files, directories = [], []
        try:
            entries = list(os.scandir(directory))
        except OSError:
            skipped["unreadable"] += 1
            return [], []
        for entry in entries:
            if entry.is_symlink():
                skipped["symbolic link"] += 1
            elif entry.is_dir(follow_symlinks=False):
                if self._is_excluded(entry.name):
                    skipped["vendored or excluded directory"] += 1
                else:
                    directories.append(entry.path)
            elif _is_source(entry, suffixes):
                files.append(entry.path)
        return files, directories

    def _is_excluded(self, directory_name: str) -> bool:
        return source_files.is_vendored(directory_name) or directory_name in self.exclude


def standard_library() -> GithubReader:
    """The standard library of the running Python, each larger top-level package or module being a repository.

    It is real code that every user has.
    """
    return GithubReader(
        root=sysconfig.get_paths()["stdlib"],
        languages=("python",),
        single_files=True,
        # Their presence depends on how Python was installed.
        exclude=("test", "tests", "idle_test", "lib-dynload", "ensurepip"),
        min_bytes=20_000,
    )


def _is_source(entry: os.DirEntry[str], suffixes: frozenset[str]) -> bool:
    # Only regular files: to read a pipe could take for ever.
    return os.path.splitext(entry.name)[1].lower() in suffixes and entry.is_file(follow_symlinks=False)


def _hash(key: str, path: str) -> bytes:
    # A file name need not be UTF-8, hence surrogateescape; the separator makes the salt unambiguous.
    return hashlib.sha256(f"{key}\0{path}".encode("utf-8", "surrogateescape")).digest()


def _printable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
