"""Tables that name image files and their labels: CSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet

from vit_finetune.data.sources.cells import check_columns, read_flags, read_names
from vit_finetune.data.sources.folders import (
    ALL,
    SPLIT_NAMES,
    Folder,
    Listing,
    count_of,
    first_of,
    is_image_name,
    join,
    walk_folders,
)
from vit_finetune.data.sources.groups import group_names
from vit_finetune.recipe import DataConfig
from vit_finetune.run import RunError

SUFFIXES = (".csv", ".jsonl", ".parquet")
METADATA_NAMES = frozenset(f"metadata{suffix}" for suffix in SUFFIXES)
FILE_COLUMNS = ("file_name", "filename", "file", "path", "image_path", "image", "img")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target", "fine_label", "cls")


def find_tables(root: Path, folders: Sequence[Folder]) -> dict[str, Path]:
    """The metadata tables of a folder by split: at its top, or one at the top of each split's folder.

    The top is below folders that only wrap all others, as in most archives.

    Args:
        root: the folder.
        folders: what is below it, as `walk_folders` gives it.

    Raises:
        RunError: several tables for one split.
    """
    tables = [(path, name) for path, names in folders for name in names if name.lower() in METADATA_NAMES]
    if not tables:
        return {}
    depth = _wrapper_depth(
        [path.split("/") for path, names in folders if any(map(is_image_name, names))]
        + [path.split("/") for path, _ in tables]
    )
    found: dict[str, Path] = {}
    for path, name in tables:
        above = path.split("/")[depth:] if path else []
        split = SPLIT_NAMES.get(above[0].lower()) if above else ALL
        if split is None or len(above) > 1:
            continue
        if split in found:
            raise RunError(
                f"{root}: found both {found[split].name} and {join(path, name)}; expected one metadata table"
            )
        found[split] = root / path / name
    if ALL in found and len(found) > 1:
        raise RunError(
            f"{root}: found metadata tables at the top and in split folders; expected one or the other"
        )
    return found


def has_column_per_label(path: str, labels: Sequence[str]) -> bool | None:
    """Whether a table, or a folder's, has a column for each of these labels; None where there is no table.

    Of a .csv it is assumed, since its cells hold no lists.

    Raises:
        RunError: it cannot be read.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        tables = [*find_tables(place, walk_folders(place)).values()]
    else:
        tables = [place] if place.is_file() and place.suffix.lower() in SUFFIXES else []
    if not tables:
        return None
    return tables[0].suffix.lower() == ".csv" or set(labels) <= _read_headings(tables[0])


def _wrapper_depth(folders: Sequence[list[str]]) -> int:
    """How many folders all paths have in common, not counting from a split's folder on."""
    depth = 0
    # What the first and the last in sorted order have in common, all have.
    for one, other in zip(min(folders), max(folders)):
        if one != other or one.lower() in SPLIT_NAMES:
            break
        depth += 1
    return depth


class Row(NamedTuple):
    """What a table says about one image."""

    id: str
    label: str | list[str]
    """The class; or all labels, where images may have several."""
    group: str | None
    split: str | None
    """None where the table names none."""


def list_tables(
    root: Path, tables: dict[str, Path], config: DataConfig, folders: Iterable[Folder] = ()
) -> Listing:
    """Splits, classes and groups of the images that tables name.

    Args:
        root: the folder that ids are counted from.
        tables: by split; names in them are taken below their own folder.
        config: which columns to use.
        folders: what is below root; images there that no table names are mentioned.

    Raises:
        RunError: an unreadable table, unknown columns, a row without name or label or with several labels, a
            file that is not there, lies outside or is named twice.
    """
    splits: dict[str, list[Row]] = {}
    seen: set[str] = set()
    grouped = False
    for split, path in tables.items():
        rows, has_groups = _list_rows(root, path, config)
        grouped |= has_groups
        for row in rows:
            if row.id in seen:
                raise RunError(f"{path}: {row.id} is listed twice; expected each image in one row only")
            seen.add(row.id)
            splits.setdefault(row.split or split, []).append(row)
    if ALL in splits and len(splits) > 1:
        raise RunError(f"{root}: some rows of the table name a split and some do not; expected all or none")
    listing = Listing({split: _build_rows(rows, grouped) for split, rows in splits.items()})
    names = (join(path, name) for path, names in folders for name in names if is_image_name(name))
    unnamed = sorted(name for name in names if name not in seen)
    if unnamed:
        images = count_of(len(unnamed), "image")
        listing.notices.append(f"{images} that the metadata does not name left out: {first_of(unnamed)}")
    return listing


def _build_rows(rows: Sequence[Row], grouped: bool) -> pa.Table:
    several = bool(rows) and isinstance(rows[0].label, list)
    labels = pa.array([row.label for row in rows], pa.list_(pa.string()) if several else pa.string())
    table = pa.table({"id": pa.array([row.id for row in rows], pa.string()), "label": labels})
    if grouped:
        table = table.append_column("group", pa.array([row.group for row in rows], pa.string()))
    return table


