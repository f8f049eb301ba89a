"""The parts of a run's page: each is a heading and what stands below it as HTML, or nothing where there is nothing."""

from __future__ import annotations

import html
import math
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from memorizing.evaluation.run_page.charts import Axis, Series, lines, parts
from memorizing.runtime.events import goodput_of
from memorizing.runtime.tables import duration
from memorizing.runtime.watching.records import EVALUATIONS, RunRecords, finite, number
from memorizing.runtime.watching.settings import value_of

# Where `inspect` writes its pages, a folder a document.
INSPECTIONS = "inspection"

_STEPS = Axis("step")
_NATS = "nats per token"
# Of a chart's table, and lines of a chart that can still be told apart.
_SHOWN_ROWS = 20
_MOST_LINES = 12
# Metrics of memories: layer, measure, and a head where there are several.
_OF_MEMORY = re.compile(r"(?P<layer>\w+)/(?P<measure>gate|weight|memory_fill|hit_share|hit_chance)(?:/(?P<head>\d+))?")
# What is not the evaluation of the whole model in what `train` writes.
_NO_EVALUATIONS = ("step", "documents", "accuracy")


def configuration(run: RunRecords) -> str:
    """What was set, and everything that makes the run the experiment that it is."""
    if not run.settings and not run.identity:
        return ""
    # Macros stand with their values where they are used.
    named = {name: value_of(run.settings, name) or "" for name in run.settings if "." in name}
    wired = {name for name, value in named.items() if value.startswith("@")}
    shown = {name: value for name, value in named.items() if name not in wired}
    body = table(
        "What was set in gin; everything else has its default.", ("setting", "value"), shown.items(), text=True
    )
    if run.identity:
        rows = [(name, _as_text(value)) for name, value in run.identity.items() if name]
        whole = table("As it was built, defaults included.", ("part", "value"), rows, text=True)
        body += f"<details><summary>The whole experiment</summary>{whole}</details>"
    return body


def losses(run: RunRecords) -> str:
    """Loss over the steps, in training and on held-out documents."""
    series = [Series("training", *_points(run, "train", "loss"))]
    held_out = Series("held-out documents", *_points(run, "evaluation", "loss"))
    series += [held_out] if held_out.x else []
    known = [each for each in series if each.x]
    if not known:
        return ""
    rate = Series("learning rate", *_points(run, "train", "learning_rate"))
    charts = figure("losses", "Loss", known, _STEPS, Axis(f"loss ({_NATS})"))
    if len(rate.x) > 1:
        charts += figure("rate", "Learning rate", [rate], _STEPS, Axis("learning rate"))
    return f'<div class="charts">{charts}</div>'


def evaluations(run: RunRecords) -> str:
    """Losses on held-out documents as a table and by position, and accuracies where the task has answers."""
    body = ""
    for index, (name, content) in enumerate(run.evaluations.items()):
        found = content.get("evaluations") if name == EVALUATIONS[1] else content
        named = {key: value for key, value in _mapping(found).items() if key not in _NO_EVALUATIONS}
        usable = {key: value for key, value in named.items() if number(_mapping(value).get("loss")) is not None}
        if not usable:
            continue
        body += f"<h3>{_source(name, content)}</h3>{_evaluation_table(usable)}"
        series = [line for key, value in usable.items() if (line := _by_position(key, value)).x]
        if series:
            where = Axis("position in the document (tokens)", is_log=True)
            title = "Held-out loss against position in the document"
            body += figure(f"positions{index}", title, series, where, Axis(f"loss ({_NATS})"))
        body += _accuracies(_mapping(content.get("accuracy")))
    return body


