"""Shards that tests write: WebDataset tars and Parquet files of drawn images."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from conftest import COLOURS, draw_image

NAMES = list(COLOURS)[:3]


def draw_png(number: int, size: tuple[int, int] | None = None) -> bytes:
    """An image that no other number gives; its class is the number modulo 3."""
    buffer = io.BytesIO()
    size = size or (20 + number % 5, 18 + number % 7)
    draw_image(COLOURS[NAMES[number % 3]], number, size).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    """A plain tar of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(number: int, label: str | None = None) -> list[tuple[str, bytes]]:
    """The members of one sample, key `cat/000007`."""
    key = f"{NAMES[number % 3]}/{number:06}"
    return [
        (f"{key}.png", draw_png(number)),
        (f"{key}.cls", (NAMES[number % 3] if label is None else label).encode()),
    ]


def write_tars(folder: Path, sizes: Sequence[int], name: str = "part", start: int = 0) -> Path:
    """A folder of WebDataset shards with so many images each, numbered through."""
    for shard, size in enumerate(sizes):
        members = [member for number in range(start, start + size) for member in sample(number)]
        write_tar(folder / f"{name}-{shard:03}.tar", *members)
        start += size
    return folder


def write_parquet(
    folder: Path, sizes: Sequence[int], name: str = "part", start: int = 0, plain: bool = False
) -> Path:
    """The same images as Parquet files: the Hub's own form with class names, or plain binary and class ids."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, size in enumerate(sizes):
        numbers = range(start, start + size)
        rows: dict[str, Any] = {
            "image": [draw_png(n) if plain else {"bytes": draw_png(n), "path": None} for n in numbers],
            "label": [n % 3 for n in numbers],
        }
        features = datasets.Features(
            {"image": datasets.Value("binary"), "label": datasets.Value("int64")}
            if plain
            else {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
        )
        file = folder / f"{name}-{shard:05}-of-{len(sizes):05}.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(file))
        start += size
    return folder
