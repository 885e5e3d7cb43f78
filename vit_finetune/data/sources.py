"""Folder, archive, table, Hub id or built-in name → images and labels of each split that the source itself has."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from vit_finetune.data.archives import is_archive, unpack
from vit_finetune.data.folders import ALL, SPLIT_NAMES, Listing, list_folder, natural_key, walk_files
from vit_finetune.recipe import DataConfig
from vit_finetune.run import RunError

TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")
FILE_COLUMNS = ("file_name", "filename", "file", "path", "image_path", "image", "img")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target", "fine_label")


@dataclass
class Source:
    """What a data source holds before anything is carved: datasets with the columns id, image and label."""

    kind: str
    """folder, archive, table, hub or built-in."""
    splits: dict[str, datasets.Dataset]
    """By train, validation and test, or all under `all` where the source has no splits."""
    labels: list[str]
    """Class names in id order, the same for every split."""
    notices: list[str] = field(default_factory=list)


def load_source(config: DataConfig) -> Source:
    """The images of a data source, undecoded, by the splits that it has.

    Raises:
        RunError: nothing there, no images, no labels, one class only, or class lists that differ between splits.
    """
    if config.path == "digits":
        return _digits()
    path = Path(config.path).expanduser()
    if path.is_dir():
        return _from_folder(path, config, "folder")
    if path.is_file():
        if is_archive(path):
            return _from_folder(unpack(path), config, "archive")
        if path.suffix.lower() in TABLE_SUFFIXES:
            return _from_listing("table", path.parent, _list_tables(path.parent, {ALL: path}, config))
        raise RunError(f"{path}: expected a folder, an archive (.zip, .tar…) or a table ({', '.join(TABLE_SUFFIXES)})")
    # A Hub id has an owner; a path that does not exist should not send anybody to the network.
    if re.fullmatch(r"[\w.-]+/[\w.-]+", config.path) and not config.path.startswith("."):
        return _from_hub(config)
    raise RunError(
        f"{config.path}: no such folder or file. Expected a folder of images, an archive, a table, a Hub dataset id "
        f"(owner/name) or `digits`; set data.path=…"
    )


def with_labels(dataset: datasets.Dataset, labels: Sequence[str]) -> datasets.Dataset:
    """The same images with their class ids counted in another order of the same class names."""
    names = dataset.features["label"].names
    if list(names) == list(labels):
        return dataset
    ids = [labels.index(names[label]) for label in column_values(dataset, "label")]
    renumbered = dataset.remove_columns("label").add_column("label", ids)
    return renumbered.cast_column("label", datasets.ClassLabel(names=list(labels)))


def column_values(dataset: datasets.Dataset, column: str) -> list[Any]:
    """A column as a list; iterating the dataset's own column object is a hundred times slower."""
    values: list[Any] = dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    return values


def is_hub_id(path: str) -> bool:
    """Whether `data.path` names a dataset of the Hub rather than something on this machine."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", path)) and not Path(path).expanduser().exists()


# --------------------------------------------------------------------------- folders and tables


def _from_folder(root: Path, config: DataConfig, kind: str) -> Source:
    files = walk_files(root)
    tables = _metadata_tables(root, files)
    if tables:
        listing = _list_tables(root, tables, config)
    else:
        listing = list_folder(root, files, config.class_folder)
    return _from_listing(kind, root, listing)


def _metadata_tables(root: Path, files: list[str]) -> dict[str, Path]:
    """The metadata tables of a folder by split: at its top, or one at the top of each split's folder."""
    found: dict[str, Path] = {}
    for name in files:
        path = PurePosixPath(name)
        if path.stem != "metadata" or path.suffix.lower() not in TABLE_SUFFIXES or len(path.parts) > 2:
            continue
        split = ALL if len(path.parts) == 1 else SPLIT_NAMES.get(path.parts[0].lower())
        if split is None:
            continue
        if split in found:
            raise RunError(f"{root}: found both {found[split].name} and {name}; expected one metadata table")
        found[split] = root / name
    if ALL in found and len(found) > 1:
        raise RunError(f"{root}: found metadata tables at the top and in split folders; expected one or the other")
    return found


