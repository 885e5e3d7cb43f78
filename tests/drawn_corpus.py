"""A clean corpus, drawn: pictures that are like no other ones, in which a checkup finds nothing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "owl")
COUNTS = {"train": 10, "test": 4}


def draw_scene(seed: int, size: tuple[int, int] = (72, 56)) -> Image.Image:
    """A picture like no other one: large soft shapes, and some texture; size is (width, height)."""
    generator = np.random.default_rng(seed)
    pixels = np.full((size[1], size[0], 3), 128.0)
    # As in photographs, what is twice as large is about twice as strong.
    for cells, strength in (((3, 3), 70), ((6, 5), 35), ((12, 10), 18), ((24, 20), 9)):
        shapes = generator.normal(0, strength, (cells[1], cells[0], 3)).clip(-128, 127)
        layer = Image.fromarray((shapes + 128).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        pixels += np.asarray(layer, np.float64) - 128
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_corpus(root: Path) -> Path:
    """Three classes, 10 training and 4 test images each, in which nothing is wrong."""
    seed = 0
    for split, count in COUNTS.items():
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                seed += 1
                size = (72 + seed % 9, 56 + seed % 7)
                draw_scene(seed, size).save(root / split / name / f"{number}.jpg", quality=92)
    return root


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def scene_of(root: Path, name: str) -> Image.Image:
    with Image.open(root / name) as image:
        return image.convert("RGB")
