"""MixUp and CutMix: the images of a batch, and their targets, mixed in pairs."""

from __future__ import annotations

import torch
from torchvision.transforms import v2

from vit_finetune.data.transforms import NO_LABEL
from vit_finetune.recipe import AugmentationConfig


def build_mixing(config: AugmentationConfig, classes: int) -> v2.Transform | None:
    """What mixes a batch by the recipe: images and class ids → images and target probabilities; None if off.

    MixUp (Zhang et al., 2018) blends each image with another, CutMix (Yun et al., 2019) pastes a rectangle of
    the other into it; with both, each batch gets one of them, half of the batches each. Both draw from
    torch's global generator of the CPU.

    Args:
        config: the recipe's section.
        classes: their number.
    """
    mixing: list[v2.Transform] = []
    if config.mixup_alpha:
        mixing.append(v2.MixUp(alpha=config.mixup_alpha, num_classes=classes))
    if config.cutmix_alpha:
        mixing.append(v2.CutMix(alpha=config.cutmix_alpha, num_classes=classes))
    return v2.RandomChoice(mixing) if mixing else None


def mix(
    mixing: v2.Transform, pixel_values: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch's images and target probabilities, `(batch, classes)` float32, on the device that it is on.

    What only fills a place (`NO_LABEL`) is left out, where there is any image: nothing is mixed with it.

    Args:
        mixing: of `build_mixing`.
        pixel_values: normalised, float32 `(batch, 3, height, width)`.
        labels: class ids, int64 `(batch,)`.
    """
    images = labels != NO_LABEL
    if not images.all():
        if not images.any():
            return pixel_values, labels
        pixel_values, labels = pixel_values[images], labels[images]
    mixed, targets = mixing(pixel_values, labels)
    return mixed, targets
