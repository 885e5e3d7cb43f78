"""Sheets of pictures as PNG: images beside where a model looked in them, and what each head attends to."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vit_finetune.console import printable
from vit_finetune.files import written_whole
from vit_finetune.publishing.record import one_line

ROWS = 8
"""Images on one sheet."""
CELL = 2.4
"""Width and height of a picture on a sheet, in inches."""
DOTS_PER_INCH = 120
LONGEST_NAME = 70
"""Characters of a title; more would leave the sheet."""

_STYLE: Any = {
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
}  # a file may be "$5.jpg"


@dataclass(frozen=True)
class Row:
    """One image on a sheet."""

    title: str
    pictures: Sequence[Image.Image]
    """As many as the sheet has columns, RGB."""


def save_sheet(rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    """Writes a PNG with one row of pictures for each image, under its title.

    Args:
        rows: at most ROWS.
        columns: what the pictures are, from left to right.
        path: of the file.
    """
    with _figure(len(rows), len(columns)) as (figure, grid):
        for row, axes in zip(rows, grid):
            axes[0].text(0, 1.11, _line(row.title), transform=axes[0].transAxes, weight="bold")
            for place, picture, column in zip(axes, row.pictures, columns):
                place.imshow(picture)
                place.set_title(column, loc="left", fontsize=8, pad=3)
        _save(figure, path)


def save_heads(title: str, heads: Sequence[Image.Image], path: Path) -> None:
    """Writes a PNG with a picture for each head of a layer, four in a row, under one title."""
    columns = min(4, len(heads))
    lines = -(-len(heads) // columns)
    with _figure(lines, columns) as (figure, grid):
        figure.suptitle(_line(title), x=0.02, ha="left", weight="bold", fontsize=9)
        places = [place for line in grid for place in line]
        for number, (place, head) in enumerate(zip(places, heads), 1):
            place.imshow(head)
            place.set_title(f"head {number}", loc="left", fontsize=8, pad=3)
        _save(figure, path)


def _line(text: str) -> str:
    return printable(one_line(text, LONGEST_NAME))


@contextmanager
def _figure(rows: int, columns: int) -> Iterator[tuple[Figure, list[list[Axes]]]]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(
            figsize=(CELL * columns, (CELL + 0.5) * rows), layout="constrained", dpi=DOTS_PER_INCH
        )
        grid = figure.subplots(rows, columns, squeeze=False).tolist()
        for line in grid:
            for place in line:
                place.axis("off")
        yield figure, grid


def _save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings(), written_whole(path) as temporary:
        # Names in scripts that matplotlib's font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        figure.savefig(temporary, format="png", bbox_inches="tight", pad_inches=0.1)
