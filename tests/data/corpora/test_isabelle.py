"""Which documents the Isabelle reader makes of a library, and that no theory comes before one that it imports."""

import posixpath
import re
import tarfile

import pytest
from raw_corpora import pack, read, shared, table, tar, texts, write

from memorizing.data import documents
from memorizing.data.corpora.isabelle import IsabelleReader
from memorizing.data.errors import DataError
from memorizing.data.formats import isabelle_syntax
from memorizing.data.formats.isabelle_imports import import_order


def theory(name, *imports):
    return f"theory {name} imports {' '.join(imports or ('Main',))} begin\nlemma {name}: True ..\nend"


ENTRY = "chapter AFP\nsession {} (AFP) = HOL +\n  theories T\n"
AFP = {
    "afp/thys/ROOTS": "One\nTwo\n",
    "afp/thys/One/ROOT": ENTRY.format("One") + 'session "One-Base" in "base" = HOL + theories X',
    "afp/thys/One/A.thy": theory("A", "B", '"HOL-Library.Multiset"'),
    "afp/thys/One/B.thy": theory("B", '"base/X"'),
    "afp/thys/One/base/X.thy": theory("X"),
    "afp/thys/One/document/root.tex": "no theory",
    "afp/thys/Two/ROOT": ENTRY.format("Two"),
    "afp/thys/Two/T.thy": theory("T", "One.A"),
}
DISTRIBUTION = {
    "src/HOL/ROOT": """
        (* comment (* nested *) session Wrong in "Nowhere" *)
        chapter HOL
        session HOL (main) = Pure +
          description \\<open>session Wrong in "Nowhere"\\<close>
          options [strict_facts, document = "pdf"]
          directories "../Tools" Sub
          theories [quick_and_dirty] Main (global)
        session "HOL-Library" (main timing) in Library = HOL +
          theories List_More
          document_files (in "elsewhere") "root.tex"
    """,
    "src/HOL/Main.thy": theory("Main", "Nat", '"~~/src/Tools/Code"'),
    "src/HOL/Nat.thy": theory("Nat", '"Sub/Base"'),
    "src/HOL/Sub/Base.thy": theory("Base", "Pure"),
    "src/Tools/Code.thy": theory("Code", "Pure"),
    "src/HOL/Library/List_More.thy": theory("List_More", "Main"),
    "src/Elsewhere/Lost.thy": theory("Lost"),
}


def names(text):
    return re.findall(r"^theory (\w+)", text, re.MULTILINE)


def local_imports(folder, imports, files):
    """Another reading of imports than the reader's: the files of the same entry that a theory imports."""
    for imported in imports:
        path = posixpath.normpath(
            posixpath.join(folder, imported.rpartition(".")[2] if "/" not in imported else imported)
        )
        by_name = [file for file in files if posixpath.basename(file) == f"{posixpath.basename(path)}.thy"]
        if f"{path}.thy" in files:
            yield f"{path}.thy"
        elif "/" not in imported and len(by_name) == 1:
            yield by_name[0]


def test_shared_entries_hold_all_their_theories_in_import_order():
    root = shared("isabelle")
    found, _ = read(IsabelleReader(str(root / "afp-2021-02-11.tar.gz")))
    sizes = {row["document"]: int(row["bytes"]) for row in table(root / "docs.tsv")}
    assert {key: len(document.text.encode()) for key, document in found.items()} == sizes and len(sizes) == 50
    entries = {key: {} for key in found}
    with tarfile.open(root / "afp-2021-02-11.tar.gz") as archive:
        for info in archive:
            if info.name.endswith(".thy"):
                _, _, entry, path = info.name.split("/", 3)
                entries[entry][path] = archive.extractfile(info).read().decode()
    num_imports = 0
    for key, theories in entries.items():
        # Every theory is there once and whole; where texts repeat, their first place would say nothing.
        rest = found[key].text
        positions = {path: rest.find(text) for path, text in theories.items()}
        assert min(positions.values()) >= 0 and len(set(positions.values())) == len(theories)
        for path, text in theories.items():
            header = re.search(r"^\s*imports\b(.*?)\bbegin\b", text, re.MULTILINE | re.DOTALL)
            imports = re.findall(r'[^\s"]+', re.sub(r"\(\*.*?\*\)", " ", header[1], flags=re.DOTALL)) if header else []
            for imported in local_imports(posixpath.dirname(path), imports, theories):
                assert positions[imported] < positions[path], (key, imported, path)
                num_imports += 1
    assert num_imports > 600


