"""What a run says of itself: its files read once, and what follows from its confusion matrix."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from vit_finetune.console import printable
from vit_finetune.reports import AnyReport, LabelScore, MultiLabelReport, load_report
from vit_finetune.run import CalibrationBin, Finding, Findings, Report, Run, wilson_interval

FEW_IMAGES = 30
"""Below this many images the 95% interval of a recall is wider than about 0.2 almost everywhere."""


@dataclass(frozen=True)
class Record:
    """The files of one run. Whatever the run did not leave is empty or None."""

    recipe_text: str
    recipe: dict[str, Any]
    """Resolved: sections with every default."""
    provenance: dict[str, Any]
    history: list[dict[str, Any]]
    """The Trainer's log, in the order of the steps."""
    validation: AnyReport | None
    test: AnyReport | None
    findings: list[Finding] | None
    """What the checkup saw in the data, gravest first; None where it was not looked at."""
    seeing: dict[str, Any] | None
    """Where the model looks: the method, and with attention how far each head reaches."""

    @property
    def headline(self) -> AnyReport | None:
        """The report to quote: the test's, or the validation's where no test split was scored."""
        return self.test or self.validation

    @property
    def best_step(self) -> int | None:
        """The step of the published weights where validation chose them; None where they are the last."""
        # The Trainer notes its best step also where it does not go back to it.
        chosen = self.setting("training", "load_best_model_at_end") is not False
        return (self.provenance.get("best_step") or None) if chosen else None

    @property
    def averaging(self) -> str | None:
        """What the published weights are an average of, in words; None where they are no average."""
        ema = self.provenance.get("ema")
        if not ema:
            return None
        last = f", {ema['last_decay']:.4g} in the last step" if ema["last_decay"] < ema["decay"] else ""
        return (
            f"exponential moving average over the steps, with decay {ema['decay']:g}{last}; "
            f"validation scored the average, too"
        )

    @property
    def package_version(self) -> str:
        """The version of this package that the run was made with; empty where it is not known."""
        return str((self.provenance.get("versions") or {}).get("vit-finetune", ""))

    @property
    def own_recipe(self) -> dict[str, Any]:
        """Only the keys that the user set."""
        return self.provenance.get("recipe") or {}

    @property
    def data(self) -> dict[str, Any]:
        """What provenance says about the data."""
        return self.provenance.get("data") or {}

    @property
    def model(self) -> dict[str, Any]:
        """What provenance says about the model."""
        return self.provenance.get("model") or {}

    @property
    def name(self) -> str:
        """What to call the run: the recipe's name."""
        return str(self.provenance.get("recipe_name") or "run")

    @property
    def is_adapter(self) -> bool:
        """Whether what is published is LoRA's adapter, to be loaded beside its base."""
        return self.setting("model", "method") == "lora" and not self.setting("model", "lora_merge")

    def setting(self, section: str, key: str) -> Any:
        """One value of the resolved recipe; None where it is not there."""
        return (self.recipe.get(section) or {}).get(key)


def hub_id(value: Any) -> str | None:
    """The id in a value that has the form `owner/name[@revision]`."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@.+)?", value, re.ASCII) if isinstance(value, str) else None
    return match[1] if match else None


def load_record(run: Run) -> Record:
    """Everything that the papers need, read from the run folder.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    text = run.recipe.read_text(encoding="utf-8")
    reports = {split: run.report(split) for split in ("validation", "test")}
    loaded = {split: load_report(path) if path.is_file() else None for split, path in reports.items()}
    return Record(
        recipe_text=text,
        recipe=yaml.safe_load(text) or {},
        provenance=_load_json(run.provenance) or {},
        history=_load_json(run.history) or [],
        validation=loaded["validation"],
        test=loaded["test"],
        findings=Findings.load(run.findings).findings if run.findings.is_file() else None,
        seeing=_load_json(run.seeing),
    )


def _load_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# --------------------------------------------------------------------------- what follows from the numbers


@dataclass(frozen=True)
class ClassRow:
    """One class of a report, with the uncertainty of its recall."""

    name: str
    precision: float
    recall: float
    recall_interval: tuple[float, float]
    f1: float
    support: int
    correct: int
    average_precision: float | None = None
    threshold: float | None = None
    given: int = 0
    """With several labels: the images that are said to have it, among others."""


@dataclass(frozen=True)
class Confusion:
    """How many images of one class were taken for another."""

    label: str
    predicted: str
    count: int
    support: int


