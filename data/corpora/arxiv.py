"""The arXiv Math corpus of Wu et al. 2022 (section 4.1): the LaTeX sources of papers labelled as mathematics.

The sources are read as arXiv distributes them: archives `arXiv_src_YYMM_NNN.tar`, about 500 MB each, with members
`YYMM/ID.gz` (gzip of one file or of a tar, with no suffix to tell which) and `YYMM/ID.pdf`. The labels are in
`arxiv-metadata-oai-snapshot.json`, a paper a line. Of a paper its .tex files are read. Its categories say whether it is
mathematics.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import IO, NamedTuple, cast

from memorizing.data.corpora.reader_settings import setting
from memorizing.data.documents import Document, all_damage, damaged
from memorizing.data.errors import DataError
from memorizing.data.formats import archives, json_lines, tex_sources

METADATA_FILE = "arxiv-metadata-oai-snapshot.json"

_EXPECTED = (
    "a folder with arXiv's bulk source archives (arXiv_src_*.tar, there or in its sub-folder src) "
    f"and with {METADATA_FILE} from kaggle.com/datasets/Cornell-University/arxiv"
)
_ARCHIVE = re.compile(r"arXiv_src_.+\.tar")
# 2601.90002, 0704.0001; math9901903, math.GT0309136. An id may end with a version.
_NEW_ID = re.compile(r"(?P<id>\d{4}\.\d{4,5})(?:v\d+)?")
_OLD_ID = re.compile(r"(?P<archive>[a-z-]+)(?:\.[A-Z]{2})?(?P<number>\d{7})(?:v\d+)?")
# Former archives of arXiv, which are categories of others now.
_ABSORBED = {"alg-geom": "math.AG", "dg-ga": "math.DG", "funct-an": "math.FA", "q-alg": "math.QA"}
_COMMAND = re.compile(r"\\[A-Za-z]+")
_HEADER_BYTES = 512


class _Label(NamedTuple):
    """What the metadata says about a paper."""

    categories: str
    license: str


@dataclasses.dataclass(frozen=True)
class ArxivReader:
    """Papers; a shard is an archive of the bulk source.

    Attributes:
      source: the folder of the archives, or one archive.
    """

    source: str
    metadata: str = setting("", "file of the labels; empty for the one beside the archives.")
    subject: str = setting("math", "papers with a category of this archive of arXiv are read, such as math or cs.")
    primary_only: bool = setting(False, "whether the first category of a paper has to be one.")
    max_bytes: int = setting(64 << 20, "papers with more source than this are left out.")

    def shards(self) -> list[str]:
        """See `documents.CorpusReader`. Raises DataError also where the metadata is missing."""
        if archives.exists(self.source) and not archives.is_folder(self.source):
            shards = [posixpath.basename(self.source)]
        else:
            names = archives.listing(self.source, _EXPECTED)
            inside = archives.listing(posixpath.join(self.source, "src"), _EXPECTED) if "src" in names else []
            names += [f"src/{name}" for name in inside]
            shards = [name for name in names if _is_archive(name)]
        if not shards:
            raise DataError(f"no archive arXiv_src_*.tar in {self.source!r}; give {_EXPECTED}")
        self._metadata_path()
        return shards

    def documents(self, shard: str, skipped: Counter[str]) -> Iterator[Document]:
        """Yields papers; see `documents.CorpusReader`. Raises DataError where no label can be read."""
        labels, damage = _labels(self._metadata_path(), self.subject, self.primary_only)
        # All shards read the same file.
        if shard == self.shards()[0]:
            skipped.update(damage)
        for member in archives.members(posixpath.join(self._folder(), shard), skipped):
            identifier = paper_id(member.name)
            if identifier is None:
                skipped["no submission"] += 1
            elif identifier not in labels:
                skipped[f"not labelled {self.subject}"] += 1
            elif not member.name.endswith(".gz"):
                skipped["no source: PDF" if member.name.endswith(".pdf") else "no source"] += 1
            else:
                text = self._text(member, skipped)
                if text is not None:
                    yield Document(identifier, text, labels[identifier]._asdict())

    def _folder(self) -> str:
        return self.source if archives.is_folder(self.source) else posixpath.dirname(self.source)

    def _metadata_path(self) -> str:
        names = (METADATA_FILE, f"{METADATA_FILE}.gz")
        places = [self.metadata] if self.metadata else [posixpath.join(self._folder(), name) for name in names]
        for path in places:
            if archives.exists(path):
                return path
        raise DataError(f"no metadata {places[0]!r}; give {_EXPECTED}, or the file by --reader.metadata=PATH")

    def _text(self, member: archives.Member, skipped: Counter[str]) -> str | None:
        """The text of a paper; None, counted, where it has none."""
        try:
            with member.open() as packed, gzip.GzipFile(fileobj=packed) as file:
                # A GzipFile has all methods of an IO[bytes]; its type says less.
                sources, reason = self._sources(cast(IO[bytes], file), member.label)
        except archives.READ_ERRORS as error:
            skipped[damaged(member.label, archives.why(error))] += 1
            return None
        if reason is not None:
            skipped[reason] += 1
            return None
        return tex_sources.join(sources)

    def _sources(self, file: IO[bytes], label: str) -> tuple[dict[str, str], str | None]:
        """The .tex files of a paper by their names, and None; or no files, and the reason.

        Args:
          file: the decompressed member: one source, or a tar of several.
          label: names the paper.

        Raises:
          READ_ERRORS: it is damaged.
        """
        contents: dict[str, bytes] = {}
        if _is_tar(file):
            size = 0
            within: Counter[str] = Counter()
            for source in archives.tar_members(file, label, within):
                if source.name.lower().endswith(".tex"):
                    contents[source.name] = source.open().read(self.max_bytes + 1 - size)
                    size = sum(map(len, contents.values()))
            if all_damage(within):
                # No honest paper has a path that leads outside.
                raise tarfile.ReadError("a path leaves the archive")
        else:
            contents["main.tex"] = file.read(self.max_bytes + 1)
            size = len(contents["main.tex"])
        if size > self.max_bytes:
            return {}, "too large"
        archives.drain(file)
        sources = {name: tex_sources.decode(content) for name, content in contents.items()}
        return sources, _reason_against(sources)


def paper_id(name: str) -> str | None:
    """The id of a paper, without its version, from the name of its member; None where that is no paper's."""
    stem = posixpath.basename(name).rpartition(".")[0]
    if match := _NEW_ID.fullmatch(stem):
        return match["id"]
    match = _OLD_ID.fullmatch(stem)
    return f"{match['archive']}/{match['number']}" if match else None


