"""Documents of the user's own: files of text in folders, JSON lines, tables, archives.

A shard is the files whose names have a certain hash. So no list of all files is made, and all shards are of about the
same size, wherever the files lie.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator

from memorizing.data.corpora.reader_settings import setting
from memorizing.data.documents import SEPARATOR, Document, damaged
from memorizing.data.errors import DataError
from memorizing.data.formats import archives, file_trees, json_lines, tables, text_files
from memorizing.data.formats.archives import Member
from memorizing.data.formats.file_trees import Found

# A shard lists its own files: of ten million a few hundred thousand names.
_MAX_SHARDS = 64
# The shard that holds everything.
WHOLE = "0 of 1"
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_LINES = (".jsonl", ".ndjson")
_TABLES = (tables.PARQUET, tables.ARROW)
_ANY = "any"
_FILE, _FOLDER = "file", "folder"

_OTHER_KIND = "other kind of file"
_IN_FOLDER = "archive in a folder (name it as a source to read it)"
_TOO_SHORT = "too short"
_FOLDER_TOO_LARGE = "folder too large"


@dataclasses.dataclass(frozen=True)
class TextReader:
    """Texts wherever they lie.

    Attributes:
      source: folders, files, patterns or URLs, with commas between; see `file_trees`.
    """

    source: str
    document: str = setting(
        _FILE, "what a document is: file, or folder: all files below a folder of the source, by their names."
    )
    separator: str = setting("", "a line that stands between the documents of a text file; by default there is none.")
    field: str = setting("text", "the one of a JSON object, or the column of a table, that holds the text.")
    key: str = setting("", "the field or column that names the document; by default its file and place in there do.")
    suffixes: tuple[str, ...] = setting((), "of the files to read in folders, or any; by default all kinds known.")
    exclude: tuple[str, ...] = setting(("__pycache__", "node_modules"), "names of folders to leave out, at any depth.")
    min_bytes: int = setting(1, "documents with less text, white space around it aside, are left out.")
    max_bytes: int = setting(archives.MAX_BYTES, "documents with more are left out.")
    keep_duplicates: bool = setting(False, "whether to keep all documents of the same text, and not only the first.")

    def shards(self) -> list[str]:
        """Names of the shards; see `documents.CorpusReader`."""
        if self.document not in (_FILE, _FOLDER):
            raise DataError(f"--reader.document={self.document}: give {_FILE} or {_FOLDER}")
        units = (1 for _, found in self._found() if self._reason(found) is None)
        count = max(sum(itertools.islice(units, _MAX_SHARDS)), 1)
        return [f"{number} of {count}" for number in range(count)]

    def documents(self, shard: str, skipped: Counter[str]) -> Iterator[Document]:
        """Yields documents by the names of their files; see `documents.CorpusReader`."""
        number, _, count = shard.partition(" of ")
        ours = []
        for unit, found in self._found():
            if _hash(unit) % int(count) != int(number):
                continue
            reason = self._reason(found)
            if reason is None:
                ours.append((unit, found))
            else:
                skipped[reason] += 1
        for unit, files in itertools.groupby(sorted(ours), lambda pair: pair[0]):
            read = itertools.chain.from_iterable(self._read(found, skipped) for _, found in files)
            if self.document == _FOLDER:
                read = self._joined(file_trees.printable(unit), read, skipped)
            for document in read:
                if len(document.text.strip().encode()) < self.min_bytes:
                    skipped[_TOO_SHORT] += 1
                else:
                    yield document

    def _found(self) -> Iterator[tuple[str, Found]]:
        """Everything in the source, with the name of the file or folder that is a document."""
        for root in file_trees.roots(self.source):
            depth = root.label.count("/") + 1 if root.label else 0
            for found in file_trees.files(root, self.exclude):
                if self.document == _FOLDER:
                    yield "/".join(found.name.split("/")[: depth + 1]), found
                else:
                    yield found.name, found

    def _reason(self, found: Found) -> str | None:
        """Why a file is left out unread, or None."""
        if found.reason is not None or found.is_named:
            return found.reason
        if archives.is_archive(found.name):
            return _IN_FOLDER
        suffix = _suffix(found.name)
        if suffix == tables.ARROW and posixpath.basename(found.name).startswith(tables.CACHE_PREFIX):
            return _OTHER_KIND
        return None if suffix in self._chosen or _ANY in self.suffixes else _OTHER_KIND

    @functools.cached_property
    def _chosen(self) -> frozenset[str]:
        """Suffixes of the files that are read in folders."""
        chosen = self.suffixes or (*_LINES, *_TABLES, *text_files.SUFFIXES)
        return frozenset(f".{name.lower().lstrip('.')}" for name in chosen)

    def _read(self, found: Found, skipped: Counter[str]) -> Iterator[Document]:
        """The documents of a file."""
        name = file_trees.printable(found.name)
        if archives.is_archive(found.name):
            for member in archives.members(found.path, skipped):
                inside = file_trees.printable(member.name)
                if self._reason(Found(inside, "")) is None and _suffix(inside) not in (*_LINES, *_TABLES):
                    yield from self._of_text(f"{name}/{inside}", member, skipped)
                else:
                    skipped[_OTHER_KIND] += 1
            return
        member = Member(found.name, name, functools.partial(file_trees.open_file, found.path))
        if _suffix(found.name) in (*_LINES, ".json"):
            yield from self._of_lines(name, member, skipped)
        elif _suffix(found.name) in _TABLES:
            yield from self._of_table(name, member, skipped)
        else:
            yield from self._of_text(name, member, skipped)

    def _of_lines(self, name: str, member: Member, skipped: Counter[str]) -> Iterator[Document]:
        for number, value in json_lines.objects(member.open, name, skipped, {self.field: str}):
            key = value.get(self.key) if self.key else f"{name}:{number}"
            if isinstance(key, str | int):
                yield Document(str(key), value[self.field], {})
            else:
                skipped[damaged(f"{name}, line {number}", f"no {self.key}")] += 1

    def _of_table(self, name: str, member: Member, skipped: Counter[str]) -> Iterator[Document]:
        columns = [self.field, self.key] if self.key else [self.field]
        for number, (text, *keys) in tables.rows(member, _suffix(member.name), columns, skipped):
            key = keys[0] if keys else f"{name}:{number}"
            if isinstance(text, str) and isinstance(key, str | int):
                yield Document(str(key), text, {})
            else:
                skipped[
                    damaged(f"{name}, row {number}", f"no {self.key if isinstance(text, str) else self.field}")
                ] += 1

    def _of_text(self, name: str, member: Member, skipped: Counter[str]) -> Iterator[Document]:
        if self.separator:
            parts = text_files.between(member, self.separator, self.max_bytes, skipped)
            contents = ((f"{name}#{number}", content) for number, content in enumerate(parts, 1))
        else:
            content = archives.read_bytes(member, skipped, self.max_bytes)
            contents = iter([] if content is None else [(name, content)])
        for key, content in contents:
            text, reason = text_files.text_of(key, _suffix(name), content)
            if reason is None:
                yield Document(key, text, {})
            else:
                skipped[reason] += 1

    def _joined(self, unit: str, documents: Iterable[Document], skipped: Counter[str]) -> Iterator[Document]:
        """What was read of a folder as one document."""
        texts = []
        num_bytes = 0
        for document in documents:
            num_bytes += len(document.text.encode()) + len(SEPARATOR)
            texts.append(document.text)
            if num_bytes > self.max_bytes:
                skipped[_FOLDER_TOO_LARGE] += 1
                return
        if texts:
            yield Document(unit, SEPARATOR.join(texts), {"num_files": len(texts)})


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=4).digest(), "big")


def _suffix(name: str) -> str:
    """What tells the kind of a file, also of a compressed one: `.txt` of `notes.txt.gz`."""
    stem, suffix = posixpath.splitext(name.lower())
    return posixpath.splitext(stem)[1] if suffix in _COMPRESSED else suffix
