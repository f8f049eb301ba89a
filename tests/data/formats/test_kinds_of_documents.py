"""Text out of HTML, EPUB, PDF, Parquet, Arrow and zstd: what a person reads of it, or why it is left out."""

from __future__ import annotations

import io
import json
import pathlib
import sys
import zipfile
from collections.abc import Callable

import pyarrow as pa
import pytest
from backports import zstd
from pyarrow import parquet
from raw_corpora import read, texts, write

from memorizing.data.corpora.text import TextReader
from memorizing.data.formats import archives, markup, pdf, tables, text_files

PAGE = """<!DOCTYPE html><html><head><title>A &amp; B</title><style>p { }</style><script>if (a < b) { "<p>" }</script></head>
<body><h1>Head <i>ing</i></h1><p>One
   line&nbsp;é</p><ul><li>x<li>y</ul><!-- no --><pre>  kept
    as it is</pre><script src="x"/></script>end</body></html>"""
TEXT = "A & B\nHead ing\nOne line é\nx\ny\n  kept\n    as it is\nend\n"
COLUMNS = {"text": ["one", "two", None], "id": [7, 8, 9], "other": [0.0, 0.0, 0.0]}


def epub(pages: dict[str, str], order: list[str], container: str | None = None) -> bytes:
    items = "".join(f'<item id="{name}" href="text/{name}%20x.xhtml"/>' for name in pages)
    spine = "".join(f'<itemref idref="{name}"/>' for name in order)
    package = (
        f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest><spine>{spine}</spine></package>'
    )
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        default = '<container xmlns="urn:x"><rootfiles><rootfile full-path="OEBPS/x.opf"/></rootfiles></container>'
        archive.writestr("META-INF/container.xml", default if container is None else container)
        archive.writestr("OEBPS/x.opf", package)
        for name, page in pages.items():
            archive.writestr(f"OEBPS/text/{name} x.xhtml", page)
    return written.getvalue()


