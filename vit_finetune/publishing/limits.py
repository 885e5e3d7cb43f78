"""Where a model fails, as its report shows it, in sentences with the numbers that they rest on."""

from __future__ import annotations

from vit_finetune.publishing.record import (
    FEW_IMAGES,
    ClassRow,
    class_rows,
    interval,
    mean_confidence,
    most_confused,
    percent,
    worst_by_recall,
)
from vit_finetune.reports import AnyReport, MultiLabelReport
from vit_finetune.run import Report


def find_limits(report: AnyReport) -> list[str]:
    """Sentences about where the model fails, each with the numbers that it rests on."""
    if isinstance(report, MultiLabelReport):
        return [*_find_label_limits(report), *filter(None, [_rarely_seen(report)])]
    return [
        sentence
        for sentence in (_missed(report), _mixed_up(report), _rarely_seen(report), _calibrated(report))
        if sentence
    ]


def _missed(report: Report) -> str:
    rows = worst_by_recall(report, 5)
    if not rows:
        return f"No image of the {report.split} split was misclassified, so these numbers show no weak class."
    return _list_recalls(rows)


def _list_recalls(rows: list[ClassRow]) -> str:
    listed = "; ".join(
        f"{row.name}: {percent(row.recall)} ({row.correct} of {row.support}, 95% interval "
        f"{interval(row.recall_interval)})"
        for row in rows
    )
    return f"Lowest recall: {listed}."


def _mixed_up(report: Report) -> str | None:
    pairs = most_confused(report, 5)
    listed = "; ".join(f"{p.label} taken for {p.predicted}, {p.count} of {p.support} images" for p in pairs)
    return f"Most confused: {listed}." if pairs else None


def _rarely_seen(report: AnyReport) -> str | None:
    few = [row for row in class_rows(report) if row.support < FEW_IMAGES]
    if not few:
        return None
    named = "; ".join(f"{row.name}: {row.support}" for row in sorted(few, key=lambda row: row.support)[:10])
    if len(few) > 10:
        named += f"; and {len(few) - 10} more"
    words = "labels" if isinstance(report, MultiLabelReport) else "classes"
    return (
        f"{len(few)} of {len(report.labels)} {words} {'has' if len(few) == 1 else 'have'} fewer than "
        f"{FEW_IMAGES} images in the {report.split} split, "
        f"too few for a certain score of their own ({named})."
    )


def _calibrated(report: Report) -> str | None:
    confidence = mean_confidence(report)
    if confidence is None:
        return None
    low, high = report.accuracy_interval
    if low <= confidence <= high:
        finding = "the difference is within the accuracy's 95% interval"
    else:
        finding = f"it is {'surer' if confidence > high else 'less sure'} than it should be"
    return (
        f"Calibration: the mean probability of the predicted class is {percent(confidence)} where "
        f"the accuracy is {percent(report.accuracy)}; {finding}. "
        f"Expected calibration error {percent(report.ece)}."
    )


def _find_label_limits(report: MultiLabelReport) -> list[str]:
    """Sentences about labels that the model misses, or gives wrongly; the numbers with them."""
    missed = worst_by_recall(report, 5)
    given_wrongly = [row for row in class_rows(report) if row.correct < row.given]
    wrong = sorted(given_wrongly, key=lambda row: (row.precision, -row.given))[:5]
    sentences = [_list_recalls(missed)] if missed else []
    if wrong:
        sentences.append(f"Lowest precision: {'; '.join(map(_say_precision, wrong))}.")
    if not missed and not wrong:
        sentences.append(
            f"No label of the {report.split} split was missed or wrongly given, so these numbers show no "
            f"weak label."
        )
    return sentences


def _say_precision(row: ClassRow) -> str:
    return f"{row.name}: {percent(row.precision)} ({row.correct} of {row.given} images that were given it)"
