"""A linear probe: a head fitted to features that are computed once, its penalty chosen on validation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
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
    standard = torch.from_numpy((features - mean) / scale)
    present, targets = np.unique(labels, return_inverse=True)
    goal = torch.from_numpy(targets)
    warm = torch.zeros(len(present), features.shape[1]).double(), torch.zeros(len(present)).double()
    tried: dict[float, tuple[np.ndarray, np.ndarray, dict[str, Any]]] = {}

    def fit(penalty: float) -> None:
        start = time.perf_counter()
        _fit(standard, goal, penalty, *warm)  # from the penalty before it
        weight, bias = np.zeros((classes, features.shape[1])), np.full(classes, ABSENT)
        weight[present] = warm[0].numpy() / scale
        bias[present] = warm[1].numpy() - weight[present] @ mean
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
    standard: torch.Tensor, targets: torch.Tensor, penalty: float, weight: torch.Tensor, bias: torch.Tensor
) -> None:
    """Takes weights, float64 `(classes, width)`, and biases from where they are to the least loss."""
    weight.requires_grad_()
    bias.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=1000, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = torch.nn.functional.linear(standard, weight, bias)
        total = torch.nn.functional.cross_entropy(logits, targets) + penalty / 2 * weight.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    weight.requires_grad_(False)
    bias.requires_grad_(False)
