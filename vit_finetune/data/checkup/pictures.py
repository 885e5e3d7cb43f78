"""Small pictures of images, to be looked at by people."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress

import datasets
import torch
from PIL import Image

from vit_finetune.data.checkup.readings import shrink
from vit_finetune.data.images import UnreadableImage, decode_image
from vit_finetune.data.sources.columns import Source, column_values
from vit_finetune.data.sources.webdataset import read_encoded
from vit_finetune.run import FoundImage

SIDE = 128
"""Pixels of a picture's longer side at most."""


def load_pictures(source: Source, images: Iterable[FoundImage]) -> dict[tuple[str, str], bytes]:
    """Pictures by split and id, as JPEG, or PNG where small; images that cannot be decoded have none.

    Args:
        source: where the images are.
        images: which.
    """
    wanted = defaultdict(set)
    for image in images:
        wanted[image.split].add(image.id)
    pictures = {}
    for split, dataset in source.splits.items():
        for row, identity in enumerate(column_values(dataset, "id") if wanted[split] else []):
            if identity not in wanted[split]:
                continue
            # The findings say which images cannot be read, and why.
            with suppress(UnreadableImage, OSError):
                pictures[split, identity] = draw_picture(open_image(dataset, row))
    return pictures


def open_image(dataset: datasets.Dataset, row: int) -> torch.Tensor:
    """The pixels of one image, uint8 `(3, height, width)`, upright.

    Raises:
        UnreadableImage: it cannot be decoded.
        OSError: its file cannot be opened.
    """
    stored = dataset.select_columns(["image"]).with_format("arrow")[row]["image"][0].as_py()
    if stored is None or (stored["bytes"] is None and stored["path"] is None):
        raise UnreadableImage("the row holds no image")
    return decode_image(read_encoded(stored))


def scaled(image: Image.Image, longest: int) -> Image.Image:
    """The image with a longer side of so many pixels; small ones keep their pixels visible."""
    scale = longest / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def draw_picture(pixels: torch.Tensor) -> bytes:
    """A small picture of an image, uint8 `(3, height, width)`, as JPEG, or PNG where small."""
    image = shrink(pixels, 2 * SIDE)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if max(image.size) <= SIDE // 2 else "JPEG", quality=85)
    return buffer.getvalue()