def memories(run: RunRecords) -> str:
    """Gates, fill and hits of every memory over the steps."""
    found: dict[str, dict[str, Series]] = {"gate": {}, "memory_fill": {}, "hit_share": {}}
    names = dict.fromkeys(name for line in run.lines("train") for name in line)
    for name in names:
        if of := _OF_MEMORY.fullmatch(name):
            # The weight of a continuous cache is the share that it has in what is predicted, as a gate is.
            measure = {"weight": "gate", "hit_chance": "hit_share"}.get(of["measure"], of["measure"])
            head = f", head {of['head']}" if of["head"] else ""
            chance = " by chance" if of["measure"] == "hit_chance" else ""
            label = f"{of['layer']}{head}{chance}"
            found[measure][label] = Series(label, *_points(run, "train", name))
    titles = {
        "gate": ("Gates: the share of the memory in what comes out", "gate"),
        "hit_share": ("Hits: neighbours that were followed by the right token", "share of the neighbours"),
        "memory_fill": ("Fill of the memories", "share that is filled"),
    }
    charts = ""
    for measure, (title, label) in titles.items():
        series = [each for each in found[measure].values() if each.x]
        if series:
            charts += figure(f"memory{measure.replace('_', '')}", title, _few(series), _STEPS, Axis(label))
    return f'<div class="charts">{charts}</div>' if charts else ""


def speed(run: RunRecords) -> str:
    """Where the time went, and tokens a second over the steps."""
    spent = goodput_of(run.events)
    if spent.total <= 0:
        return ""
    seconds = {kind: taken for kind, taken in spent.named.items() if taken >= 0.0005 * spent.total}
    shares = {kind: taken / spent.total for kind, taken in seconds.items()}
    title = f"Where {duration(spent.total)} went, over {spent.starts} start{'s' if spent.starts > 1 else ''}"
    rows = [(kind, duration(taken), f"{taken / spent.total:.1%}") for kind, taken in seconds.items()]
    listed = table("By kind of time.", ("kind", "h:mm:ss", "share"), rows)
    charts = f"<figure><figcaption>{html.escape(title)}</figcaption>{parts('time', title, shares)}{listed}</figure>"
    # A step that compiles says nothing of the others.
    compiled = {event.get("step") for event in run.events if event["event"] == "compile"}
    x, y = _points(run, "train", "tokens_per_second", without=compiled)
    if x:
        charts += figure("speed", "Speed of training", [Series("training", x, y)], _STEPS, Axis("tokens a second"))
    return f'<div class="charts">{charts}</div>'


def inspections(run: RunRecords) -> str:
    """Links to the pages that `memorizing inspect` has written, beside this one."""
    folder = run.workdir / INSPECTIONS
    names = sorted(page.parent.name for page in folder.glob("*/index.html"))
    if not names:
        return ""
    links = [
        f'<li><a href="{INSPECTIONS}/{urllib.parse.quote(name)}/index.html">{html.escape(name)}</a></li>'
        for name in names
    ]
    return f"<p>What the memory looked up in a document, token by token:</p><ul>{''.join(links)}</ul>"


