"""Images made worse: noise, blur, brightness, JPEG and rotation, each at five strengths."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import Dataset
from transformers import BaseImageProcessor

from vit_finetune.data.sources.columns import column_values
from vit_finetune.data.transforms import EvaluationImages

STRENGTHS = (1, 2, 3, 4, 5)

Corrupt = Callable[[Image.Image, int, int], Image.Image]


def corrupt(image: torch.Tensor, kind: str, strength: int, seed: int) -> torch.Tensor:
    """The image made worse, uint8 `(3, height, width)` as it was.

    The kinds and, but for rotation, the strengths are those of ImageNet-C (Hendrycks & Dietterich, 2019);
    lengths in pixels are those of an image of 224 pixels, scaled to this one's shorter side.

    Args:
        image: uint8 `(3, height, width)`, as the model would be shown it.
        kind: a key of `CORRUPTIONS`.
        strength: 1 to 5.
        seed: of what is drawn.
    """
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())  # (H, W, 3)
    worse = CORRUPTIONS[kind](picture, strength, seed)
    return torch.from_numpy(np.array(worse)).permute(2, 0, 1)  # (3, H, W)


def _add_noise(image: Image.Image, strength: int, seed: int) -> Image.Image:
    deviation = 255 * (0.08, 0.12, 0.18, 0.26, 0.38)[strength - 1]
    pixels = np.asarray(image, np.float32)
    noise = np.random.default_rng(seed).normal(0, deviation, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).round().astype(np.uint8))


def _blur(image: Image.Image, strength: int, seed: int) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur((1, 2, 3, 4, 6)[strength - 1] * min(image.size) / 224))


def _brighten(image: Image.Image, strength: int, seed: int) -> Image.Image:
    """Adds to the value of hue, saturation and value, which keeps the colours."""
    more = round(255 * (0.1, 0.2, 0.3, 0.4, 0.5)[strength - 1])
    hue, saturation, value = image.convert("HSV").split()
    return Image.merge("HSV", (hue, saturation, value.point(lambda old: min(255, old + more)))).convert("RGB")


def _compress(image: Image.Image, strength: int, seed: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=(25, 18, 15, 10, 7)[strength - 1])
    return Image.open(buffer).convert("RGB")


def _rotate(image: Image.Image, strength: int, seed: int) -> Image.Image:
    """Turns it to the side that the seed says; of what is left, the largest part without empty corners."""
    degrees = (5, 10, 15, 20, 30)[strength - 1]
    turned = image.rotate(degrees if seed % 2 else -degrees, Image.Resampling.BILINEAR, expand=True)
    width, height = _inner_size(*image.size, math.radians(degrees))
    left, top = (turned.width - width) / 2, (turned.height - height) / 2
    return turned.resize(image.size, Image.Resampling.BILINEAR, (left, top, left + width, top + height))


def _inner_size(width: int, height: int, angle: float) -> tuple[float, float]:
    """Width and height of the largest upright part, of an image's own proportions, that lies inside the image
    turned by an angle between 0 and π/2."""
    scale = min(
        width / (width * math.cos(angle) + height * math.sin(angle)),
        height / (width * math.sin(angle) + height * math.cos(angle)),
    )
    scale *= 1 - 2 / min(width, height)  # resampling reaches a pixel beyond
    return width * scale, height * scale


CORRUPTIONS: dict[str, Corrupt] = {
    "noise": _add_noise,
    "blur": _blur,
    "brightness": _brighten,
    "jpeg": _compress,
    "rotation": _rotate,
}


class CorruptedImages(Dataset[dict[str, Any]]):
    """A split as evaluation sees it, made worse after resizing: what is drawn depends on an image's id alone.

    Items are those of `EvaluationImages`.

    Args:
        split: columns id, image and label.
        image_processor: the model's.
        kind: a key of `CORRUPTIONS`.
        strength: 1 to 5.
    """

    def __init__(
        self, split: datasets.Dataset, image_processor: BaseImageProcessor, kind: str, strength: int
    ) -> None:
        self.images = EvaluationImages(split, image_processor)
        self.seeds = [zlib.crc32(f"{kind} {name}".encode()) for name in column_values(split, "id")]
        self.kind, self.strength = kind, strength

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.images[index]
        worse = corrupt(item["pixel_values"], self.kind, self.strength, self.seeds[index])
        return item | {"pixel_values": worse}
