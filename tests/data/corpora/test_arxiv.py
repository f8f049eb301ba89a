"""Which papers the arXiv reader takes from the bulk source, and in which order their files come."""

import json
import pickle
import re
from collections import Counter

import pytest
from raw_corpora import link, pack, read, shared, table, tar, texts, write

from memorizing.data import documents
from memorizing.data.corpora.arxiv import METADATA_FILE, ArxivReader, paper_id
from memorizing.data.errors import DataError
from memorizing.data.formats import tex_sources

PAPER = "\\documentclass{article}\\begin{document}text\\end{document}"


def snapshot(categories):
    """The file of the labels: categories by id."""
    lines = ({"id": key, "categories": value, "license": None, "versions": []} for key, value in categories.items())
    return "".join(json.dumps(line) + "\n" for line in lines)


def corpus(tmp_path, papers, categories=None):
    """A corpus of one archive; papers by the names of their members."""
    categories = {paper_id(name): "math.AG" for name in papers} if categories is None else categories
    members = {f"2601/{name}": content for name, content in papers.items()}
    write(tmp_path, {"src/arXiv_src_2601_001.tar": tar(members), METADATA_FILE: snapshot(categories)})
    return ArxivReader(str(tmp_path))


def of_old(packed):
    """A tar as it was written before its headers had a magic word."""
    header = bytearray(packed[:512])
    header[257:265] = bytes(8)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + packed[512:]


@pytest.mark.parametrize("primary_only", [False, True])
def test_every_paper_of_the_shared_corpus_is_kept_or_dropped_as_it_says(primary_only):
    root = shared("arxiv")
    found, skipped = read(ArxivReader(str(root), primary_only=primary_only))
    truth = table(root / "truth.tsv")
    assert len(truth) == 30
    kept = set()
    for paper in truth:
        categories = paper["categories"].split()[: 1 if primary_only else None]
        has_source = paper["kind"] != "pdf" and "Withdrawn" not in paper["key"]
        if has_source and any(category.startswith("math.") for category in categories):
            kept.add(paper["id"])
    assert set(found) == kept
    assert skipped == {"no source: PDF": 1, "withdrawn": 1, "not labelled math": 1 + primary_only}
    sizes = {row["document"]: int(row["bytes"]) for row in table(root / "docs.tsv")}
    assert {key: len(document.text.encode()) for key, document in found.items()} == {key: sizes[key] for key in kept}
    assert len(kept) == 27 - primary_only


def test_shared_papers_begin_with_their_main_file_and_follow_its_chapters():
    found = texts(ArxivReader(str(shared("arxiv"))))
    assert found["2601.90008"].startswith("% open-logic-complete.tex")
    book = found["2602.90013"]
    assert "\\documentclass" in book[:1000]
    chapters = ["Introduction", "Type theory", "Homotopy type theory", "Sets and logic", "Equivalences", "Induction"]
    positions = [re.search(rf"\\chapter\*?\{{{name}\}}", book).start() for name in chapters]
    assert positions == sorted(positions)
    # Latin-1.
    assert sum("\xa0" <= character <= "\xff" for character in found["2601.90012"]) == 111


