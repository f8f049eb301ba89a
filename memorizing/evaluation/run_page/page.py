"""A run as one HTML page that needs nothing else: no script, no network, no other file."""

from __future__ import annotations

import html
import importlib.resources

from memorizing.evaluation.run_page import sections
from memorizing.evaluation.run_page.template import filled_in
from memorizing.runtime.tables import duration
from memorizing.runtime.watching.records import RunRecords
from memorizing.runtime.watching.status import Status

FILE = "report.html"
_PACKAGE = "memorizing.evaluation.run_page"
_TEMPLATE = "run_page.html"

# The parts of the page in their order.
_SECTIONS = {
    "Losses": sections.losses,
    "Evaluation": sections.evaluations,
    "Memories": sections.memories,
    "Time": sections.speed,
    "Inspections": sections.inspections,
    "Configuration": sections.configuration,
}


def make_page(title: str, run: RunRecords, status: Status) -> str:
    """The page.

    Args:
      title: name of the run.
      run, status: what it has left, and how it is doing.
    """
    made = {heading: make(run) for heading, make in _SECTIONS.items()}
    there = {heading: body for heading, body in made.items() if body}
    links = [f'<li><a href="#{_id(heading)}">{heading}</a></li>' for heading in there]
    bodies = [
        f'<section aria-labelledby="{_id(heading)}"><h2 id="{_id(heading)}">{heading}</h2>{body}</section>'
        for heading, body in there.items()
    ]
    facts = [
        f"<dt>{html.escape(label)}</dt><dd>{html.escape(value)}</dd>" for label, value in _facts(run, status).items()
    ]
    damage = [f'<p class="damage">Damaged: {html.escape(what)}</p>' for what in run.damage]
    return filled_in(
        importlib.resources.files(_PACKAGE).joinpath(_TEMPLATE),
        {
            "TITLE": html.escape(title),
            "FACTS": "".join(facts),
            "DAMAGE": "".join(damage),
            "NAVIGATION": "".join(links),
            "SECTIONS": "\n".join(bodies),
        },
    )


def _id(heading: str) -> str:
    return heading.lower()


def _facts(run: RunRecords, status: Status) -> dict[str, str]:
    """What a reader wants to know first; what is not known is left out."""
    start = next((event for event in reversed(run.events) if event["event"] == "start"), {})
    facts = {
        "state": f"{status.state}, {status.why}" if status.why else status.state,
        "steps": _steps(status),
        "training loss": "" if status.loss is None else f"{status.loss:.4f} nats per token",
        "held-out loss": "" if status.held_out is None else f"{status.held_out:.4f} nats per token",
        "speed": "" if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f} tokens/s",
        "memory": "" if status.memory_gib is None else f"{status.memory_gib:.2f} GiB at most on a device",
        "time left": "" if status.seconds_left is None else duration(status.seconds_left),
        "checkpoints": ", ".join(map(str, run.checkpoints)),
        "devices": f"{start.get('devices', '?')} of kind {start['device_kind']}" if "device_kind" in start else "",
        "data": str(run.identity.get("data", "")),
        "folder": str(run.workdir),
        "version": f"memorizing {start['version']}" if "version" in start else "",
    }
    return {label: value for label, value in facts.items() if value}


def _steps(status: Status) -> str:
    if status.step is None:
        return ""
    return f"{status.step:,}" if status.num_steps is None else f"{status.step:,} of {status.num_steps:,}"
