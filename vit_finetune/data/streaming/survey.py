"""What has to be known of a stream before training: who is in validation and test, counts, class names."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from vit_finetune.console import progress
from vit_finetune.data.sources.archives import cache_dir
from vit_finetune.data.streaming.streams import Carving, Origin, Row
from vit_finetune.files import folder_written_whole
from vit_finetune.recipe import DataConfig

HELD_BYTES = 8_000_000
"""Encoded images that are in memory on their way to the cache."""
_FEATURES = datasets.Features(
    {"id": datasets.Value("string"), "image": datasets.Image(), "label": datasets.Value("string")}
)


@dataclass(frozen=True)
class Survey:
    """Validation and test, copied out of a stream, and what was counted on the way."""

    held: dict[str, datasets.Dataset]
    """Columns id, image and label (text), memory-mapped from the cache."""
    shard_sizes: list[int] | None
    """Training images in each shard; None where they were not counted."""
    classes: dict[str, int] | None
    """Training images by label; None where they were not counted."""


def take_survey(origin: Origin, carving: Carving, config: DataConfig) -> Survey:
    """The survey of a source, made once and kept in the cache until its shards change.

    Splits of the source's own are read whole; its training images only where others are carved out of them,
    or where nothing else tells the class names.

    Args:
        origin: the source.
        carving: which training images are set apart.
        config: which columns to use.

    Raises:
        RunError: a broken shard, or rows without images.
    """
    key = json.dumps([origin.place, str(carving), config.image_column, config.class_column])
    folder = cache_dir() / "streams" / hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    if not folder.is_dir():
        with folder_written_whole(folder) as aside:
            _write_survey(aside, origin, carving)
    counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
    held = {file.stem: datasets.Dataset.from_file(str(file)) for file in sorted(folder.glob("*.arrow"))}
    return Survey(held, counts["shard_sizes"], counts["classes"])


def _write_survey(folder: Path, origin: Origin, carving: Carving) -> None:
    own = [split for split in origin.streams if split != "train"]
    counted = origin.label_counts.get("train")
    reads_train = bool(carving.shares) or (origin.names is None and counted is None)
    total = sum(
        origin.streams[split].rows.num_shards for split in (*own, *(["train"] if reads_train else []))
    )
    with ExitStack() as stack:
        advance = stack.enter_context(progress("reading through the shards", total, "shards"))
        held = {
            split: stack.enter_context(_Held(folder / f"{split}.arrow", origin.kind))
            for split in (*own, *carving.shares)
        }
        for split in own:
            for shard in _each_shard(origin, split):
                for row in shard:
                    held[split].add(row)
                advance()
        if reads_train:
            counted = []
            for shard in _each_shard(origin, "train"):
                labels: Counter[str] = Counter()
                for row in shard:
                    split = carving.split_of(row.key)
                    if split != "train":
                        held[split].add(row)
                    elif row.label is not None:
                        labels[row.label] += 1
                counted.append(labels)
                advance()
    counts = {
        "shard_sizes": None if counted is None else [labels.total() for labels in counted],
        "classes": None if counted is None else dict(sum(counted, Counter())),
    }
    (folder / "counts.json").write_text(json.dumps(counts), encoding="utf-8")


def _each_shard(origin: Origin, split: str) -> Iterable[Iterable[Row]]:
    stream = origin.streams[split]
    count = stream.rows.num_shards
    return (stream.read(stream.shard(index, count)) for index in range(count))


class _Held:
    """Labelled rows on their way to an Arrow file: columns id, image and label (text)."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind = path, kind
        self.rows: list[dict[str, Any]] = []
        self.bytes = self.count = 0

    def __enter__(self) -> _Held:
        self.sink = pa.OSFile(str(self.path), "wb")
        self.writer = pa.ipc.new_stream(self.sink, _FEATURES.arrow_schema)
        return self

    def add(self, row: Row) -> None:
        """Takes one row; passes over one without a label."""
        if row.label is None:
            return
        # Of the Hub, names may come twice: its rows are counted, as where it is downloaded.
        name = str(self.count) if self.kind == "hub" else row.name
        self.rows.append({"id": name, "image": {"bytes": row.encoded, "path": None}, "label": row.label})
        self.count += 1
        self.bytes += len(row.encoded)
        if self.bytes > HELD_BYTES:
            self._write()

    def _write(self) -> None:
        self.writer.write_batch(pa.RecordBatch.from_pylist(self.rows, _FEATURES.arrow_schema))
        self.rows, self.bytes = [], 0

    def __exit__(self, *_: object) -> None:
        self._write()
        self.writer.close()
        self.sink.close()
