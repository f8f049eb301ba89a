"""The Isabelle corpus of Wu et al. 2022 (section 4.1): one document an entry of the Archive of Formal Proofs, or a
session of another library such as the distribution's own.

A document holds all theories of its entry or session, in the order of their imports: no theory comes before one that it
imports. A theory belongs to the session in whose directories it lies. An entry of the Archive is one document, even if
it declares several sessions.
"""

from __future__ import annotations

import configparser
import dataclasses
import posixpath
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from memorizing.data.corpora.reader_settings import setting
from memorizing.data.documents import SEPARATOR, Document, damaged
from memorizing.data.errors import DataError
from memorizing.data.formats import archives, isabelle_syntax
from memorizing.data.formats.isabelle_imports import import_order

_EXPECTED = (
    "a release of the AFP (afp-current.tar.gz) or of Isabelle, packed or unpacked, or a folder that holds such ones"
)
# What lies at the top of an unpacked library.
_TOP = frozenset(("ROOT", "ROOTS", "thys", "src"))
_AFP = "AFP"
_DEFAULT_LICENCE = "bsd"


@dataclasses.dataclass(frozen=True)
class IsabelleReader:
    """Libraries of Isabelle theories; a shard is a library.

    Attributes:
      source: an archive or folder of a library, or a folder of several of these.
    """

    source: str
    licences: tuple[str, ...] = setting(
        (), "entries under others are left out; bsd or lgpl, as the metadata of the AFP says; empty for all."
    )

    def shards(self) -> list[str]:
        """See `documents.CorpusReader`."""
        if archives.exists(self.source) and not archives.is_folder(self.source):
            return ["."]
        names = archives.listing(self.source, _EXPECTED)
        if _TOP & set(names):
            return ["."]
        found = [name for name in names if archives.is_archive(name) or self._is_library(name)]
        if not found:
            raise DataError(f"no library in {self.source!r}: no archive, and no folder with a ROOT; give {_EXPECTED}")
        return found

    def _is_library(self, name: str) -> bool:
        path = posixpath.join(self.source, name)
        return any(archives.exists(posixpath.join(path, top)) for top in _TOP)

    def documents(self, shard: str, skipped: Counter[str]) -> Iterator[Document]:
        """Yields entries as soon as their last theory is read; see `documents.CorpusReader`."""
        path = self.source if shard == "." else posixpath.join(self.source, shard)
        library = _survey(path, skipped)
        remaining = Counter(library.owners.values())
        texts: dict[str, dict[str, str]] = {key: {} for key in remaining}
        # `_survey` has counted what is wrong with the archive itself.
        for member in archives.members(path, Counter()):
            key = library.owners.get(member.name)
            if key is None:
                continue
            text = archives.read_text(member, skipped)
            if text is not None:
                texts[key][member.name] = text
            remaining[key] -= 1
            theories = texts.pop(key) if not remaining[key] else {}
            if not theories:
                continue
            reason = self._reason_against(key, library)
            if reason is not None:
                skipped[reason] += 1
                continue
            order = import_order(theories, library.sessions[key])
            text = SEPARATOR.join(theories[name] for name in order)
            yield Document(key, text, {"num_files": len(order), **library.metadata.get(key, {})})

    def _reason_against(self, key: str, library: _Library) -> str | None:
        if key == library.cut_off:
            return "entry cut off"
        licence = library.metadata.get(key, {}).get("license", _DEFAULT_LICENCE)
        return "licence not allowed" if self.licences and licence not in self.licences else None


class _Library(NamedTuple):
    """What is known of a library before its theories are read.

    Attributes:
      owners: key of the document by the name of the theory's file.
      sessions: names of the sessions of each document.
      metadata: of the entries, by key.
      cut_off: key of the entry in which the archive ends early.
    """

    owners: dict[str, str]
    sessions: dict[str, frozenset[str]]
    metadata: dict[str, dict[str, Any]]
    cut_off: str | None


