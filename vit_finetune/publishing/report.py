"""report.html: one run on one page, charts and pictures inside; needs no network and no JavaScript."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from vit_finetune.files import write_text
from vit_finetune.publishing import charts
from vit_finetune.publishing.multi_label import label_score_rows, multi_label_reports
from vit_finetune.publishing.page import page_environment
from vit_finetune.publishing.picture import Picture, build_picture
from vit_finetune.publishing.record import (
    Record,
    bin_count,
    class_rows,
    load_record,
    mean_confidence,
    most_confused,
    score_rows,
    worst_by_f1,
)
from vit_finetune.reports import AnyReport, MultiLabelReport
from vit_finetune.run import Run

MOST_BARS = 20
"""With more classes, the bars show only this many: the worst."""


def write_report(run: Run) -> Path:
    """The path of the run's `report.html`, written whole or not at all.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    write_text(run.report_html, build_report(run))
    return run.report_html


def build_report(run: Run) -> str:
    """The page; what the run did not leave is left out or said to be missing."""
    record = load_record(run)
    template = page_environment().get_template("report.html.jinja")
    report = record.headline
    several = multi_label_reports(record)
    return template.render(
        record=record,
        provenance=record.provenance,
        report=report,
        curves=_curves(record),
        augmented=_picture(run.pictures / "augmented.jpg"),
        mistakes=[
            (mistake, _named_picture(run, mistake.picture), _named_picture(run, mistake.map))
            for mistake in (report.worst_mistakes if report else [])
        ],
        seeing=record.seeing,
        distances=Markup(chart) if (chart := charts.draw_distances(record.seeing)) else None,
        scores=label_score_rows(several) if several else score_rows(record),
        multi_label=bool(several),
        **(_of_one_split(report) if report else {}),
    )


def _curves(record: Record) -> list[tuple[str, Markup]]:
    """(caption, chart) of each learning curve that the log holds points for."""
    chosen = _chosen_epoch(record)
    drawn = [
        ("Loss of training batches and of the validation split", charts.draw_losses(record.history, chosen)),
        ("Accuracy on the validation split", charts.draw_accuracy(record.history, chosen)),
        (
            "Mean average precision on the validation split",
            charts.draw_average_precision(record.history, chosen),
        ),
        ("Learning rate", charts.draw_learning_rate(record.history)),
        ("Range test of the learning rate, before training", charts.draw_range_test(_range_test(record))),
    ]
    return [(caption, Markup(chart)) for caption, chart in drawn if chart]  # escaped in charts


def _range_test(record: Record) -> dict[str, Any] | None:
    test: dict[str, Any] | None = record.provenance.get("range_test")
    return test


def _chosen_epoch(record: Record) -> float | None:
    """The epoch of the published weights; None where the run did not choose by validation."""
    step = record.best_step
    found = (
        entry["epoch"] for entry in record.history if step and entry.get("step") == step and "epoch" in entry
    )
    return next(found, None)


def _of_one_split(report: AnyReport) -> dict[str, Any]:
    """What the page shows of the report that it quotes."""
    rows = class_rows(report)
    few = len(rows) <= MOST_BARS
    bars = {
        "classes": rows,
        "bars_shown": min(len(rows), MOST_BARS),
        "bars": Markup(charts.draw_classes(rows if few else worst_by_f1(report, MOST_BARS))),
    }
    if isinstance(report, MultiLabelReport):
        return bars
    drawn = [(report.calibration, report.ece, "calibration")]
    if after := report.calibrated:
        drawn.append((after.calibration, after.ece, "calibrated"))
    diagrams = [chart for one in drawn if (chart := charts.draw_calibration(*one))]
    return bars | {
        "confusion": Markup(charts.draw_confusion(report)),
        "confused": most_confused(report, 10 if len(rows) <= charts.READABLE_CLASSES else 20),
        "is_labelled": len(rows) <= charts.READABLE_CLASSES,
        "diagrams": [Markup(chart) for chart in diagrams],
        "bins": bin_count(report.calibration),
        "confidence": mean_confidence(report),
    }


def _named_picture(run: Run, name: str | None) -> Picture | None:
    # Only the name counts: a report from elsewhere must not pull other files into the page.
    return _picture(run.pictures / Path(name).name) if name else None


def _picture(path: Path) -> Picture | None:
    """The picture in a file; None where there is none that a browser could show."""
    try:
        return build_picture(path.read_bytes())
    except OSError:
        return None
