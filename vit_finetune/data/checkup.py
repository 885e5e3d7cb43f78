"""What is wrong with this data, image by image: found by reading every one before training starts."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet

from vit_finetune.console import progress
from vit_finetune.data.archives import cache_dir
from vit_finetune.data.images import UnreadableImage, decode_image
from vit_finetune.data.sources import Source, column_values
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
    """The source without images that cannot be decoded, with a column `digest` (content hash), and the findings.

    Every image is read and decoded once, in parallel. What was found is remembered by path, size and modification
    time (by content for images that are no files), so that the next pass only looks at what changed.

    Raises:
        RunError: images are unreadable and `data.on_unreadable` is `stop`; the message lists them all.
    """
    readings = _read_all(source, config)
    findings = [
        Finding(name, reading.problem)
        for split, rows in readings.items()
        for name, reading in zip(column_values(source.splits[split], "id"), rows)
        if reading.problem
    ]
    if findings and config.on_unreadable == "stop":
        lines = "\n".join(f"  {finding.id}: {finding.problem}" for finding in findings)
        raise RunError(
            f"{config.path}: {len(findings):,} of {sum(map(len, readings.values())):,} images cannot be read:\n{lines}\n"
            f"Repair or remove them, or leave them out with data.on_unreadable=skip"
        )
    splits = {}
    for split, rows in readings.items():
        dataset = source.splits[split].add_column("digest", [reading.digest for reading in rows])
        good = [number for number, reading in enumerate(rows) if not reading.problem]
        splits[split] = dataset if len(good) == len(rows) else dataset.select(good)
    if not any(map(len, splits.values())):
        raise RunError(f"{config.path}: not one image can be read; first: {findings[0].id}: {findings[0].problem}")
    return Source(source.kind, splits, source.labels, source.notices), findings


def _read_all(source: Source, config: DataConfig) -> dict[str, list[_Reading]]:
    memory = _Memory(cache_dir() / "readings" / f"{_hash(os.path.abspath(config.path).encode())}.parquet")
    total = sum(map(len, source.splits.values()))
    readings: dict[str, list[_Reading]] = {}
    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        progress("reading images", total, "images") as advance,
    ):
        for split, dataset in source.splits.items():
            images = dataset.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
            readings[split] = []
            chunks = (images[start : start + CHUNK]["image"] for start in range(0, len(images), CHUNK))
            for rows in threads.map(lambda chunk: [_read(image, memory) for image in chunk], chunks):
                readings[split] += rows
                advance(len(rows))
    memory.save()
    return readings


def _read(image: dict[str, str | bytes | None], memory: _Memory) -> _Reading:
    """Reads one image, or remembers having read it. Called from several threads."""
    data, path = image["bytes"], image["path"]
    if data is not None:
        assert isinstance(data, bytes)
        key = digest = _hash(data)
    else:
        try:
            facts = os.stat(str(path))
        except OSError as error:
            return _Reading("", f"cannot be opened: {error.strerror}")
        key, digest = f"{path}|{facts.st_size}|{facts.st_mtime_ns}", ""
    if key in memory.readings:
        return memory.remember(key, memory.readings[key])
    if not digest:
        try:
            data = Path(str(path)).read_bytes()
        except OSError as error:
            return _Reading("", f"cannot be opened: {error.strerror}")
        digest = _hash(data)
    assert isinstance(data, bytes)
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
        with written_whole(self.path) as temporary:
            pyarrow.parquet.write_table(table, temporary)
