"""The GitHub corpus of Wu et al. 2022 (section 4.1) from a folder of checkouts, or of unpacked source distributions.

A repository is a document; see `repositories` for the order of its files.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator

from memorizing.data.corpora.reader_settings import setting
from memorizing.data.corpora.repositories import NO_LICENCE, VENDORED, Repositories
from memorizing.data.documents import Document
from memorizing.data.errors import DataError
from memorizing.data.formats import archives, licences, source_files

_GIT = ".git"
_COMMIT = re.compile(r"[0-9a-f]{40,64}")
_EXPECTED = "a folder that holds one sub-folder a repository, or an owner's repositories in a sub-folder of their own"


@dataclasses.dataclass(frozen=True)
class GithubReader(Repositories):
    """A folder of repositories; a shard is a repository.

    Every sub-folder is one. But a folder of checkouts that is no checkout itself stands for their owner.
    """

    single_files: bool = setting(False, "whether a source file that lies beside the repositories is one too.")

    def shards(self) -> list[str]:
        """Names of the repositories; see `documents.CorpusReader`."""
        suffixes = source_files.suffixes_of(self.languages)
        try:
            entries = sorted(os.scandir(self.root), key=lambda entry: entry.name)
        except FileNotFoundError:
            raise DataError(f"no folder {self.root!r}; give {_EXPECTED}") from None
        except OSError as error:
            raise DataError(f"cannot read the folder {self.root!r}: {error.strerror}; give {_EXPECTED}") from None
        shards = []
        for entry in entries:
            if entry.is_symlink() or entry.is_dir():
                shards += _checkouts(entry) or [entry.name]
            elif archives.is_archive(entry.name) or (self.single_files and _is_source(entry, suffixes)):
                shards.append(entry.name)
        return shards

    def documents(self, shard: str, skipped: Counter[str]) -> Iterator[Document]:
        """Yields one repository, or none; see `documents.CorpusReader`."""
        path = os.path.join(self.root, shard)
        if os.path.islink(path):
            skipped[archives.SYMBOLIC_LINK] += 1
        elif os.path.isfile(path):
            if self.single_files and not archives.is_archive(shard):
                yield from self.document(
                    _printable(shard), [shard], self._reader(self.root), {"license": None}, skipped
                )
            else:
                skipped["packed archive, to be unpacked first"] += 1
        elif any(map(self.is_excluded, shard.split("/"))):
            skipped[VENDORED] += 1
        else:
            licence = _licence(path)
            if self.is_allowed(licence):
                metadata = {"license": licence, "commit": _commit(path)}
                files = list(self._files(path, skipped))
                yield from self.document(_printable(shard), files, self._reader(path), metadata, skipped)
            else:
                skipped[NO_LICENCE] += 1

    def _reader(self, folder: str) -> Callable[[str], tuple[str, str | None]]:
        return lambda path: source_files.read_text(os.path.join(folder, path), self.max_file_bytes)

    def _files(self, repository: str, skipped: Counter[str]) -> Iterator[str]:
        """Paths of the source files of a repository, in no particular order.

        Symbolic links are not followed: they may lead outside, or in a circle.
        """
        suffixes = source_files.suffixes_of(self.languages)
        pending = [""]
        while pending:
            directory = pending.pop()
            try:
                entries = list(os.scandir(os.path.join(repository, directory)))
            except OSError:
                skipped["unreadable"] += 1
                continue
            for entry in entries:
                path = os.path.join(directory, entry.name)
                if entry.is_symlink():
                    skipped[archives.SYMBOLIC_LINK] += 1
                elif entry.is_dir(follow_symlinks=False):
                    if self.is_excluded(entry.name):
                        skipped[VENDORED] += 1
                    else:
                        pending.append(path)
                elif _is_source(entry, suffixes):
                    yield path


def standard_library() -> GithubReader:
    """The standard library of the running Python, each larger top-level package or module being a repository.

    It is real code that every user has.
    """
    return GithubReader(
        root=sysconfig.get_paths()["stdlib"],
        languages=("python",),
        # All of it is under Python's own licence, which its packages do not repeat.
        licences=(licences.ANY,),
        single_files=True,
        # Whether these are there depends on how Python was installed.
        exclude=("test", "tests", "idle_test", "lib-dynload", "ensurepip"),
        min_bytes=20_000,
    )


def _checkouts(folder: os.DirEntry[str]) -> list[str]:
    """Names of the checkouts in a folder that is no checkout itself, as "OWNER/NAME"."""
    if folder.is_symlink() or os.path.exists(os.path.join(folder.path, _GIT)):
        return []
    try:
        names = sorted(entry.name for entry in os.scandir(folder.path) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []
    return [f"{folder.name}/{name}" for name in names if os.path.isdir(os.path.join(folder.path, name, _GIT))]


def _licence(repository: str) -> str | None:
    """The licence that the files at the top of a repository name, or None.

    Where a package was unpacked into a folder made for it, the top is the only folder in there.
    """
    try:
        entries = list(os.scandir(repository))
        while len(entries) == 1 and entries[0].is_dir(follow_symlinks=False):
            entries = list(os.scandir(entries[0].path))
    except OSError:
        return None
    files = [entry for entry in entries if entry.is_file(follow_symlinks=False)]
    return licences.of_files({file.name: _start_of(file.path) for file in files if licences.is_licence_file(file.name)})


def _commit(repository: str) -> str | None:
    """The commit that is checked out, or None."""
    head = _start_of(os.path.join(repository, _GIT, "HEAD")).strip()
    if head.startswith("ref: "):
        reference = head.removeprefix("ref: ")
        head = _start_of(os.path.join(repository, _GIT, reference)).strip()
        packed = _start_of(os.path.join(repository, _GIT, "packed-refs"))
        lines = (line.split(" ") for line in packed.splitlines())
        head = head or next((words[0] for words in lines if words[1:] == [reference]), "")
    return head if _COMMIT.fullmatch(head) else None


def _start_of(path: str) -> str:
    """The first megabyte of a text file, "" where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20)
    except OSError:
        return ""


def _is_source(entry: os.DirEntry[str], suffixes: frozenset[str]) -> bool:
    # Only regular files: to read a pipe could take for ever.
    return source_files.is_source(entry.name, suffixes) and entry.is_file(follow_symlinks=False)


def _printable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