def _list_tables(root: Path, tables: dict[str, Path], config: DataConfig) -> Listing:
    listing = Listing({})
    for split, path in tables.items():
        rows = _read_table(path)
        if not rows:
            raise RunError(f"{path}: the table has no rows")
        columns = list(rows[0])
        file_column = _column(path, columns, config.image_column, FILE_COLUMNS, "data.image_column")
        label_column = _column(path, columns, config.label_column, LABEL_COLUMNS, "data.label_column")
        prefix = path.parent.relative_to(root).as_posix()
        missing: list[str] = []
        for number, row in enumerate(rows):
            name, label = row.get(file_column), row.get(label_column)
            if isinstance(label, list | dict):
                raise RunError(f"{path}: row {number} has several labels; expected one class per image")
            if name is None or label is None or label == "":
                raise RunError(f"{path}: row {number} has no {file_column if not name else label_column}")
            identity = PurePosixPath(prefix, str(name))
            if identity.is_absolute() or ".." in identity.parts:
                raise RunError(f"{path}: row {number} names {name!r}, which lies outside {root}")
            if not (root / identity).is_file():
                missing.append(str(name))
            row_split = SPLIT_NAMES.get(str(row.get("split", "")).lower(), split)
            listing.splits.setdefault(row_split, []).append((str(identity), str(label)))
        if missing:
            raise RunError(
                f"{path}: {len(missing):,} of {len(rows):,} files that it names are not there: "
                f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}. Names are taken below {path.parent}"
            )
    if ALL in listing.splits and len(listing.splits) > 1:
        raise RunError(f"{root}: some rows of the table name a split and some do not")
    return listing


def _read_table(path: Path) -> list[dict[str, Any]]:
    try:
        match path.suffix.lower():
            case ".csv":
                with path.open(newline="", encoding="utf-8-sig") as file:
                    return list(csv.DictReader(file))
            case ".jsonl":
                with path.open(encoding="utf-8") as file:
                    return [json.loads(line) for line in file if line.strip()]
            case _:
                rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
                return rows
    except (ValueError, csv.Error, pa.ArrowException) as error:
        raise RunError(f"{path}: not a readable table: {error}") from error


def _column(where: object, columns: Sequence[str], asked: str | None, usual: Iterable[str], key: str) -> str:
    """The column that was asked for, or the first of the usual names that is there."""
    if asked is not None:
        if asked in columns:
            return asked
        raise RunError(f"{where}: there is no column {asked!r}; found {', '.join(columns)}. Set {key}=…")
    by_lower = {column.lower(): column for column in columns}
    found = next((by_lower[name] for name in usual if name in by_lower), None)
    if found is None:
        raise RunError(f"{where}: found the columns {', '.join(columns)}; say which one to use with {key}=…")
    return found


def _from_listing(kind: str, root: Path, listing: Listing) -> Source:
    labels = _common_labels(str(root), {split: {y for _, y in rows} for split, rows in listing.splits.items()})
    ids = {label: number for number, label in enumerate(labels)}
    prefix = f"{root}/"
    splits = {}
    for split, rows in listing.splits.items():
        names = [name for name, _ in rows]
        if len(set(names)) < len(names):
            twice = next(name for i, name in enumerate(names) if name in set(names[:i]))
            raise RunError(f"{root}: {twice} is listed twice")
        images = pa.StructArray.from_arrays(
            [pa.nulls(len(names), pa.binary()), pa.array([prefix + name for name in names], pa.string())],
            names=["bytes", "path"],
        )
        splits[split] = build_dataset(names, images, [ids[label] for _, label in rows], labels)
    return Source(kind, splits, labels, listing.notices + _missing_classes(splits, labels))


def build_dataset(
    ids: Sequence[str], images: pa.StructArray, label_ids: Sequence[int], labels: Sequence[str]
) -> datasets.Dataset:
    """A dataset with the columns id, image and label.

    Args:
        ids: one distinct name per image.
        images: structs of `bytes` and `path`, as `datasets.Image` stores them.
        label_ids: class ids, positions in `labels`.
        labels: class names.
    """
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(labels)),
        }
    )
    table = pa.table(
        {"id": pa.array(ids, pa.string()), "image": images, "label": pa.array(label_ids, pa.int64())},
        schema=features.arrow_schema,
    )
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def _common_labels(where: str, classes: dict[str, set[str]]) -> list[str]:
    """The class names of all splits in natural order.

    Raises:
        RunError: fewer than two classes, or a class that the training images lack.
    """
    known = classes.get("train") or classes.get(ALL) or set().union(*classes.values())
    labels = sorted(known, key=natural_key)
    for split, names in classes.items():
        unknown = sorted(names - known, key=natural_key)
        if unknown:
            absent = sorted(known - names, key=natural_key)
            raise RunError(
                f"{where}: the classes of {split} differ from those of train: {', '.join(map(repr, unknown))} "
                f"{'is' if len(unknown) == 1 else 'are'} only in {split}"
                + (f", {', '.join(map(repr, absent))} only in train" if absent else "")
                + ". Expected the same class names in every split"
            )
    if len(labels) < 2:
        raise RunError(
            f"{where}: found one class only ({', '.join(map(repr, labels))}). Expected at least two class folders"
        )
    return labels


