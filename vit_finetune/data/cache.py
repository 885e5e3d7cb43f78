"""Images decoded once and kept at just above training size, as raw pixels in memory-mapped files.

A cached image is found by the hash of its file's content, so a cache is never stale: an edited photograph is
another one. Packs appear whole or not at all; whoever fills a cache holds its lock, others wait and then find
everything there.
"""

from __future__ import annotations

import os
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2.functional import InterpolationMode

from vit_finetune.console import progress
from vit_finetune.data.images import EncodedImage
from vit_finetune.files import written_whole
from vit_finetune.run import RunError

FORMAT = 1
"""Counted up when the same name would mean other pixels."""
PACK_BYTES = 256_000_000
"""Size from which a pack is closed; an interruption loses no more than this."""
CHUNK = 16
"""Images that one thread prepares at a time."""
FIELDS = ("digest", "offset", "height", "width", "original_height", "original_width")


def cached_edge(size: tuple[int, int]) -> int:
    """Shortest edge in pixels that images are kept at: 8/7 of the longer side that the model takes.

    That is 256 for 224, the margin that ImageNet's evaluation crops have had since Krizhevsky et al. (2012).

    Args:
        size: the model's height and width in pixels.
    """
    return round(max(size) * 8 / 7)


def shrink(picture: EncodedImage, edge: int) -> torch.Tensor:
    """The pixels of an image whose shortest edge is at most `edge`: uint8 `(3, height, width)`.

    Smaller images stay as they are, bit for bit.

    Args:
        picture: the image.
        edge: in pixels.
    """
    shortest = min(picture.size)
    if shortest <= edge:
        return picture.decode()
    # The decoder's own scaling while twice the size remains to resize from.
    factor = next((factor for factor in (8, 4, 2) if shortest // factor >= 2 * edge), 1)
    sides = [max(edge, round(side * edge / shortest)) for side in picture.size]
    # Bicubic keeps the sharpness that the crop's own, bilinear, resizing then costs a second time.
    small: torch.Tensor = F.resize(
        picture.decode(factor), sides, interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    return small


@dataclass(frozen=True)
class CachedImage:
    """One image of a cache: a `Picture` that needs no decoding."""

    pixels: torch.Tensor
    """uint8 `(3, height, width)`, channels last in memory; never to be written to."""
    size: tuple[int, int]
    """The original's height and width in pixels."""

    def decode(self, shrink: int = 1) -> torch.Tensor:
        """The cached pixels, whatever is asked for."""
        return self.pixels


class CachedImages:
    """A split's images in a cache, in the split's order: `Pictures`.

    Maps its packs in each process when they are first read, so that it can be sent to loader processes.

    Args:
        packs: files of raw pixels.
        rows: int64 `(images, 6)`: pack, offset, height, width, original height, original width.
    """

    def __init__(self, packs: Sequence[Path], rows: np.ndarray) -> None:
        self.packs, self.rows = list(packs), rows
        self._maps: list[torch.Tensor | None] = [None] * len(self.packs)

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": [None] * len(self.packs)}

    def open(self, index: int) -> CachedImage:
        """One image.

        Raises:
            RunError: somebody deleted the cache.
        """
        pack, offset, height, width, *size = self.rows[index].tolist()
        pixels = self._map(pack)[offset : offset + 3 * height * width]
        return CachedImage(pixels.view(height, width, 3).permute(2, 0, 1), (size[0], size[1]))

    def _map(self, pack: int) -> torch.Tensor:
        mapped = self._maps[pack]
        if mapped is None:
            path = self.packs[pack]
            try:
                # Unlike Python's mmap it keeps no file open: a large cache has more packs than a process may
                # open files. Not shared: what is written to is copied, and the file stays as it is.
                mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
            except (OSError, RuntimeError) as error:
                raise RunError(
                    f"{path}: the image cache changed while it was in use ({error}). Say the same again: "
                    f"what is missing is made again, and `train` goes on with --resume"
                ) from error
            self._maps[pack] = mapped
        return mapped


class PixelCache:
    """A folder of packs with images prepared in one way.

    Args:
        folder: where caches lie; this one gets a folder of its own below it.
        name: says how the images were prepared; caches of other names are others.
        prepare: from an image to the pixels to keep, uint8 `(3, height, width)`.
    """

    def __init__(self, folder: Path, name: str, prepare: Callable[[EncodedImage], torch.Tensor]) -> None:
        self.folder = folder / f"{name}-v{FORMAT}"
        self.prepare = prepare

    def images(self, open_image: Callable[[int], EncodedImage], digests: Sequence[str]) -> CachedImages:
        """A split's images; those that are not in the cache yet are prepared and added first.

        Args:
            open_image: from a row of the split to its image.
            digests: content hash of each row.

        Raises:
            RunError: the folder cannot be written, or the disk is full. What was added until then stays.
        """
        found = self._read_index()
        if any(digest not in found.row_of for digest in digests):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with filelock.FileLock(self.folder / ".lock"):
                    found = self._read_index()  # another process may have filled it meanwhile
                    self._remove_leftovers(found.packs)
                    first_rows = {digest: row for row, digest in reversed(list(enumerate(digests)))}
                    missing = [row for digest, row in first_rows.items() if digest not in found.row_of]
                    self._fill(open_image, digests, sorted(missing))
                    found = self._read_index()
            except OSError as error:
                raise RunError(
                    f"{self.folder}: the image cache cannot be written: {error.strerror or error}. Write "
                    f"data.cache=off, or a folder that can be written to"
                ) from error
        return CachedImages(found.packs, found.rows[[found.row_of[digest] for digest in digests]])

    def _fill(
        self, open_image: Callable[[int], EncodedImage], digests: Sequence[str], rows: list[int]
    ) -> None:
        pack = _Pack(self.folder)
        try:
            with (
                ThreadPoolExecutor(os.cpu_count()) as threads,
                progress("shrinking images", len(rows), "images") as advance,
            ):
                for row, size, pixels in self._prepare_all(threads, open_image, rows):
                    pack.add(digests[row], pixels, size)
                    if pack.size >= PACK_BYTES:
                        pack.close()
                        pack = _Pack(self.folder)
                    advance()
            pack.close()
        finally:
            pack.discard()

    def _prepare_all(
        self, threads: ThreadPoolExecutor, open_image: Callable[[int], EncodedImage], rows: list[int]
    ) -> Iterator[tuple[int, tuple[int, int], np.ndarray]]:
        """Row, original size and pixels `(height, width, 3)`, in the order of the rows; few at a time."""

        def work(chunk: list[int]) -> list[tuple[int, tuple[int, int], np.ndarray]]:
            done = []
            for row in chunk:
                picture = open_image(row)
                pixels = self.prepare(picture).permute(1, 2, 0).contiguous().numpy()
                done.append((row, picture.size, pixels))
            return done

        waiting: deque[Future[list[tuple[int, tuple[int, int], np.ndarray]]]] = deque()
        for start in range(0, len(rows), CHUNK):
            waiting.append(threads.submit(work, rows[start : start + CHUNK]))
            if len(waiting) > 2 * (os.cpu_count() or 1):
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()

    def _read_index(self) -> _Index:
        """What is in the cache; packs that are not as long as their index says are passed over."""
        packs: list[Path] = []
        digests: list[str] = []
        blocks: list[np.ndarray] = []
        for path in sorted(self.folder.glob("*.parquet")):
            pack = path.with_suffix(".bin")
            try:
                table = pyarrow.parquet.read_table(path)
                columns = [table[name].to_numpy() for name in FIELDS[1:]]
                last = len(table) - 1
                end = columns[0][last] + 3 * columns[1][last] * columns[2][last]
                if pack.stat().st_size != end:
                    continue
            except (OSError, KeyError, IndexError, pa.ArrowException):
                continue  # damaged: its images are prepared again
            digests += table["digest"].to_pylist()
            blocks.append(np.column_stack([np.full(len(table), len(packs)), *columns]))
            packs.append(pack)
        rows = np.concatenate(blocks) if blocks else np.zeros((0, len(FIELDS)), np.int64)
        return _Index(packs, {digest: row for row, digest in enumerate(digests)}, rows)

    def _remove_leftovers(self, packs: Sequence[Path]) -> None:
        """Deletes what an interrupted or damaged filling left; only called under the lock."""
        known = {path.stem for path in packs}
        for path in self.folder.iterdir():
            if path.name != ".lock" and path.name.lstrip(".").split(".")[0] not in known:
                path.unlink(missing_ok=True)


@dataclass
class _Index:
    packs: list[Path]
    row_of: dict[str, int]
    rows: np.ndarray
    """int64 `(images, 6)`, as in `CachedImages`."""


class _Pack:
    """A pack being written: its name appears with its index, once all pixels are on the disk."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"{uuid.uuid4().hex}.bin"
        self.aside = folder / f".{self.path.name}"
        self.file = self.aside.open("wb")
        self.size = 0
        self.index: dict[str, list[Any]] = {name: [] for name in FIELDS}

    def add(self, digest: str, pixels: np.ndarray, original: tuple[int, int]) -> None:
        """Appends one image, `(height, width, 3)`."""
        self.file.write(pixels.data)
        values = (digest, self.size, *pixels.shape[:2], *original)
        for name, value in zip(FIELDS, values):
            self.index[name].append(value)
        self.size += pixels.nbytes

    def close(self) -> None:
        """Gives the pack its name, then its index; an index without its pack cannot be."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if self.size:
            with written_whole(self.path.with_suffix(".parquet")) as temporary:
                pyarrow.parquet.write_table(pa.table(self.index), temporary)
                self.aside.replace(self.path)

    def discard(self) -> None:
        """Forgets what has not been closed."""
        self.aside.unlink(missing_ok=True)
        with suppress(OSError):  # on a full disk closing writes once more, and fails once more
            self.file.close()
