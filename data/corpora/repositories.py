"""How the files of a repository become one document, wherever they come from.

Wu et al. 2022 (section 4.1): the files are joined depth-first, files and sub-directories of each directory in random
order, and each directory in one piece, so that code that belongs together is near. Here the files of a directory come
before its sub-directories. The random order is the order of hashes of the paths, salted with the repository's name and
a seed: it is the same on every machine, and a file that is added leaves the others in their order. Files are separated
by one newline and nothing else: no names, no marks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from memorizing.data.corpora.reader_settings import setting
from memorizing.data.documents import SEPARATOR, Document
from memorizing.data.formats import licences, source_files

VENDORED = "vendored or excluded directory"
NO_LICENCE = "repository without an open licence (--reader.licences=any keeps them)"
_TOO_SMALL = "repository too small"


@dataclasses.dataclass(frozen=True)
class Repositories:
    """What the readers of repositories have in common.

    Attributes:
      root: the folder that is read.
    """

    root: str
    languages: tuple[str, ...] = setting(
        tuple(source_files.SUFFIXES), "whose source files are read: c, c++, java, python, go, typescript."
    )
    licences: tuple[str, ...] = setting(
        licences.OPEN_SOURCE, "repositories under others are left out; SPDX identifiers, or any."
    )
    exclude: tuple[str, ...] = setting((), "names of further directories to leave out, at any depth.")
    seed: int = setting(0, "of the order of the files of a repository.")
    min_bytes: int = setting(1 << 10, "repositories with less source than this are left out.")
    max_bytes: int = setting(32 << 20, "no further file of a repository is read when it would exceed this many bytes.")
    max_file_bytes: int = setting(1 << 20, "larger files are left out.")

    def is_excluded(self, directory_name: str) -> bool:
        """Whether a directory of this name is left out: it holds copies of other projects, or the user excludes it."""
        return source_files.is_vendored(directory_name) or directory_name in self.exclude

    def is_allowed(self, licence: str | None) -> bool:
        """Whether repositories are read that are under a licence, as the functions of `licences` name it."""
        return licences.is_allowed(licence, tuple(map(str.lower, self.licences)))

    def document(
        self,
        name: str,
        paths: Collection[str],
        read: Callable[[str], tuple[str, str | None]],
        metadata: Mapping[str, Any],
        skipped: Counter[str],
    ) -> Iterator[Document]:
        """Yields a repository as a document, unless there is too little of it.

        Args:
          name: of the repository. It is the document's key, with the commit if the metadata has it.
          paths: of its source files.
          read: returns the text of a file by its path and None, or "" and why it is left out.
          metadata: what is known of it; goes into the document.
          skipped: counts what was left out, by reason.
        """
        texts = []
        num_bytes = 0
        for path in document_order(paths, f"{self.seed}\0{name}"):
            text, reason = read(path)
            size = len(text.encode()) + len(SEPARATOR)
            if reason is None and num_bytes + size > self.max_bytes:
                reason = "repository too large"
            if reason is None:
                num_bytes += size
                texts.append(text)
            else:
                skipped[reason] += 1
        if num_bytes - len(SEPARATOR) < self.min_bytes:
            skipped[_TOO_SMALL] += 1
        else:
            key = f"{name}@{metadata['commit']}" if metadata.get("commit") else name
            yield Document(key, SEPARATOR.join(texts), {"num_files": len(texts), **metadata})


def document_order(paths: Collection[str], salt: str) -> list[str]:
    """Paths depth-first: of each directory its files, then its sub-directories one after the other, each shuffled.

    Args:
      paths: of the files of a repository, relative, with slashes.
      salt: decides how they are shuffled.
    """
    files: dict[str, list[str]] = defaultdict(list)
    directories: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        folder = posixpath.dirname(path)
        files[folder].append(path)
        while folder:
            above = posixpath.dirname(folder)
            directories[above].add(folder)
            folder = above

    def shuffled(those: Collection[str]) -> list[str]:
        return sorted(those, key=lambda path: _hash(salt, path))

    ordered: list[str] = []
    # A stack instead of recursion, so that no depth is too deep.
    pending = [""]
    while pending:
        folder = pending.pop()
        ordered += shuffled(files[folder])
        pending += reversed(shuffled(directories[folder]))
    return ordered


def _hash(salt: str, path: str) -> bytes:
    # A file name need not be UTF-8, hence surrogateescape; the separator makes the salt unambiguous.
    return hashlib.sha256(f"{salt}\0{path}".encode("utf-8", "surrogateescape")).digest()