def _missing_classes(splits: dict[str, datasets.Dataset], labels: list[str]) -> list[str]:
    notices = []
    for split, dataset in splits.items():
        present = set(column_values(dataset, "label"))
        absent = [label for number, label in enumerate(labels) if number not in present]
        if absent and split != "train":
            notices.append(f"{split} has no image of {', '.join(absent[:8])}{' …' if len(absent) > 8 else ''}")
    return notices


# --------------------------------------------------------------------------- the Hub and what is built in


def _from_hub(config: DataConfig) -> Source:
    try:
        loaded = datasets.load_dataset(config.path, name=config.subset, revision=config.revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(
            f"{config.path}: could not be loaded from the Hub ({type(error).__name__}: {error}). It is no folder or "
            f"file on this machine either; set data.path=…"
        ) from error
    return arrange_columns(loaded, config)


def arrange_columns(loaded: datasets.DatasetDict, config: DataConfig) -> Source:
    """A Hub dataset under our split and column names, with the row's number as its id.

    Raises:
        RunError: columns or splits that cannot be told apart.
    """
    splits: dict[str, datasets.Dataset] = {}
    for name, dataset in loaded.items():
        split = SPLIT_NAMES.get(str(name).lower())
        if split is None and len(loaded) == 1:
            split = ALL
        if split is not None:
            splits[split] = dataset
    if not splits:
        raise RunError(f"{config.path}: found the splits {', '.join(loaded)}; expected train, validation or test")
    features = next(iter(splits.values())).features
    image = _typed_column(config, features, config.image_column, datasets.Image, "data.image_column")
    label = _typed_column(config, features, config.label_column, datasets.ClassLabel, "data.label_column")
    for split, dataset in splits.items():
        dataset = dataset.select_columns([image, label])
        if not isinstance(features[label], datasets.ClassLabel):
            dataset = dataset.class_encode_column(label)
        dataset = dataset.rename_columns({image: "image", label: "label"})
        splits[split] = dataset.add_column("id", [str(number) for number in range(len(dataset))])
    labels = list(next(iter(splits.values())).features["label"].names)
    for split, dataset in splits.items():
        if list(dataset.features["label"].names) != labels:
            raise RunError(f"{config.path}: the classes of {split} differ from those of the other splits")
    if len(labels) < 2:
        raise RunError(f"{config.path}: found one class only ({labels}); expected at least two")
    left_out = [str(name) for name in loaded if SPLIT_NAMES.get(str(name).lower()) is None and ALL not in splits]
    notices = [f"splits left out: {', '.join(left_out)}"] if left_out else []
    return Source("hub", splits, labels, notices + _missing_classes(splits, labels))


def _typed_column(config: DataConfig, features: Any, asked: str | None, kind: type, key: str) -> str:
    if asked is None:
        typed = [name for name, feature in features.items() if isinstance(feature, kind)]
        if len(typed) == 1:
            return str(typed[0])
    usual = FILE_COLUMNS if kind is datasets.Image else LABEL_COLUMNS
    return _column(config.path, list(features), asked, usual, key)


def _digits() -> Source:
    """scikit-learn's 1,797 handwritten digits, 8×8 pixels, as 8-bit greyscale PNG."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    encoded = []
    for pixels in digits.images:  # (8, 8), 0 to 16
        buffer = io.BytesIO()
        Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8)).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    images = pa.StructArray.from_arrays(
        [pa.array(encoded, pa.binary()), pa.nulls(len(encoded), pa.string())], names=["bytes", "path"]
    )
    labels = [str(name) for name in digits.target_names]
    ids = [str(number) for number in range(len(encoded))]
    return Source("built-in", {ALL: build_dataset(ids, images, digits.target.tolist(), labels)}, labels)
