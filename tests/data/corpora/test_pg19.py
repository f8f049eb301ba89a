"""PG-19 as a folder of the bucket's layout and as an archive."""

import pytest
from raw_corpora import pack, read, shared, table, tar, write

from memorizing.data import documents
from memorizing.data.corpora.pg19 import PG19Reader
from memorizing.data.errors import DataError

METADATA = '1001,"Audley, by ""B."", a title",1862,http://a/1\r\n1002,Plain,1900,http://a/2\r\n'
FILES = {
    "train/1001.txt": "\ufeffChapter I.\r\n\r\nIt was.",
    "train/1002.txt": "  Two  ",
    "train/2002.txt": "é",
    "validation/3.txt": "three",
    "test/4.txt": "four",
    "metadata.csv": METADATA,
}


def sources(tmp_path, files):
    """The same books in every form."""
    write(tmp_path / "folder", files)
    write(tmp_path / "packed", {"pg19.tar.gz": pack(tar({f"./pg19/{name}": text for name, text in files.items()}))})
    return [tmp_path / "folder", tmp_path / "packed", tmp_path / "packed" / "pg19.tar.gz"]


def test_every_book_of_the_shared_corpus_is_read_with_its_split_and_title():
    root = shared("pg19")
    found, skipped = read(PG19Reader(str(root)))
    sizes = {row["document"]: int(row["bytes"]) for row in table(root / "docs.tsv")}
    assert {
        f"{document.metadata['split']}/{key}.txt": len(document.text.encode()) for key, document in found.items()
    } == sizes
    assert not skipped and len(sizes) == 20
    assert found["987244"].metadata["title"] == "Audley, by Braddon"


def test_folders_and_archives_give_the_same_books(tmp_path):
    for source in sources(tmp_path, FILES):
        found, skipped = read(PG19Reader(str(source)))
        assert {key: (book.text, book.metadata["split"]) for key, book in found.items()} == {
            "1001": ("Chapter I.\r\n\r\nIt was.", "train"),
            "1002": ("  Two  ", "train"),
            "2002": ("é", "train"),
            "3": ("three", "validation"),
            "4": ("four", "test"),
        }
        assert found["1001"].metadata == {
            "split": "train", "title": 'Audley, by "B.", a title', "year": "1862", "url": "http://a/1"
        }  # fmt: skip
        assert found["3"].metadata == {"split": "validation"}
        assert not skipped


def test_shards_of_a_folder_are_read_alone(tmp_path):
    write(tmp_path, FILES)
    reader = PG19Reader(str(tmp_path))
    assert reader.shards() == ["train/*01.txt", "train/*02.txt", "validation/*3.txt", "test/*4.txt"]
    books = [[book.key for book in reader.documents(shard, documents.Counter())] for shard in reader.shards()]
    assert books == [["1001"], ["1002", "2002"], ["3"], ["4"]]


def test_books_without_metadata_are_read(tmp_path):
    for source in sources(tmp_path, {name: text for name, text in FILES.items() if name != "metadata.csv"}):
        assert len(read(PG19Reader(str(source)))[0]) == 5


def test_damaged_books_and_lines_are_named_once_and_the_rest_read(tmp_path):
    bad = FILES | {"train/1002.txt": b"caf\xe9", "metadata.csv": METADATA + "1003,Missing,1900\n", "train/x.doc": ""}
    for source in sources(tmp_path, bad):
        found, skipped = read(PG19Reader(str(source)))
        assert sorted(found) == ["1001", "2002", "3", "4"]
        line, book = sorted(documents.all_damage(skipped), key=lambda damage: "1002.txt" in damage)
        assert line.endswith("metadata.csv, line 3: 3 columns, not 4: id, title, year, url")
        assert book.endswith("train/1002.txt: not UTF-8 at byte 3")
        assert documents.reasons(skipped) == {"damaged": 2, "no book": 1}


def test_an_archive_that_ends_early_gives_the_books_before(tmp_path):
    content = tar({name: text * 300 for name, text in FILES.items()})
    path = write(tmp_path, {"pg19.tar.gz": content[: content.index(b"metadata.csv") + 700]}) / "pg19.tar.gz"
    found, skipped = read(PG19Reader(str(path)))
    assert len(found) == 5
    assert documents.all_damage(skipped) == [
        "pg19.tar.gz: it ends early; the rest of it is lost",
        "pg19.tar.gz: metadata.csv: it ends early",
    ]


@pytest.mark.parametrize("metadata", ["1001,Title,1900\n1002,Title,1900\n", "id\n"])
def test_metadata_with_a_missing_column_is_told(tmp_path, metadata):
    for source in sources(tmp_path, FILES | {"metadata.csv": metadata}):
        with pytest.raises(DataError, match=r"metadata\.csv.*no line of this file can be used"):
            read(PG19Reader(str(source)))


@pytest.mark.parametrize("files", [{}, {"train.txt": "x"}])
def test_folders_without_books_are_told(tmp_path, files):
    write(tmp_path, files)
    with pytest.raises(DataError, match=r"no book in .*give a copy of gs://deepmind-gutenberg"):
        PG19Reader(str(tmp_path)).shards()
    with pytest.raises(DataError, match="no folder"):
        PG19Reader(str(tmp_path / "nowhere")).shards()
