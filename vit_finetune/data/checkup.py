"""What is wrong with this data, image by image: found by reading every one before training starts."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet

from vit_finetune.console import progress
from vit_finetune.data.archives import cache_dir
from vit_finetune.data.folders import ALL
from vit_finetune.data.images import UnreadableImage, decode_image
from vit_finetune.data.sources import Source, column_values, missing_classes
from vit_finetune.data.webdataset import is_member_path, read_encoded
from vit_finetune.recipe import DataConfig
from vit_finetune.run import RunError, written_whole

CHUNK = 64
"""Images that one thread reads at a time."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one image."""

    id: str
    problem: str


@dataclass(frozen=True)
class _Reading:
    """What reading one image told: its content's hash, and why it cannot be decoded, or nothing."""

    digest: str
    problem: str


def leave_out_unreadable(source: Source, config: DataConfig) -> tuple[Source, list[Finding]]:
    """The source without images that cannot be decoded, with a column `digest` (content hash), and findings.

    Every image is read and decoded once, in parallel. What was found is remembered by path, size and
    modification time (by content for images that are no files), so that the next pass only looks at what
    changed.

    Raises:
        RunError: images are unreadable and `data.on_unreadable` is `stop`, the message lists them all; or a
            split has no others.
    """
    readings = _read_all(source, config)
    findings = [
        # Rows of the Hub and of Parquet files are counted in each split from 0.
        Finding(f"{split} {name}" if source.kind in ("hub", "parquet") else name, reading.problem)
        for split, rows in readings.items()
        for name, reading in zip(column_values(source.splits[split], "id"), rows)
        if reading.problem
    ]
    if findings and config.on_unreadable == "stop":
        lines = "\n".join(f"  {finding.id}: {finding.problem}" for finding in findings)
        total = sum(map(len, readings.values()))
        raise RunError(
            f"{config.path}: {len(findings):,} of {total:,} images cannot be read:\n"
            f"{lines}\nRepair or remove them, or leave them out with data.on_unreadable=skip"
        )
    splits = {}
    for split, rows in readings.items():
        good = [number for number, reading in enumerate(rows) if not reading.problem]
        if not good:
            where = config.path if split == ALL else f"{config.path}: {split}"
            raise RunError(f"{where}: not one image can be read; the first is {rows[0].problem}")
        dataset = source.splits[split].add_column("digest", [reading.digest for reading in rows])
        splits[split] = dataset if len(good) == len(rows) else dataset.select(good)
    notices = source.notices + [
        notice for notice in missing_classes(splits, source.labels) if notice not in source.notices
    ]
    return Source(source.kind, splits, source.labels, notices), findings


def _read_all(source: Source, config: DataConfig) -> dict[str, list[_Reading]]:
    place = _hash(str(Path(config.path).absolute()).encode())
    memory = _Memory(cache_dir() / "readings" / f"{place}.parquet")
    total = sum(map(len, source.splits.values()))
    readings: dict[str, list[_Reading]] = {}
    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        progress("reading images", total, "images") as advance,
    ):
        for split, dataset in source.splits.items():
            images = dataset.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
            readings[split] = []
            for rows in _in_parallel(threads, images, memory):
                readings[split] += rows
                advance(len(rows))
    memory.save()
    return readings


def _in_parallel(
    threads: ThreadPoolExecutor, images: datasets.Dataset, memory: _Memory
) -> Iterator[list[_Reading]]:
    """Readings in order, chunk by chunk.

    Few chunks are under way at a time: `ThreadPoolExecutor.map` would take all images' bytes into memory at
    once, and Ctrl-C would wait for all of them.
    """
    waiting: deque[Future[list[_Reading]]] = deque()
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK]["image"]
        waiting.append(threads.submit(lambda chunk: [_read(image, memory) for image in chunk], chunk))
        if len(waiting) > 2 * (os.cpu_count() or 1):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _read(image: dict[str, Any] | None, memory: _Memory) -> _Reading:
    """Reads one image, or remembers having read it. Called from several threads."""
    if image is None or (image["bytes"] is None and image["path"] is None):
        return _Reading("", "the row holds no image")
    data: bytes | None = image["bytes"]
    try:
        if data is None and is_member_path(image["path"]):
            data = read_encoded(image)
        if data is not None:
            key = digest = _hash(data)
        else:
            path = Path(image["path"])
            facts = path.stat()
            key, digest = f"{path}|{facts.st_size}|{facts.st_mtime_ns}", ""
        if key in memory.readings:
            return memory.remember(key, memory.readings[key])
        if data is None:
            data = path.read_bytes()
            digest = _hash(data)
    except OSError as error:
        return _Reading("", f"cannot be opened: {error.strerror}")
    try:
        decode_image(data)
        problem = ""
    except UnreadableImage as error:
        problem = str(error)
    return memory.remember(key, _Reading(digest, problem))


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class _Memory:
    """Readings of earlier passes over the same data, in one small Parquet file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.readings: dict[str, _Reading] = {}
        self.used: dict[str, _Reading] = {}
        if path.is_file():
            try:
                columns = pyarrow.parquet.read_table(path).to_pydict()
                self.readings = {
                    key: _Reading(digest, problem)
                    for key, digest, problem in zip(columns["key"], columns["digest"], columns["problem"])
                }
            except (OSError, KeyError, pa.ArrowException):
                self.readings = {}  # a damaged cache only costs the time to read again

    def remember(self, key: str, reading: _Reading) -> _Reading:
        self.used[key] = reading
        return reading

    def save(self) -> None:
        """Keeps what this pass saw; forgets files that are gone."""
        if self.used == self.readings:
            return
        table = pa.table(
            {
                "key": list(self.used),
                "digest": [reading.digest for reading in self.used.values()],
                "problem": [reading.problem for reading in self.used.values()],
            }
        )
        # A cache that cannot be written only costs the time to read again.
        with suppress(OSError), written_whole(self.path) as temporary:
            pyarrow.parquet.write_table(table, temporary)
