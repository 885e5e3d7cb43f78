"""Charts of a run as SVG to stand inside a page: matplotlib's objects, no display, no global figure."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullFormatter,
    StrMethodFormatter,
    SymmetricalLogLocator,
)

from vit_finetune.files import written_whole
from vit_finetune.publishing.record import ClassRow, bin_count, one_line, percent
from vit_finetune.run import CalibrationBin, Report

READABLE_CLASSES = 30
"""Above this many classes the confusion matrix carries neither names nor numbers."""
MOST_POINTS = 400
"""A curve with more logged steps shows means over neighbouring ones."""

BLUE, ORANGE, GREEN, GREY, INK = "#2f5d8a", "#c8642b", "#4f8f6b", "#8a8f98", "#24292f"
_STYLE: Any = {
    "svg.fonttype": "none",  # browsers' fonts know more scripts, and text can be searched
    "text.parse_math": False,  # a class may be called "$5"
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e6e8eb",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fancybox": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


# --------------------------------------------------------------------------- learning curves


def draw_losses(history: Sequence[dict[str, Any]], chosen_epoch: float | None) -> str | None:
    """Training and validation loss by epoch; None without a loss in the log."""
    training, validation = _series(history, "loss"), _series(history, "eval_loss")
    if not training and not validation:
        return None
    with _style("losses"):
        figure, axes = _figure(3.7, 2.7, "Epoch", "Loss (nats per image)")
        if training:
            axes.plot(*zip(*_thinned(training)), color=BLUE, linewidth=1.2, label="training")
        if validation:
            axes.plot(
                *zip(*validation), color=ORANGE, linewidth=1.6, marker="o", markersize=3, label="validation"
            )
        _mark_epoch(axes, chosen_epoch)
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper right")
        return _svg(figure, "losses", "Training and validation loss by epoch")


def draw_accuracy(history: Sequence[dict[str, Any]], chosen_epoch: float | None) -> str | None:
    """Validation accuracy by epoch; None where the log has none."""
    return _draw_score(history, chosen_epoch, "accuracy")


def draw_average_precision(history: Sequence[dict[str, Any]], chosen_epoch: float | None) -> str | None:
    """Validation's mean average precision by epoch; None where the log has none."""
    return _draw_score(history, chosen_epoch, "mean_average_precision")


def _draw_score(history: Sequence[dict[str, Any]], chosen_epoch: float | None, name: str) -> str | None:
    points = [(epoch, 100 * value) for epoch, value in _series(history, f"eval_{name}")]
    if not points:
        return None
    words = name.replace("_", " ")
    with _style(name):
        figure, axes = _figure(3.7, 2.7, "Epoch", f"Validation {words} (%)")
        axes.plot(*zip(*points), color=ORANGE, linewidth=1.6, marker="o", markersize=3)
        axes.set_ylim(top=min(100.5, max(value for _, value in points) + 5))
        _mark_epoch(axes, chosen_epoch)
        if chosen_epoch is not None:
            axes.legend(loc="lower right")
        return _svg(figure, name, f"Validation {words} by epoch")


def draw_learning_rate(history: Sequence[dict[str, Any]]) -> str | None:
    """The learning rate by epoch; None where the log has none."""
    points = _series(history, "learning_rate")
    if not points:
        return None
    with _style("rate"):
        figure, axes = _figure(3.7, 2.7, "Epoch", "Learning rate (per step)")
        axes.plot(*zip(*_thinned(points)), color=GREEN, linewidth=1.4)
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        return _svg(figure, "rate", "Learning rate by epoch")


def draw_range_test(test: dict[str, Any] | None) -> str | None:
    """The losses of a range test by learning rate, with the rate that was chosen; None without a test."""
    if not test:
        return None
    with _style("range"):
        figure, axes = _figure(3.7, 2.7, "Learning rate", "Loss (nats per image)")
        axes.plot(test["rates"], test["losses"], color=BLUE, linewidth=0.7, alpha=0.5, label="each step")
        axes.plot(test["rates"], test["smoothed"], color=BLUE, linewidth=1.6, label="smoothed")
        axes.axvline(test["chosen"], color=ORANGE, linewidth=1.2, linestyle="--")
        axes.plot([], [], color=ORANGE, linestyle="--", label=f"chosen: {test['chosen']:.2g}")
        _use_log_scale(axes)
        # A loss that has diverged would leave nothing to be seen of the descent.
        low, high = min(test["smoothed"]), test["smoothed"][0]
        room = max(high - low, 0.05 * high)
        axes.set_ylim(low - 2 * room, high + 2 * room)
        axes.legend(loc="lower left", fontsize=8)
        return _svg(figure, "range", "Training loss by learning rate, and the rate that was chosen")


def _mark_epoch(axes: Axes, epoch: float | None) -> None:
    if epoch is not None:
        axes.axvline(epoch, color=GREY, linewidth=0.9, linestyle="--", label="published weights")


