"""What is wrong with images one by one: what cannot be read, odd pixels, odd sizes, odd files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
from PIL import Image

from vit_finetune.data.sources.columns import Source, column_values
from vit_finetune.data.sources.folders import count_of
from vit_finetune.data.sources.labels import is_multi_label, label_pairs, label_texts, spoken
from vit_finetune.run import Finding, FoundImage

HUGE = 40_000_000
"""Pixels above which decoding one image takes about half a second of a core."""

SMALL = 32
"""Pixels of the shorter side from which on no image is called tiny, however large the others are."""

ELONGATED = 5
"""Longer by shorter side from which on squashing or cropping leaves little of an image."""


@dataclass(frozen=True)
class Images:
    """All images of a source, one behind the other, with what reading them told."""

    splits: list[str]
    """Names of the source's splits."""
    split: np.ndarray
    """Position in `splits`, int64 `(n,)`."""
    ids: list[str]
    label: np.ndarray
    """What each image is labelled as, position in `texts`, int64 `(n,)`: the class id, where it has one."""
    texts: list[str]
    """The class names; or all different sets of labels, each as one text."""
    pairs: tuple[np.ndarray, np.ndarray]
    """Row and class id of each label that an image has, both int64 `(pairs,)`."""
    labels: list[str]
    """Class names in id order."""
    group: list[str | None]
    """The group that an image is never parted from; None where it has none."""
    readings: pa.Table
    """Columns as in `readings.SCHEMA`."""

    def column(self, name: str) -> np.ndarray:
        """One column of the readings."""
        values: np.ndarray = self.readings[name].to_numpy()
        return values

    @property
    def digests(self) -> pa.Array:
        """Content hashes, strings; empty of what could not be opened."""
        return self.readings["digest"].combine_chunks()

    @property
    def readable(self) -> np.ndarray:
        """Which images could be decoded, bool `(n,)`."""
        readable: np.ndarray = pa.compute.equal(self.readings["problem"], "").to_numpy()
        return readable

    def count_classes(self, rows: np.ndarray) -> np.ndarray:
        """How many of some images, bool `(n,)`, have each class, int64 `(classes,)`."""
        row, label = self.pairs
        return np.bincount(label[rows[row]], minlength=len(self.labels))

    def found(
        self,
        rows: Iterable[int],
        detail: Callable[[int], str] = lambda row: "",
        groups: Iterable[int] | None = None,
    ) -> list[FoundImage]:
        """The images of some rows, with what is to be said of each."""
        numbers: Iterable[int | None] = groups if groups is not None else [None] * len(self.ids)
        return [
            FoundImage(split=self.splits[self.split[row]], id=self.ids[row], detail=detail(row), group=number)
            for row, number in zip(map(int, rows), numbers)
        ]


def gather_images(source: Source, readings: dict[str, pa.Table]) -> Images:
    """The images of a source with their readings.

    Args:
        source: datasets with the columns id and label, and group where images belong to groups.
        readings: by split, row for row.
    """

    def values(dataset: datasets.Dataset, column: str) -> list[str | None]:
        return column_values(dataset, column) if column in dataset.features else [None] * len(dataset)

    parts = list(source.splits.values())
    starts = np.cumsum([0, *map(len, parts)])
    pairs = [label_pairs(part) for part in parts]
    rows = np.concatenate([start + row for start, (row, _) in zip(starts, pairs)])
    ids = np.concatenate([label for _, label in pairs])
    label, texts = ids, source.labels
    if any(map(is_multi_label, parts)):
        sets = pa.concat_arrays([label_texts(part) for part in parts]).dictionary_encode()
        label = sets.indices.to_numpy().astype(np.int64)
        texts = [spoken(json.loads(text)) for text in sets.dictionary.to_pylist()]
    return Images(
        list(source.splits),
        np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
        [identity for part in parts for identity in column_values(part, "id")],
        label,
        texts,
        (rows, ids),
        source.labels,
        [group for part in parts for group in values(part, "group")],
        pa.concat_tables([readings[split] for split in source.splits]).combine_chunks(),
    )


def find_unreadable(images: Images, skip: bool) -> list[Finding]:
    """Findings about images that cannot be decoded: errors, or warnings where they are left out.

    Args:
        images: all of them.
        skip: whether they are left out.
    """
    problems = images.readings["problem"].to_pylist()
    bad = np.flatnonzero(~images.readable)
    cut = [row for row in bad if problems[row].startswith("truncated")]
    other = [row for row in bad if not problems[row].startswith("truncated")]
    advice = (
        "Repair or remove them"
        if skip
        else "Repair or remove them, or leave them out with data.on_unreadable=skip"
    )
    return [
        Finding(
            kind=kind,
            severity="warning" if skip else "error",
            message=f"{len(rows):,} of {len(problems):,} images {what}{', and left out' if skip else ''}",
            advice=advice,
            count=len(rows),
            images=(listed := images.found(map(int, rows), lambda row: problems[row])),
            exclude=listed,
        )
        for kind, what, rows in (
            ("unreadable", "cannot be read", other),
            ("truncated", "are truncated", cut),
        )
        if rows
    ]


