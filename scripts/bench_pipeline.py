"""Image pipeline speed on one core: ours, from files and from the cache, others', and decoding alone.

.venv/bin/python scripts/bench_pipeline.py PHOTOS --as 500x375   # a folder of photographs, or an archive
.venv/bin/python scripts/bench_pipeline.py PHOTOS                # in the sizes that they have

Every row makes training batches of 32 at 224 px: a random resized crop (8 to 100% of the area) and a flip.
Rows take turns, so that a machine whose speed drifts slows all alike; the ratio is the median over the
rounds. timm's rows are left out where timm is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_table import print_table
from PIL import Image

SIZE, BATCH = 224, 32
SUFFIXES = {".jpg", ".jpeg"}


def lay_out(source: Path, folder: Path, size: tuple[int, int] | None) -> Path:
    """The photographs in class folders, at their own size or all at one, (width, height)."""
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        sys.exit(f"{source}: no JPEG files there")
    for number, file in enumerate(files):
        target = folder / "photos" / f"class{number % 4}" / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        if size is None:
            target.write_bytes(file.read_bytes())
        else:
            with Image.open(file) as image:
                image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(target, quality=90)
    return folder / "photos"


# --------------------------------------------------------------------------- rows: endless batches


def batches_of_example(folder: Path) -> Iterator[Any]:
    """As transformers' run_image_classification.py reads: Pillow, torchvision v1, float32 in the loader."""
    from bench_example import collate_example, load_example_images

    images = load_example_images(folder, folder.parent / "cache", SIZE)
    loader = torch.utils.data.DataLoader(
        images, BATCH, shuffle=True, drop_last=True, collate_fn=collate_example
    )
    while True:
        yield from loader


def batches_of_timm(folder: Path, prefetcher: bool) -> Iterator[Any]:
    """As timm's train.py reads, with the same crop and flip and nothing else; with its prefetcher, uint8."""
    from timm.data import create_dataset, create_loader

    dataset = create_dataset("", root=str(folder), split="train", is_training=True)
    loader = create_loader(
        dataset, (3, SIZE, SIZE), BATCH, is_training=True, num_workers=0, use_prefetcher=prefetcher,
        color_jitter=None, auto_augment=None, interpolation="bilinear", device=torch.device("cpu"),
        persistent_workers=False, pin_memory=False,
    )  # fmt: skip
    while True:
        yield from loader


def training_images(folder: Path, cache: Path | None) -> tuple[Any, Any]:
    """Our training images, from files or from a cache, and the image processor."""
    from transformers import ViTImageProcessor

    from vit_finetune.data.sources.columns import column_values
    from vit_finetune.data.splits.prepared import prepare_splits
    from vit_finetune.data.transforms import TrainingImages
    from vit_finetune.recipe import AugmentationConfig, DataConfig

    splits = prepare_splits(DataConfig(path=str(folder), test_fraction=0, validation_fraction=0.07)).splits
    processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    images = TrainingImages(splits["train"], processor, AugmentationConfig(crop_scale=(0.08, 1.0)), seed=0)
    if cache:
        images.read_from_cache(cache, column_values(splits["train"], "digest"))
    return images, processor


def batches_of_ours(folder: Path, cache: Path | None, normalized: bool) -> Iterator[Any]:
    """As ours reads; normalised here only to compare with the others: training does it on the device."""
    from torch.utils.data import DataLoader

    from vit_finetune.data.batches import EpochSampler
    from vit_finetune.data.transforms import collate, normalize

    images, processor = training_images(folder, cache)
    sampler = EpochSampler(len(images), seed=0)
    loader = DataLoader(images, BATCH, sampler=sampler, drop_last=True, collate_fn=collate)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        for batch in loader:
            if normalized:
                batch["pixel_values"] = normalize(batch["pixel_values"], processor)
            yield batch


def describe_cache(folder: Path, cache: Path, epochs: int = 5) -> str:
    """Size of the cache, and how far its training images are from those of the files."""
    from vit_finetune.data.transforms import TrainingIndex

    (from_files, _), (from_cache, _) = training_images(folder, None), training_images(folder, cache)
    absolute = squared = 0.0
    for epoch, row in itertools.product(range(epochs), range(len(from_files))):
        key = TrainingIndex(epoch, row)
        one, other = (images[key]["pixel_values"].float() for images in (from_files, from_cache))
        absolute += float((one - other).abs().mean())
        squared += float((one - other).square().mean())
    count = epochs * len(from_files)
    size = sum(path.stat().st_size for path in cache.rglob("*.bin")) / len(from_files)
    return (
        f"cache: {size / 1000:,.0f} kB an image; its training images differ from those of the files by "
        f"{absolute / count:.1f} of 255 on average (PSNR {-10 * math.log10(squared / count / 255**2):.1f} dB)"
    )


def batches_of_decoder(folder: Path, decode: Callable[[bytes], Any]) -> Iterator[Any]:
    """Decoding alone, of bytes in memory."""
    encoded = itertools.cycle([path.read_bytes() for path in sorted(folder.rglob("*.jpg"))])
    while True:
        yield [decode(next(encoded)) for _ in range(BATCH)]


def decode_with_pillow(data: bytes) -> Any:
    """Pixels as Pillow decodes them."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def decode_with_torchvision(data: bytes) -> Any:
    """Pixels as torchvision decodes them."""
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def decode_with_ours(data: bytes) -> Any:
    """Pixels as we decode them."""
    from vit_finetune.data.images import decode_image

    return decode_image(data)


def build_rows(folder: Path) -> dict[str, Iterator[Any]]:
    """What is measured, by the row's name; the first is what the others are compared with."""
    cache = folder.parent / "pixels"
    rows = {"transformers' example (float32)": batches_of_example(folder)}
    if importlib.util.find_spec("timm"):
        rows |= {
            "timm, no prefetcher (float32)": batches_of_timm(folder, False),
            "timm, prefetcher (float32)": batches_of_timm(folder, True),
        }
    return rows | {
        "vit-finetune from files (uint8)": batches_of_ours(folder, None, False),
        "vit-finetune from files, normalised here": batches_of_ours(folder, None, True),
        "vit-finetune from the cache (uint8)": batches_of_ours(folder, cache, False),
        "vit-finetune from the cache, normalised here": batches_of_ours(folder, cache, True),
        "limit: decoding alone, Pillow": batches_of_decoder(folder, decode_with_pillow),
        "limit: decoding alone, torchvision": batches_of_decoder(folder, decode_with_torchvision),
        "limit: decoding alone, ours (simplejpeg)": batches_of_decoder(folder, decode_with_ours),
    }


def measure(batches: Iterator[Any], seconds: float) -> float:
    """Images per second."""
    next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        next(batches)
        count += BATCH
    return count / (time.perf_counter() - start)


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "500x375"."""
    width, height = map(int, text.split("x"))
    return width, height


def main(words: Iterable[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path, metavar="PHOTOS")
    parser.add_argument("--as", dest="size", type=parse_size, help="WIDTHxHEIGHT to make of all photographs")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row and round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(words)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["VIT_FINETUNE_CACHE"] = f"{temporary}/readings"
        source = options.photos
        if source.is_file():
            from vit_finetune.data.sources.archives import unpack

            source = unpack(source)
        rows = build_rows(lay_out(source, Path(temporary), options.size))
        rates: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(options.rounds):
            for name, batches in rows.items():
                rates[name].append(measure(batches, options.seconds))
        print_table("one core", rates)
        print(f"\n{describe_cache(Path(temporary) / 'photos', Path(temporary) / 'pixels')}")


if __name__ == "__main__":
    main()