def _series(history: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(epoch, value) of each entry that has the key and a finite number for it."""
    return [
        (float(entry["epoch"]), float(entry[key]))
        for entry in history
        if isinstance(entry.get(key), int | float) and "epoch" in entry and math.isfinite(entry[key])
    ]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= MOST_POINTS:
        return points
    return [tuple(part.mean(axis=0).tolist()) for part in np.array_split(np.array(points), MOST_POINTS)]


# --------------------------------------------------------------------------- one report


def draw_confusion(report: Report) -> str:
    """The confusion matrix, coloured by the share of the true class, with counts where there is room."""
    counts = np.array(report.confusion_matrix)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size, labelled = len(report.labels), len(report.labels) <= READABLE_CLASSES
    side = max(2.2, 0.36 * size) if labelled else 5.0
    names = [one_line(label, 18) for label in report.labels]
    margin = 0.7 + (0.075 * max(map(len, names)) if labelled else 0.3)
    with _style("confusion"):
        figure, axes = _figure(
            side + margin + 0.9, side + margin, "Predicted class", "True class", grid=False
        )
        # "none" embeds one pixel per cell, which the page enlarges without blurring.
        # Without numbers, only a steeper scale shows a confusion of a few per cent.
        scale = PowerNorm(1 if labelled else 0.4, vmin=0, vmax=1)
        image = axes.imshow(shares, cmap="Blues", norm=scale, interpolation="none")
        bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.03)
        bar.set_label("Share of the true class")
        bar.outline.set_visible(False)
        if labelled:
            upright = 0.08 * max(map(len, names)) < side / size
            axes.set_xticks(range(size), names, rotation=0 if upright else 90)
            axes.set_yticks(range(size), names)
            for row, column in zip(*np.nonzero(counts)):
                shade = "white" if shares[row, column] > 0.55 else INK
                text = str(counts[row, column])
                axes.text(
                    column,
                    row,
                    text,
                    color=shade,
                    ha="center",
                    va="center",
                    fontsize=8 if len(text) < 4 else 6,
                )
        else:
            axes.set_xlabel("Predicted class (number)")
            axes.set_ylabel("True class (number)")
        axes.tick_params(length=0)
        return _svg(figure, "confusion", "Confusion matrix: rows are true classes, columns predicted ones")


def draw_classes(rows: Sequence[ClassRow]) -> str:
    """Precision, recall and F1 of some classes as bars, the first class on top."""
    names = [one_line(row.name, 26) for row in rows]
    with _style("classes"):
        figure, axes = _figure(7.2, 1.1 + 0.42 * len(rows), "Score (%)", "Class", grid=False)
        places = np.arange(len(rows))
        for offset, (key, colour) in enumerate((("precision", BLUE), ("recall", ORANGE), ("f1", GREEN))):
            values = [100 * getattr(row, key) for row in rows]
            label = "F1" if key == "f1" else key
            axes.barh(places + 0.27 * (offset - 1), values, height=0.25, color=colour, label=label)
        axes.set_yticks(places, names)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3)
        return _svg(figure, "classes", "Precision, recall and F1 by class")


def draw_calibration(
    calibration: Sequence[CalibrationBin], ece: float, name: str = "calibration"
) -> str | None:
    """The reliability diagram over the numbers of images behind it; None where no bin holds an image."""
    bins = [part for part in calibration if part.count]
    if not bins:
        return None
    middles = [100 * (part.low + part.high) / 2 for part in bins]
    widths = [100 * (part.high - part.low) * 0.94 for part in bins]
    with _style(name):
        figure = Figure(figsize=(4.6, 4.4), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.bar(middles, [100 * part.accuracy for part in bins], width=widths, color=BLUE, label="accuracy")
        confidences = [100 * part.confidence for part in bins]
        upper.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1, label="perfectly calibrated")
        upper.scatter(confidences, confidences, s=14, color=ORANGE, zorder=3, label="mean probability")
        upper.set(ylabel="Accuracy (%)", xlim=(0, 100), ylim=(0, 102))
        upper.set_title(f"ECE {percent(ece)} over {bin_count(calibration)} bins", loc="left")
        figure.legend(*upper.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
        lower.bar(middles, [part.count for part in bins], width=widths, color=GREY)
        lower.set(xlabel="Probability of the predicted class (%)", ylabel="Images")
        lower.set_yscale("symlog", linthresh=1)
        lower.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1))
        lower.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        for axes in (upper, lower):
            axes.grid(axis="y")
            axes.set_axisbelow(True)
        return _svg(figure, name, "Reliability diagram: accuracy by predicted probability")


# --------------------------------------------------------------------------- attention


def draw_distances(seeing: dict[str, Any] | None) -> str | None:
    """How far each attention head looks, by layer, from what `seeing.json` holds; None without distances."""
    if not seeing or not seeing.get("mean_attention_distance"):
        return None
    with _style("distances"):
        figure = _distances(seeing)
        return _svg(figure, "distances", "Mean attention distance of each head, by layer")


def save_distances(seeing: dict[str, Any], path: Path) -> None:
    """Writes the same chart as a PNG; there must be distances."""
    with _style("distances"), written_whole(path) as temporary:
        _distances(seeing).savefig(temporary, format="png", dpi=160)


def _distances(seeing: dict[str, Any]) -> Figure:
    layers = seeing["mean_attention_distance"]
    figure, axes = _figure(5.4, 3.0, "Layer", "Mean attention distance (pixels)")
    points = [(number, value) for number, heads in enumerate(layers, 1) for value in heads]
    axes.plot(*zip(*points), "o", color=BLUE, markersize=4, alpha=0.7, label="a head")
    means = [float(np.mean(heads)) for heads in layers]
    axes.plot(range(1, len(means) + 1), means, color=ORANGE, linewidth=1.4, label="mean of the layer")
    axes.axhline(seeing["uniform_distance"], color=GREY, linestyle="--", label="all patches alike")
    axes.set_ylim(0, 1.08 * max(seeing["uniform_distance"], *(value for _, value in points)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


# --------------------------------------------------------------------------- a search


def draw_trials(document: dict[str, Any]) -> str | None:
    """The scores of a search by trial, and the best so far; None without a score."""
    scored = [(trial["number"], trial["score"]) for trial in document["trials"] if trial["score"] is not None]
    if not scored:
        return None
    best = np.minimum if document["metric"] == "loss" else np.maximum
    numbers, scores = zip(*scored)
    metric = document["metric"].replace("_", " ")
    with _style("trials"):
        figure, axes = _figure(3.7, 2.7, "Trial", f"Validation {metric}")
        axes.plot(numbers, best.accumulate(scores), color=ORANGE, drawstyle="steps-post", label="best so far")
        axes.plot(numbers, scores, "o", color=BLUE, markersize=4, label="scored")
        _draw_pruned(axes, [(trial["number"], trial) for trial in document["trials"]])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="best", fontsize=7)
        return _svg(figure, "trials", f"Validation {metric} by trial")


def draw_settings(document: dict[str, Any], key: str) -> str | None:
    """The scores of a search by the values of one key; None without a score."""
    trials = document["trials"]
    scored = [trial for trial in trials if trial["score"] is not None]
    if not scored:
        return None
    values = [trial["settings"][key] for trial in trials]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    words = [] if numeric else sorted({str(value) for value in values})
    metric = document["metric"].replace("_", " ")

    def place(trial: dict[str, Any]) -> float:
        value = trial["settings"][key]
        return float(value) if numeric else words.index(str(value))

    with _style(f"by-{key}"):
        figure, axes = _figure(3.7, 2.7, one_line(key, 40), f"Validation {metric}")
        if key in document["logarithmic"]:
            _use_log_scale(axes)
        points = [(place(trial), trial["score"]) for trial in scored]
        axes.plot(*zip(*points), "o", color=BLUE, markersize=4)
        best = [point for point, trial in zip(points, scored) if trial["number"] == document["best"]]
        axes.plot(*zip(*best), "o", color=ORANGE, markersize=6, label="best")
        _draw_pruned(axes, [(place(trial), trial) for trial in trials])
        if words:
            axes.set_xticks(range(len(words)), [one_line(word, 18) for word in words])
            axes.set_xlim(-0.5, len(words) - 0.5)
        axes.legend(loc="best", fontsize=7)
        return _svg(figure, re.sub(r"[^A-Za-z0-9]", "-", key), f"Validation {metric} by {one_line(key, 40)}")


def _draw_pruned(axes: Axes, trials: Sequence[tuple[float, dict[str, Any]]]) -> None:
    """Trials that were pruned, at their last evaluation."""
    points = [
        (place, list(trial["evaluations"].values())[-1])
        for place, trial in trials
        if trial["outcome"] == "pruned" and trial["evaluations"]
    ]
    if points:
        axes.plot(*zip(*points), "x", color=GREY, markersize=4, label="pruned")


# --------------------------------------------------------------------------- figures to SVG


def _style(name: str) -> Any:
    # The salt makes the SVG's ids the same each time, and different from those of the page's other charts.
    return matplotlib.rc_context(_STYLE | {"svg.hashsalt": name})


def _figure(width: float, height: float, xlabel: str, ylabel: str, grid: bool = True) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if xlabel == "Epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(grid)
    axes.set_axisbelow(True)
    return figure, axes


def _use_log_scale(axes: Axes) -> None:
    """Orders of magnitude along x, with numbers as people write them: mathtext is off."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _svg(figure: Figure, name: str, title: str) -> str:
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
    return ElementTree.tostring(root, encoding="unicode")