def test_gzip_of_one_file_and_of_a_tar_are_told_apart(tmp_path):
    reader = corpus(
        tmp_path,
        {
            "2601.00001.gz": pack(PAPER),
            "2601.00002.gz": pack(tar({"main.tex": PAPER, "figure.eps": b"%!PS", "main.bbl": "bbl", "own.sty": "sty"})),
            # Without the magic word of later tars.
            "2601.00003v2.gz": pack(of_old(tar({"main.tex": PAPER}))),
            "math9901001.gz": pack(PAPER),
            "math.GT0309136.gz": pack(PAPER),
        },
    )
    found, skipped = read(reader)
    assert {key: document.text for key, document in found.items()} == dict.fromkeys(
        ["2601.00001", "2601.00002", "2601.00003", "math/9901001", "math/0309136"], PAPER
    )
    assert found["2601.00001"].metadata == {"categories": "math.AG", "license": ""}
    assert not skipped


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("2601.00001.pdf", b"%PDF-1.5", "no source: PDF"),
        ("2601.00001.gz", pack("%PDF-1.5 ..."), "no source: PDF"),
        ("2601.00001.gz", pack("%!PS-Adobe-2.0\n"), "no source: PostScript"),
        ("2601.00001.gz", pack("<!DOCTYPE html><html></html>"), "no source: HTML"),
        ("2601.00001.gz", pack("%auto-ignore\nThis paper has been withdrawn."), "withdrawn"),
        ("2601.00001.gz", pack(tar({"paper.docx": b"PK"})), "no source: no .tex file"),
        ("2601.00001.gz", pack("To be or not to be."), "no source: no TeX"),
        ("2601.00001.gz", pack(PAPER + "%" * 5000), "too large"),
        ("2601.00001.gz", pack(tar({"a.tex": PAPER, "b.tex": "%" * 5000})), "too large"),
        ("README.gz", pack(PAPER), "no submission"),
        ("2601.00001.gz", b"no gzip", "damaged"),
        ("2601.00001.gz", b"", "no source: no TeX"),
        ("2601.00001.gz", pack(PAPER * 40)[:-9], "damaged"),
        ("2601.00001.gz", pack(tar({"a.tex": PAPER * 40})[:1500]), "damaged"),
        ("2601.00001.gz", pack(tar({"a.tex": PAPER, "../b.tex": PAPER})), "damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_paper_is_counted_and_the_others_read(tmp_path, name, content, reason):
    labels = {"2601.00001": "math.AG", "2601.00002": "math.AG"}
    reader = corpus(tmp_path, {name: content, "2601.00002.gz": pack(PAPER)}, labels)
    found, skipped = read(ArxivReader(reader.source, max_bytes=3000))
    assert list(found) == ["2601.00002"]
    assert documents.reasons(skipped) == {reason: 1}
    if reason == "damaged":
        (damage,) = documents.all_damage(skipped)
        assert damage.startswith(f"arXiv_src_2601_001.tar: 2601/{name}: ")


@pytest.mark.parametrize(
    ("categories", "any_category", "primary"),
    [
        ("math.AG", True, True),
        ("cs.LO math.CA", True, False),
        ("hep-th", False, False),
        ("physics.class-ph stat.TH", False, False),
        # An archive of its own that lists its papers in mathematics too.
        ("math-ph math.MP", True, False),
        # What was an archive before it became a part of mathematics.
        ("alg-geom math.AG", True, True),
        ("q-alg", True, True),
    ],
)
def test_categories_tell_what_is_mathematics(tmp_path, categories, any_category, primary):
    papers = {"2601.00001.gz": pack(PAPER), "2601.00002.gz": pack(PAPER)}
    reader = corpus(tmp_path, papers, {"2601.00001": categories, "2601.00002": "math.CO"})
    for primary_only, expected in ((False, any_category), (True, primary)):
        found = texts(ArxivReader(reader.source, primary_only=primary_only))
        assert ("2601.00001" in found) == expected and "2601.00002" in found


def test_another_subject_can_be_read(tmp_path):
    reader = corpus(tmp_path, {"2601.00001.gz": pack(PAPER)}, {"2601.00001": "cs.LO"})
    assert list(texts(ArxivReader(reader.source, subject="cs"))) == ["2601.00001"]


def test_utf8_and_else_latin1_is_decoded_file_by_file(tmp_path):
    sources = {"main.tex": "\\documentclass{article}\\input{b} é".encode("latin-1"), "b.tex": "\\b é"}
    (text,) = texts(corpus(tmp_path, {"2601.00001.gz": pack(tar(sources))})).values()
    assert text == "\\documentclass{article}\\input{b} é\n\\b é"


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        # In the order of reading, and a file before what follows it.
        (
            {
                "a.tex": "not read",
                "main.tex": r"\documentclass{book}\begin{document}\input{z}\include{chapters/one}\input y \input{x.tex}",
                "z.tex": r"\input{deep}",
                "deep.tex": "",
                "chapters/one.tex": r"\input{chapters/two}\input{three}",
                "chapters/two.tex": "",
                "chapters/three.tex": "",
                "x.tex": r"\input{z}",
                "y.tex": "",
            },
            "main z deep chapters/one chapters/two chapters/three y x a",
        ),
        # What is commented out is not read; a percent sign that is printed begins no comment.
        (
            {
                "m.tex": "\\documentclass{book}% \\input{c}\n50\\% \\\\% \\input{c}\n\\% \\input{b}",
                "b.tex": "",
                "c.tex": "",
                "a.tex": "",
            },
            "m b a c",
        ),
        # Other ways to read a file.
        (
            {
                "m.tex": r"\documentclass{book}\import{f/}{d} \subfile{c} \mychapterinput[f]{b} \input{\home/A}",
                "f/d.tex": r"\subimport*{./}{e}",
                "f/e.tex": "",
                "c.tex": "",
                "f/b.tex": "",
                "a.tex": "",
            },
            "m f/d f/e c f/b a",
        ),
        # Several files with a class: the one that reads in most, not the first by name.
        (
            {
                "cover.tex": r"\documentclass{article}\begin{document}",
                "paper.tex": r"\documentclass{amsart}\begin{document}\input{text}",
                "text.tex": "x" * 100,
                "text/part.tex": r"\documentclass[../paper]{subfiles}\begin{document}" + "x" * 500,
            },
            "paper text cover text/part",
        ),
        # The mark of what is no paper of its own.
        ({"a.tex": "%auto-ignore\n\\documentclass{article}" + "x" * 99, "b.tex": r"\documentstyle{amsppt}"}, "b a"),
        # Files that read one another; no class at all.
        ({"b.tex": r"\documentclass{book}\input{a}", "a.tex": r"\input{b}\input{a}"}, "b a"),
        ({"b.tex": r"\input amstex \input a", "a.tex": ""}, "a b"),
    ],
)
def test_order_of_the_files_of_a_paper(sources, expected):
    assert tex_sources.order(sources) == [f"{name}.tex" for name in expected.split()]
    assert tex_sources.order(dict(reversed(sources.items()))) == tex_sources.order(sources)


