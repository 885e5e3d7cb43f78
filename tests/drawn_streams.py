"""Streams of drawn images, and what must come out of them, image by image."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import torch
from shard_files import NAMES, draw_png

from vit_finetune.data.augmentation import generator_of
from vit_finetune.data.images import decode_image
from vit_finetune.data.sources.columns import column_values
from vit_finetune.data.streaming.batches import NO_LABEL, StreamBatches
from vit_finetune.data.streaming.prepared import PreparedStream, prepare_stream
from vit_finetune.data.transforms import TrainingIndex, build_augmentation
from vit_finetune.recipe import AugmentationConfig, DataConfig

AUGMENTED = AugmentationConfig(policy="trivialaugment", random_erasing=0.3)
SIZES = [7, 1, 12, 5, 5]
TOTAL = sum(SIZES)


def prepare(path: Path | str, **options: Any) -> PreparedStream:
    return prepare_stream(DataConfig(path=str(path), streaming=True, **options))


def key_of(number: int) -> str:
    return hashlib.blake2b(draw_png(number), digest_size=16).hexdigest()


NUMBER_OF = {key_of(number): number for number in range(TOTAL)}


def numbers_of(data: PreparedStream) -> dict[str, list[int]]:
    """The numbers of the drawn images in each split."""
    train = [NUMBER_OF[row.key] for row in data.train.read(0, 1, 0, 0)]
    held = {
        split: [NUMBER_OF[hashlib.blake2b(image["bytes"], digest_size=16).hexdigest()] for image in
                column_values(rows.cast_column("image", datasets.Image(decode=False)), "image")]
        for split, rows in data.splits.items()
    }  # fmt: skip
    return {"train": sorted(train)} | {split: sorted(numbers) for split, numbers in held.items()}


def build(data: PreparedStream, processor: Any, batch_size: int = 4, **options: Any) -> StreamBatches:
    return StreamBatches(data.train, processor, AUGMENTED, 7, batch_size, **options)


def epoch_of(batches: StreamBatches, epoch: int, start: int = 0) -> list[dict[str, torch.Tensor]]:
    return [batches[TrainingIndex(epoch, row)] for row in range(start, len(batches))]


def images_in(some: list[dict[str, torch.Tensor]]) -> list[tuple[bytes, int]]:
    """Pixels and label of each image, without what only fills a place."""
    return [
        (pixels.numpy().tobytes(), int(label))
        for batch in some
        for pixels, label in zip(batch["pixel_values"], batch["labels"])
        if label != NO_LABEL
    ]


def expected_images(data: PreparedStream, processor: Any, epoch: int) -> Counter[tuple[bytes, int]]:
    """What every training image must look like in an epoch, one by one."""
    augment = build_augmentation(AUGMENTED, processor)
    images = []
    for number in numbers_of(data)["train"]:
        image, generator = decode_image(draw_png(number)), generator_of(7, epoch, key_of(number))
        varied = augment(augment.fit(image, augment.draw_crop(image.shape[-2:], generator)), generator)
        images.append((varied.numpy().tobytes(), data.labels.index(NAMES[number % 3])))
    return Counter(images)
