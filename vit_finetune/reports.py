"""The report of a split whose images may have several labels; and a report of either kind read back."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from vit_finetune.run import ClassScore, Mistake, Report


class LabelScore(ClassScore):
    """Scores of one label at its threshold, each in [0, 1]; `support` counts the images that have it."""

    average_precision: float | None = None
    """Over all thresholds; None where no image has the label."""
    threshold: float
    """Probability from which on an image is said to have the label."""
    given: int
    """How many images are said to have it."""


class MultiLabelReport(BaseModel):
    """The numbers of one split whose images may have several labels, each in [0, 1]."""

    model_config = ConfigDict(frozen=True)
    split: str
    num_images: int
    mean_average_precision: float
    """Mean over the labels that an image has; it needs no thresholds."""
    micro_f1: float
    """F1 of all decisions about an image and a label together."""
    macro_f1: float
    """Mean of the F1 of the labels that an image has or is given."""
    exact_match: float
    """Share of images of which every label is right."""
    exact_match_interval: tuple[float, float]
    """95% Wilson score interval."""
    hamming_loss: float
    """Share of decisions about an image and a label that are wrong."""
    per_class: dict[str, LabelScore]
    labels: list[str]
    """Label names in id order."""
    worst_mistakes: list[Mistake] = []

    def to_json(self) -> str:
        """The report as JSON, without what does not apply."""
        return self.model_dump_json(indent=2, exclude_none=True) + "\n"


AnyReport = Report | MultiLabelReport


def headline_scores(report: AnyReport) -> list[tuple[str, str]]:
    """The scores that a table of splits shows, (name, value) each, images first."""
    if isinstance(report, MultiLabelReport):
        low, high = report.exact_match_interval
        return [
            ("images", f"{report.num_images:,}"),
            ("mAP", f"{report.mean_average_precision:.4f}"),
            ("micro F1", f"{report.micro_f1:.4f}"),
            ("macro F1", f"{report.macro_f1:.4f}"),
            ("exact", f"{report.exact_match:.4f}"),
            ("95% interval", f"{low:.3f}–{high:.3f}"),
        ]
    low, high = report.accuracy_interval
    return [
        ("images", f"{report.num_images:,}"),
        ("accuracy", f"{report.accuracy:.4f}"),
        ("95% interval", f"{low:.3f}–{high:.3f}"),
        ("macro F1", f"{report.macro_f1:.4f}"),
        ("log loss", f"{report.log_loss:.4f}"),
        ("ECE", f"{report.ece:.4f}"),
    ]


def all_scores(report: AnyReport) -> list[list[str]]:
    """Name and value of each score of a split, images first."""
    if isinstance(report, MultiLabelReport):
        low, high = report.exact_match_interval
        return [
            ["images", f"{report.num_images:,}"],
            ["mean average precision", f"{report.mean_average_precision:.4f}"],
            ["micro F1", f"{report.micro_f1:.4f}"],
            ["macro F1", f"{report.macro_f1:.4f}"],
            ["exact match", f"{report.exact_match:.4f}  [{low:.4f}, {high:.4f}]"],
            ["Hamming loss", f"{report.hamming_loss:.4f}"],
        ]
    low, high = report.accuracy_interval
    rows = [
        ["images", f"{report.num_images:,}"],
        ["accuracy", f"{report.accuracy:.4f}  [{low:.4f}, {high:.4f}]"],
        ["macro F1", f"{report.macro_f1:.4f}"],
        ["balanced accuracy", f"{report.balanced_accuracy:.4f}"],
        ["log loss", f"{report.log_loss:.4f}"],
        ["calibration error", f"{report.ece:.4f}"],
    ]
    if after := report.calibrated:
        rows += [
            [f"log loss at temperature {after.temperature:.3f}", f"{after.log_loss:.4f}"],
            [f"calibration error at temperature {after.temperature:.3f}", f"{after.ece:.4f}"],
        ]
    return rows


def load_report(path: Path) -> AnyReport:
    """The report in a JSON file, of the kind that it holds."""
    text = path.read_text(encoding="utf-8")
    if "mean_average_precision" in json.loads(text):
        return MultiLabelReport.model_validate_json(text)
    return Report.model_validate_json(text)
