"""The GitHub corpus from exports of the tables of `bigquery-public-data.github_repos`, as JSON lines.

The tables, each in one or several files, compressed or not, named after it or in a folder named after it:
  licenses   repo_name, license
  files      repo_name, ref, path, mode, id
  contents   id, content, binary: the text once, however many repositories have it; none for what is larger than 1 MB
  languages  repo_name, language: optional, spares reading what has no source in the languages
Their rows are in no order. The repositories are divided into parts by the hash of their names, and the rows of a part
are joined in memory, in one pass over the tables: more parts need less memory and more passes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import posixpath
import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from memorizing.data.corpora.reader_settings import setting
from memorizing.data.corpora.repositories import NO_LICENCE, VENDORED, Repositories
from memorizing.data.documents import Document
from memorizing.data.errors import DataError
from memorizing.data.formats import archives, json_lines, licences, source_files

_NEEDED = ("licenses", "files", "contents")
_TABLES = (*_NEEDED, "languages")
# files-000000000012.json.gz, or anything of these types in the folder files/; a sample has the same columns.
_FILE = re.compile(rf"(?:.*/)?(?:sample_)?(?P<table>{'|'.join(_TABLES)})(?:[-_.\d/][^/]*)?\.jsonl?(?:\.gz)?")
_SYMBOLIC_LINK = 0o120000
_COLUMNS: dict[str, dict[str, type]] = {
    "licenses": {"repo_name": str},
    "files": {"repo_name": str, "path": str, "id": str},
    "contents": {"id": str},
    "languages": {"repo_name": str, "language": list},
}


@dataclasses.dataclass(frozen=True)
class BigQueryReader(Repositories):
    """A folder of exported tables; a shard is a part of the repositories."""

    parts: int = setting(1, "into how many the repositories of a BigQuery export are divided.")

    def __post_init__(self) -> None:
        """Raises DataError where there would be no part."""
        if self.parts < 1:
            raise DataError(f"--reader.parts={self.parts}: give 1 or more")

    def shards(self) -> list[str]:
        """Parts as "INDEX of NUMBER"; see `documents.CorpusReader`."""
        missing = [table for table in _NEEDED if not _files_of(self.root, table)]
        if missing:
            raise DataError(
                f"no file {missing[0]}*.json or {missing[0]}*.json.gz in {self.root!r}; give a folder with the tables "
                f"{', '.join(_NEEDED)} of bigquery-public-data.github_repos, exported as JSON"
            )
        return [f"{index} of {self.parts}" for index in range(self.parts)]

    def documents(self, shard: str, skipped: Counter[str]) -> Iterator[Document]:
        """Yields the repositories of a part by name; see `documents.CorpusReader`."""
        part = int(shard.split()[0])
        # All parts read the same files: one of them tells what is damaged there.
        damage = skipped if part == 0 else Counter()
        licence_of = self._licences(part, damage, skipped)
        repositories = self._paths(licence_of, damage, skipped)
        wanted: set[str] = set()
        for paths in repositories.values():
            wanted.update(paths.values())
        texts = self._texts(wanted, damage)
        for name, paths in sorted(repositories.items()):

            def read(path: str, paths: dict[str, str] = paths) -> tuple[str, str | None]:
                return texts.get(paths[path], ("", "binary, too large or missing"))

            yield from self.document(name, list(paths), read, {"license": licence_of[name]}, skipped)

    def _licences(self, part: int, damage: Counter[str], skipped: Counter[str]) -> dict[str, str | None]:
        """Licences of the repositories of a part that are read, by name."""
        found: dict[str, str | None] = {}
        for row in self._rows("licenses", damage):
            name = row["repo_name"]
            if _part_of(name, self.parts) != part:
                continue
            licence = licences.named(str(row.get("license")))
            if self.is_allowed(licence):
                found[name] = licence
            else:
                skipped[NO_LICENCE] += 1
        for row in self._rows("languages", damage):
            names = {str(entry.get("name", "")).lower() for entry in row["language"] if isinstance(entry, dict)}
            if row["repo_name"] in found and not names & set(self.languages):
                del found[row["repo_name"]]
                skipped["repository in other languages"] += 1
        return found

    def _paths(self, wanted: Collection[str], damage: Counter[str], skipped: Counter[str]) -> dict[str, dict[str, str]]:
        """Of the wanted repositories, ids of the contents of their source files by path."""
        suffixes = source_files.suffixes_of(self.languages)
        found: dict[str, dict[str, str]] = {name: {} for name in wanted}
        branches: dict[str, str] = {}
        for row in self._rows("files", damage):
            name = row["repo_name"]
            path = row["path"]
            if name not in found or not source_files.is_source(path, suffixes):
                continue
            if _mode(row) & 0o170000 == _SYMBOLIC_LINK:
                skipped[archives.SYMBOLIC_LINK] += 1
            elif any(map(self.is_excluded, path.split("/")[:-1])):
                skipped[VENDORED] += 1
            # One branch of a repository; the table has hardly more.
            elif branches.setdefault(name, row.get("ref", "")) != row.get("ref", ""):
                skipped["another branch"] += 1
            else:
                found[name][path] = row["id"]
        return found

    def _texts(self, wanted: set[str], damage: Counter[str]) -> dict[str, tuple[str, str | None]]:
        """Texts by the ids of the contents, or "" and why it is left out."""
        found: dict[str, tuple[str, str | None]] = {}
        for row in self._rows("contents", damage):
            text = row.get("content")
            if row["id"] not in wanted or row.get("binary") is True or not isinstance(text, str):
                continue
            text = text.removeprefix("\ufeff")
            is_too_large = len(text.encode()) > self.max_file_bytes
            reason = "too large" if is_too_large else source_files.reason_against(text)
            found[row["id"]] = ("", reason) if reason else (text, None)
        return found

    def _rows(self, table: str, damage: Counter[str]) -> Iterator[dict[str, Any]]:
        for name in _files_of(self.root, table):
            for _, row in json_lines.read(posixpath.join(self.root, name), name, damage, _COLUMNS[table]):
                yield row


def is_export(root: str) -> bool:
    """Whether a folder holds exported tables: more than one of those that are needed."""
    # A single one could be a repository of the same name.
    return archives.is_folder(root) and sum(bool(_files_of(root, table)) for table in _NEEDED) > 1


def _files_of(root: str, table: str) -> list[str]:
    """Files of a table, relative to the root, sorted."""
    found = []
    for name in archives.listing(root, "a folder of the exported tables"):
        inside = posixpath.join(root, name)
        is_table = name in _TABLES and archives.is_folder(inside)
        names = [f"{name}/{file}" for file in archives.listing(inside, "")] if is_table else [name]
        for file in names:
            match = _FILE.fullmatch(file)
            if match is not None and match["table"] == table:
                found.append(file)
    return found


def _part_of(name: str, parts: int) -> int:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % parts


def _mode(row: dict[str, Any]) -> int:
    # BigQuery writes whole numbers as text.
    try:
        return int(row.get("mode") or 0)
    except (TypeError, ValueError):
        return 0