def _survey(path: str, skipped: Counter[str]) -> _Library:
    """Reads a library, except for the texts of its theories."""
    theories: list[str] = []
    roots: dict[str, isabelle_syntax.Root] = {}
    metadata: dict[str, dict[str, Any]] = {}
    of_archive: Counter[str] = Counter()
    for member in archives.members(path, of_archive):
        folder, name = posixpath.split(member.name)
        if name.endswith(".thy"):
            theories.append(member.name)
        elif name == "ROOT":
            text = archives.read_text(member, skipped)
            if text is not None:
                roots[folder] = isabelle_syntax.root(text)
        elif f"/{member.name}".endswith("/metadata/metadata"):
            metadata |= _of_ini(member, skipped)
        elif f"/{folder}".endswith("/metadata/entries") and name.endswith(".toml"):
            metadata |= _of_toml(member, skipped)
    names = _Owners(roots, posixpath.basename(path.rstrip("/")))
    owners: dict[str, str] = {}
    for theory in theories:
        key = names.owner(posixpath.dirname(theory))
        if key is not None:
            owners[theory] = key
    if len(owners) < len(set(theories)):
        skipped["theory of no session"] += len(set(theories)) - len(owners)
    skipped.update(of_archive)
    is_cut_off = any(reason.endswith(archives.REST_IS_LOST) for reason in of_archive)
    cut_off = owners.get(theories[-1]) if is_cut_off and theories else None
    return _Library(owners, names.sessions, metadata, cut_off)


class _Owners:
    """Which document a theory belongs to, by its directory."""

    def __init__(self, roots: Mapping[str, isabelle_syntax.Root], library: str) -> None:
        """
        Args:
          roots: the ROOT files by their directories.
          library: name of the library.
        """
        self._entries: dict[str, str] = {}
        self._directories: dict[str, str] = {}
        self.sessions: dict[str, frozenset[str]] = {}
        # Outer directories first.
        for folder, root in sorted(roots.items()):
            entry = self._entry(folder)
            if entry is None and _is_entry(folder, root):
                entry = posixpath.basename(folder) or library
                self._entries[folder] = entry
            for session in root.sessions:
                key = entry or session.name
                self.sessions[key] = self.sessions.get(key, frozenset()) | {session.name}
                for directory in session.directories:
                    path = posixpath.normpath(posixpath.join(folder, directory))
                    self._directories.setdefault(path, key)

    def owner(self, directory: str) -> str | None:
        """The entry that holds a directory, or else the session of the nearest directory above; None for neither."""
        nearest = (self._directories.get(above or ".") for above in _upwards(directory))
        return self._entry(directory) or next(filter(None, nearest), None)

    def _entry(self, directory: str) -> str | None:
        # No entry lies in another one.
        return next(filter(None, map(self._entries.get, _upwards(directory))), None)


def _is_entry(folder: str, root: isabelle_syntax.Root) -> bool:
    """Whether a ROOT file is that of an entry of the Archive of Formal Proofs."""
    above = posixpath.basename(posixpath.dirname(folder))
    return _AFP in root.chapters or above == "thys"


def _upwards(directory: str) -> Iterator[str]:
    yield directory
    while directory:
        directory = posixpath.dirname(directory)
        yield directory


def _of_ini(member: archives.Member, skipped: Counter[str]) -> dict[str, dict[str, Any]]:
    """Entries of `metadata/metadata`, one file for all entries up to the release of 2021."""
    text = archives.read_text(member, skipped)
    parser = configparser.RawConfigParser(strict=False)
    try:
        parser.read_string(text or "")
    except configparser.Error as error:
        skipped[damaged(member.label, " ".join(str(error).split()))] += 1
    return {entry: _selected(parser[entry], parser[entry].get("topic", "")) for entry in parser.sections()}


def _of_toml(member: archives.Member, skipped: Counter[str]) -> dict[str, dict[str, Any]]:
    """The entry of `metadata/entries/ENTRY.toml`, a file for each entry since the release 2021-1."""
    text = archives.read_text(member, skipped)
    try:
        fields = tomllib.loads(text or "")
    except tomllib.TOMLDecodeError as error:
        skipped[damaged(member.label, str(error))] += 1
        return {}
    entry = posixpath.basename(member.name).removesuffix(".toml")
    return {entry: _selected(fields, ", ".join(fields.get("topics", ())))}


def _selected(fields: Mapping[str, Any], topics: str) -> dict[str, Any]:
    return {
        "title": str(fields.get("title", "")),
        "date": str(fields.get("date", "")),
        "topics": topics,
        "license": str(fields.get("license", _DEFAULT_LICENCE)).lower(),
    }
