"""Every image read and decoded once, in parallel: what was learnt of each, remembered for the next pass."""

from __future__ import annotations

import io
import os
import stat
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
import torch
from PIL import Image

from vit_finetune.console import progress
from vit_finetune.data.images import BROKEN, UnreadableImage, decode_image, hash_content
from vit_finetune.data.sources.archives import cache_dir
from vit_finetune.data.sources.columns import Source
from vit_finetune.data.sources.webdataset import file_of, read_encoded
from vit_finetune.files import written_whole
from vit_finetune.recipe import DataConfig

CHUNK = 64
"""Images that one thread reads at a time."""

HASHED_SIDE = 24
"""Pixels of the shorter side from which on a perceptual hash means something: smaller images resemble one
another by chance."""

ORIENTATION = 0x0112
"""EXIF's tag of how the camera was held."""


class Reading(NamedTuple):
    """What reading one image told. Only `problem` and `digest` are known of one that cannot be decoded."""

    digest: str
    """Hash of the file's content; empty where it could not be opened."""
    problem: str = ""
    """Why it cannot be decoded, or nothing."""
    format: str = ""
    """Pillow's name: JPEG, PNG, …"""
    mode: str = ""
    """Pillow's name of the stored pixels: RGB, L, P, CMYK, …"""
    width: int = 0
    """Pixels, as they are shown: EXIF orientation applied."""
    height: int = 0
    orientation: int = 1
    """EXIF's, 1 to 8; 1 is upright."""
    frames: int = 1
    """More than 1 in an animation or a file of several pages."""
    transparent: bool = False
    """Whether some pixel is not opaque."""
    blank: bool = False
    """Whether all pixels have one colour, within 4 of 255."""
    phash: int | None = None
    """64 bits; None of an image under `HASHED_SIDE` pixels."""


SCHEMA = pa.schema(
    {
        "digest": pa.string(),
        "problem": pa.string(),
        "format": pa.string(),
        "mode": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "orientation": pa.uint8(),
        "frames": pa.int32(),
        "transparent": pa.bool_(),
        "blank": pa.bool_(),
        "phash": pa.uint64(),
    }
)
"""Readings as columns, which a million images fit in about 100 MB of."""


def read_images(source: Source, config: DataConfig) -> dict[str, pa.Table]:
    """The readings of every image by split, row for row with its datasets; columns as in `SCHEMA`.

    What was learnt is remembered by path, size and modification time (by content for images that are no
    files), so that the next pass only looks at what changed.
    """
    memory = memory_path("readings", config)
    known = _load(memory)
    total = sum(map(len, source.splits.values()))
    readings, seen, fresh = {}, [], 0
    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        progress("reading images", total, "images") as advance,
    ):
        for split, dataset in source.splits.items():
            keys = _keys(dataset)
            rows = pa.compute.index_in(keys, value_set=known["key"], skip_nulls=True)
            missing = np.flatnonzero(rows.is_null())
            advance(len(keys) - len(missing))
            read = []
            for batch in _in_parallel(threads, _encoded(dataset, missing)):
                read.append(batch)
                advance(batch.num_rows)
            found = known.drop_columns(["key"]).take(rows.drop_null())
            table = pa.concat_tables([found, pa.Table.from_batches(read, SCHEMA)])
            # Remembered rows come first in it, fresh ones behind; this is where each image's row is.
            order = np.empty(len(keys), np.int64)
            order[np.flatnonzero(rows.is_valid())] = np.arange(len(found))
            order[missing] = np.arange(len(found), len(keys))
            readings[split] = table.take(order).combine_chunks()
            seen.append(readings[split].append_column("key", keys))
            fresh += len(missing)
    kept = pa.concat_tables(seen)
    if fresh or len(kept) != len(known):
        # A memory that cannot be written only costs the time to read again.
        with suppress(OSError), written_whole(memory) as temporary:
            pa.parquet.write_table(kept, temporary)
    return readings


def hash_text(text: str | bytes) -> str:
    """A content hash: 32 hexadecimal digits."""
    return hash_content(text.encode() if isinstance(text, str) else text)


def memory_path(what: str, config: DataConfig) -> Path:
    """The file in the cache that remembers something about this data path."""
    return cache_dir() / what / f"{hash_text(str(Path(config.path).absolute()))}.parquet"


def _load(memory: Path) -> pa.Table:
    schema = SCHEMA.append(pa.field("key", pa.string()))
    try:
        table = pa.parquet.read_table(memory)
        if table.schema.equals(schema):
            return table
    except (OSError, pa.ArrowException):
        pass  # none yet; or damaged, which only costs the time to read again
    return schema.empty_table()


# --------------------------------------------------------------------------- one image


