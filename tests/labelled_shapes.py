"""Drawn images whose coloured shapes come together, in tables that say which: any, several or none."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from conftest import tiny_recipe
from PIL import Image, ImageDraw

from vit_finetune.data.sources.columns import Source, build_dataset, column_values
from vit_finetune.data.sources.labels import label_texts
from vit_finetune.recipe import DataConfig, Recipe

SHAPES = {"disc": (210, 40, 50), "frame": (40, 180, 60), "bar": (40, 60, 200)}
"""Colour of each shape; labels in the order of ids where they are sorted are bar, disc, frame."""
NAMES = sorted(SHAPES)


def draw_shapes(names: list[str], seed: int, size: int = 24) -> Image.Image:
    """An image with these shapes on a noisy ground; each has a place and a colour of its own."""
    random = np.random.default_rng(seed)
    ground = np.clip(random.normal(120, 12, (size, size, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(ground)
    pen, shift = ImageDraw.Draw(image), int(random.integers(0, 3))
    if "disc" in names:
        pen.ellipse((1 + shift, 1 + shift, 10 + shift, 10 + shift), fill=SHAPES["disc"])
    if "frame" in names:
        pen.rectangle((12, 1 + shift, 22, 10 + shift), outline=SHAPES["frame"], width=3)
    if "bar" in names:
        pen.rectangle((2, 15 + shift, 21, 19 + shift), fill=SHAPES["bar"])
    return image


def draw_labels(count: int, seed: int = 0) -> list[list[str]]:
    """Which shapes each image has: a disc comes with a frame more often than not, one in ten has none."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        disc = random.random() < 0.5
        frame = random.random() < (0.7 if disc else 0.3)
        bar = random.random() < 0.3
        rows.append([name for name, here in (("bar", bar), ("disc", disc), ("frame", frame)) if here])
    return rows


def write_images(root: Path, labels: list[list[str]]) -> list[str]:
    """An image for each set of labels; answers their names."""
    root.mkdir(parents=True, exist_ok=True)
    files = [f"{number:03}.png" for number in range(len(labels))]
    for number, (file, names) in enumerate(zip(files, labels)):
        draw_shapes(names, number).save(root / file)
    return files


def write_jsonl(root: Path, count: int = 60, seed: int = 0) -> Path:
    """A folder with images and a metadata.jsonl with a column of lists; answers the table."""
    labels = draw_labels(count, seed)
    rows = [{"file_name": file, "labels": names} for file, names in zip(write_images(root, labels), labels)]
    return write_rows(root / "metadata.jsonl", rows)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A table: .jsonl, .csv or .parquet, by its name."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def flag_rows(root: Path, count: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """The same images as rows with one column per label."""
    labels = draw_labels(count, seed)
    return [
        {"file_name": file} | {name: int(name in names) for name in SHAPES}
        for file, names in zip(write_images(root, labels), labels)
    ]


def several(path: str | Path, **options: Any) -> DataConfig:
    """A source of images with several labels."""
    return DataConfig.model_validate({"path": str(path), "multi_label": True, **options})


def names_by_id(dataset: datasets.Dataset) -> dict[str, list[str]]:
    """Labels by id."""
    return dict(zip(column_values(dataset, "id"), map(json.loads, label_texts(dataset).to_pylist())))


def drawn_source(labels: list[list[int]], classes: int, **columns: list[str | None]) -> Source:
    """A source without pictures."""
    ids = [f"{number}.jpg" for number in range(len(labels))]
    images = pa.StructArray.from_arrays([pa.nulls(len(ids), pa.binary()), pa.array(ids)], ["bytes", "path"])
    names = [f"c{number}" for number in range(classes)]
    groups = pa.array(columns["group"], pa.string()) if "group" in columns else None
    dataset = build_dataset(ids, images, pa.array(labels, pa.list_(pa.int64())), names, groups)
    return Source("table", {"all": dataset}, names)


def draw_sets(count: int, classes: int, seed: int) -> list[list[int]]:
    """Label sets in which the first labels are frequent and the last rare; some images have none."""
    random = np.random.default_rng(seed)
    shares = np.linspace(0.5, 0.06, classes)
    return [np.flatnonzero(random.random(classes) < shares).tolist() for _ in range(count)]


def recipe_of(table: Path, output: Path, **sections: Any) -> Recipe:
    """A tiny recipe of images with several labels."""
    data = {"multi_label": True, **sections.pop("data", {})}
    return tiny_recipe(table, output, data=data, **sections)


def write_recipe(path: Path, recipe: Recipe) -> Path:
    """The recipe as a file."""
    path.write_text(recipe.to_yaml(resolved=False), encoding="utf-8")
    return path
