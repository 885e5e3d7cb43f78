"""The page of a model at other image sizes and on images made worse; needs no network and no JavaScript."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator
from PIL import Image

from vit_finetune.files import write_text
from vit_finetune.publishing.figures import BLUE, COLOURS, GREEN, GREY, build_figure, chart_style, draw_svg
from vit_finetune.publishing.page import page_environment
from vit_finetune.publishing.picture import Picture, build_picture

_LINE: Any = {"linewidth": 1.6, "marker": "o", "markersize": 4}


def write_robustness(page: Path, document: dict[str, Any], sheet: Image.Image | None) -> Path:
    """The path of the page, written whole or not at all.

    Args:
        page: where to write it.
        document: what `robustness.evaluate_robustness` answers.
        sheet: one image under every corruption; None where there are none.
    """
    write_text(page, build_page(document, sheet))
    return page


def build_page(document: dict[str, Any], sheet: Image.Image | None) -> str:
    """The page as HTML."""
    sizes, corruptions = document["image_sizes"], document["corruptions"]
    drawn = []
    if len(sizes) > 1:
        drawn = [
            (f"{document['metric'].capitalize()} by image size", _draw_sizes(document)),
            ("Images per second by image size", _draw_speed(document)),
        ]
    kinds = list(dict.fromkeys(row["kind"] for row in corruptions[1:]))
    return (
        page_environment()
        .get_template("robustness.html.jinja")
        .render(
            document=document,
            target=_name(document["target"]),
            data=_name(document["data"]) if document["data"] else None,
            charts=[(caption, Markup(chart)) for caption, chart in drawn],  # escaped in figures
            corruptions=Markup(_draw_corruptions(document, kinds)) if corruptions else None,
            rows=[(kind, [row for row in corruptions[1:] if row["kind"] == kind]) for kind in kinds],
            plain=corruptions[0] if corruptions else None,
            sheet=_encode(sheet) if sheet else None,
        )
    )


def _name(place: str) -> str:
    """What is called by a path, without the folders above it: the page may be for others. Hub ids stay."""
    path = Path(place).expanduser()
    return path.resolve().name if path.exists() else place


def _encode(sheet: Image.Image) -> Picture | None:
    sheet.thumbnail((1200, 1000))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG" if sheet.width <= 400 else "JPEG", quality=85)
    return build_picture(buffer.getvalue())


def _draw_sizes(document: dict[str, Any]) -> str:
    with chart_style("sizes"):
        figure, axes = _figure_of_sizes(document, f"{document['metric'].capitalize()} (%)")
        rows = document["image_sizes"]
        places = [row["image_size"][0] for row in rows]
        axes.plot(places, [100 * row["score"] for row in rows], color=BLUE, **_LINE)
        if rows[0]["interval"]:
            low, high = zip(*[[100 * bound for bound in row["interval"]] for row in rows])
            axes.fill_between(places, low, high, color=BLUE, alpha=0.2, linewidth=0)
        return draw_svg(figure, "sizes", f"{document['metric'].capitalize()} by image size")


def _draw_speed(document: dict[str, Any]) -> str:
    with chart_style("speed"):
        figure, axes = _figure_of_sizes(document, "Images per second")
        rows = document["image_sizes"]
        rates = [row["images_per_second"] for row in rows]
        axes.plot([row["image_size"][0] for row in rows], rates, color=GREEN, **_LINE)
        axes.set_ylim(bottom=0)
        return draw_svg(figure, "speed", "Images per second by image size")


def _figure_of_sizes(document: dict[str, Any], label: str) -> Any:
    figure, axes = build_figure(3.7, 2.7, "Image size (pixels)", label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for row in document["image_sizes"]:
        if row["trained"]:
            axes.axvline(row["image_size"][0], color=GREY, linewidth=0.9, linestyle="--", label="trained at")
    axes.legend(loc="best", fontsize=8)
    return figure, axes


def _draw_corruptions(document: dict[str, Any], kinds: list[str]) -> str:
    plain, *worse = document["corruptions"]
    with chart_style("corruptions"):
        figure, axes = build_figure(5.6, 3.4, "Strength", f"{document['metric'].capitalize()} (%)")
        for kind, colour in zip(kinds, COLOURS):
            rows = [plain, *(row for row in worse if row["kind"] == kind)]
            scores = [100 * row["score"] for row in rows]
            axes.plot([row["strength"] for row in rows], scores, color=colour, label=kind, **_LINE)
        axes.set_ylim(bottom=0)
        axes.legend(loc="best", fontsize=8)
        return draw_svg(figure, "corruptions", "Score by corruption and strength")
