"""What training lowers: cross-entropy of one class or of each label, and what it is divided by."""

from __future__ import annotations

import torch

from vit_finetune.data.transforms import NO_LABEL


def count_images(labels: torch.Tensor) -> int:
    """How many of a batch are images, and do not only fill a place (`NO_LABEL`).

    Args:
        labels: class ids, int64 `(batch,)`, or target probabilities, float `(batch, classes)`.
    """
    first = labels[:, 0] if labels.is_floating_point() else labels
    return int((first != NO_LABEL).sum())


def binary_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, count: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy of each label for itself, in nats: the mean over the labels, and over the images.

    An image's loss is `F.binary_cross_entropy_with_logits` of its labels, their mean: it does not grow with
    their number. The images' losses are added up and divided by `count`, as in `cross_entropy`.

    Args:
        logits: `(batch, classes)`.
        labels: 1 for each label that an image has, else 0, float `(batch, classes)`; rows of `NO_LABEL` add
            nothing.
        count: number of images to divide by, of which these are a part; those of the batch if None.
    """
    images = labels[:, 0] != NO_LABEL  # (B,)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")  # (B, C)
    total = (losses.mean(dim=1) * images).sum()
    return total / (count_images(labels) if count is None else count)


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    count: torch.Tensor | int | None = None,
    class_weights: torch.Tensor | None = None,
    focal_gamma: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy in nats: the mean over the batch, or the sum divided by `count`.

    With targets q (one-hot or soft, then smoothed), probabilities p, weights w and γ, the loss of an image is
    Σ_c w_c q_c (1 - p_c)^γ (-log p_c). It is divided by the number of images, where torch's mean over class
    ids (but not over target probabilities) would divide by the sum of their weights: that sum differs from
    batch to batch, so an image would count by what lies beside it, and alone in a batch as if unweighted.

    Args:
        logits: `(batch, classes)`.
        labels: class ids, int64 `(batch,)`, of which `NO_LABEL` adds nothing, or target probabilities, float
            `(batch, classes)`.
        label_smoothing: share of every target spread over all classes, in [0, 1).
        count: number of images to divide by, of which these are a part.
        class_weights: above 0, float `(classes,)`; None weighs all the same.
        focal_gamma: γ, at least 0 (Lin et al., 2017); 0 is cross-entropy.
    """
    if count is None:
        if class_weights is None and not focal_gamma:
            return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        count = count_images(labels)
    if focal_gamma:
        return _sum_focal(logits, labels, label_smoothing, class_weights, focal_gamma) / count
    total = torch.nn.functional.cross_entropy(
        logits, labels, class_weights, label_smoothing=label_smoothing, reduction="sum"
    )
    return total / count


def _sum_focal(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float,
    class_weights: torch.Tensor | None,
    gamma: float,
) -> torch.Tensor:
    """The focal losses of a batch, added up; each class of a soft target has the factor of its own p."""
    classes = logits.shape[-1]
    if labels.is_floating_point():
        targets = labels * (1 - label_smoothing) + label_smoothing / classes
    else:
        images = labels != NO_LABEL
        one_hot = torch.nn.functional.one_hot(labels * images, classes).to(logits.dtype)
        targets = (one_hot * (1 - label_smoothing) + label_smoothing / classes) * images[:, None]
    logs = logits.log_softmax(dim=-1)
    # At p = 1 the factor's slope is infinite where γ < 1, and the loss 0: a floor that no loss shows keeps
    # their product from being NaN.
    wrong = (-logs.expm1()).clamp(min=torch.finfo(logs.dtype).eps)
    losses = -targets * wrong**gamma * logs
    return (losses if class_weights is None else losses * class_weights).sum()
