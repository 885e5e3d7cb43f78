"""What training lowers: cross-entropy of class ids or of target probabilities, and what it is divided by."""

from __future__ import annotations

import torch

from vit_finetune.data.transforms import NO_LABEL


def count_images(labels: torch.Tensor) -> int:
    """How many of a batch are images, and do not only fill a place (`NO_LABEL`).

    Args:
        labels: class ids, int64 `(batch,)`, or target probabilities, float `(batch, classes)`.
    """
    return len(labels) if labels.is_floating_point() else int((labels != NO_LABEL).sum())


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    count: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross-entropy in nats: the mean over the batch, or the sum divided by `count`.

    Args:
        logits: `(batch, classes)`.
        labels: class ids, int64 `(batch,)`, of which `NO_LABEL` adds nothing, or target probabilities, float
            `(batch, classes)`.
        label_smoothing: share of every target spread over all classes, in [0, 1).
        count: number of images to divide by, of which these are a part.
    """
    if count is None:
        return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    total = torch.nn.functional.cross_entropy(
        logits, labels, label_smoothing=label_smoothing, reduction="sum"
    )
    return total / count