def test_shared_sessions_are_documents():
    found, skipped = read(IsabelleReader(str(shared("isabelle"))))
    assert len(found) == 79 and {"Jinja", "UTP1", "UTP-Axiomatic", "HOL-TRANSCL"} <= set(found)
    assert skipped == {"theory of no session": 34}
    assert found["Jinja"].metadata["title"] == "Jinja is not Java"


@pytest.mark.parametrize("form", ["archive", "folder", "thys", "archives"])
def test_entries_of_the_archive_are_whole(tmp_path, form):
    if form.startswith("archive"):
        write(tmp_path, {"afp.tar.gz": pack(tar(AFP))})
    else:
        write(tmp_path, AFP)
    inside = {"archive": "afp.tar.gz", "folder": "", "thys": "afp/thys", "archives": ""}[form]
    found = texts(IsabelleReader(str(tmp_path / inside)))
    assert found == {
        "One": "\n".join(AFP[f"afp/thys/One/{name}.thy"] for name in ("base/X", "B", "A")),
        "Two": AFP["afp/thys/Two/T.thy"],
    }


def test_entries_may_be_folders_of_their_own(tmp_path):
    write(tmp_path, {name.removeprefix("afp/thys/"): text for name, text in AFP.items() if "ROOTS" not in name})
    reader = IsabelleReader(str(tmp_path))
    assert reader.shards() == ["One", "Two"]
    assert list(texts(reader)) == ["One", "Two"]


def test_sessions_of_the_distribution_are_documents(tmp_path):
    write(
        tmp_path,
        {"Isabelle2021.tar.gz": pack(tar({f"Isabelle2021/{name}": text for name, text in DISTRIBUTION.items()}))},
    )
    write(tmp_path / "unpacked", DISTRIBUTION)
    for source in (tmp_path / "Isabelle2021.tar.gz", tmp_path / "unpacked"):
        found, skipped = read(IsabelleReader(str(source)))
        assert set(found) == {"HOL", "HOL-Library"}
        assert names(found["HOL"].text) == ["Base", "Nat", "Code", "Main"]
        assert names(found["HOL-Library"].text) == ["List_More"]
        assert skipped == {"theory of no session": 1}


def test_metadata_in_one_file_and_in_one_an_entry(tmp_path):
    ini = "[One]\ntitle = First: a title\ntopic = Logic\ndate = 2020-01-02\nabstract =\n  50% of\n  it = here\nlicense = LGPL\n"
    toml = 'title = "Second"\ndate = 2021-03-04\ntopics = ["Logic", "Mathematics"]\nlicense = "bsd"\n[authors]\n'
    write(tmp_path, AFP | {"afp/metadata/metadata": ini, "afp/metadata/entries/Two.toml": toml})
    found, skipped = read(IsabelleReader(str(tmp_path / "afp")))
    assert not skipped
    assert found["One"].metadata == {
        "num_files": 3, "title": "First: a title", "date": "2020-01-02", "topics": "Logic", "license": "lgpl"
    }  # fmt: skip
    assert found["Two"].metadata["topics"] == "Logic, Mathematics" and found["Two"].metadata["date"] == "2021-03-04"
    found, skipped = read(IsabelleReader(str(tmp_path / "afp"), licences=("bsd",)))
    assert list(found) == ["Two"] and skipped == {"licence not allowed": 1}


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("afp/metadata/metadata", "no section", "metadata/metadata: File contains no section headers"),
        ("afp/metadata/entries/Two.toml", "title =", "Two.toml: Invalid value"),
        ("afp/thys/One/B.thy", b"theory B caf\xe9", "B.thy: not UTF-8 at byte 12"),
    ],
)
def test_damaged_members_are_named_and_the_rest_read(tmp_path, file, content, told):
    write(tmp_path, {"x.tar": tar(AFP | {file: content})})
    found, skipped = read(IsabelleReader(str(tmp_path)))
    assert set(found) == {"One", "Two"}
    assert names(found["One"].text) == (["A", "X"] if "B.thy" in file else ["X", "B", "A"])
    (damage,) = documents.all_damage(skipped)
    assert damage.startswith("x.tar: ") and told in damage and sum(skipped.values()) == 1


