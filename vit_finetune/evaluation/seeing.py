"""Where a model looks in one image, and how far its attention reaches over many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from vit_finetune.console import progress
from vit_finetune.data.transforms import EvaluationImages, normalize
from vit_finetune.evaluation.attention import (
    GRADIENTS,
    ROLLOUT,
    NoGlobalAttention,
    attention_rollout,
    attentions_of,
    gradient_maps,
    grid_of,
    mean_attention_distance,
    over_patches,
    patch_size_of,
    reads_class_token,
)
from vit_finetune.evaluation.images import spread_rows

SAMPLE = 16
"""Images over which distances are averaged at the end of a run: from one to the next they differ little."""
LEAST_PIXELS = 224
"""Smaller images are enlarged by a whole number, so that people see them."""


@dataclass(frozen=True)
class Look:
    """Where a model looked in one image."""

    method: str
    """ROLLOUT or GRADIENTS."""
    map: torch.Tensor
    """float32 `(rows, columns)` ≥ 0."""
    heads: torch.Tensor | None = None
    """Of the last layer, `(heads, rows, columns)`; None without attention."""
    distances: torch.Tensor | None = None
    """Mean attention distance in pixels, `(layers, heads)`; None without attention."""


def look_at(
    model: PreTrainedModel, image_processor: BaseImageProcessor, seen: torch.Tensor, number: int
) -> Look:
    """Where a model looks in an image: by attention rollout, or by gradients where it has no such attention.

    Args:
        model: on the device to compute on.
        image_processor: the model's.
        seen: the image at the model's size, uint8 `(3, height, width)`.
        number: the class that gradients are of.

    Raises:
        NoMap: the model has neither attention nor a layer with a map of the image.
    """
    pixel_values = normalize(seen[None].to(model.device), image_processor)  # (1, 3, H, W)
    try:
        attentions = attentions_of(model, pixel_values)
    except NoGlobalAttention:
        classes = torch.tensor([number], device=model.device)
        return Look(GRADIENTS, gradient_maps(model, pixel_values, classes)[0].cpu())
    grid = grid_of(model, pixel_values)
    from_class_token = reads_class_token(model, attentions[0].shape[-1], grid)
    return Look(
        ROLLOUT,
        over_patches(attention_rollout(attentions), grid, from_class_token)[0].cpu(),
        over_patches(attentions[-1], grid, from_class_token)[0].cpu(),
        mean_attention_distance(attentions, grid, patch_size_of(model)).cpu(),
    )


def describe_seeing(
    model: PreTrainedModel, distances: Sequence[torch.Tensor], size: tuple[int, int]
) -> dict[str, Any]:
    """What `seeing.json` holds: the method, and with attention how far each head looks, averaged over images.

    Args:
        model: whose attention it is.
        distances: mean attention distances in pixels of one image each, `(layers, heads)`; none without
            attention.
        size: height and width in pixels of what the model was shown.

    Returns:
        `method`; with attention also `images`, `image_size` and `patch_size` in pixels, and
        `mean_attention_distance` in pixels, layer by layer and head by head, and `uniform_distance`: what a
        head that attends to all patches alike would have.
    """
    if not distances:
        return {"method": GRADIENTS}
    patch = patch_size_of(model)
    grid = size[0] // patch[0], size[1] // patch[1]
    uniform = torch.ones(1, 1, grid[0] * grid[1], grid[0] * grid[1])
    means = torch.stack(list(distances)).mean(dim=0).tolist()
    return {
        "method": ROLLOUT,
        "images": len(distances),
        "image_size": list(size),
        "patch_size": list(patch),
        "mean_attention_distance": [[round(value, 3) for value in layer] for layer in means],
        "uniform_distance": round(mean_attention_distance([uniform], grid, patch).item(), 3),
    }


def measure_seeing(
    model: PreTrainedModel, image_processor: BaseImageProcessor, split: datasets.Dataset
) -> dict[str, Any]:
    """How far a model's attention reaches, over up to SAMPLE images of a split, evenly spread.

    Args:
        model: on the device to compute on.
        image_processor: the model's.
        split: columns image and label.

    Returns:
        As `describe_seeing`; of a model without global attention the method alone.
    """
    images = EvaluationImages(split, image_processor)
    rows = spread_rows(len(images), SAMPLE)
    distances: list[torch.Tensor] = []
    size = (0, 0)
    with progress("measuring attention", len(rows), "images") as advance:
        for row in rows:
            seen = images[row]["pixel_values"]
            size = (seen.shape[-2], seen.shape[-1])
            pixel_values = normalize(seen[None].to(model.device), image_processor)
            try:
                attentions = attentions_of(model, pixel_values)
            except NoGlobalAttention:
                break
            grid = grid_of(model, pixel_values)
            distances.append(mean_attention_distance(attentions, grid, patch_size_of(model)).cpu())
            advance()
    return describe_seeing(model, distances, size)


def as_seen(seen: torch.Tensor) -> Image.Image:
    """An image at the model's size, uint8 `(3, height, width)`, to look at: enlarged where it is small."""
    image = Image.fromarray(seen.permute(1, 2, 0).contiguous().cpu().numpy())
    times = max(1, round(LEAST_PIXELS / max(image.size)))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
