"""A linear probe: a head fitted to features that are computed once, its penalty chosen on validation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
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
    standard = ((features - mean) / scale).astype(np.float32)
    tried: dict[float, tuple[np.ndarray, np.ndarray, dict[str, Any]]] = {}

    def fit(penalty: float) -> None:
        start = time.perf_counter()
        weight, bias = _fit(standard, labels, penalty, classes)
        weight = weight / scale
        bias = bias - weight @ mean
        logits = torch.from_numpy(validation @ weight.T + bias)
        loss = float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(validation_labels)))
        found = scores(logits.numpy().argmax(axis=1), validation_labels)
        entry = {"penalty": penalty, "eval_loss": loss} | {f"eval_{k}": v for k, v in found.items()}
        tried[penalty] = (weight, bias, entry | {"seconds": round(time.perf_counter() - start, 3)})

    def rank(penalty: float) -> tuple[float, float]:
        entry = tried[penalty][2]
        return (-entry["eval_loss"] if metric == "loss" else entry[f"eval_{metric}"], -entry["eval_loss"])

    for number, decade in enumerate(DECADES):
        fit(10.0**decade)
        best = max(tried, key=rank)
        if number - list(tried).index(best) >= WORSE:
            break
    for half in (-0.5, 0.5):
        fit(best * 10**half)
    best = max(tried, key=rank)
    weight, bias, _ = tried[best]
    history = [entry for *_, entry in (tried[penalty] for penalty in sorted(tried))]
    return Probe(weight.astype(np.float32), bias.astype(np.float32), best, history)


def _fit(
    standard: np.ndarray, labels: np.ndarray, penalty: float, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weights, float64 `(classes, width)`, and biases of one penalty."""
    weight, bias = np.zeros((classes, standard.shape[1])), np.full(classes, ABSENT)
    present = np.unique(labels)
    if len(present) == 1:
        bias[present] = 0.0
        return weight, bias
    # scikit-learn's C is of the sum of the losses; of two classes it has the difference of their weights,
    # whose square is twice that of both.
    penalty = penalty / 2 if len(present) == 2 else penalty
    model = LogisticRegression(C=1 / (penalty * len(labels)), max_iter=1000, tol=1e-5)
    model.fit(standard, labels)
    if len(present) == 2:  # one vector for both: half of it for either
        weight[present] = model.coef_ * np.array([[-0.5], [0.5]])
        bias[present] = model.intercept_ * np.array([-0.5, 0.5])
    else:
        weight[present], bias[present] = model.coef_, model.intercept_
    return weight, bias
