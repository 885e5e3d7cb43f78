"""Where images lie does not matter: a folder, WebDataset shards and Parquet files train the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TINY_VIT, tiny_recipe
from safetensors.torch import load_file
from shard_files import NAMES, draw_png, sample, write_parquet, write_tar, write_tars

from vit_finetune.finetuning import finetune

SPLITS = {"train": (0, 24), "validation": (100, 9), "test": (200, 9)}
"""First number and how many images."""


def write_folder(root: Path) -> Path:
    for split, (start, count) in SPLITS.items():
        for number in range(start, start + count):
            file = root / split / NAMES[number % 3] / f"{number:06}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(draw_png(number))
    return root


def write_tars_as_listed(root: Path) -> Path:
    """The same images in two shards a split, in the order in which a folder is listed: class by class."""
    for split, (start, count) in SPLITS.items():
        numbers = sorted(range(start, start + count), key=lambda number: (NAMES[number % 3], number))
        for shard, part in enumerate((numbers[: count // 2], numbers[count // 2 :])):
            write_tar(root / f"{split}-{shard:03}.tar", *(member for n in part for member in sample(n)))
    return root


@pytest.mark.slow
def test_a_folder_equals_its_images_in_shards(tmp_path: Path) -> None:
    """Bit for bit: with loader processes or without, from the cache or not."""
    for split, (start, count) in SPLITS.items():
        sizes = [count // 2, count - count // 2]
        write_tars(tmp_path / "tars", sizes, split, start)
        write_parquet(tmp_path / "tables", sizes, split, start)
    folder, listed = write_folder(tmp_path / "folder"), write_tars_as_listed(tmp_path / "listed")
    cache = str(tmp_path / "cache")
    weights = []
    for path, workers, kept in (
        (folder, 0, "off"),
        (folder, 2, cache),
        (listed, 1, "off"),
        (listed, 2, cache),
        # In an order of their own:
        (tmp_path / "tars", 0, "off"),
        (tmp_path / "tables", 1, "off"),
    ):
        run = finetune(
            tiny_recipe(
                path,
                tmp_path / f"run{len(weights)}",
                data={"cache": kept},
                augmentation={"policy": "trivialaugment", "random_erasing": 0.3},
                model={"config": {**TINY_VIT, "image_size": 24}},
                training={"dataloader_num_workers": workers},
            )
        )
        weights.append(load_file(run.model / "model.safetensors"))
    for other in weights[1:4]:
        assert all(value.equal(other[key]) for key, value in weights[0].items())
    assert all(value.equal(weights[5][key]) for key, value in weights[4].items())
    assert not all(value.equal(weights[4][key]) for key, value in weights[0].items())