def _list_rows(root: Path, path: Path, config: DataConfig) -> tuple[list[Row], bool]:
    """The rows of a table, and whether it has a column that names the groups."""
    rows = _read_table(path)
    if not rows:
        raise RunError(f"{path}: the table has no rows")
    # Objects of .jsonl may leave out what an image does not have, the first one, too.
    named = {column: None for row in rows for column in row} if path.suffix.lower() == ".jsonl" else rows[0]
    columns = [str(column) for column in named]
    file_column = find_column(path, columns, config.image_column, FILE_COLUMNS, "data.image_column")
    label_columns = _find_label_columns(path, columns, config)
    others = [column for column in columns if column not in label_columns]
    split_column = next((column for column in others if column.lower() == "split"), "")
    groups: list[str | None] = [None] * len(rows)
    if config.group in columns:
        groups = group_names(f"{path}: {config.group}", [row.get(config.group) for row in rows])
    prefix = path.parent.relative_to(root).as_posix()
    listed = []
    missing: list[str] = []
    for number, (row, group) in enumerate(zip(rows, groups), start=1):
        where = f"{path}: row {number}"
        name = row.get(file_column)
        if name is None or name == "":
            raise RunError(f"{where} has no {file_column}")
        if not isinstance(name, str):
            raise RunError(f"{where}: {file_column} holds {type(name).__name__}; expected file names")
        label = _label_of(where, row, label_columns, config)
        identity = PurePosixPath(prefix, name)
        if identity.is_absolute() or ".." in identity.parts:
            raise RunError(f"{where} names {name!r}, which lies outside {path.parent}")
        if not os.path.isfile(f"{root}/{identity}"):  # noqa: PTH113 - a Path for each row takes most of the time
            missing.append(name)
        listed.append(Row(str(identity), label, group, _split_of(where, row.get(split_column))))
    if missing:
        raise RunError(
            f"{path}: {len(missing):,} of {len(rows):,} files that it names are not there: "
            f"{first_of(missing, 5)}. Names are taken below {path.parent}"
        )
    return listed, config.group in columns


def _find_label_columns(path: Path, columns: Sequence[str], config: DataConfig) -> list[str]:
    """The column that holds the class, or a list of labels; or all columns, where there is one per label.

    Raises:
        RunError: they are not there, or lists are asked for where a cell holds a text.
    """
    if isinstance(config.label_column, list):
        check_columns(path, columns, config.label_column)
        return config.label_column
    if config.multi_label and path.suffix.lower() == ".csv":
        raise RunError(
            f"{path}: a cell of a .csv holds one text, which is no list of labels. Either make one column "
            f"per label, with 0 or 1 in its cells, and list them (data.label_column='[beach, people]'), or "
            f"write the table as .jsonl or .parquet with a column of lists"
        )
    return [find_column(path, columns, config.class_column, LABEL_COLUMNS, "data.label_column")]


def _label_of(where: str, row: dict[str, Any], columns: Sequence[str], config: DataConfig) -> str | list[str]:
    """The class that a row names; or all labels, where images may have several."""
    if isinstance(config.label_column, list):
        return read_flags(where, row, columns)
    label = row.get(columns[0])
    if config.multi_label:
        return read_names(where, columns[0], label)
    if label is None or label == "":
        raise RunError(f"{where} has no {columns[0]}")
    if isinstance(label, list | dict):
        raise RunError(
            f"{where} has several labels; expected one class per image. If images may have several, write "
            f"data.multi_label=true"
        )
    return str(label)


def _split_of(where: str, value: Any) -> str | None:
    if value is None or value == "":
        return None
    split = SPLIT_NAMES.get(str(value).lower())
    if split is None:
        # Taken for training images, a split of another name could be a test that leaks.
        raise RunError(f"{where}: found the split {value!r}; expected train, validation or test")
    return split


def _read_headings(path: Path) -> set[str]:
    """The columns of a table that is no .csv."""
    if path.suffix.lower() == ".jsonl":
        return {column for row in _read_table(path) for column in row}
    try:
        return {*pyarrow.parquet.read_schema(path).names}  # shards hold images, which are not needed here
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{path}: not a readable table: {error}") from error


def _read_table(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]]
    try:
        match path.suffix.lower():
            case ".csv":
                with path.open(newline="", encoding="utf-8-sig") as file:
                    reader = csv.DictReader(file)
                    rows = list(reader)
                    _check_headings(path, reader.fieldnames or [])
            case ".jsonl":
                with path.open(encoding="utf-8") as file:
                    rows = [json.loads(line) for line in file if line.strip()]
            case _:
                rows = pyarrow.parquet.read_table(path).to_pylist()
    except (ValueError, csv.Error, pa.ArrowException) as error:
        raise RunError(f"{path}: not a readable table: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise RunError(f'{path}: row {number} is {row!r}; expected an object such as {{"file_name": …}}')
        if None in row:  # where csv keeps what it has no heading for
            raise RunError(f"{path}: row {number} has more values than there are columns")
    return rows


def _check_headings(path: Path, headings: Sequence[str]) -> None:
    """Raises RunError where two columns have one name, of which csv would keep the last."""
    twice = [heading for number, heading in enumerate(headings) if heading in headings[:number]]
    if twice:
        raise RunError(f"{path}: two columns are called {twice[0]!r}; expected a name of its own for each")


def find_column(
    where: object, columns: Sequence[str], asked: str | None, usual: Iterable[str], key: str
) -> str:
    """The column that was asked for, or the first of the usual names that is there.

    Args:
        where: what has the columns, for messages.
        columns: their names.
        asked: the recipe's choice.
        usual: names in lower case.
        key: the recipe's key, for messages.

    Raises:
        RunError: neither is there.
    """
    found = ", ".join(columns)
    if asked is not None:
        if asked in columns:
            return asked
        raise RunError(f"{where}: there is no column {asked!r}; found {found}. Set {key}=…")
    by_lower = {column.lower(): column for column in columns}
    column = next((by_lower[name] for name in usual if name in by_lower), None)
    if column is None:
        raise RunError(f"{where}: found the columns {found}; say which one to use with {key}=…")
    return column
