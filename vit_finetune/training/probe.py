"""A linear probe: a head fitted to features that are computed once, its penalty chosen on validation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from threadpoolctl import threadpool_limits
from torch import nn

DECADES = range(1, -7, -1)
"""Powers of ten of the penalties that are tried, from the one that allows least; small ones take longest."""
WORSE = 2
"""So many in a row that are no better than the best end the search; half a decade to its sides comes last."""
ABSENT = -30.0
"""Bias of a class without training images, which no feature then makes probable."""


@dataclass(frozen=True)
class Probe:
    """A fitted head and how it was chosen."""

    weight: np.ndarray
    """float32 `(classes, width)`."""
    bias: np.ndarray
    """float32 `(classes,)`."""
    penalty: float
    history: list[dict[str, Any]]
    """`penalty`, and the validation scores, of each that was tried."""

    def put_into(self, head: nn.Linear) -> None:
        """Gives a model's head these weights."""
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(self.weight))
            head.bias.copy_(torch.from_numpy(self.bias))


def fit_probe(
    features: np.ndarray,
    labels: np.ndarray,
    validation: np.ndarray,
    validation_labels: np.ndarray,
    classes: int,
    metric: str,
    scores: Callable[[np.ndarray, np.ndarray], dict[str, float]],
) -> Probe:
    """Multinomial logistic regression by L-BFGS: mean cross-entropy + penalty / 2 · ‖weights‖².

    The penalty is of features that the training images have a mean of 0 and a standard deviation of 1 of; the
    answer is of the features as they are.

    Args:
        features: of the training images, float32 `(images, width)`.
        labels: int64 `(images,)`.
        validation: features to choose the penalty by.
        validation_labels: int64.
        classes: their number.
        metric: `loss`, or the name of a score; the loss decides between equals.
        scores: from predicted and true class ids to scores by name.
    """
    mean, scale = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    scale = np.where(scale > 1e-6 * max(scale.max(), 1e-12), scale, 1.0)  # constant ones tell nothing
    standard = (features - mean) / scale
    present, targets = np.unique(labels, return_inverse=True)
    tried: dict[float, _Tried] = {}

    def fit(penalty: float, start: np.ndarray, tolerance: float = 1e-4) -> None:
        begun = time.perf_counter()
        flat = _fit(standard, targets, penalty, start, tolerance)
        weight, bias = np.zeros((classes, features.shape[1])), np.full(classes, ABSENT)
        fitted = flat.reshape(len(present), -1)
        weight[present] = fitted[:, :-1] / scale
        bias[present] = fitted[:, -1] - weight[present] @ mean
        logits = validation @ weight.T + bias
        loss = float(-log_softmax(logits, axis=1)[np.arange(len(logits)), validation_labels].mean())
        found = scores(logits.argmax(axis=1), validation_labels)
        entry = {"penalty": penalty, "eval_loss": loss} | {f"eval_{k}": v for k, v in found.items()}
        entry |= {"seconds": round(time.perf_counter() - begun, 3)}
        tried[penalty] = _Tried(flat, weight, bias, entry)

    def rank(penalty: float) -> tuple[float, float]:
        entry = tried[penalty].entry
        return (-entry["eval_loss"] if metric == "loss" else entry[f"eval_{metric}"], -entry["eval_loss"])

    last = np.zeros(len(present) * (features.shape[1] + 1))
    for number, decade in enumerate(DECADES):
        fit(10.0**decade, last)
        last = tried[10.0**decade].flat
        best = max(tried, key=rank)
        if number - list(tried).index(best) >= WORSE:
            break
    for half in (-0.5, 0.5):
        fit(best * 10**half, tried[best].flat)
    refined = set()
    while (best := max(tried, key=rank)) not in refined:  # what is kept is the minimum; others may be near it
        fit(best, tried[best].flat, tolerance=1e-6)
        refined.add(best)
    history = [tried[penalty].entry for penalty in sorted(tried)]
    return Probe(tried[best].weight.astype(np.float32), tried[best].bias.astype(np.float32), best, history)


@dataclass(frozen=True)
class _Tried:
    """What came of a penalty."""

    flat: np.ndarray
    """As `_fit` answers."""
    weight: np.ndarray
    """Of the features as they are, float64 `(classes, width)`."""
    bias: np.ndarray
    """float64 `(classes,)`."""
    entry: dict[str, Any]


def _fit(
    standard: np.ndarray, targets: np.ndarray, penalty: float, start: np.ndarray, tolerance: float
) -> np.ndarray:
    """The weights and biases of least loss, from those to start with on.

    Args:
        standard: features, float64 `(images, width)`.
        targets: class ids, int64 `(images,)`.
        penalty: of the weights.
        start: float64 `(classes * (width + 1),)`: of each class the weights and then the bias, as answered.
        tolerance: largest component of the gradient to stop at.
    """
    images, rows = len(targets), np.arange(len(targets))

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = flat.reshape(-1, standard.shape[1] + 1)
        weight = parameters[:, :-1]
        logs = log_softmax(standard @ weight.T + parameters[:, -1], axis=1)  # (images, classes)
        value = -logs[rows, targets].mean() + penalty / 2 * np.square(weight).sum()
        slope = np.exp(logs)
        slope[rows, targets] -= 1
        slope /= images
        gradient = np.column_stack([slope.T @ standard + penalty * weight, slope.sum(axis=0)])
        return float(value), gradient.ravel()

    options = {"maxiter": 1000, "gtol": tolerance, "ftol": 0.0, "maxcor": 20}
    with threadpool_limits(1, user_api="blas"):  # products this small cost several threads more than one
        found: np.ndarray = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
    return found