def find_odd_images(images: Images) -> list[Finding]:
    """Findings about images that can be decoded, one kind each."""
    good = images.readable
    return [
        finding
        for finding in (*_find_pixels(images, good), *_find_sizes(images, good), *_find_files(images, good))
        if finding.count
    ]


def _finding(
    images: Images,
    kind: str,
    severity: Literal["warning", "note"],
    which: np.ndarray,
    message: str,
    advice: str,
    detail: Callable[[int], str] = lambda row: "",
    exclude: bool = False,
) -> Finding:
    """A finding about some images, bool `(n,)`; `message` goes on after "1 image" or "12 images"."""
    rows = np.flatnonzero(which)
    listed = images.found(rows, detail)
    return Finding(
        kind=kind,
        severity=severity,
        message=f"{count_of(len(rows), 'image')} {message}",
        advice=advice,
        count=len(rows),
        images=listed,
        exclude=listed if exclude else [],
    )


def _find_pixels(images: Images, good: np.ndarray) -> list[Finding]:
    mode = images.column("mode").astype(str)
    grey = good & np.isin(mode, ["L", "LA", "1"])
    deep = good & np.char.startswith(mode, "I")
    usual = np.isin(mode, ["RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "CMYK", "YCbCr", "1"])
    # Where all are grey, as digits are, none is odd.
    mixed = grey if (good & ~grey & ~deep).any() else np.zeros(len(good), bool)
    return [
        _finding(
            images, "blank", "warning", good & images.column("blank"), "of one single colour",
            "Look whether they are placeholders; data.exclude leaves them out", exclude=True,
        ),
        _finding(
            images, "transparent", "note", good & images.column("transparent"),
            "with transparent pixels, whose colours show once transparency is dropped",
            "Save them on the background that they are meant to have",
        ),
        _finding(
            images, "greyscale", "note", mixed, "in greyscale among coloured ones",
            "Where they belong to some classes only, the model learns that instead: convert all, or none",
        ),
        _finding(
            images, "cmyk", "note", good & (mode == "CMYK"), "in CMYK, the colours of printing",
            "They become RGB without a colour profile; convert them yourself if their colours look wrong",
        ),
        _finding(
            images, "sixteen-bit", "note", deep, "with 16 bits or more, of which the upper 8 are used",
            "Stretch them to 8 bits yourself if what matters lies in a part of the range",
            lambda row: str(mode[row]),
        ),
        _finding(
            images, "odd-mode", "note", good & ~deep & ~usual, "with pixels of an unusual kind",
            "They become RGB; look at them here, or save them as RGB", lambda row: str(mode[row]),
        ),
    ]  # fmt: skip


def _find_sizes(images: Images, good: np.ndarray) -> list[Finding]:
    width, height = images.column("width").astype(np.int64), images.column("height").astype(np.int64)
    short, long = np.minimum(width, height), np.maximum(width, height)
    usual = float(np.median(short[good])) if good.any() else 0.0

    def size(row: int) -> str:
        return f"{width[row]}×{height[row]}"

    return [
        _finding(
            images, "tiny", "warning", good & (short < max(4, min(usual / 4, SMALL))),
            f"much smaller than the others, whose shorter side is {usual:.0f} pixels in the middle",
            "Look whether they are thumbnails or icons; data.exclude leaves them out", size, exclude=True,
        ),
        _finding(
            images, "huge", "note", good & (width * height > HUGE),
            f"of more than {HUGE // 1_000_000} megapixels",
            "Decoding them takes most of the time; shrink them once", size,
        ),
        _finding(
            images, "elongated", "note", good & (long >= ELONGATED * short),
            f"at least {ELONGATED} times as long as wide",
            "Fitting them to the model squashes or crops most away; look whether they are banners",
            size,
        ),
    ]  # fmt: skip


def _find_files(images: Images, good: np.ndarray) -> list[Finding]:
    orientation, frames, kind = (images.column(name) for name in ("orientation", "frames", "format"))
    return [
        _finding(
            images, "exif-rotated", "note", good & (orientation != 1),
            "turned by an EXIF tag, which is obeyed here",
            "Programs that ignore the tag see them on their side: turn the pixels if the model is used there",
            lambda row: f"orientation {orientation[row]}",
        ),
        _finding(
            images, "animated", "warning", good & (frames > 1), "with several frames; the first is used",
            "Save the frame that you mean", lambda row: f"{frames[row]} frames",
        ),
        _finding(
            images, "wrong-suffix", "note", good & _misnamed(images.ids, kind.tolist()),
            "of another format than their names say", "Rename them: other programs may refuse them",
            lambda row: str(kind[row]),
        ),
    ]  # fmt: skip


def _misnamed(ids: Sequence[str], formats: Sequence[str]) -> np.ndarray:
    """Which files have an ending that belongs to another format than theirs, bool `(n,)`."""
    meant = Image.registered_extensions()
    same = {"MPO": "JPEG"}  # a JPEG with more behind it
    wrong = np.zeros(len(ids), bool)
    for row, (name, kind) in enumerate(zip(ids, formats)):
        expected = meant.get(name[name.rfind(".") :].lower())
        wrong[row] = bool(expected and kind) and same.get(str(expected), expected) != same.get(kind, kind)
    return wrong
