"""Damaged and hostile archives: what is whole is read, the rest is named, and nothing is written anywhere."""

import bz2
import lzma
import pathlib
import tarfile
import tracemalloc
import zipfile
from collections import Counter

import pytest
from raw_corpora import link, pack, tar, write

from memorizing.data import documents
from memorizing.data.errors import DataError
from memorizing.data.formats import archives, json_lines

FILES = {"a.txt": "first " * 300, "folder/b.txt": "second " * 300, "folder/deep/c.txt": "third " * 300}


def members(path):
    skipped = Counter()
    found = {}
    for member in archives.members(str(path), skipped):
        text = archives.read_text(member, skipped)
        if text is not None:
            found[member.name] = text
    return found, skipped


def as_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("folder")
        for name, text in FILES.items():
            archive.writestr(name, text)


@pytest.mark.parametrize(
    ("name", "compress"),
    [("x.tar", bytes), ("x.tar.gz", pack), ("x.tgz", pack), ("x.tar.bz2", bz2.compress), ("x.tar.xz", lzma.compress)],
)
def test_folders_and_archives_of_all_kinds_are_read_alike(tmp_path, name, compress):
    folder = write(tmp_path / "folder", FILES)
    (tmp_path / name).write_bytes(compress(tar(FILES)))
    as_zip(tmp_path / "x.zip")
    assert archives.is_archive(name) and archives.is_archive("x.zip") and not archives.is_archive("x.gz")
    for path in (folder, tmp_path / name, tmp_path / "x.zip"):
        assert members(path) == (FILES, {})


def test_what_comes_before_the_damage_is_read(tmp_path):
    whole, packed = tar(FILES), pack(tar(FILES))
    end_of_first = 512 + 2048
    path = tmp_path / "x.tar"
    for content, expected in (
        (whole[: end_of_first + 100], 1),
        # Where one member ends and the next one begins.
        (whole[:end_of_first], 1),
        (whole[:700], 0),
        (whole[:end_of_first] + b"\xff" * 512 + whole[end_of_first + 512 :], 1),
        (packed[: len(packed) - 30], None),
        (b"no tar at all" * 100, 0),
        (b"", 0),
    ):
        path.write_bytes(content)
        found, skipped = members(path)
        assert found == dict([*FILES.items()][: len(found)])
        assert expected is None or len(found) == expected
        damages = documents.all_damage(skipped)
        assert any(damage.startswith("x.tar: ") and damage.endswith("the rest of it is lost") for damage in damages)


def test_a_wrong_checksum_is_told(tmp_path):
    packed = bytearray(pack(tar(FILES)))
    packed[-6] ^= 1
    (tmp_path / "x.tar.gz").write_bytes(packed)
    found, skipped = members(tmp_path / "x.tar.gz")
    assert found == FILES
    (damage,) = documents.all_damage(skipped)
    assert damage.startswith("x.tar.gz: CRC check failed")


def test_nothing_leaves_the_archive_and_links_are_not_followed(tmp_path):
    before = write(tmp_path / "inside", {"x.tar": tar({})}).parent
    hostile = {
        "../escaped.txt": "out",
        "a/../../escaped.txt": "out",
        "/tmp/escaped.txt": "out",
        "link": link("link", "../../secret"),
        "circle": link("circle", "circle"),
        "good.txt": "good",
    }
    path = tmp_path / "inside" / "x.tar"
    path.write_bytes(tar(hostile))
    listed = sorted(before.rglob("*"))
    found, skipped = members(path)
    assert found == {"good.txt": "good"}
    assert skipped.pop("symbolic link") == 2
    assert documents.all_damage(skipped) == sorted(
        f"x.tar: {name}: the path leaves the archive" for name in hostile if "escaped" in name
    )
    assert sorted(before.rglob("*")) == listed and not pathlib.Path("/tmp/escaped.txt").exists()


def test_circles_of_links_in_a_folder_end(tmp_path):
    write(tmp_path, FILES)
    (tmp_path / "folder" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "itself").symlink_to("itself")
    assert members(tmp_path) == (FILES, {"symbolic link": 2})


def test_texts_that_are_no_utf8_are_named(tmp_path):
    write(tmp_path, {"a.txt": b"\xef\xbb\xbffine", "b.txt": b"caf\xe9"})
    found, skipped = members(tmp_path)
    assert found == {"a.txt": "fine"}
    assert documents.all_damage(skipped) == ["b.txt: not UTF-8 at byte 3"]


