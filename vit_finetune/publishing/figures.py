"""Figures as SVG that stand inside a page and take its colours, light or dark; no global figure."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

BLUE, ORANGE, GREEN, GREY, INK = "#3d74ab", "#c8642b", "#4f8f6b", "#8a8f98", "#24292f"
COLOURS = (BLUE, ORANGE, GREEN, "#8a5aa8", "#b08a1e", "#2f9aa0", "#b5487a", GREY)
"""Of things side by side, in their order."""
GRID, PAPER = "#e6e8eb", "#fefefe"
_OF_THE_PAGE = {INK: "--ink", GRID: "--line", PAPER: "--card"}
"""Colours that a page changes with the light; where there is no page, they stay."""
_STYLE: Any = {
    "svg.fonttype": "none",  # browsers' fonts know more scripts, and text can be searched
    "text.parse_math": False,  # a class may be called "$5"
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "legend.edgecolor": "none",
    "legend.facecolor": PAPER,
    "legend.framealpha": 0.85,
    "legend.fancybox": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def chart_style(name: str) -> Any:
    """A block in which figures are drawn in the house's style; `name` is the chart's on its page."""
    # The salt makes the SVG's ids the same each time, and different from those of the page's other charts.
    return matplotlib.rc_context(_STYLE | {"svg.hashsalt": name})


def build_figure(
    width: float, height: float, xlabel: str, ylabel: str, grid: bool = True
) -> tuple[Figure, Axes]:
    """An empty figure of a size in inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if xlabel == "Epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(grid)
    axes.set_axisbelow(True)
    return figure, axes


def use_log_scale(axes: Axes) -> None:
    """Orders of magnitude along x, with numbers as people write them: mathtext is off."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an `<svg>` element for an HTML page: no prolog, metadata, namespaces; ids of its own."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # Names in scripts that matplotlib's font lacks: only their width is guessed, the browser draws them.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.06)
    root = ElementTree.fromstring(buffer.getvalue())
    for child in list(root):
        if child.tag.endswith("}metadata"):
            root.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            value = f"{name}-{value}" if key == "id" else value.replace("url(#", f"url(#{name}-")
            key = key.rpartition("}")[2]
            element.set(key, f"#{name}-{value[1:]}" if key == "href" and value.startswith("#") else value)
    width = float(re.sub(r"pt$", "", root.attrib.pop("width")))
    del root.attrib["height"]  # the view box keeps the proportions
    root.attrib.update({"role": "img", "aria-label": title, "style": f"--natural:{width * 4 / 3:.0f}px"})
    text = ElementTree.tostring(root, encoding="unicode")
    for colour, variable in _OF_THE_PAGE.items():
        # Only in styles: attributes know no variables.
        text = re.sub(rf"(: ?){colour}(?=[;\"])", rf"\1var({variable}, {colour})", text)
    return text
