"""What the papers say of a report whose images may have several labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vit_finetune.publishing.record import Record, interval, percent
from vit_finetune.reports import MultiLabelReport

METRICS = ["mean_average_precision", "f1"]
"""The Hub's names of the metrics that a card leads with."""


def multi_label_reports(record: Record) -> list[MultiLabelReport]:
    """The reports of a run of this kind, test first."""
    return [report for report in (record.test, record.validation) if isinstance(report, MultiLabelReport)]


def label_score_rows(reports: Sequence[MultiLabelReport]) -> list[tuple[str, list[str]]]:
    """The table of scores: each row's name and its text for every report."""
    return [
        ("Images", [f"{report.num_images:,}" for report in reports]),
        ("Mean average precision", [percent(report.mean_average_precision) for report in reports]),
        ("Micro F1", [percent(report.micro_f1) for report in reports]),
        ("Macro F1", [percent(report.macro_f1) for report in reports]),
        ("Exact match", [percent(report.exact_match) for report in reports]),
        ("95% interval of the exact match", [interval(report.exact_match_interval) for report in reports]),
        ("Hamming loss", [percent(report.hamming_loss) for report in reports]),
    ]


def label_metrics(report: MultiLabelReport, what: str) -> list[tuple[str, str, float, dict[str, Any]]]:
    """The scores for the model-index: type, name, value and arguments of each.

    Args:
        report: whose.
        what: what follows each name, such as the split.
    """
    low, high = report.exact_match_interval
    return [
        ("mean_average_precision", f"Mean average precision{what}", report.mean_average_precision, {}),
        ("f1", f"Micro F1{what}", report.micro_f1, {"average": "micro"}),
        ("f1", f"Macro F1{what}", report.macro_f1, {"average": "macro"}),
        (
            "exact_match",
            f"Exact match{what}",
            report.exact_match,
            {"interval_95": [low, high], "interval_method": "Wilson"},
        ),
        ("hamming_loss", f"Hamming loss{what}", report.hamming_loss, {}),
    ]