def test_an_encrypted_member_is_named(tmp_path):
    as_zip(tmp_path / "x.zip")
    content = bytearray((tmp_path / "x.zip").read_bytes())
    # The flag of the first entry of the directory at the end.
    content[content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1) + 8] |= 1
    (tmp_path / "x.zip").write_bytes(content)
    found, skipped = members(tmp_path / "x.zip")
    assert found == dict([*FILES.items()][1:])
    assert documents.all_damage(skipped) == ["x.zip: a.txt: it is encrypted"]


def test_a_large_archive_is_never_in_memory(tmp_path):
    size = 48 << 20
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz", compresslevel=1) as archive, open("/dev/zero", "rb") as zeros:
        for index in range(2):
            info = tarfile.TarInfo(f"{index}.bin")
            info.size = size
            archive.addfile(info, zeros)
        info = tarfile.TarInfo("last.txt")
        archive.addfile(info)
    tracemalloc.start()
    names = [member.name for member in archives.members(str(tmp_path / "x.tar.gz"), Counter())]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert names == ["0.bin", "1.bin", "last.txt"]
    assert peak < 8 << 20


def lines(path, fields):
    skipped = Counter()
    return [value for _, value in json_lines.read(str(path), path.name, skipped, fields)], documents.all_damage(skipped)


def test_damaged_lines_are_named_and_the_others_read(tmp_path):
    content = (
        b'{"x": "a"}\n\n{"x": "caf\xe9"}\n{"x": 1}\n{"y": "b"}\nnothing\n[]\n{"x": "\\ud800"}\n{"x": "\\ud83d\\ude00"}'
    )
    write(tmp_path, {"x.json": content, "x.json.gz": pack(content)})
    for name in ("x.json", "x.json.gz"):
        found, damages = lines(tmp_path / name, {"x": str})
        assert found == [{"x": "a"}, {"x": "\U0001f600"}]
        assert damages == [
            f"{name}, line 3: not UTF-8",
            f"{name}, line 4: x is no str",
            f"{name}, line 5: no x",
            f"{name}, line 6: not JSON",
            f"{name}, line 7: no JSON object",
            f"{name}, line 8: not UTF-8",
        ]


def test_a_file_of_anything_is_reported_in_few_lines(tmp_path):
    write(tmp_path, {"x.json": "nothing\n" * 10_000})
    skipped = Counter()
    assert list(json_lines.read(str(tmp_path / "x.json"), "x.json", skipped, {})) == []
    assert len(skipped) < 30 and sum(skipped.values()) == 10_000
    assert documents.reasons(skipped) == {"damaged": 10_000}


def test_a_truncated_file_of_lines_gives_what_is_there(tmp_path):
    packed = pack("".join(f'{{"x": "{index} {index**9}"}}\n' for index in range(20_000)))
    write(tmp_path, {"x.json.gz": packed[: len(packed) // 2]})
    found, damages = lines(tmp_path / "x.json.gz", {"x": str})
    assert 5000 < len(found) < 15_000
    assert damages == ["x.json.gz: it ends early"]


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_what_is_no_folder_is_told(tmp_path, name):
    write(tmp_path, {"file": ""})
    with pytest.raises(DataError, match=rf"{name}'.*; give a folder of things"):
        archives.listing(str(tmp_path / name), "a folder of things")


def test_counts_of_damage_add_up_like_all_others():
    one = Counter({documents.damaged("x.tar", "it ends early"): 1, "empty": 2})
    other = Counter({documents.damaged("y.tar", "it ends early"): 1, "empty": 1})
    assert documents.reasons(one + other) == {"damaged": 2, "empty": 3}
    assert documents.all_damage(one + other) == ["x.tar: it ends early", "y.tar: it ends early"]


def test_what_becomes_too_large_is_left_out_and_counted(tmp_path, monkeypatch):
    """A zip of a kilobyte can hold a text of gigabytes; neither it nor a line of it is ever in memory."""
    monkeypatch.setattr(archives, "MAX_BYTES", 1 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.txt", b"a" * (64 << 20))
        archive.writestr("text.txt", b"text")
    skipped = Counter()
    tracemalloc.start()
    texts = [archives.read_text(member, skipped) for member in archives.members(str(tmp_path / "bomb.zip"), skipped)]
    path = tmp_path / "lines.json"
    path.write_bytes(b'{"text": "a"}\n{"text": "' + b"a" * (8 << 20) + b'"}\n{"text": 3}\n{"text": "b"}')
    found = list(json_lines.read(str(path), "lines.json", skipped, {"text": str}))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert texts == [None, "text"]
    assert found == [(1, {"text": "a"}), (4, {"text": "b"})]
    assert skipped["too large"] == 2 and skipped.total() == 3
    assert peak < 24 << 20
