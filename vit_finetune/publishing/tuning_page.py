"""tune.html: the trials of a search, with pictures; needs no network and no JavaScript."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from vit_finetune.console import printable
from vit_finetune.files import write_text
from vit_finetune.publishing import charts
from vit_finetune.publishing.record import duration

TEMPLATES = Path(__file__).parent.parent / "templates"


def write_tuning_page(document: dict[str, Any], folder: Path) -> Path:
    """The path of `tune.html` in the folder, written whole or not at all.

    Args:
        document: what `trials.json` holds.
        folder: of the search.
    """
    page = folder / "tune.html"
    write_text(page, build_page(document))
    return page


def build_page(document: dict[str, Any]) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters.update(duration=duration, setting=_setting)
    trials = document["trials"]
    keys = list(trials[0]["settings"]) if trials else []
    drawn = [("Score by trial", charts.draw_trials(document))]
    drawn += [(f"Score by {key}", charts.draw_settings(document, key)) for key in keys]
    scored = [trial for trial in trials if trial["score"] is not None]
    return environment.get_template("tune.html.jinja").render(
        document=document,
        metric=document["metric"].replace("_", " "),
        keys=keys,
        best=next((trial for trial in trials if trial["number"] == document["best"]), None),
        trials=sorted(scored, key=lambda trial: trial["score"], reverse=document["metric"] != "loss")
        + [trial for trial in trials if trial["score"] is None],
        charts=[(caption, Markup(chart)) for caption, chart in drawn if chart],  # escaped in charts
    )


def _setting(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
