"""The page of several runs side by side, from what `comparing` found; needs no network and no JavaScript."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from vit_finetune.files import write_text
from vit_finetune.publishing.figures import COLOURS, GREY, build_figure, chart_style, draw_svg
from vit_finetune.publishing.page import page_environment
from vit_finetune.publishing.picture import build_picture
from vit_finetune.publishing.record import Record, one_line

MOST_CLASSES = 40
"""With more classes, the chart of recalls shows only those in which the runs differ most."""


def write_comparison(
    page: Path,
    document: dict[str, Any],
    records: Mapping[str, Record],
    pictures: Mapping[str, Sequence[dict[str, Any]]],
) -> Path:
    """The path of the page, written whole or not at all.

    Args:
        page: where to write it.
        document: what `comparing.compare` answers.
        records: the runs by name.
        pictures: by run, images that it alone gets right: `id`, `label`, what the others `said`, and
            `picture`, the bytes of a small one or None.
    """
    write_text(page, build_page(document, records, pictures))
    return page


def build_page(
    document: dict[str, Any],
    records: Mapping[str, Record],
    pictures: Mapping[str, Sequence[dict[str, Any]]],
) -> str:
    """The page as HTML."""
    environment = page_environment()
    environment.filters.update(label=_label, points=_points, chance=_chance, rate=rounded)
    runs = [
        run | dict(zip(("score_name", "score", "bounds"), score_of(run["report"])))
        for run in document["runs"]
    ]
    colour_of = {run["name"]: COLOURS[place % len(COLOURS)] for place, run in enumerate(runs)}
    classes = _classes_by_spread(document)
    drawn = [
        (f"{runs[0]['score_name'].capitalize()} with 95% intervals", _draw_scores(runs, colour_of)),
        ("Validation score by epoch", _draw_curves(records, colour_of)),
    ]
    return environment.get_template(
        "comparison.html.jinja"
    ).render(
        document=document,
        runs=runs,
        pairs=[(pair, describe_pair(pair)) for pair in document["pairs"]],
        charts=[(caption, Markup(chart)) for caption, chart in drawn if chart],  # escaped in figures
        recalls=Markup(_draw_recalls(runs, classes[:MOST_CLASSES], colour_of)),
        classes=classes,
        shown=min(len(classes), MOST_CLASSES),
        pictures={name: [_with_picture(one) for one in images] for name, images in pictures.items()},
        one_machine=len({run["hardware"] for run in runs}) == 1,
    )


def _with_picture(image: dict[str, Any]) -> dict[str, Any]:
    return image | {"picture": build_picture(image["picture"]) if image["picture"] else None}


def score_of(report: dict[str, Any]) -> tuple[str, float, tuple[float, float]]:
    """What images are right by: the name of the score, its value in [0, 1] and its 95% interval."""
    name = "exact_match" if "exact_match" in report else "accuracy"
    return name.replace("_", " "), report[name], tuple(report[f"{name}_interval"])


def describe_pair(pair: dict[str, Any]) -> str:
    """What the comparison of two runs says, in a sentence."""
    first, second = pair["first"], pair["second"]
    if pair["only_first"] == pair["only_second"] == 0:
        return f"{first} and {second} are right about the same images: no difference"
    counts = (
        f"{pair['only_first']:,} images only {first} gets right, {pair['only_second']:,} only {second} "
        f"({_chance(pair['adjusted_p_value'])})"
    )
    if pair["adjusted_p_value"] >= 0.05:
        return f"{first} and {second}: {counts}: a difference that chance could explain"
    better, worse = (first, second) if pair["difference"] < 0 else (second, first)
    low, high = sorted(abs(100 * bound) for bound in pair["interval"])
    size = f"{abs(100 * pair['difference']):.1f} points [{low:.1f}, {high:.1f}]"
    return f"{better} is better than {worse} by {size}: {counts}"


def rounded(rate: float | None) -> str:
    """Images per second in whole ones; a dash where they are not known."""
    return f"{rate:,.0f}" if rate else "–"


def _chance(p_value: float) -> str:
    return "p < 0.0001" if p_value < 0.0001 else f"p = {p_value:.4f}"


def _label(value: Any) -> str:
    """A class, or several labels, in words."""
    return value if isinstance(value, str) else ", ".join(value) or "none"


def _points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def _classes_by_spread(document: dict[str, Any]) -> list[tuple[str, list[float]]]:
    """(class, recall by run) of every class, those in which the runs differ most first."""
    rows = [
        (label, [document["recalls"][run["name"]][number] for run in document["runs"]])
        for number, label in enumerate(document["labels"])
    ]
    return sorted(rows, key=lambda row: min(row[1]) - max(row[1]))  # stable: of equals, the lower ids first


def _draw_scores(runs: Sequence[dict[str, Any]], colour_of: Mapping[str, str]) -> str:
    with chart_style("scores"):
        score = f"{runs[0]['score_name'].capitalize()} (%)"
        figure, axes = build_figure(3.7, 1.2 + 0.32 * len(runs), score, "")
        for place, run in enumerate(runs):
            colour, (low, high) = colour_of[run["name"]], run["bounds"]
            axes.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=2)
            axes.plot([100 * run["score"]], [place], "o", color=colour, markersize=6)
        axes.set_yticks(range(len(runs)), [one_line(run["name"], 24) for run in runs])
        axes.set_ylim(len(runs) - 0.5, -0.5)
        return draw_svg(figure, "scores", "Scores of the runs with their intervals")


def _draw_curves(records: Mapping[str, Record], colour_of: Mapping[str, str]) -> str | None:
    """Validation accuracy, or mean average precision of several labels, by epoch; None without a log."""
    curves = {}
    for name, record in records.items():
        for key in ("eval_accuracy", "eval_mean_average_precision"):
            log = [one for one in record.history if key in one and "epoch" in one]
            if log:
                curves[name] = [(one["epoch"], 100 * one[key]) for one in log]
    if not curves:
        return None
    with chart_style("curves"):
        figure, axes = build_figure(3.7, 2.9, "Epoch", "Validation score (%)")
        for name, points in curves.items():
            style: dict[str, Any] = {
                "color": colour_of[name],
                "linewidth": 1.5,
                "marker": "o",
                "markersize": 3,
            }
            axes.plot(*zip(*points), label=one_line(name, 24), **style)
        axes.legend(loc="best", fontsize=8)
        return draw_svg(figure, "curves", "Validation score of each run by epoch")


def _draw_recalls(
    runs: Sequence[dict[str, Any]],
    classes: Sequence[tuple[str, list[float]]],
    colour_of: Mapping[str, str],
) -> str:
    """A dot for each run on the line of each class."""
    with chart_style("recalls"):
        figure, axes = build_figure(7.2, 1.0 + 0.26 * len(classes), "Recall (%)", "Class", grid=False)
        recalls = 100 * np.array([row for _, row in classes])  # (classes, runs)
        places = np.arange(len(classes))
        axes.hlines(places, recalls.min(axis=1), recalls.max(axis=1), color=GREY, linewidth=1)
        for column, run in enumerate(runs):
            colour, label = colour_of[run["name"]], one_line(run["name"], 30)
            axes.plot(recalls[:, column], places, "o", color=colour, markersize=6, label=label)
        axes.set_yticks(places, [one_line(label, 26) for label, _ in classes])
        axes.set_ylim(len(classes) - 0.4, -0.6)
        axes.set_xlim(-2, 102)
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        handles = axes.get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper right", ncols=min(len(runs), 3))
        return draw_svg(figure, "recalls", "Recall of each run by class")
