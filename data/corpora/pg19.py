"""PG-19 (Rae et al. 2020): whole books, with official splits.

The layout of the bucket gs://deepmind-gutenberg: `train/ID.txt`, `validation/ID.txt`, `test/ID.txt` and `metadata.csv`
with the lines `id,title,year,url`, without a header; as a folder or as an archive.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import posixpath
import re
from collections import Counter
from collections.abc import Iterator

from memorizing.data.documents import Document, all_damage, damaged
from memorizing.data.errors import DataError
from memorizing.data.formats import archives

SPLITS = ("train", "validation", "test")
METADATA_FILE = "metadata.csv"
_COLUMNS = ("id", "title", "year", "url")
_EXPECTED = "a copy of gs://deepmind-gutenberg: the folders train, validation and test, or an archive of them"
_BOOK = re.compile(rf"(?:.*/)?(?P<split>{'|'.join(SPLITS)})/(?P<id>[^/]+)\.txt")
# The books of a split are divided by the ends of their names, so that a shard is neither a book nor all of them.
_SHARD = re.compile(rf"(?P<split>{'|'.join(SPLITS)})/\*(?P<end>.+)")
_LENGTH_OF_END = len("00.txt")


@dataclasses.dataclass(frozen=True)
class PG19Reader:
    """The books; a shard is an archive, or the books of a split whose names end alike.

    Attributes:
      source: the folder of the three folders, an archive of it, or a folder that holds such an archive.
    """

    source: str

    def shards(self) -> list[str]:
        """See `documents.CorpusReader`."""
        if archives.exists(self.source) and not archives.is_folder(self.source):
            return ["."]
        names = archives.listing(self.source, _EXPECTED)
        packed = [name for name in names if archives.is_archive(name)]
        shards = [f"{split}/*{end}" for split in SPLITS if split in names for end in self._ends(split)]
        if not shards and not packed:
            raise DataError(f"no book in {self.source!r}: no folder train, validation or test; give {_EXPECTED}")
        return shards or packed

    def _ends(self, split: str) -> list[str]:
        names = archives.listing(posixpath.join(self.source, split), _EXPECTED)
        return sorted({name[-_LENGTH_OF_END:] for name in names})

    def documents(self, shard: str, skipped: Counter[str]) -> Iterator[Document]:
        """Yields books; see `documents.CorpusReader`."""
        match = _SHARD.fullmatch(shard)
        if match is None:
            path = self.source if shard == "." else posixpath.join(self.source, shard)
            books = archives.members(path, skipped, accept=_is_no_metadata)
        else:
            path = self.source
            split = match["split"]
            folder = posixpath.join(path, split)
            books = archives.members(folder, skipped, accept=lambda name: name.endswith(match["end"]))
            books = (book._replace(name=f"{split}/{book.name}", label=f"{split}/{book.name}") for book in books)
        metadata, damage = _metadata(path)
        # All shards of a folder read the same file.
        if match is None or shard == self.shards()[0]:
            skipped.update(damage)
        for book in books:
            named = _BOOK.fullmatch(book.name)
            if named is None:
                skipped["no book"] += 1
                continue
            text = archives.read_text(book, skipped)
            if text is not None:
                yield Document(named["id"], text, {"split": named["split"], **metadata.get(named["id"], {})})


def _is_no_metadata(name: str) -> bool:
    return posixpath.basename(name) != METADATA_FILE


def _metadata(path: str) -> tuple[dict[str, dict[str, str]], Counter[str]]:
    """What metadata.csv says about the books, by their ids, and what is damaged in it. Without the file, nothing.

    Args:
      path: of the folder or archive of the books.

    Raises:
      DataError: it is there, and no line of it can be used.
    """
    damage: Counter[str] = Counter()
    if archives.is_folder(path):
        found = archives.files(path, METADATA_FILE)
    else:
        found = archives.members(path, Counter(), accept=lambda name: not _is_no_metadata(name))
    books: dict[str, dict[str, str]] = {}
    for member in found:
        text = archives.read_text(member, damage)
        if text is not None:
            books |= _parsed(member.label, text, damage)
            if damage and not books:
                raise DataError(f"{all_damage(damage)[0]}; no line of this file can be used")
    return books, damage


def _parsed(label: str, text: str, damage: Counter[str]) -> dict[str, dict[str, str]]:
    books = {}
    rows = csv.reader(io.StringIO(text, newline=""))
    try:
        for row in rows:
            if len(row) == len(_COLUMNS):
                books[row[0]] = dict(zip(_COLUMNS[1:], row[1:], strict=True))
            elif row:
                wrong = f"{len(row)} columns, not {len(_COLUMNS)}: {', '.join(_COLUMNS)}"
                damage[damaged(f"{label}, line {rows.line_num}", wrong)] += 1
    except csv.Error as error:
        damage[damaged(f"{label}, line {rows.line_num}", str(error))] += 1
    return books