def class_rows(report: AnyReport) -> list[ClassRow]:
    """The classes of a report in the order of their ids."""
    rows = []
    for index, name in enumerate(report.labels):
        score = report.per_class[name]
        if isinstance(report, MultiLabelReport):
            correct = round(score.recall * score.support)
        else:
            correct = report.confusion_matrix[index][index]
        row = ClassRow(
            name,
            score.precision,
            score.recall,
            wilson_interval(correct, score.support),
            score.f1,
            score.support,
            correct,
        )
        if isinstance(score, LabelScore):
            row = replace(
                row,
                average_precision=score.average_precision,
                threshold=score.threshold,
                given=score.given,
            )
        rows.append(row)
    return rows


def worst_by_f1(report: AnyReport, count: int) -> list[ClassRow]:
    """The classes with the lowest F1, lowest first; of equals, the one with more images, which says more."""
    return sorted(class_rows(report), key=lambda row: (row.f1, -row.support))[:count]


def worst_by_recall(report: AnyReport, count: int) -> list[ClassRow]:
    """The classes of which most was missed, worst first; only classes that have images and missed some."""
    missed = [row for row in class_rows(report) if row.correct < row.support]
    return sorted(missed, key=lambda row: (row.recall, -row.support))[:count]


def most_confused(report: Report, count: int) -> list[Confusion]:
    """The pairs (true, predicted) off the diagonal that hold most images, most first."""
    pairs = [
        Confusion(label, predicted, number, report.per_class[label].support)
        for label, row in zip(report.labels, report.confusion_matrix)
        for predicted, number in zip(report.labels, row)
        if number and label != predicted
    ]
    return sorted(pairs, key=lambda pair: -pair.count)[:count]  # stable: of equals, the lower ids first


def mean_confidence(report: Report) -> float | None:
    """The mean top probability over the split's images; None where no bin holds an image."""
    total = sum(part.count for part in report.calibration)
    return sum(part.count * part.confidence for part in report.calibration) / total if total else None


def bin_count(calibration: Sequence[CalibrationBin]) -> int | None:
    """How many bins of equal width the calibration is measured over; reports list those with images only."""
    widths = [part.high - part.low for part in calibration]
    return round(1 / widths[0]) if widths else None


# --------------------------------------------------------------------------- words


def one_line(text: str, longest: int | None = None) -> str:
    """The text printable and on one line, cut with … where it is longer than `longest` characters."""
    line = " ".join(printable(text).split())
    return line[: longest - 1] + "…" if longest is not None and len(line) > longest else line


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage; never "100.0%" or "0.0%" for what only rounds to it."""
    text = f"{value:.{digits}%}"
    if math.isclose(value, 1) or math.isclose(value, 0, abs_tol=1e-9):
        return text
    rounded_away = (value < 1 and text == f"{1:.{digits}%}") or (value > 0 and text == f"{0:.{digits}%}")
    return percent(value, digits + 1) if rounded_away and digits < 4 else text


def interval(bounds: Iterable[float]) -> str:
    """Two shares as "95.1–98.0%"."""
    low, high = (percent(bound) for bound in bounds)
    return f"{low.removesuffix('%')}–{high}"


def duration(seconds: float) -> str:
    """Seconds as "31 s", "5 min 12 s" or "3 h 04 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def memory(size: float) -> str:
    """Bytes as "812 B", "35 kB", "812 MB" or "24.5 GB", decimal."""
    if size < 1e6:
        return f"{size:.0f} B" if size < 1e3 else f"{size / 1e3:.0f} kB"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def pixels(size: Iterable[int] | None) -> str | None:
    """An image size (height, width) as "224 × 224 pixels"."""
    return " × ".join(str(side) for side in size) + " pixels" if size else None


def score_rows(record: Record) -> list[tuple[str, list[str]]]:
    """The table of scores: each row's name and its text for every scored split."""
    reports = [report for report in (record.test, record.validation) if isinstance(report, Report)]
    rows: list[tuple[str, list[str]]] = [
        ("Images", [f"{report.num_images:,}" for report in reports]),
        ("Accuracy", [percent(report.accuracy) for report in reports]),
        ("95% interval of the accuracy", [interval(report.accuracy_interval) for report in reports]),
        ("Macro F1", [percent(report.macro_f1) for report in reports]),
        ("Balanced accuracy", [percent(report.balanced_accuracy) for report in reports]),
        ("Log loss (nats)", [f"{report.log_loss:.4f}" for report in reports]),
        ("Expected calibration error", [percent(report.ece) for report in reports]),
    ]
    after = [report.calibrated for report in reports]
    if any(after):
        rows.append(("Log loss, calibrated (nats)", [f"{c.log_loss:.4f}" if c else "–" for c in after]))
        rows.append(("Expected calibration error, calibrated", [percent(c.ece) if c else "–" for c in after]))
    top_5 = [report.top_5_accuracy for report in reports]
    if any(score is not None for score in top_5):
        rows.insert(3, ("Top-5 accuracy", ["–" if score is None else percent(score) for score in top_5]))
    return rows