def test_an_entry_that_is_cut_off_is_left_out(tmp_path):
    packed = tar(AFP)
    write(tmp_path, {"x.tar": packed[: packed.index(b"afp/thys/One/base/X.thy") + 100]})
    assert read(IsabelleReader(str(tmp_path)))[0] == {}
    whole = {name: text for name, text in AFP.items() if "/Two/" in name} | AFP
    packed = tar(whole)
    write(tmp_path, {"x.tar": packed[: packed.index(b"afp/thys/One/base/X.thy") + 100]})
    found, skipped = read(IsabelleReader(str(tmp_path)))
    assert list(found) == ["Two"]
    assert documents.reasons(skipped) == {"damaged": 1, "entry cut off": 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("theory T imports Main begin", ["Main"]),
        ('theory "T-2"\nimports A "B/C"\n  "HOL-Library.D" begin imports E', ["A", "B/C", "HOL-Library.D"]),
        ("(* theory X imports Y begin *) theory T imports A (* B (* C *) *) D keywords \"x\" :: y begin", ["A", "D"]),
        ("section \\<open>theory X imports Y \\<open>begin\\<close>\\<close> theory T imports A begin", ["A"]),
        ("text ‹theory X imports Y begin› theory T imports A begin", ["A"]),
        ("header {* theory X imports (* Y begin *} theory T imports A uses \"b.ML\" begin", ["A"]),
        ('text "theory X imports Y begin" theory T imports A abbrevs "a" = "b" begin', ["A"]),
        ("theory Pure keywords \"imports\" begin", []),
        ("theory \\<alpha>\\<^sub>1 imports \\<beta> begin", ["\\<beta>"]),
        ("", []),
        ("(* theory T imports A begin", []),
    ],
)  # fmt: skip
def test_headers_of_theories(text, expected):
    assert isabelle_syntax.imports(text) == expected


@pytest.mark.parametrize(
    ("imports", "expected"),
    [
        ({"a/C": ["../B"], "B": ["A"], "A": []}, "A B a/C"),
        # A theory comes right after what it needs; else the order is that of the names.
        ({"Z": [], "M": ["Z"], "A": [], "B": ["M", "A"]}, "A Z M B"),
        ({"A": ["S.B"], "B": []}, "B A"),
        ({"A": ["Other.B"], "B": []}, "A B"),
        ({"A": ['$AFP/E/B', "~~/src/HOL/Main"], "thys/E/B": []}, "thys/E/B A"),
        # Of two theories of a name the nearer one.
        ({"p/A": ["V"], "p/V": [], "r/V": ["A"], "q/A": ["../r/V"]}, "p/V p/A r/V q/A"),
        ({"A": ["B"], "B": ["A"], "C": ["C", "B"]}, "B A C"),
        ({f"T{index:05}": [f"T{index + 1:05}"] for index in range(5000)}, " ".join(f"T{4999 - i:05}" for i in range(5000))),
    ],
)  # fmt: skip
def test_order_of_imports(imports, expected):
    files = {
        f"{name}.thy": theory(posixpath.basename(name), *(f'"{imported}"' for imported in those))
        for name, those in imports.items()
    }
    assert import_order(files, {"S"}) == [f"{name}.thy" for name in expected.split()]


def test_archives_of_interleaved_entries_are_read(tmp_path):
    members = sorted(AFP.items(), key=lambda item: posixpath.basename(item[0]))
    write(tmp_path, {"x.tar": tar(dict(members))})
    write(tmp_path / "folder", AFP)
    assert texts(IsabelleReader(str(tmp_path / "x.tar"))) == texts(IsabelleReader(str(tmp_path / "folder")))


@pytest.mark.parametrize("files", [{}, {"notes/readme.txt": "x"}])
def test_folders_without_a_library_are_told(tmp_path, files):
    write(tmp_path, files)
    with pytest.raises(DataError, match=r"no library in .*give a release of the AFP"):
        IsabelleReader(str(tmp_path)).shards()
    with pytest.raises(DataError, match="no folder"):
        IsabelleReader(str(tmp_path / "nowhere")).shards()


def test_a_file_that_is_no_archive_is_damage(tmp_path):
    path = write(tmp_path, {"x.tar.gz": "nothing"}) / "x.tar.gz"
    found, skipped = read(IsabelleReader(str(path)))
    assert not found and documents.all_damage(skipped)[0].startswith("x.tar.gz: ")
