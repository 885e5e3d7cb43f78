"""Image files → `pixel_values`: what training and evaluation read, batch by batch.

Images travel as uint8 until they are on the device; there the image processor's arithmetic normalises them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Protocol

import datasets
import torch
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import InterpolationMode
from transformers import BaseImageProcessor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import pil_torch_interpolation_mapping

from vit_finetune.data.augmentation import Augmentation, generator_of
from vit_finetune.data.cache import PixelCache, cached_edge, shrink
from vit_finetune.data.images import EncodedImage, UnreadableImage
from vit_finetune.data.sources.columns import column_values
from vit_finetune.data.sources.labels import is_multi_label, label_names
from vit_finetune.data.sources.webdataset import read_encoded
from vit_finetune.recipe import AugmentationConfig
from vit_finetune.run import RunError

IN_MEMORY_BYTES = 256_000_000
"""Up to this size, paths or encoded images of a split are kept in a list."""


NO_LABEL = -100
"""The class id of what only fills a place in a batch: `cross_entropy` and counts of images pass over it."""
NO_IMAGE = -1
"""The row of what only fills a place in a batch."""


class TrainingIndex(NamedTuple):
    """Which image to read, in which epoch, for which time: its augmentation depends on all three."""

    epoch: int
    row: int
    repeat: int = 0
    """How often the epoch has the image already, where it has an image more than once."""

    @property
    def key(self) -> int | str:
        """What its augmentation is drawn by, beside seed and epoch: the row alone the first time."""
        return f"{self.row}/{self.repeat}" if self.repeat else self.row


class Picture(Protocol):
    """An image of a split before it is decoded."""

    @property
    def size(self) -> tuple[int, int]:
        """The original's height and width in pixels."""

    def decode(self, shrink: int = 1) -> torch.Tensor:
        """The pixels, uint8 `(3, height, width)`, perhaps smaller, but by no more than `shrink` asks for or
        the cache states."""


