"""Charts as SVG that stands in an HTML page: with a title and a text in their place, and nothing from elsewhere."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from memorizing.evaluation.plots import COLORS, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SVG = "http://www.w3.org/2000/svg"
_LINK = "http://www.w3.org/1999/xlink"
# A line has no more points than a screen shows: of more of them, each point is the mean of its neighbours.
MOST_POINTS = 300
# More markers than these hide their line.
_MOST_MARKERS = 24
# Inches.
_WIDTH, _HEIGHT = 7.0, 3.6


class Series(NamedTuple):
    """A line of a chart.

    Attributes:
      label: its name.
      x, y: its points.
      low, high: ends of an interval around them; empty for none.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


class Axis(NamedTuple):
    """What stands beside an axis, and what unit its points are told in."""

    label: str
    is_log: bool = False


def thinned(series: Series) -> Series:
    """The same line with at most `MOST_POINTS` points, each the mean of an equal share of them. Without an interval."""
    if len(series.x) <= MOST_POINTS:
        return series
    x = [float(part.mean()) for part in np.array_split(np.array(series.x, float), MOST_POINTS)]
    y = [float(part.mean()) for part in np.array_split(np.array(series.y, float), MOST_POINTS)]
    return Series(series.label, x, y)


def lines(name: str, title: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Lines over a common axis, as SVG.

    Args:
      name: tells the chart from the others of the page: letters and digits.
      title: what it shows.
      series: its lines, one or more.
      x, y: of the axes.
    """
    figure, axes = _figure(_HEIGHT)
    for index, each in enumerate(map(thinned, series)):
        look = style(index)
        if len(each.x) > _MOST_MARKERS:
            look["markevery"] = max(len(each.x) // _MOST_MARKERS, 1)
        axes.plot(each.x, each.y, label=_plain(each.label), **look)
        if len(each.low) == len(each.x):
            axes.fill_between(each.x, each.low, each.high, alpha=0.15, color=look["color"], linewidth=0)
    if x.is_log:
        axes.set_xscale("log")
    axes.set_xlabel(x.label)
    axes.set_ylabel(y.label)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(fontsize="small", ncols=1 + len(series) // 8)
    told = "; ".join(_told(each, x.label) for each in series)
    return _svg(figure, name, title, f"{y.label} against {x.label}. {told}.")


def parts(name: str, title: str, shares: Mapping[str, float]) -> str:
    """Parts of a whole as one bar, as SVG.

    Args:
      name: tells the chart from the others of the page.
      title: what it shows.
      shares: by label; together 1.
    """
    figure, axes = _figure(1.6)
    begin = 0.0
    for index, (label, share) in enumerate(shares.items()):
        color = COLORS[index % len(COLORS)]
        # The last colour is black, and after it they come again: hatched.
        hatch = "//" if index >= len(COLORS) else None
        axes.barh(
            [0],
            [share],
            left=[begin],
            color=color,
            hatch=hatch,
            edgecolor="white",
            label=f"{_plain(label)} {share:.1%}",
        )
        begin += share
    axes.set_xlim(0, 1)
    axes.set_axis_off()
    axes.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, 0.0), frameon=False)
    told = ", ".join(f"{label} {share:.1%}" for label, share in shares.items())
    return _svg(figure, name, title, f"{told}.")


def _told(series: Series, unit: str) -> str:
    """A line in words."""
    y = np.array(series.y, float)
    x = np.array(series.x, float)
    if len(y) == 0 or not np.isfinite(y).any():
        return f"{series.label}: no values"
    lowest, highest = int(np.nanargmin(y)), int(np.nanargmax(y))
    return (
        f"{series.label}: {y[0]:.4g} at {x[0]:,.0f}, {y[-1]:.4g} at {x[-1]:,.0f}, "
        f"lowest {y[lowest]:.4g} at {x[lowest]:,.0f}, highest {y[highest]:.4g} at {x[highest]:,.0f}"
    )


def _plain(text: str) -> str:
    """A text of somebody's as matplotlib shows it as it is: dollars would begin formulas, and XML has no controls."""
    return "".join(sign if sign.isprintable() else "?" for sign in text).replace("$", "\\$")


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _svg(figure: Figure, name: str, title: str, description: str) -> str:
    """A figure as an element of a page: one picture to a screen reader, as wide as there is room."""
    import matplotlib

    buffer = io.BytesIO()
    # Text stays text, and equal figures give equal bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _LINK)
    root = ElementTree.fromstring(buffer.getvalue())
    _take_out(root, ("metadata", "style"))
    _rename_ids(root, name)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    # What the style sheet said, which would have been that of the whole page.
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-description")
    for index, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": f"{name}-{'title' if index == 0 else 'description'}"})
        element.text = "".join(sign if sign.isprintable() else "?" for sign in text)
        root.insert(index, element)
    return ElementTree.tostring(root, encoding="unicode")


def _take_out(root: ElementTree.Element, tags: Sequence[str]) -> None:
    """Removes elements wherever they are."""
    names = {f"{{{_SVG}}}{tag}" for tag in tags}
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in names]:
            parent.remove(child)


def _rename_ids(root: ElementTree.Element, name: str) -> None:
    """Makes the ids of a figure its own: those of two figures would meet in one page."""
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == f"{{{_LINK}}}href":
                element.set(key, value.replace("#", f"#{name}-"))
            else:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
