"""Classification metrics over scikit-learn, also as `evaluate.Metric` modules that need no download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn import metrics as sk

from vit_finetune.run import CalibrationBin, ClassScore

CALIBRATION_BINS = 15
"""As in Guo et al., 2017."""


def balanced_accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean recall over the classes that have images, in [0, 1].

    Args:
        labels: true class ids, int `(images,)`.
        predicted: predicted class ids, int `(images,)`.
    """
    return float(
        sk.recall_score(labels, predicted, average="macro", labels=np.unique(labels), zero_division=0.0)
    )


def top_k_accuracy(labels: np.ndarray, probabilities: np.ndarray, k: int = 5) -> float:
    """Share of images whose true class is among the k most probable, in [0, 1].

    Args:
        labels: true class ids, int `(images,)`.
        probabilities: float `(images, classes)`.
        k: how many count.
    """
    score = sk.top_k_accuracy_score(labels, probabilities, k=k, labels=np.arange(probabilities.shape[1]))
    return float(score)


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean negative log probability of the true class, in nats; probabilities below 2e-16 count as that.

    Args:
        labels: true class ids, int `(images,)`.
        probabilities: float `(images, classes)`, rows summing to 1.
    """
    # Rows of float32 sum to 1 within 1e-7 only, which scikit-learn warns about.
    rows = np.asarray(probabilities, dtype=np.float64)
    rows = rows / rows.sum(axis=1, keepdims=True)
    return float(sk.log_loss(labels, rows, labels=np.arange(rows.shape[1])))


def calibration_bins(labels: np.ndarray, probabilities: np.ndarray) -> list[CalibrationBin]:
    """Images by their top probability in bins of equal width, the empty ones left out.

    Args:
        labels: true class ids, int `(images,)`.
        probabilities: float `(images, classes)`.
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    bins = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, CALIBRATION_BINS - 1)
    return [
        CalibrationBin(
            low=float(edges[number]),
            high=float(edges[number + 1]),
            count=int(inside.sum()),
            confidence=float(confidence[inside].mean(dtype=np.float64)),
            accuracy=float(right[inside].mean()),
        )
        for number in range(CALIBRATION_BINS)
        if (inside := bins == number).any()
    ]


def expected_calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Mean distance of confidence and accuracy over the bins, weighted by their images, in [0, 1]."""
    total = sum(b.count for b in bins)
    return sum(b.count * abs(b.confidence - b.accuracy) for b in bins) / total


def class_scores(labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> dict[str, ClassScore]:
    """Precision, recall, F1 and number of images of each class, by its name; 0 where nothing can be divided.

    Args:
        labels: true class ids, int `(images,)`.
        predicted: predicted class ids, int `(images,)`.
        names: in id order.
    """
    table = sk.precision_recall_fscore_support(
        labels, predicted, labels=np.arange(len(names)), zero_division=0.0
    )
    return {
        name: ClassScore(precision=float(p), recall=float(r), f1=float(f), support=int(s))
        for name, p, r, f, s in zip(names, *table)
    }


# --------------------------------------------------------------------------- evaluate's modules


class _LabelMetric(evaluate.Metric):
    """A metric of predicted and true class ids."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions, references: class ids",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )


class Accuracy(_LabelMetric):
    """Share of images whose most probable class is the true one, in [0, 1]."""

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(sk.accuracy_score(references, predictions))}


class MacroF1(_LabelMetric):
    """Unweighted mean over the classes of the harmonic mean of precision and recall, in [0, 1]."""

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"macro_f1": float(sk.f1_score(references, predictions, average="macro", zero_division=0.0))}


class BalancedAccuracy(_LabelMetric):
    """Mean recall over the classes that have images, in [0, 1]."""

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"balanced_accuracy": balanced_accuracy(np.asarray(references), np.asarray(predictions))}


def build_metrics() -> evaluate.CombinedEvaluations:
    """Accuracy, macro F1 and balanced accuracy of class ids, as one `evaluate` module kept in memory."""
    return evaluate.combine([metric(keep_in_memory=True) for metric in (Accuracy, MacroF1, BalancedAccuracy)])
