"""Documents of one's own: what is read of a folder, in which encoding, and what is left out."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import zipfile
from collections import Counter

import fsspec
import pytest
from raw_corpora import pack, read, tar, texts, write

from memorizing.data.corpora import text
from memorizing.data.corpora.text import TextReader
from memorizing.data.errors import DataError
from memorizing.data.formats import archives, text_files

LINES = "".join(json.dumps({"text": f"page {index}", "id": f"p{index}", "body": "b"}) + "\n" for index in range(3))
FILES = {
    "a.txt": "plain é\n",
    "deep/er/b.md": b"\xef\xbb\xbf# title\n",
    "deep/c.py": "x = 1\n",
    "d.jsonl.gz": pack(LINES),
    "e.txt.gz": pack("zipped"),
    "same.txt": "plain é\n",
    "empty.txt": " \n",
    "binary.txt": bytes(range(256)),
    "picture.png": "png",
    ".hidden/f.txt": "hidden",
    "node_modules/g.js": "excluded",
    "packed.zip": "",
}


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    root = write(tmp_path / "folder", FILES)
    os.symlink("..", root / "deep" / "loop")
    os.symlink(tmp_path / "folder" / "a.txt", root / "link.txt")
    return root


def test_a_folder_is_read_as_it_lies(folder):
    found, skipped = read(TextReader(str(folder)))
    assert {key: document.text for key, document in found.items()} == {
        **{"a.txt": "plain é\n", "same.txt": "plain é\n", "deep/er/b.md": "# title\n", "deep/c.py": "x = 1\n"},
        **{f"d.jsonl.gz:{number}": f"page {number - 1}" for number in (1, 2, 3)},
        "e.txt.gz": "zipped",
    }
    assert skipped == {
        **{text_files.EMPTY: 1, text_files.BINARY: 1, "other kind of file": 1, "hidden": 1, "excluded folder": 1},
        **{archives.SYMBOLIC_LINK: 2, "archive in a folder (name it as a source to read it)": 1},
    }


def test_shards_are_the_whole_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_MAX_SHARDS", 4)
    write(tmp_path, {f"{index % 3}/{index}.txt": f"text {index}" for index in range(40)} | {"x.png": ""})
    reader = TextReader(str(tmp_path))
    shards = [list(reader.documents(shard, Counter())) for shard in reader.shards()]
    assert len(shards) == 4 and all(len(shard) > 4 for shard in shards)
    found, skipped = read(reader)
    assert len(found) == 40 and skipped == {"other kind of file": 1}


def test_a_folder_can_be_a_document(folder):
    found = texts(TextReader(str(folder), document="folder", suffixes=("md", ".py", "txt")))
    assert found["deep"] == "x = 1\n\n# title\n" and found["a.txt"] == "plain é\n"
    assert "deep/c.py" not in found


def test_several_sources_and_patterns(folder, tmp_path):
    write(tmp_path, {"other/a.txt": "another", "one,two.txt": "comma"})
    source = f"{folder}/*.txt,{tmp_path}/other, {folder}/deep/**/*.md"
    assert set(texts(TextReader(source))) == {*("folder/a.txt", "folder/same.txt", "other/a.txt", "deep/er/b.md")}
    assert set(texts(TextReader(f"{folder}/deep/**/*.md"))) == {"er/b.md"}
    assert texts(TextReader(f"{tmp_path}/one,two.txt")) == {"one,two.txt": "comma"}
    # Of two folders of one name, keys tell which.
    write(tmp_path, {"x/same/a.txt": "1", "y/same/a.txt": "2"})
    assert len(texts(TextReader(f"{tmp_path}/x/same,{tmp_path}/y/same"))) == 2


def test_a_named_file_is_read_whatever_it_is_called(tmp_path):
    write(tmp_path, {"notes.log": "text", "lines.json": LINES})
    assert texts(TextReader(f"{tmp_path}/notes.log")) == {"notes.log": "text"}
    assert len(texts(TextReader(f"{tmp_path}/lines.json"))) == 3


def test_fields_and_keys_of_json_lines(tmp_path):
    write(tmp_path, {"a.jsonl": LINES + '{"body": "no key"}\n{"text": 1}\n[]\n'})
    found, skipped = read(TextReader(str(tmp_path), field="body", key="id", keep_duplicates=True))
    assert {key: document.text for key, document in found.items()} == {f"p{index}": "b" for index in range(3)}
    assert len(skipped) == 3 and "damaged: a.jsonl, line 4: no id" in skipped


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lines_between_separators(tmp_path, encoding):
    content = "first\nof all\n<|end|>\n\n<|end|>\nsecond é\n  <|end|>  \n" + "long " * 100 + "\n<|end|>\nlast"
    (tmp_path / "a.txt").write_bytes(content.encode(encoding))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"cut off" * 9)[:-9])
    found, skipped = read(TextReader(str(tmp_path), separator="<|end|>", max_bytes=300))
    assert [document.text for document in found.values()] == ["first\nof all\n", "second é\n", "last"]
    assert skipped == {archives.TOO_LARGE: 1, "damaged: b.txt.gz: it ends early": 1}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("é漢".encode(), "é漢"),
        (b"\xef\xbb\xbfx", "x"),
        ("wide é漢".encode("utf-16"), "wide é漢"),
        ("wide é".encode("utf-16-be"), "wide é"),
        ("wide é".encode("utf-16-le"), "wide é"),
        ("wide é".encode("utf-32"), "wide é"),
        ("café".encode("latin-1"), "café"),
        ("“café”".encode("cp1252"), "“café”"),
        (b"caf\xe9 \x81", "café \x81"),
        (b"PK\x03\x04\x00\x00", None),
        (bytes(range(1, 256)), None),
        (b"\xff\xfex", None),
    ],
)
def test_encodings_are_told_apart(content, expected):
    assert text_files.decoded(content) == (("", text_files.BINARY) if expected is None else (expected, None))


def test_what_is_short_or_long_is_left_out(tmp_path):
    write(tmp_path, {"a.txt": "  ab  ", "b.txt": "x" * 50, "c.txt": "enough"})
    found, skipped = read(TextReader(str(tmp_path), min_bytes=3, max_bytes=49))
    assert set(found) == {"c.txt"} and skipped == {"too short": 1, archives.TOO_LARGE: 1}
    write(tmp_path / "d", {f"{index}.txt": "enough" for index in range(9)})
    _, skipped = read(TextReader(str(tmp_path), document="folder", max_bytes=49))
    assert skipped["folder too large"] == 1


def test_archives_are_read_where_they_are_named(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(pack(tar({"in/x.txt": "tarred", "../out.txt": "left", "y.png": ""})))
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("z.txt", "zipped")
        # A bomb: a thousandth of its size.
        archive.writestr("bomb.txt", " " * (1 << 20))
    found, skipped = read(TextReader(f"{tmp_path}/a.tar.gz,{tmp_path}/b.zip", max_bytes=1 << 19))
    assert {key: document.text for key, document in found.items()} == {
        "a.tar.gz/in/x.txt": "tarred",
        "b.zip/z.txt": "zipped",
    }
    assert skipped[archives.TOO_LARGE] == 1 and any("leaves the archive" in reason for reason in skipped)


def test_what_fsspec_can_name_is_read():
    system = fsspec.filesystem("memory")
    for name, content in FILES.items():
        system.pipe(f"/bucket/{name}", content if isinstance(content, bytes) else content.encode())
    try:
        found = texts(TextReader("memory://bucket"))
        assert found["deep/er/b.md"] == "# title\n" and found["e.txt.gz"] == "zipped" and len(found) == 8
        assert set(texts(TextReader("memory://bucket/**/*.md"))) == {"deep/er/b.md"}
    finally:
        system.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("missing", "no file or folder"),
        ("missing/*.txt", "no file or folder"),
        ("", "give a folder"),
        ("nowhere://x", "cannot be reached"),
    ],
)
def test_a_source_that_is_not_there_is_told(tmp_path, monkeypatch, source, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=told):
        TextReader(source).shards()
