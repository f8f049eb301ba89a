"""C4 in allenai's layout."""

import json

import pytest
from raw_corpora import pack, read, shared, table, write

from memorizing.data import documents
from memorizing.data.corpora import catalogue
from memorizing.data.corpora.c4 import C4Reader
from memorizing.data.errors import DataError


def page(url, text="text", **others):
    return json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": url} | others) + "\n"


FILES = {
    "en/c4-train.00000-of-00002.json.gz": pack(page("https://a.org/1", "one\n\n é\u2028 ") + page("https://a.org/2")),
    "en/c4-train.00001-of-00002.json.gz": pack(page("https://a.org/3")),
    "en/c4-validation.00000-of-00001.json.gz": pack(page("https://a.org/4")),
    "en/notes.txt": "no page",
    "realnewslike/c4-train.00000-of-00001.json.gz": pack(page("https://news.org/1")),
}


def test_every_page_of_the_shared_corpus_is_read():
    root = shared("c4")
    found, skipped = read(C4Reader(str(root)))
    rows = table(root / "docs.tsv")
    assert {key: len(document.text.encode()) for key, document in found.items()} == {
        row["document"]: int(row["bytes"]) for row in rows
    }
    assert not skipped and len(rows) == 745
    assert {document.metadata["split"] for document in found.values()} == {"train", "validation"}


def test_pages_of_a_variant_with_their_splits(tmp_path):
    write(tmp_path, FILES)
    for source, settings in ((tmp_path, {}), (tmp_path / "en", {}), (tmp_path, {"variant": "en"})):
        found, skipped = read(C4Reader(str(source), **settings))
        assert {key[-1]: document.metadata["split"] for key, document in found.items()} == {
            "1": "train", "2": "train", "3": "train", "4": "validation"
        }  # fmt: skip
        assert found["https://a.org/1"].text == "one\n\n é\u2028 " and not skipped
    assert list(read(C4Reader(str(tmp_path), variant="realnewslike"))[0]) == ["https://news.org/1"]


def test_a_shard_is_a_file(tmp_path):
    write(tmp_path, FILES)
    reader = C4Reader(str(tmp_path))
    assert reader.shards() == [name for name in FILES if name.startswith("en/c4-")]
    (document,) = reader.documents("en/c4-train.00001-of-00002.json.gz", documents.Counter())
    assert document.key == "https://a.org/3"


def test_short_pages_are_left_to_who_tokenises():
    corpus = catalogue.find("c4")
    assert corpus.min_tokens == 4096 and corpus.official_splits
    assert all(other.min_tokens == 0 for other in catalogue.CORPORA.values() if other is not corpus)


def test_damaged_lines_and_files_are_named_and_the_rest_read(tmp_path):
    whole = pack("".join(page(f"https://b.org/{index}", f"{index**20}") for index in range(1000)))
    write(tmp_path, FILES | {
        "en/c4-train.00001-of-00002.json.gz": pack('{"text": "a"}\n' + page("https://a.org/3") + "{\n"),
        "en/c4-validation.00000-of-00001.json.gz": whole[: len(whole) // 2],
    })  # fmt: skip
    found, skipped = read(C4Reader(str(tmp_path)))
    assert "https://a.org/3" in found and 300 < len(found) < 700
    assert documents.all_damage(skipped) == [
        "c4-train.00001-of-00002.json.gz, line 1: no url",
        "c4-train.00001-of-00002.json.gz, line 3: not JSON",
        "c4-validation.00000-of-00001.json.gz: it ends early",
    ]


def test_a_page_that_comes_again_has_a_key_of_its_own(tmp_path):
    name = "c4-train.00000-of-00001.json.gz"
    write(tmp_path, {name: pack(page("https://a.org", "one") + page("https://a.org", "two"))})
    found, _ = read(C4Reader(str(tmp_path)))
    assert {key: document.text for key, document in found.items()} == {
        "https://a.org": "one", f"https://a.org#{name}:2": "two"
    }  # fmt: skip


@pytest.mark.parametrize("files", [{}, {"en/other.json.gz": b""}])
def test_folders_without_c4_are_told(tmp_path, files):
    write(tmp_path, files)
    with pytest.raises(DataError, match=r"no file c4-train\.\*\.json\.gz"):
        C4Reader(str(tmp_path)).shards()
    with pytest.raises(DataError, match="no folder"):
        C4Reader(str(tmp_path / "nowhere")).shards()
