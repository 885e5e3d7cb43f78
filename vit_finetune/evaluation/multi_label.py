"""Scores of images that may have several labels: thresholds, and what is right at them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn import metrics as sk

from vit_finetune.data.sources.labels import spoken
from vit_finetune.reports import LabelScore, MultiLabelReport
from vit_finetune.run import Mistake, RunError, wilson_interval

UNTUNED = 0.5
"""The threshold of a label that there was nothing to tune by."""


def read_thresholds(config: Any) -> np.ndarray:
    """The thresholds in a model's config, float64 `(classes,)` in id order; 0.5 each where it has none.

    Raises:
        RunError: it has others than one number in [0, 1] for each label.
    """
    found = getattr(config, "thresholds", None)
    if found is None:
        return np.full(config.num_labels, UNTUNED)
    numbers = isinstance(found, list) and all(
        type(value) in (int, float) and 0 <= value <= 1 for value in found
    )
    if not numbers or len(found) != config.num_labels:
        raise RunError(
            f"config.json: thresholds is {found!r}; expected a number in [0, 1] for each of the "
            f"{config.num_labels} labels, in id order"
        )
    return np.asarray(found, np.float64)


def tune_thresholds(targets: np.ndarray, probabilities: np.ndarray) -> list[float]:
    """The threshold of each label that gives it the highest F1 on these images, in id order.

    Tried are the middles between neighbouring probabilities that the label got, and between the lowest and 0.
    Of those with equal F1 the one nearest to 0.5 is taken, of equally near ones the higher. A label that no
    image has keeps 0.5.

    Args:
        targets: 1 for each label that an image has, else 0, `(images, classes)`.
        probabilities: float `(images, classes)`.
    """
    return [
        _tune(target.astype(bool), column.astype(np.float64))
        for target, column in zip(targets.T, probabilities.T)
    ]


def _tune(target: np.ndarray, probabilities: np.ndarray) -> float:
    """The threshold of one label.

    Args:
        target: which images have it, bool `(images,)`.
        probabilities: float64 `(images,)`.
    """
    if not target.any():
        return UNTUNED
    values, which = np.unique(-probabilities, return_inverse=True)  # the highest first
    values = -values
    taken = np.cumsum(np.bincount(which))  # images at or above each value
    right = np.cumsum(np.bincount(which, weights=target))
    scores = 2 * right / (taken + target.sum())
    middles = (values + np.append(values[1:], 0.0)) / 2
    best = np.flatnonzero(scores == scores.max())
    # The middles fall: of equally near ones, the first is the higher.
    return float(middles[best[np.argmin(np.abs(middles[best] - 0.5))]])


def average_precisions(targets: np.ndarray, probabilities: np.ndarray) -> list[float | None]:
    """The average precision of each label, in [0, 1]; None where no image has it.

    Args:
        targets: 1 for each label that an image has, else 0, `(images, classes)`.
        probabilities: float `(images, classes)`.
    """
    return [
        float(sk.average_precision_score(target, column)) if target.any() else None
        for target, column in zip(targets.T, probabilities.T)
    ]


def compute_multi_label_metrics(
    targets: np.ndarray, probabilities: np.ndarray, thresholds: np.ndarray | float = UNTUNED
) -> dict[str, float]:
    """Mean average precision, micro F1, macro F1, exact match and Hamming loss by name, each in [0, 1].

    Args:
        targets: 1 for each label that an image has, else 0, `(images, classes)`.
        probabilities: float `(images, classes)`.
        thresholds: of each label, or one for all.
    """
    predicted = (probabilities >= thresholds).astype(int)
    known = [value for value in average_precisions(targets, probabilities) if value is not None]
    return {"mean_average_precision": float(np.mean(known)) if known else 0.0} | compare_labels(
        targets, predicted
    )


def compare_labels(targets: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Micro F1, macro F1, exact match and Hamming loss by name, each in [0, 1].

    Macro F1 is the mean over the labels that an image has or is given, as with classes: of others there is
    nothing to be right or wrong about.

    Args:
        targets: 1 for each label that an image has, else 0, `(images, classes)`.
        predicted: likewise, of what a model says.
    """
    targets = targets.astype(int)
    told = targets.any(axis=0) | predicted.astype(bool).any(axis=0)
    return {
        "micro_f1": float(sk.f1_score(targets, predicted, average="micro", zero_division=0.0)),
        "macro_f1": float(sk.f1_score(targets[:, told], predicted[:, told], average="macro"))
        if told.any()
        else 0.0,
        "exact_match": float((targets == predicted).all(axis=1).mean()),
        "hamming_loss": float(sk.hamming_loss(targets, predicted)),
    }


def build_multi_label_report(
    split: str,
    ids: Sequence[str],
    targets: np.ndarray,
    probabilities: np.ndarray,
    names: Sequence[str],
    thresholds: np.ndarray,
    num_mistakes: int = 0,
) -> MultiLabelReport:
    """The report of these probabilities.

    Args:
        split: its name.
        ids: of the images.
        targets: 1 for each label that an image has, else 0, `(images, classes)`.
        probabilities: float `(images, classes)`.
        names: label names in id order.
        thresholds: of each label, float64 `(classes,)`.
        num_mistakes: how many of the worst to list: those of which the model was surest.
    """
    predicted = probabilities >= thresholds
    scores = compute_multi_label_metrics(targets, probabilities, thresholds)
    right = int((predicted == targets.astype(bool)).all(axis=1).sum())
    table = sk.precision_recall_fscore_support(
        targets.astype(int), predicted.astype(int), average=None, zero_division=0.0
    )
    given = predicted.sum(axis=0)
    rows = zip(names, *table, average_precisions(targets, probabilities), thresholds, given)
    return MultiLabelReport(
        split=split,
        num_images=len(targets),
        **scores,
        exact_match_interval=wilson_interval(right, len(targets)),
        per_class={
            name: LabelScore(
                precision=float(precision),
                recall=float(recall),
                f1=float(f1),
                support=int(support),
                average_precision=average,
                threshold=float(threshold),
                given=int(given),
            )
            for name, precision, recall, f1, support, average, threshold, given in rows
        },
        labels=list(names),
        worst_mistakes=_worst_mistakes(ids, targets.astype(bool), probabilities, predicted, names)[
            :num_mistakes
        ],
    )


def _worst_mistakes(
    ids: Sequence[str],
    targets: np.ndarray,
    probabilities: np.ndarray,
    predicted: np.ndarray,
    names: Sequence[str],
) -> list[Mistake]:
    """Images of which some label is wrong, the one that the model was surest of first; of equals by id."""
    sureness = np.where(targets != predicted, np.abs(probabilities - targets), -1.0).max(axis=1)
    wrong = sorted((-sureness[row], ids[row], row) for row in np.flatnonzero(sureness >= 0).tolist())
    return [
        Mistake(
            id=identity,
            label=spoken([names[number] for number in np.flatnonzero(targets[row]).tolist()]),
            predicted=spoken([names[number] for number in np.flatnonzero(predicted[row]).tolist()]),
            probability=float(-minus),
        )
        for minus, identity, row in wrong
    ]
