"""How transformers' run_image_classification.py reads images: what the benchmarks compare ours with."""

from pathlib import Path
from typing import Any

import datasets
import torch
from torchvision import transforms


def load_example_images(folder: Path, cache: Path, size: int) -> datasets.Dataset:
    """A folder as the example reads it: imagefolder, Pillow, torchvision v1 transforms under `set_transform`.

    Args:
        folder: class folders.
        cache: where `datasets` may write.
        size: side of the crops in pixels.
    """
    images = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(cache))
    vary = transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )

    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        batch["pixel_values"] = [vary(image.convert("RGB")) for image in batch["image"]]
        return batch

    images.set_transform(transform)
    return images


def collate_example(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch as the example makes it: float32 `(batch, 3, size, size)` and class ids."""
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.tensor([item["label"] for item in items]),
    }
