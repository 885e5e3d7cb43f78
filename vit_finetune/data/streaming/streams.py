"""Sources that are read front to back: shards on this machine, or a dataset of the Hub as it arrives.

An image is known by the hash of its encoded bytes: that decides its split and its augmentation, so neither
depends on shards, workers or processes, and copies of one image are never on both sides of a split.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import datasets

from vit_finetune.data.checkup.readings import hash_text
from vit_finetune.data.sources.folders import ALL, SPLIT_NAMES
from vit_finetune.data.sources.hub import FILE_NAME, is_hub_id, load_from_hub, typed_column
from vit_finetune.data.sources.shards import (
    Shards,
    count_labels,
    find_shards,
    label_text,
    read_class_names,
    read_rows,
)
from vit_finetune.recipe import DataConfig
from vit_finetune.run import RunError

READ_ROWS = 32
"""Rows that are taken from `datasets` at a time."""


class Row(NamedTuple):
    """One image of a stream."""

    name: str
    """Shard and key, for messages."""
    key: str
    """Hash of the encoded bytes."""
    encoded: bytes
    label: str | None
    """As text; None where the row has none."""


@dataclass(frozen=True)
class Stream:
    """The rows of one split of a source, shard by shard, as `datasets` reads them."""

    rows: datasets.IterableDataset
    """Columns id or file_name where the source has one, and the next two."""
    image: str
    label: str
    feature: Any
    """What `datasets` knows of the label column, or None."""

    def read(self, shards: datasets.IterableDataset | None = None) -> Iterator[Row]:
        """Rows in order, of all shards or of some of them, undecoded.

        Raises:
            RunError: rows that hold names of files rather than images, or a broken shard.
        """
        # Taken one by one, `datasets` hands them out at half the speed.
        for some in (self.rows if shards is None else shards).iter(READ_ROWS):
            images, labels = some[self.image], some[self.label]
            names = some.get("id", some.get(FILE_NAME, [None] * len(images)))
            for name, image, label in zip(names, images, labels):
                path = image["path"] if isinstance(image, dict) else None
                encoded = image["bytes"] if isinstance(image, dict) else image
                if encoded is None:
                    raise RunError(
                        f"{name or path or 'a row'}: holds no image bytes, so it cannot be streamed; leave "
                        f"out data.streaming"
                    )
                key = hash_text(encoded)
                yield Row(name or path or key, key, encoded, label_text(label, self.feature))

    def shard(self, index: int, count: int) -> datasets.IterableDataset:
        """Every `count`-th shard, from `index` on."""
        return self.rows.shard(num_shards=count, index=index, contiguous=False)


@dataclass(frozen=True)
class Carving:
    """Which of the training images are set apart: those whose key, hashed with the seed, is small enough."""

    seed: int
    shares: dict[str, float]
    """By split; empty where nothing is carved."""

    def split_of(self, key: str) -> str:
        """The split that an image belongs to, by its key alone."""
        digest = hashlib.blake2b(f"{self.seed}/{key}".encode(), digest_size=8).digest()
        place, limit = int.from_bytes(digest, "big") / 2**64, 0.0  # uniform in [0, 1)
        for split, share in self.shares.items():
            limit += share
            if place < limit:
                return split
        return "train"


# --------------------------------------------------------------------------- opening a source


@dataclass(frozen=True)
class Origin:
    """A source that is open to be streamed."""

    kind: str
    """webdataset, parquet or hub."""
    streams: dict[str, Stream]
    """By train, validation and test."""
    names: list[str] | None
    """Class names in id order, where the source tells them."""
    fingerprint: str
    """Of the shards: their names and sizes, or the Hub's commit."""
    place: str
    """What changes whenever anything in the shards may have."""
    num_images: int | None = None
    """Of train, where it is known without reading."""
    label_counts: dict[str, list[Counter[str]]] = field(default_factory=dict)
    """Of each shard of each split, where labels can be read without the images."""
    notices: list[str] = field(default_factory=list)
    revision: str | None = None
    """The Hub's commit."""


