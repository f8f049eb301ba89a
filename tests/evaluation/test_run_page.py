"""A run as one page: it needs nothing else, shows what was written, and is sane for eyes, keyboards and readers."""

from __future__ import annotations

import html.parser
import json
import pathlib
import re
import shutil
import subprocess
import urllib.parse

import pytest
import written_run
from etils import epath

from memorizing import main
from memorizing.evaluation.run_page import sections
from memorizing.evaluation.run_page.charts import MOST_POINTS, Series, thinned
from memorizing.runtime.watching.records import read_run

# Of a run that somebody made to harm its readers.
HOSTILE = "<script>alert('$x$')</script>&{{DAMAGE}}\x07"


class Page(html.parser.HTMLParser):
    """What stands in a page.

    Attributes:
      ids: of elements, in their order.
      elements: tags with their attributes.
      text: of everything that is no markup.
    """

    # Elements that have no end.
    VOID = ("meta", "br", "img")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.elements.append((tag, given))
        self.ids += [given["id"]] if given.get("id") else []
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [given for name, given in self.elements if name == tag]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run that failed, of a name and with results that are not what they should be."""
    folder = tmp_path_factory.mktemp("runs") / "a <b>run</b>"
    written_run.write(folder, end="failure")
    evaluation = folder / "evaluation.json"
    evaluation.write_text(
        json.dumps(json.loads(evaluation.read_text()) | {HOSTILE: written_run.evaluations(1)["memory cleared"]})
    )
    inspection = folder / "inspection" / "a b#<c>"
    inspection.mkdir(parents=True)
    (inspection / "index.html").touch()
    (folder / "experiment.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def source(workdir: pathlib.Path) -> str:
    before = {path.name for path in workdir.iterdir()}
    assert main._run(["report", str(workdir)]) == 0
    assert {path.name for path in workdir.iterdir()} - before == {"report.html"}
    return (workdir / "report.html").read_text()


def test_the_page_needs_nothing_else_and_runs_nothing(source: str):
    page = Page(source)
    for tag, given in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "img", "image"), tag
        for name, value in given.items():
            assert not name.startswith("on")
            assert name in ("xmlns", "xmlns:xlink") or "//" not in (value or ""), (tag, name, value)
    assert "url(http" not in source and "@import" not in source
    assert "default-src 'none'" in source


def test_what_others_wrote_is_text(source: str):
    page = Page(source)
    assert "ValueError: <b>broken</b>" in page.text and "<b>" not in source
    assert "a <b>run</b>" in page.text
    assert page.text.count("<script>alert('$x$')</script>&{{DAMAGE}}") >= 3
    assert page.text.count("experiment.json is damaged") == 1


def test_every_id_is_there_once_and_every_reference_has_its_id(source: str):
    page = Page(source)
    assert len({*page.ids}) == len(page.ids)
    references = re.findall(r'(?:url\(|href=")#([^)"]+)', source)
    for _, given in page.elements:
        references += (given.get("aria-labelledby") or "").split()
    assert {*references} <= {*page.ids}


def test_every_chart_has_a_name_a_text_and_a_table(source: str):
    page = Page(source)
    charts = page.all("svg")
    assert len(charts) >= 6 and all(chart["role"] == "img" and chart["aria-labelledby"] for chart in charts)
    assert all(len(re.findall(f"<{tag} id=", source)) == len(charts) for tag in ("title", "desc"))
    # That of where the time went stands open.
    assert len(page.all("figure")) == len(charts) and len(page.all("details")) == len(charts) - 1
    for region in (given for _, given in page.elements if given.get("role") == "region"):
        assert region["tabindex"] == "0" and region["aria-label"]


def test_the_figures_are_those_of_the_run(source: str):
    text = Page(source).text
    assert "training: 8 at 1, 1.265 at 40, lowest 1.265 at 40" in text
    assert "held-out documents: 2.5 at 40" in text
    # The first bin of 64 tokens in its middle, the others half their start further.
    assert "memory cleared: 5 at 32, 3.5 at 192" in text
    assert "layer_01, head 1: 0.6025 at 1, 0.7 at 40" in text
    assert "layer_01: 0.05 at 1, 1 at 40" in text
    assert "training: 1,010" not in text and "training: 1010 at 10, 1040 at 40" in text, (
        "a step that compiles has no speed"
    )
    assert "training 87.0%" in text and "compiling 13.0%" in text
    assert "2048" in text and "%SIZE" not in text


def test_inspections_are_linked_by_their_place_beside_the_page(source: str, workdir: pathlib.Path):
    (link,) = [given["href"] for given in Page(source).all("a") if not given["href"].startswith("#")]
    assert (workdir / urllib.parse.unquote(link)).is_file()


def test_results_of_other_kinds_than_they_should_be_are_left_out(tmp_path: pathlib.Path):
    strange = [{"from": 0, "loss": 1, "tokens": 1, "interval": [None, "x", 3]}, 7, {"from": "x"}]
    given = {"a": {"loss": 1, "by_position": strange, "perplexity": 10**400}, "b": {"loss": "x"}, "c": 3, "step": []}
    workdir = written_run.write(tmp_path / "run")
    (workdir / "evaluation.json").write_text(json.dumps(given | {"accuracy": {"x": 3, "y": {"1": 2}}}))
    lines = '{"step": 1, "kind": "train", "loss": "x"}\n{"step": 2, "kind": "evaluation"}\n'
    (workdir / "metrics.jsonl").write_text(lines)
    for command in ("report", "status", "runs"):
        assert main._run([command, str(workdir)]) == 0
    text = Page((workdir / "report.html").read_text()).text
    assert "a: 1 at 1" in text


def test_a_long_run_is_drawn_with_as_many_points_as_can_be_seen():
    steps = [float(step) for step in range(10 * MOST_POINTS)]
    thin = thinned(Series("loss", steps, steps))
    assert len(thin.x) == len(thin.y) == MOST_POINTS
    assert thin.x[0] == 4.5 and thin.y[-1] == 10 * MOST_POINTS - 5.5


def test_heads_that_are_too_many_are_shown_by_their_mean():
    series = [Series(f"layer_{layer}, head {head}", [1, 2], [layer, head]) for layer in range(3) for head in range(8)]
    shown = sections._few([*series, Series("cache", [1], [9])])
    assert [each.label for each in shown] == [*(f"layer_{layer}, mean of its heads" for layer in range(3)), "cache"]
    assert shown[2].y == [2, 3.5]


def test_a_run_that_has_just_begun_has_a_page(tmp_path: pathlib.Path):
    (tmp_path / "events.jsonl").write_text('{"time": 1, "event": "start"}\n')
    assert main._run(["report", str(tmp_path)]) == 0
    page = Page((tmp_path / "report.html").read_text())
    assert "killed" in page.text and page.all("svg") == []
    assert read_run(epath.Path(tmp_path)).damage == ()


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome", "chromium-browser"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_page_on_a_small_screen(source: str, tmp_path: pathlib.Path):
    """Nothing is wider than the screen, charts have names and sizes, and the first stop of the keyboard is a link."""
    look = """<script>
const charts = [...document.querySelectorAll("svg")];
document.title = JSON.stringify({
  wider: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  named: charts.every(each => each.getAttribute("aria-labelledby").split(" ").every(id => document.getElementById(id).textContent)),
  drawn: charts.filter(each => each.getBoundingClientRect().height > 50).length,
  first: document.querySelector("a, summary, [tabindex='0']").textContent,
});
</script></body>"""
    # The page itself allows no script.
    allowed = source.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    (tmp_path / "page.html").write_text(allowed.replace("</body>", look))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=500,800",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    ended = subprocess.run(
        [BROWSER, *flags, "--dump-dom", f"file://{tmp_path / 'page.html'}"], capture_output=True, text=True, timeout=120
    )
    title = re.search(r"<title>(\{.*?\})</title>", ended.stdout)
    assert title, ended.stderr[-2000:]
    seen = json.loads(title[1].replace("&lt;", "<").replace("&amp;", "&"))
    assert seen == {"wider": 0, "named": True, "drawn": source.count("<svg"), "first": "Skip to the figures"}