def test_every_file_of_a_paper_is_there_once_and_links_are_not(tmp_path):
    sources = {f"{name}.tex": f"\\{name}\\input{{a}}\\input{{b}}" for name in "dcba"}
    (text,) = texts(
        corpus(tmp_path, {"2601.00001.gz": pack(tar(sources | {"e.tex": link("e.tex", "a.tex")}))})
    ).values()
    assert sorted(text.split("\n")) == sorted(sources.values())


def test_an_archive_that_ends_early_gives_the_papers_before(tmp_path):
    papers = {f"2601.0000{index}.gz": pack(PAPER) for index in range(5)}
    corpus(tmp_path, papers)
    path = tmp_path / "src" / "arXiv_src_2601_001.tar"
    path.write_bytes(path.read_bytes()[: 2 * 1024 + 300])
    found, skipped = read(ArxivReader(str(tmp_path)))
    assert list(found) == ["2601.00000", "2601.00001"]
    assert documents.all_damage(skipped)[-1] == "arXiv_src_2601_001.tar: it ends early; the rest of it is lost"


def test_shards_are_read_alone_and_in_other_processes(tmp_path):
    names = ["arXiv_src_2601_001.tar", "arXiv_src_2601_002.tar", "arXiv_src_9901_001.tar"]
    files = {name: tar({f"x/260{index}.00001.gz": pack(PAPER + name)}) for index, name in enumerate(names)}
    write(tmp_path, files | {METADATA_FILE: snapshot({f"260{index}.00001": "math.AG" for index in range(3)})})
    reader = pickle.loads(pickle.dumps(ArxivReader(str(tmp_path))))
    assert reader.shards() == names
    for index, name in reversed([*enumerate(names)]):
        (document,) = reader.documents(name, Counter())
        assert document[:2] == (f"260{index}.00001", PAPER + name)
    # One archive alone, its labels beside it or anywhere.
    assert list(texts(ArxivReader(str(tmp_path / names[1])))) == ["2601.00001"]
    (tmp_path / METADATA_FILE).rename(tmp_path / "labels")
    assert list(texts(ArxivReader(str(tmp_path / names[1]), metadata=str(tmp_path / "labels")))) == ["2601.00001"]


def test_damaged_labels_are_named_once(tmp_path):
    reader = corpus(tmp_path, {"2601.00001.gz": pack(PAPER)})
    for number in (2, 3):
        write(tmp_path, {f"src/arXiv_src_2601_00{number}.tar": tar({})})
    with open(tmp_path / METADATA_FILE, "a") as labels:
        labels.write('{"id": "2601.00002"}\n')
    found, skipped = read(reader)
    assert list(found) == ["2601.00001"]
    assert documents.all_damage(skipped) == [f"{METADATA_FILE}, line 2: no categories"]
    assert sum(skipped.values()) == 1


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "no archive arXiv_src_"),
        ({"src/arXiv_src_2601_001.tar": tar({})}, f"no metadata .*{METADATA_FILE}.*--reader.metadata"),
        ({"arXiv_src_2601_001.tar": tar({}), METADATA_FILE: "no JSON"}, "no paper of the subject 'math': .*not JSON"),
        ({"arXiv_src_2601_001.tar": tar({}), METADATA_FILE: snapshot({"2601.00001": "cs.LO"})}, "no paper of the subj"),
    ],
)
def test_sources_that_cannot_be_read_are_told(tmp_path, files, told):
    (tmp_path / "source").mkdir()
    write(tmp_path / "source", files)
    with pytest.raises(DataError, match=told):
        texts(ArxivReader(str(tmp_path / "source")))
    with pytest.raises(DataError, match="no folder"):
        ArxivReader(str(tmp_path / "nowhere")).shards()