def open_source(config: DataConfig) -> Origin:
    """A source, open to be streamed.

    Raises:
        RunError: it has no shards, no training images, no labels, or columns that cannot be told apart.
    """
    shards = find_shards(config.path)
    if shards:
        origin = _open_shards(shards, config)
    elif is_hub_id(config.path):
        origin = _open_hub(config)
    else:
        raise RunError(
            f"{config.path}: only shards can be streamed: WebDataset tars, Parquet files with image bytes or "
            f"a Hub dataset (owner/name). Make shards of these images, or leave out data.streaming"
        )
    if "train" not in origin.streams:
        raise RunError(
            f"{config.path}: found {', '.join(origin.streams)} only; expected training images, too"
        )
    return origin


def _open_shards(shards: Shards, config: DataConfig) -> Origin:
    streams = {}
    counts = {}
    for split, files in shards.files.items():
        split = "train" if split == ALL else split
        rows = datasets.IterableDataset.from_generator(
            read_rows,
            gen_kwargs={
                "shards": [str(file) for file in files],
                "root": str(shards.root),
                "kind": shards.kind,
                "config": config,
            },
        )
        streams[split] = Stream(rows, "image", "label", None)
        counts[split] = [count_labels(shards, file, config) for file in files]
    return Origin(
        shards.kind,
        streams,
        read_class_names(shards.root),
        shards.fingerprint(),
        shards.place(),
        sum(count.total() for count in counts.get("train", [])),
        counts,
    )


def _open_hub(config: DataConfig) -> Origin:
    loaded, commit = load_from_hub(config, streaming=True)
    return arrange_streams(loaded, commit or "", config)


def arrange_streams(loaded: datasets.IterableDatasetDict, commit: str, config: DataConfig) -> Origin:
    """A Hub dataset that is read as it arrives, under our names of splits and columns.

    Args:
        loaded: by the Hub's names of splits.
        commit: of the dataset.
        config: which columns to use.

    Raises:
        RunError: splits or columns that cannot be told apart.
    """
    splits: dict[str, datasets.IterableDataset] = {}
    notices = []
    for name, rows in loaded.items():
        split = SPLIT_NAMES.get(str(name).lower(), "train" if len(loaded) == 1 else None)
        if split in splits:
            raise RunError(f"{config.path}: found the splits {', '.join(loaded)}, two of which mean {split}")
        if split is None:
            notices.append(f"the split {name} left out")
        else:
            splits[split] = rows
    if not splits:
        raise RunError(f"{config.path}: found the splits {', '.join(loaded)}; expected train")
    first = splits.get("train", next(iter(splits.values())))
    features = first.features
    if features is None:
        raise RunError(f"{config.path}: does not tell its columns, so it cannot be streamed")
    image = typed_column(config, features, config.image_column, datasets.Image, "data.image_column")
    label = typed_column(config, features, config.class_column, datasets.ClassLabel, "data.label_column")
    streams = {
        split: Stream(_needed_columns(rows, image, label), image, label, features[label])
        for split, rows in splits.items()
        if label in rows.features
    }
    known = (first.info.splits or {}).get(first.split) if first.info.splits else None
    names = list(features[label].names) if isinstance(features[label], datasets.ClassLabel) else None
    place = f"{config.path}|{config.subset}|{commit}"
    num_images = (known.num_examples or None) if known else None
    return Origin("hub", streams, names, place, place, num_images, {}, notices, commit or None)


def _needed_columns(rows: datasets.IterableDataset, image: str, label: str) -> datasets.IterableDataset:
    """Image, undecoded, label and, for messages, the name of the file where the rows have it."""
    named = rows.features.get(FILE_NAME) == datasets.Value("string")
    columns = dict.fromkeys([image, label, *([FILE_NAME] if named else [])])
    rows = rows.select_columns(list(columns))
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    return rows
