"""What the tests of the corpus readers share: small archives, and the small real corpora beside the project."""

from __future__ import annotations

import gzip
import io
import pathlib
import tarfile
from collections import Counter
from collections.abc import Mapping

import pytest

from memorizing.data import documents

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "corpora"


def shared(name: str) -> pathlib.Path:
    """A corpus beside the project; skips the test where there is none."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"no corpora beside the project, in {SHARED}")
    return SHARED / name


def table(path: pathlib.Path) -> list[dict[str, str]]:
    """Rows of a file of columns divided by tabs, with a header."""
    header, *rows = (line.split("\t") for line in path.read_text().splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


def tar(files: Mapping[str, bytes | str | tarfile.TarInfo]) -> bytes:
    """A tar of files by their names; a TarInfo is a member without content."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return written.getvalue()


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def pack(content: bytes | str) -> bytes:
    return gzip.compress(content.encode() if isinstance(content, str) else content, mtime=0)


def write(root: pathlib.Path, files: Mapping[str, bytes | str]) -> pathlib.Path:
    """Writes files into a folder and returns it."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def read(reader: documents.CorpusReader) -> tuple[dict[str, documents.Document], Counter[str]]:
    """All documents of a reader by their keys, which are unique, and what was left out."""
    skipped: Counter[str] = Counter()
    found = list(documents.read_all(reader, skipped))
    assert len({document.key for document in found}) == len(found)
    return {document.key: document for document in found}, skipped


def texts(reader: documents.CorpusReader) -> dict[str, str]:
    return {key: document.text for key, document in read(reader)[0].items()}
