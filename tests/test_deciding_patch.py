"""Images where one patch decides the class: maps peak there once the model has learnt it, whichever the method."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from vit_finetune.evaluation.attention import GRADIENTS, ROLLOUT, explain_pixels

PATCH, SIDE = 8, 8
COLOURS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.2, 0.9]])


def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images `(count, 3, 64, 64)` of patches in random colours, noise on all; the one that is a chequerboard decides.

    Any patch has the colour of some class, so that colours alone, or their mean, tell next to nothing.

    Returns:
        Images, classes and the deciding patches' numbers.
    """
    colours = torch.randint(0, len(COLOURS), (count, SIDE, SIDE), generator=generator)
    images = COLOURS[colours].permute(0, 3, 1, 2).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    images = 0.7 * images + 0.15 * torch.randn(images.shape, generator=generator)
    places = torch.randint(0, SIDE * SIDE, (count,), generator=generator)
    squares = torch.arange(PATCH) // 2
    board = (squares[:, None] + squares) % 2
    for image, place in zip(images, places.tolist()):
        row, column = PATCH * (place // SIDE), PATCH * (place % SIDE)
        image[:, row : row + PATCH, column : column + PATCH] *= board
    return 2 * (images - 0.4), colours.flatten(1).gather(1, places[:, None])[:, 0], places


def fit(model: PreTrainedModel, steps: int, learning_rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        images, classes, _ = draw(64, generator)
        loss = torch.nn.functional.cross_entropy(model(pixel_values=images).logits, classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def found(model: PreTrainedModel, method: str) -> tuple[float, float]:
    """The accuracy, and the share of 200 new images where the map's peak is the deciding patch."""
    images, classes, places = draw(200, torch.Generator().manual_seed(99))
    with torch.no_grad():
        right = model.eval()(pixel_values=images).logits.argmax(-1) == classes
    maps, used = explain_pixels(model, images)
    assert used == method and maps.shape == (200, SIDE, SIDE)
    return right.float().mean().item(), (maps.flatten(1).argmax(1) == places).float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("method", [ROLLOUT, GRADIENTS])
def test_the_map_peaks_at_the_patch_that_decides(method: str) -> None:
    torch.manual_seed(0)
    if method == ROLLOUT:
        config = ViTConfig(
            image_size=64, patch_size=PATCH, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=96, num_labels=3,
        )  # fmt: skip
        model, steps, learning_rate = ViTForImageClassification(config), 600, 2e-3
    else:
        # Its last map has 8 x 8 cells, each the centre of a receptive field that is wider than the patch.
        resnet = ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=3
        )
        model, steps, learning_rate = ResNetForImageClassification(resnet), 300, 5e-3
    _, before = found(model, method)
    assert before < 0.5, "an untrained model does not know which one decides"
    fit(model, steps, learning_rate)
    accuracy, peak = found(model, method)
    assert accuracy >= 0.98
    assert peak >= 0.95, f"{peak:.1%} of 200"