def one_page_pdf(text: str) -> bytes:
    """The smallest PDF that shows a text."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> /MediaBox [0 0 612 792] >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    written = b"%PDF-1.4\n"
    places = []
    for number, content in enumerate(objects, 1):
        places.append(len(written))
        written += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % len(written)
    return written + b"xref\n0 6\n0000000000 65535 f \n" + table + end


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (PAGE.encode(), TEXT),
        (PAGE.encode("utf-16"), TEXT),
        ('<meta charset="koi8-r"><p>привет'.encode("koi8-r"), "привет\n"),
        ("<?xml version='1.0' encoding='ISO-8859-2'?><p>ż".encode("iso-8859-2"), "ż\n"),
        ("<meta charset=nonsense><p>é".encode("latin-1"), "é\n"),
        (b"<p>a<p>b</script>c", "a\nbc\n"),
        (b"<" * 9999 + b"p>text", None),
    ],
)
def test_pages(content, expected):
    text, reason = text_files.text_of("page", ".html", content)
    assert reason is None
    assert expected is None or text == expected


def test_books_are_read_in_their_order():
    content = epub({"a": PAGE, "b": "<p>second", "unread": "<p>x"}, ["b", "a", "b"])
    assert text_files.text_of("book", ".epub", content) == ("second\n\n" + TEXT, None)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: b"no zip", "not a zip"),
        (lambda: epub({"a": "x"}, ["a"], "<container"), "container.xml"),
        (lambda: epub({"a": "x"}, ["a"], "<container/>"), "no "),
        (lambda: epub({"a": "x"}, ["a"])[:-30], "zip"),
        (lambda: epub({"a": " " * (1 << 17)}, ["a"]), archives.TOO_LARGE),
        (lambda: epub({}, []), None),
    ],
)
def test_damaged_books_are_told(monkeypatch, make: Callable[[], bytes], told: str | None):
    monkeypatch.setattr(archives, "MAX_BYTES", 1 << 16)
    text, reason = text_files.text_of("book", ".epub", make())
    assert text == "" and reason is not None
    assert reason == text_files.EMPTY if told is None else reason.startswith("damaged: book: ") and told in reason


def test_a_laughing_book_does_not_fill_the_memory():
    entities = "".join(f'<!ENTITY e{index + 1} "{f"&e{index};" * 10}">' for index in range(12))
    laughing = f'<!DOCTYPE c [<!ENTITY e0 "ha">{entities}]><container>&e12;</container>'
    _, reason = text_files.text_of("book", ".epub", epub({}, [], laughing))
    assert reason is not None and "container.xml" in reason


def test_pdf(monkeypatch):
    assert text_files.text_of("paper", ".pdf", one_page_pdf("Words of a page")) == ("Words of a page", None)
    for damaged in (b"%PDF-1.4\nnothing", b"", one_page_pdf("x")[:200]):
        text, reason = text_files.text_of("paper", ".pdf", damaged)
        assert text == "" and reason
    monkeypatch.setitem(sys.modules, "pypdf", None)
    assert text_files.text_of("paper", ".pdf", one_page_pdf("x")) == ("", pdf.MISSING)


def test_tables(tmp_path: pathlib.Path, monkeypatch):
    monkeypatch.setattr(tables, "_ROWS", 2)
    table = pa.table(COLUMNS)
    parquet.write_table(table, tmp_path / "a.parquet")
    found, skipped = read(TextReader(str(tmp_path)))
    assert {key: document.text for key, document in found.items()} == {"a.parquet:1": "one", "a.parquet:2": "two"}
    assert skipped == {"damaged: a.parquet, row 3: no text": 1}
    assert set(texts(TextReader(str(tmp_path), key="id"))) == {"7", "8"}
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    _, skipped = read(TextReader(str(tmp_path), field="body"))
    assert "damaged: a.parquet: no column 'body', only text, id, other" in skipped and len(skipped) == 2
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert read(TextReader(str(tmp_path))) == ({}, {tables.MISSING: 2})


@pytest.mark.parametrize("layout", [pa.ipc.new_stream, pa.ipc.new_file])
def test_a_dataset_that_was_saved(tmp_path: pathlib.Path, layout):
    # As `datasets.Dataset.save_to_disk` leaves it, with what `map` had kept.
    for name in ("data-00000-of-00001.arrow", "cache-1f.arrow"):
        with pa.OSFile(str(tmp_path / name), "wb") as file, layout(file, pa.table(COLUMNS).schema) as writer:
            writer.write_table(pa.table(COLUMNS))
    write(tmp_path, {"state.json": "{}", "dataset_info.json": "{}"})
    assert set(texts(TextReader(str(tmp_path))).values()) == {"one", "two"}


def test_zstd(tmp_path: pathlib.Path, monkeypatch):
    lines = "".join(json.dumps({"text": f"page {index}"}) + "\n" for index in range(3)).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(lines[:20]) + zstd.compress(lines[20:]))
    (tmp_path / "cut.txt.zst").write_bytes(zstd.compress(b"cut" * 999)[:-3])
    (tmp_path / "wrong.txt.zst").write_bytes(zstd.compress(b"wrong" * 99)[:6] + b"\xff" * 40)
    (tmp_path / "bomb.txt.zst").write_bytes(zstd.compress(b" " * (1 << 22)))
    found, skipped = read(TextReader(str(tmp_path), max_bytes=1 << 20))
    assert [document.text for document in found.values()] == ["page 0", "page 1", "page 2"]
    assert skipped[archives.TOO_LARGE] == 1 and skipped["damaged: cut.txt.zst: it ends early"] == 1
    assert sum(skipped.values()) == 3
    monkeypatch.setattr(archives, "zstd", None)
    assert (
        "damaged: a.jsonl.zst: zstd, which needs pip install 'memorizing[documents]'"
        in read(TextReader(str(tmp_path)))[1]
    )


def test_kinds_are_told_by_their_names():
    assert {*markup.HTML, markup.EPUB, pdf.SUFFIX, ".txt", ".py"} <= {*text_files.SUFFIXES}