def _is_archive(name: str) -> bool:
    return _ARCHIVE.fullmatch(posixpath.basename(name)) is not None


def _is_tar(file: IO[bytes]) -> bool:
    """Whether a file, which can seek, begins with the header of a tar. Old ones have no magic word."""
    header = file.read(_HEADER_BYTES)
    file.seek(0)
    try:
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _reason_against(sources: dict[str, str]) -> str | None:
    """Why a paper is left out because of its sources, or None."""
    if not sources:
        return "no source: no .tex file"
    if all(map(tex_sources.is_ignored, sources.values())):
        return "withdrawn"
    start = next(iter(sources.values())).lstrip()[:100].lower()
    if len(sources) == 1:
        for name, magic in (("PDF", "%pdf"), ("PostScript", "%!ps"), ("HTML", ("<html", "<!doctype", "<?xml"))):
            if start.startswith(magic):
                return f"no source: {name}"
    if not any(_COMMAND.search(text) for text in sources.values()):
        return "no source: no TeX"
    return None


@functools.lru_cache(maxsize=2)
def _labels(path: str, subject: str, primary_only: bool) -> tuple[dict[str, _Label], Counter[str]]:
    """The labels of the papers of a subject by their ids, and the damaged lines.

    Cached, so that a process reads the file of several GB only once.

    Raises:
      DataError: there are none.
    """
    damage: Counter[str] = Counter()
    labels: dict[str, _Label] = {}
    for _, paper in json_lines.read(path, posixpath.basename(path), damage, {"id": str, "categories": str}):
        if _is_of_subject(paper["categories"].split(), subject, primary_only):
            labels[paper["id"]] = _Label(paper["categories"], paper.get("license") or "")
    if not labels:
        why = "; ".join(all_damage(damage)[:1]) or "its categories name others"
        raise DataError(f"{path!r} has no paper of the subject {subject!r}: {why}")
    return labels, damage


def _is_of_subject(categories: list[str], subject: str, primary_only: bool) -> bool:
    """Whether one of a paper's categories, or its first one, is of a subject: math.AG of math."""
    # Categories of before 1998 are part of newer ones.
    current = [_ABSORBED.get(category, category) for category in categories]
    considered = current[:1] if primary_only else current
    return any(category.partition(".")[0] == subject for category in considered)