class Pictures(Protocol):
    """The images of a split, in its order."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> Picture:
        """One image."""


class ImageFiles(Dataset[torch.Tensor]):
    """The decoded images of a split: uint8 `(3, height, width)`, each of its own size.

    Args:
        split: column image.
    """

    def __init__(self, split: datasets.Dataset) -> None:
        self.images = split.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
        # A row of a dataset costs 0.1 ms, one of a list nothing; what is large stays where it is.
        small = split.data.nbytes < IN_MEMORY_BYTES
        self.rows = column_values(self.images, "image") if small else None

    def __len__(self) -> int:
        return len(self.images)

    def open(self, index: int) -> EncodedImage:
        """One image, read but not decoded."""
        row = self.rows[index] if self.rows is not None else self.images[index]["image"]
        return EncodedImage(read_encoded(row))

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.open(index).decode()

    def explain(self, index: int, error: Exception) -> RunError:
        """What to say of an image that cannot be read any more."""
        problem = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return RunError(
            f"{self.images[index]['image']['path']}: {problem}. It could be read when the data was looked "
            f"at; put it back and start again, a run with --resume"
        )


class EvaluationImages(Dataset[dict[str, Any]]):
    """A split as evaluation and serving see it: the image processor's resizing and cropping, nothing random.

    Items are `pixel_values`, uint8 `(3, height, width)`, and `labels`, as `target_of` has them.

    Args:
        split: columns image and label.
        image_processor: the model's.
    """

    def __init__(self, split: datasets.Dataset, image_processor: BaseImageProcessor) -> None:
        self.files, self.labels = ImageFiles(split), column_values(split, "label")
        self.classes = count_targets(split)
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            image = self.files[index]
        except (OSError, UnreadableImage) as error:
            raise self.files.explain(index, error) from None
        labels = target_of(self.labels[index], self.classes)
        return {"pixel_values": resize(image, self.image_processor), "labels": labels}


class TrainingImages(Dataset[dict[str, Any]]):
    """A split as training sees it: augmented by seed and `TrainingIndex` alone, by which it is read.

    Items are `pixel_values`, uint8 `(3, height, width)`, and `labels`, as `target_of` has them.

    Args:
        split: columns image and label.
        image_processor: the model's.
        config: the recipe's section.
        seed: of all augmentation.
        balanced: whether an epoch is to have as many images of each class as of any other.
    """

    pictures: Pictures
    """Where the pixels come from: the files, until `data.cache` takes their place."""

    def __init__(
        self,
        split: datasets.Dataset,
        image_processor: BaseImageProcessor,
        config: AugmentationConfig,
        seed: int,
        balanced: bool = False,
    ) -> None:
        self.files, self.labels, self.seed = ImageFiles(split), column_values(split, "label"), seed
        self.balanced, self.classes = balanced, count_targets(split)
        self.pictures, self.processor = self.files, image_processor
        self.augment = build_augmentation(config, image_processor)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: TrainingIndex) -> dict[str, Any]:
        key = TrainingIndex(*key)
        index = key.row
        if index == NO_IMAGE:
            return filling(self.augment.size, self.classes)
        generator = generator_of(self.seed, key.epoch, key.key)
        try:
            picture = self.pictures.open(index)
            if self.is_cached and self.augment.config.crop_scale is None:
                image = self.augment(picture.decode(), generator)  # kept as evaluation sees it
            else:
                image = read_varied(picture, self.augment, generator)
        except (OSError, UnreadableImage) as error:
            raise self.files.explain(index, error) from None
        return {"pixel_values": image, "labels": target_of(self.labels[index], self.classes)}

    @property
    def is_cached(self) -> bool:
        """Whether pixels come from a cache."""
        return self.pictures is not self.files

    def read_from_cache(self, folder: Path, digests: Sequence[str]) -> None:
        """Takes pixels from a cache from now on; fills it first where images are missing.

        Args:
            folder: where caches lie.
            digests: content hash of each image.

        Raises:
            RunError: the folder cannot be written, or an image is not what it was when it was hashed.
        """

        def open_unchanged(row: int) -> EncodedImage:
            try:
                picture = self.files.open(row)
                if picture.digest == digests[row]:
                    return picture
                problem = "its content is not what it was when it was looked at"
            except (OSError, UnreadableImage) as error:
                problem = str(error)
            # Kept under the hash that it had, another image would pass for it for ever.
            raise RunError(
                f"{self.files.images[row]['image']['path']}: {problem}. Leave the images as they are while "
                f"training begins; if nobody changed this one just now, `touch` it, and start again"
            )

        if self.augment.config.crop_scale is not None:
            name = f"shortest-edge-{cached_edge(self.augment.size)}"
        else:
            settings = repr(sorted(self.processor.to_dict().items())).encode()
            name = f"evaluation-{hashlib.blake2b(settings, digest_size=8).hexdigest()}"
        self.pictures = PixelCache(folder, name, self.prepare).images(open_unchanged, digests)

    def prepare(self, picture: EncodedImage) -> torch.Tensor:
        """The pixels that a cache keeps of an image, uint8 `(3, height, width)`.

        With random crops shrunk to `cached_edge`, else exactly as evaluation sees it.
        """
        if self.augment.config.crop_scale is None:
            return self.augment.resize(picture.decode())
        return shrink(picture, cached_edge(self.augment.size))

    def unaugmented(self, index: int) -> torch.Tensor:
        """An image as evaluation sees it: uint8 `(3, height, width)`."""
        return self.augment.resize(self.files[index])


def read_varied(picture: Picture, augment: Augmentation, generator: Random) -> torch.Tensor:
    """One image as training sees it, uint8 `(3, height, width)`; decoded to no more pixels than needed.

    Raises:
        UnreadableImage: it cannot be decoded.
    """
    crop = augment.draw_crop(picture.size, generator)
    image = picture.decode(crop.shrink_for(augment.size) if crop else 1)
    return augment(augment.fit(image, crop and crop.on(image.shape[-2:], picture.size)), generator)


def build_augmentation(config: AugmentationConfig, image_processor: BaseImageProcessor) -> Augmentation:
    """The recipe's augmentation, to the size and with the interpolation of the model's image processor."""
    return Augmentation(
        config,
        size=output_size(image_processor),
        fill=[round(255 * mean) for mean in image_processor.image_mean],
        interpolation=pil_torch_interpolation_mapping.get(
            image_processor.resample, InterpolationMode.BILINEAR
        ),
        resize=partial(resize, image_processor=image_processor),
    )


def count_targets(split: datasets.Dataset) -> int | None:
    """How many labels an image may have; None where it has one class."""
    return len(label_names(split)) if is_multi_label(split) else None


def target_of(label: Any, classes: int | None) -> Any:
    """What an item says of its image's label: the class id; or float32 `(classes,)`, 1 for each that it has.

    Args:
        label: class id, or a list of label ids.
        classes: of several labels, their number.
    """
    if classes is None:
        return label
    target = torch.zeros(classes)
    target[label] = 1
    return target


def filling(size: tuple[int, int], classes: int | None = None) -> dict[str, Any]:
    """What stands in a batch where there is no image: black, and without a label (`NO_LABEL`).

    Args:
        size: height and width in pixels.
        classes: of several labels, their number.
    """
    labels = NO_LABEL if classes is None else torch.full((classes,), float(NO_LABEL))
    return {"pixel_values": torch.zeros(3, *size, dtype=torch.uint8), "labels": labels}


def cores_here() -> int:
    """Cores for each process of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def check_image_processor(image_processor: Any) -> None:
    """Makes sure that resizing and normalising can be done apart, on tensors.

    Raises:
        RunError: the processor is none of transformers' torchvision ones.
    """
    if not isinstance(image_processor, TorchvisionBackend):
        raise RunError(
            f"the checkpoint's image processor is {type(image_processor).__name__}, which does not work on "
            f"tensors; expected one of transformers' torchvision processors, such as ViTImageProcessor"
        )


def output_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width in pixels of what an image processor gives."""
    size = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
    return int(size["height"]), int(size["width"])


def resize(image: torch.Tensor, image_processor: BaseImageProcessor) -> torch.Tensor:
    """The image at the model's size, by its processor: uint8 `(3, height, width)` → uint8 `(3, *size)`."""
    processed = image_processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")[
        "pixel_values"
    ]
    return processed[0]  # type: ignore[no-any-return]


def normalize(pixel_values: torch.Tensor, image_processor: BaseImageProcessor) -> torch.Tensor:
    """A batch as the model expects it: uint8 `(batch, 3, height, width)` → float32, by its processor.

    On the CPU this gives the processor's own values bit for bit.
    """
    return image_processor.rescale_and_normalize(  # type: ignore[no-any-return]
        pixel_values,
        image_processor.do_rescale,
        image_processor.rescale_factor,
        image_processor.do_normalize,
        tuple(image_processor.image_mean),
        tuple(image_processor.image_std),
    )


def collate(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch: `pixel_values`, uint8 `(batch, 3, height, width)`, and `labels`, int64 `(batch,)`.

    With several labels, float32 `(batch, classes)`.
    """
    labels = [item["labels"] for item in items]
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.stack(labels) if isinstance(labels[0], torch.Tensor) else torch.tensor(labels),
    }
