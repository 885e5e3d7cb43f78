"""A published model, as strangers load it, against what its report says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
from PIL import Image
from transformers import pipeline

from vit_finetune.console import progress
from vit_finetune.data.sources.columns import column_values
from vit_finetune.data.sources.folders import first_of
from vit_finetune.data.sources.labels import multi_hot
from vit_finetune.data.transforms import ImageFiles
from vit_finetune.evaluation.images import spread_rows
from vit_finetune.evaluation.multi_label import compare_labels
from vit_finetune.evaluation.scoring import compute_label_metrics
from vit_finetune.evaluation.target import best_device
from vit_finetune.model.loading import load_checkpoint, quiet_transformers
from vit_finetune.model.lora import is_adapter
from vit_finetune.reports import AnyReport, MultiLabelReport, load_report
from vit_finetune.run import Run, RunError

SAMPLE = 64
"""Test images that are scored anew unless all are asked for."""
TOLERANCE = 1e-3
"""Largest difference of a probability that passes: other kernels of another machine stay far below it."""


@dataclass(frozen=True)
class Verified:
    """How a model that was downloaded compares with what was scored."""

    num_images: int
    """That were scored anew."""
    largest_difference: float
    """Of a probability."""


def verify_scores(model: Path, split: datasets.Dataset, run: Run, whole: bool) -> Verified:
    """How `pipeline` scores test images with a downloaded model, which agrees with the run's predictions.

    Args:
        model: the folder it was downloaded to.
        split: the run's test images: columns id, image and label.
        run: with a report and predictions of the test split.
        whole: whether all images are scored, and not a sample of 64.

    Raises:
        RunError: it does not agree, or the predictions are not those that the report is of.
    """
    table = pyarrow.parquet.read_table(run.predictions("test"))
    report = load_report(run.report("test"))
    scored = dict(zip(table["id"].to_pylist(), np.stack(table["probabilities"].to_numpy())))
    _check_predictions(table, report)
    ids = column_values(split, "id")
    if len(ids) != len(scored) or any(identity not in scored for identity in ids):
        raise RunError(f"{run.path}: the test images are not those of its predictions")
    rows = spread_rows(len(ids), len(ids) if whole else SAMPLE)
    found = _classify(model, split, rows, report.labels)  # (images, classes)
    expected = np.stack([scored[ids[row]] for row in rows])
    differences = np.abs(found - expected).max(axis=1)
    worst = int(differences.argmax())
    if not differences[worst] <= TOLERANCE:  # NaN too
        raise RunError(
            f"what was downloaded does not score as reported: {int((~(differences <= TOLERANCE)).sum())} of "
            f"{len(rows)} test images get other probabilities, {ids[rows[worst]]} one that is off by "
            f"{differences[worst]:.3f}"
        )
    return Verified(len(rows), float(differences[worst]))


def _check_predictions(table: pyarrow.Table, report: AnyReport) -> None:
    """Raises RunError unless the report's scores are those of the predictions."""
    number = {label: row for row, label in enumerate(report.labels)}
    columns = [table[name].to_pylist() for name in ("predicted", "label")]
    if isinstance(report, MultiLabelReport):
        predicted, labels = (
            multi_hot([[number[name] for name in names] for names in column], len(number))
            for column in columns
        )
        again = compare_labels(labels, predicted.astype(int))
        compared = ["exact_match", "micro_f1", "macro_f1"]
    else:
        predicted, labels = (np.asarray([number[name] for name in column]) for column in columns)
        again = compute_label_metrics(predicted, labels)
        compared = ["accuracy", "macro_f1"]
    for name in compared:
        if not np.isclose(again[name], getattr(report, name)):
            raise RunError(
                f"the report's {name.replace('_', ' ')} is {getattr(report, name):.4f}, that of the "
                f"predictions beside it {again[name]:.4f}: they are not of the same model"
            )


def _classify(model: Path, split: datasets.Dataset, rows: list[int] | range, labels: list[str]) -> np.ndarray:
    """Probabilities `(images, classes)` by the stock pipeline, in the order of the labels.

    Raises:
        RunError: it cannot be used, or its classes are others.
    """
    with quiet_transformers(), _explaining_faults():
        whole: dict[str, Any] = {"model": str(model)}
        if is_adapter(model):
            whole["model"], whole["image_processor"] = load_checkpoint(str(model))
        classify = pipeline("image-classification", **whole, device=best_device())
    if others := sorted(set(labels) ^ set(classify.model.config.id2label.values())):
        raise RunError(f"what was downloaded has other classes than the report: {first_of(others)}")
    files, number = ImageFiles(split), {label: place for place, label in enumerate(labels)}
    found = np.full((len(rows), len(labels)), np.nan)
    with progress("scoring what was downloaded", len(rows), "images") as advance:
        for place, row in enumerate(rows):
            image = Image.fromarray(files[row].permute(1, 2, 0).numpy())
            with _explaining_faults():
                answers = classify(image, top_k=len(labels))
            for answer in answers:
                found[place, number[answer["label"]]] = answer["score"]
            advance()
    return found


@contextmanager
def _explaining_faults() -> Iterator[None]:
    """A block in which transformers tells, in whatever way, that files of a model do not go together."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise RunError(
            f"what was downloaded cannot be used ({type(error).__name__}: {reason}). Mend the files, or "
            f"bring back those that were scored, and push again"
        ) from error