# What the parts are made of.


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], text: bool = False) -> str:
    """A table whose first column names the rows. `text`: whether the others hold text, not figures."""
    head = "".join(f'<th scope="col">{html.escape(each)}</th>' for each in heads)
    opening, kind = ('<td class="text">', ' class="text"') if text else ("<td>", "")
    body = ""
    for first, *rest in rows:
        cells = "".join(f"{opening}{html.escape(cell)}</td>" for cell in rest)
        body += f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>'
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{html.escape(caption)}"><table{kind}>'
        f"<caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figure(name: str, title: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """A chart, and below it the same figures as a table that can be opened."""
    steps = sorted({at for each in series for at in each.x})
    # The first and the last are shown, and others between them.
    kept = steps[:: max(len(steps) // _SHOWN_ROWS, 1)]
    kept += [] if kept[-1] == steps[-1] else [steps[-1]]
    by_step = [dict(zip(each.x, each.y, strict=True)) for each in series]
    rows = [(f"{at:,.0f}", *(_shown(values.get(at)) for values in by_step)) for at in kept]
    some = f"{len(kept)} of {len(steps)} rows." if len(kept) < len(steps) else "All rows."
    listed = table(f"{title}. {some}", (x.label, *(each.label for each in series)), rows)
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>{lines(name, title, series, x, y)}"
        f"<details><summary>{html.escape(title)}: as a table</summary>{listed}</details></figure>"
    )


def _points(
    run: RunRecords, kind: str, name: str, without: Iterable[Any] = ()
) -> tuple[Sequence[float], Sequence[float]]:
    """Steps and values of a metric, where it is a finite number."""
    left_out = {*without}
    found = {}
    for line in run.lines(kind):
        value = finite(line.get(name))
        if value is not None and line["step"] not in left_out:
            found[float(line["step"])] = value
    return list(found), list(found.values())


def _few(series: Sequence[Series]) -> Sequence[Series]:
    """The lines, or where they are too many to be told apart, the mean over the heads of each layer."""
    if len(series) <= _MOST_LINES:
        return series
    by_layer: dict[str, list[Series]] = {}
    for each in series:
        layer, _, head = each.label.partition(", head ")
        by_layer.setdefault(f"{layer}, mean of its heads" if head else layer, []).append(each)
    means = []
    for label, of_layer in by_layer.items():
        values = [dict(zip(each.x, each.y, strict=True)) for each in of_layer]
        x = [at for at in of_layer[0].x if all(at in each for each in values)]
        means.append(Series(label, x, [sum(each[at] for each in values) / len(values) for at in x]))
    return means


def _by_position(label: str, evaluation: Mapping[str, Any]) -> Series:
    """Loss against position; the first bin stands in its middle, the others half their start further."""
    x, y, low, high = [], [], [], []
    given = evaluation.get("by_position")
    bins = given if isinstance(given, list) else []
    for place in bins:
        start, loss = finite(_mapping(place).get("from")), finite(_mapping(place).get("loss"))
        # Where nothing was scored there is nothing to show.
        if start is None or loss is None or not place.get("tokens"):
            continue
        x.append(start * 1.5 if start else _middle_of_first(bins))
        y.append(loss)
        ends = place.get("interval")
        both = [finite(end) for end in ends] if isinstance(ends, list) else []
        is_interval = len(both) == 2 and None not in both
        low.append(both[0] if is_interval else math.nan)
        high.append(both[1] if is_interval else math.nan)
    return Series(label, x, y, low, high)


def _middle_of_first(bins: Sequence[Any]) -> float:
    second = finite(_mapping(bins[1]).get("from")) if len(bins) > 1 else None
    return second / 2 if second else 1.0


def _evaluation_table(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    heads = {"loss": f"loss ({_NATS})", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}
    used = [name for name in heads if any(number(each.get(name)) is not None for each in evaluations.values())]
    rows = [(label, *(_shown(each.get(name)) for name in used)) for label, each in evaluations.items()]
    return table("Held-out documents, each once, whole.", ("model", *(heads[name] for name in used)), rows)


def _accuracies(accuracies: Mapping[str, Any]) -> str:
    """Share of right answers by control and by how far back they lie."""
    by_control = {control: _mapping(by_reach) for control, by_reach in accuracies.items()}
    if not by_control:
        return ""
    reaches = list(next(iter(by_control.values())))
    rows = [
        (control, *(_shown(_mapping(by_reach.get(reach)).get("answers")) for reach in reaches))
        for control, by_reach in by_control.items()
    ]
    return table("Share of right answers, by the segments to reach over.", ("control", *reaches), rows)


def _source(name: str, content: Mapping[str, Any]) -> str:
    what = "By memorizing evaluate" if name == EVALUATIONS[1] else "At the end of training"
    step = content.get("step")
    return html.escape(what if number(step) is None else f"{what}, step {step}")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _shown(value: Any) -> str:
    """A figure to four decimals, small ones to four digits."""
    known = number(value)
    if known is None:
        return ""
    return f"{known:,.4f}" if abs(known) >= 0.01 or known == 0 else f"{known:.4g}"


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)
