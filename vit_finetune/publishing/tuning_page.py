"""tune.html: the trials of a search, with pictures; needs no network and no JavaScript."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from vit_finetune.files import write_text
from vit_finetune.publishing import charts
from vit_finetune.publishing.page import page_environment


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
    environment = page_environment()
    environment.filters.update(setting=_setting)
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
