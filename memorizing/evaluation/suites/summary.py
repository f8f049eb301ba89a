"""What suites found, as a table for a terminal and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from memorizing.evaluation import bootstrap
from memorizing.evaluation.plots import png, sheet
from memorizing.evaluation.suites.controls import AS_TRAINED
from memorizing.evaluation.suites.run import DEPTHS, Line
from memorizing.runtime.tables import align

# What does not tell lines of one exercise apart.
_COMMON = ("setting", "accuracy", "interval", "nats", "by_distance", "by_depth", "bytes_carried", "generated")


def table(lines: Sequence[Line]) -> str:
    """A row an exercise, a column a setting."""
    settings = list(dict.fromkeys(line["setting"] for line in lines))
    has_pairs = any("pairs" in line for line in lines)
    head = ["", *(["pairs"] if has_pairs else []), "segments", "back", "chance", settings[0], "95%", *settings[1:]]
    rows = [head]
    for exercise in grouped(lines):
        first = exercise[0]
        by_setting = {line["setting"]: line for line in exercise}
        row = [first["task"]]
        row += [str(first.get("pairs", ""))] if has_pairs else []
        least, most = first["distance"]
        row += [str(first["segments"]), str(most) if least == most else f"{least}-{most}", f"{first['chance']:.3f}"]
        trained = by_setting[settings[0]]
        row += [_accuracy(trained), _interval(trained)]
        row += [_accuracy(by_setting.get(name, {})) for name in settings[1:]]
        rows.append(row)
    generated = _generated(lines)
    return "\n".join(
        [
            "share of right answers: all tokens of an answer are the most likely ones; back: segments between it and its fact",
            align(rows),
            f"95%: {bootstrap.LEVEL:.0%} bootstrap interval over samples; -: not read in this setting",
            *generated,
        ]
    )


def grouped(lines: Iterable[Line]) -> list[list[Line]]:
    """Lines of the same exercise."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        key = repr([(name, value) for name, value in line.items() if name not in _COMMON])
        found.setdefault(key, []).append(line)
    return list(found.values())


def _generated(lines: Sequence[Line]) -> list[str]:
    """The benchmarks' own scores of what was generated, where there are any."""
    scored = [line for line in lines if line.get("generated") is not None]
    if not scored:
        return []
    settings = list(dict.fromkeys(line["setting"] for line in scored))
    rows = [["the benchmark's own score of generated text", "segments", *settings]]
    for exercise in grouped(scored):
        by_setting = {line["setting"]: line for line in exercise}
        scores = [f"{by_setting[name]['generated']:.3f}" if name in by_setting else "-" for name in settings]
        rows.append([exercise[0]["task"], str(exercise[0]["segments"]), *scores])
    return ["", align(rows)]


def _accuracy(line: Line) -> str:
    accuracy = line.get("accuracy")
    return "-" if accuracy is None else f"{accuracy:.3f}"


def _interval(line: Line) -> str:
    interval = line.get("interval")
    return "" if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def depth_by_length(lines: Sequence[Line]) -> bytes:
    """A PNG: for every task, and number of pairs, the share of right answers by the fact's depth and the length."""
    trained = [line for line in lines if line["setting"] == AS_TRAINED]
    names = list(dict.fromkeys(_panel(line) for line in trained))
    figure, panels = sheet(len(names))
    for panel, name in zip(panels, names, strict=False):
        own = sorted((line for line in trained if _panel(line) == name), key=lambda line: line["segments"])
        cells = np.full((DEPTHS, len(own)), np.nan)
        for column, line in enumerate(own):
            for depth, found in enumerate(line["by_depth"]):
                if found is not None:
                    cells[depth, column] = found[0]
        image = panel.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        panel.set_title(name, fontsize="small")
        panel.set_xticks(range(len(own)), [str(line["segments"]) for line in own], fontsize="x-small")
        panel.set_yticks([0, DEPTHS - 1], ["start", "end"], fontsize="x-small")
        figure.colorbar(image, ax=panel)
    figure.supxlabel("length of a sample (segments)")
    figure.supylabel("depth of the fact")
    return png(figure)


def _panel(line: Line) -> str:
    return f"{line['task']}, {line['pairs']} pairs" if "pairs" in line else line["task"]