def _keys(dataset: datasets.Dataset) -> pa.Array:
    """What each image is remembered by; null where there is nothing to open."""
    keys: list[str | None] = []
    for chunk in _encoded(dataset, np.arange(len(dataset))):
        keys += map(_key, chunk)
    return pa.array(keys, pa.string())


def _key(image: dict[str, Any] | None) -> str | None:
    if image is None:
        return None
    if image["bytes"] is not None:
        return hash_text(image["bytes"])
    try:
        facts = os.stat(file_of(image["path"]))  # noqa: PTH116 - a Path object takes longer to make than to use
    except (OSError, TypeError):
        return None
    return f"{image['path']}|{facts.st_size}|{facts.st_mtime_ns}"


def _encoded(dataset: datasets.Dataset, rows: np.ndarray) -> Iterator[list[dict[str, Any] | None]]:
    """Images as they are stored, `bytes` and `path` each, chunk by chunk."""
    images = dataset.select_columns(["image"]).with_format("arrow")
    for start in range(0, len(rows), CHUNK):
        yield images[rows[start : start + CHUNK]]["image"].to_pylist()


def _in_parallel(
    threads: ThreadPoolExecutor, chunks: Iterator[list[dict[str, Any] | None]]
) -> Iterator[pa.RecordBatch]:
    """Readings in order, chunk by chunk.

    Few chunks are under way at a time: `ThreadPoolExecutor.map` would take all images' bytes into memory at
    once, and Ctrl-C would wait for all of them.
    """
    waiting: deque[Future[pa.RecordBatch]] = deque()
    for chunk in chunks:
        waiting.append(threads.submit(_read_chunk, chunk))
        if len(waiting) > 2 * (os.cpu_count() or 1):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _read_chunk(chunk: list[dict[str, Any] | None]) -> pa.RecordBatch:
    columns = zip(*map(_read, chunk))
    return pa.record_batch([pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types)], SCHEMA)


def _read(image: dict[str, Any] | None) -> Reading:
    if image is None or (image["bytes"] is None and image["path"] is None):
        return Reading("", "the row holds no image")
    data: bytes | None = image["bytes"]
    if data is None:
        try:
            # A pipe would never answer, and a device never end.
            kind = stat.S_IFMT(os.stat(file_of(image["path"])).st_mode)  # noqa: PTH116 - as above
            if kind not in (stat.S_IFREG, stat.S_IFDIR):
                return Reading("", "is a pipe or device")
            data = read_encoded(image)
        except OSError as error:
            return Reading("", f"cannot be opened: {error.strerror}")
    digest = hash_content(data)
    try:
        pixels = decode_image(data)  # (3, H, W)
    except UnreadableImage as error:
        return Reading(digest, str(error))
    _, height, width = pixels.shape
    grey = shrink(pixels).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    # The small picture may have lost a few pixels of another colour, so that it only says where to look.
    low, high = cast(tuple[int, int], grey.getextrema())
    blank = high - low <= 4 and _spread(pixels) <= 4
    phash = None
    if min(width, height) >= HASHED_SIDE:
        phash = int.from_bytes(np.packbits(imagehash.phash(grey).hash).tobytes())
    return Reading(digest, "", *_header(data, width, height), blank, phash)


def _spread(pixels: torch.Tensor) -> int:
    """The largest difference within a channel, 0 to 255."""
    return int((pixels.amax((1, 2)).int() - pixels.amin((1, 2)).int()).max())


def _header(data: bytes, width: int, height: int) -> tuple[str, str, int, int, int, int, bool]:
    """Format, mode, width, height, orientation, frames, and whether some pixel is not opaque."""
    with Image.open(io.BytesIO(data)) as image:
        kind, mode = image.format or "", image.mode
        orientation, frames, transparent = 1, 1, False
        # The pixels are fine; what cannot be read beside them is as if it were not there.
        with suppress(*BROKEN):
            orientation = image.getexif().get(ORIENTATION, 1)
        with suppress(*BROKEN):
            # A telephone's MPO is one photograph; what follows in it is for the screen or for depth.
            frames = 1 if kind == "MPO" else getattr(image, "n_frames", 1)
        with suppress(*BROKEN):
            if image.has_transparency_data:
                transparent = bool(np.asarray(image.convert("RGBA"))[..., 3].min() < 255)
    return kind, mode, width, height, orientation if orientation in range(1, 9) else 1, frames, transparent


def shrink(pixels: torch.Tensor, side: int = 128) -> Image.Image:
    """An RGB picture of once to twice `side` pixels, or as it is where smaller; by means, which is fast.

    Args:
        pixels: uint8 `(3, height, width)`.
        side: what the shorter side keeps at least, in pixels, where it has as many.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    step = min(image.size) // side
    return image.reduce(step) if step > 1 else image
