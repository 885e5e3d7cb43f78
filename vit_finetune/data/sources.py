"""Folder, archive, table, Hub id or built-in name → images and labels of each split that the source has."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vit_finetune.data.archives import cache_dir, is_archive, unpack
from vit_finetune.data.folders import (
    ALL,
    SPLIT_NAMES,
    Listing,
    count_of,
    first_of,
    list_folder,
    natural_key,
    walk_folders,
)
from vit_finetune.data.groups import group_names, match_groups
from vit_finetune.data.shards import (
    Shards,
    distinct_labels,
    find_shards,
    image_column,
    label_column,
    number_labels,
    read_class_names,
)
from vit_finetune.data.tables import FILE_COLUMNS, LABEL_COLUMNS, find_column, find_tables, list_tables
from vit_finetune.data.tables import SUFFIXES as TABLE_SUFFIXES
from vit_finetune.data.webdataset import index_webdataset
from vit_finetune.recipe import DataConfig
from vit_finetune.run import RunError


@dataclass
class Source:
    """What a data source holds before anything is carved: datasets with the columns id, image and label.

    Where the recipe says how images are grouped there is a string column group, None for those in no group.
    """

    kind: str
    """folder, archive, table, webdataset, parquet, hub or built-in."""
    splits: dict[str, datasets.Dataset]
    """By train, validation and test, or all under `all` where the source has no splits."""
    labels: list[str]
    """Class names in id order, the same for every split."""
    notices: list[str] = field(default_factory=list)


def load_source(config: DataConfig) -> Source:
    """The images of a data source, undecoded, by the splits that it has.

    Raises:
        RunError: nothing there, no images, no labels, one class only, class lists that differ between
            splits, or groups that are nowhere to be found.
    """
    source = _open_source(config)
    return source if config.group is None else _with_groups(source, config.path, config.group)


def _open_source(config: DataConfig) -> Source:
    if config.path == "digits":
        return _digits()
    shards = find_shards(config.path)
    if shards:
        return _from_parquet(shards, config) if shards.kind == "parquet" else _from_webdataset(shards, config)
    path = Path(config.path).expanduser()
    if path.is_dir():
        return _from_folder(path, config, "folder")
    if path.is_file():
        if is_archive(path):
            return _from_folder(unpack(path), config, "archive")
        if path.suffix.lower() in TABLE_SUFFIXES:
            return _from_listing("table", path.parent, list_tables(path.parent, {ALL: path}, config))
        kinds = ", ".join(TABLE_SUFFIXES)
        raise RunError(f"{path}: expected a folder, an archive (.zip, .tar…) or a table ({kinds})")
    if is_hub_id(config.path):
        return _from_hub(config)
    raise RunError(
        f"{config.path}: no such folder or file. Expected a folder of images, an archive, a table, a Hub "
        f"dataset id (owner/name) or `digits`; set data.path=…"
    )


def is_hub_id(path: str) -> bool:
    """Whether `data.path` names a dataset of the Hub rather than something on this machine.

    A Hub id has an owner; a misspelt path, archive or table should not send anybody to the network.
    """
    looks = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None
    is_file_name = is_archive(Path(path)) or Path(path).suffix.lower() in TABLE_SUFFIXES
    return looks and not is_file_name and not Path(path).exists()


def with_labels(dataset: datasets.Dataset, labels: Sequence[str]) -> datasets.Dataset:
    """The same images with their class ids counted in another order of the same class names."""
    names = dataset.features["label"].names
    if list(names) == list(labels):
        return dataset
    ids = {label: number for number, label in enumerate(labels)}
    renumbered = [ids[names[label]] for label in column_values(dataset, "label")]
    return dataset.remove_columns("label").add_column(
        "label", renumbered, feature=datasets.ClassLabel(names=list(labels))
    )


def column_values(dataset: datasets.Dataset, column: str) -> list[Any]:
    """A column as a list; iterating the dataset's own column object is a hundred times slower."""
    values: list[Any] = column_array(dataset, column).to_pylist()
    return values


def column_array(dataset: datasets.Dataset, column: str) -> pa.ChunkedArray:
    """A column as Arrow keeps it: a million rows without a Python object for each."""
    return dataset.select_columns([column]).with_format("arrow")[:][column]


# --------------------------------------------------------------------------- folders and tables


def _from_folder(root: Path, config: DataConfig, kind: str) -> Source:
    folders = walk_folders(root)
    tables = find_tables(root, folders)
    if tables:
        return _from_listing(kind, root, list_tables(root, tables, config, folders))
    return _from_listing(kind, root, list_folder(root, folders, config.class_folder))


def _from_listing(kind: str, root: Path, listing: Listing) -> Source:
    labels = common_labels(
        str(root), {split: set(rows["label"].unique().to_pylist()) for split, rows in listing.splits.items()}
    )
    splits = {}
    for split, rows in listing.splits.items():
        ids = rows["id"].combine_chunks()
        paths = pc.binary_join_element_wise(pa.scalar(f"{root}/"), ids, "")
        images = pa.StructArray.from_arrays([pa.nulls(len(ids), pa.binary()), paths], names=["bytes", "path"])
        label_ids = pc.index_in(rows["label"], value_set=pa.array(labels)).combine_chunks()
        groups = rows["group"].combine_chunks() if "group" in rows.column_names else None
        splits[split] = build_dataset(ids, images, label_ids.cast(pa.int64()), labels, groups)
    return Source(kind, splits, labels, listing.notices)


def build_dataset(
    ids: Sequence[str] | pa.Array,
    images: pa.StructArray,
    label_ids: Sequence[int] | pa.Array,
    labels: Sequence[str],
    groups: pa.Array | None = None,
) -> datasets.Dataset:
    """A dataset with the columns id, image and label, and where groups are given group.

    Args:
        ids: one distinct name per image.
        images: structs of `bytes` and `path`, as `datasets.Image` stores them.
        label_ids: class ids, int64, positions in `labels`.
        labels: class names.
        groups: names of groups, strings or null.
    """
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(labels)),
        }
        | ({} if groups is None else {"group": datasets.Value("string")})
    )
    columns = {
        "id": ids if isinstance(ids, pa.Array) else pa.array(ids, pa.string()),
        "image": images,
        "label": label_ids if isinstance(label_ids, pa.Array) else pa.array(label_ids, pa.int64()),
    } | ({} if groups is None else {"group": groups})
    table = datasets.table.InMemoryTable(pa.table(columns, schema=features.arrow_schema))
    # A fingerprint of its own, as for any new dataset: taking it from the content would pickle all of it.
    return datasets.Dataset(table, fingerprint=datasets.fingerprint.generate_random_fingerprint())


def _with_groups(source: Source, path: str, group: str) -> Source:
    """The source with a column group in every split, by a pattern in the ids where no column names it."""
    splits, alone, total = dict(source.splits), [], 0
    is_column = any("group" in split.column_names for split in splits.values())
    for name, split in splits.items():
        ids = column_values(split, "id")
        if "group" in split.column_names:
            groups = column_values(split, "group")
        else:
            groups = [None] * len(ids) if is_column else match_groups(path, ids, group)
            splits[name] = split.add_column("group", groups, feature=datasets.Value("string"))
        alone += [identity for identity, value in zip(ids, groups) if value is None]
        total += len(ids)
    if len(alone) == total:
        what = (
            "has no value in any row" if is_column else "is no column of the data and matches no image's id"
        )
        raise RunError(
            f"{path}: data.group={group} {what}; the {count_of(total, 'image')} are called {first_of(alone)}"
        )
    notices = list(source.notices)
    if alone:
        notices.append(
            f"{count_of(len(alone), 'image')} in no group of data.group={group}: {first_of(alone)}"
        )
    return Source(source.kind, splits, source.labels, notices)


def common_labels(where: str, classes: dict[str, set[str]]) -> list[str]:
    """The class names of all splits in natural order.

    Raises:
        RunError: fewer than two classes, or a class that the training images lack.
    """
    known = classes.get("train") or classes.get(ALL) or set().union(*classes.values())
    for split, names in classes.items():
        unknown = sorted(names - known, key=natural_key)
        if unknown:
            absent = sorted(known - names, key=natural_key)
            are = "is" if len(unknown) == 1 else "are"
            raise RunError(
                f"{where}: the classes of {split} differ from those of train: "
                f"{', '.join(map(repr, unknown))} {are} only in {split}"
                + (f", {', '.join(map(repr, absent))} only in train" if absent else "")
                + ". Expected the same class names in every split"
            )
    if len(known) < 2:
        found = f" ({', '.join(map(repr, known))})" if known else ""
        number = "one class only" if known else "no class"
        raise RunError(f"{where}: found {number}{found}. Expected at least two classes")
    return sorted(known, key=natural_key)


# --------------------------------------------------------------------------- shards


def _from_webdataset(shards: Shards, config: DataConfig) -> Source:
    """The samples of WebDataset tars by their indices; no image is read."""
    names = read_class_names(shards.root)
    indices = {
        split: datasets.concatenate_datasets(
            [index_webdataset(shard, shards.name_of(shard), config) for shard in files]
        )
        for split, files in shards.files.items()
    }
    if names is None:
        classes = {split: set(distinct_labels(index)[0]) for split, index in indices.items()}
        names = common_labels(config.path, classes)
    splits = {split: number_labels(index, names, config.path) for split, index in indices.items()}
    return Source("webdataset", splits, names)


def _from_parquet(shards: Shards, config: DataConfig) -> Source:
    """Parquet files with image bytes, as an Arrow copy that is memory-mapped from the cache."""
    first = next(iter(shards.files.values()))[0]
    image, label = image_column(first, config), label_column(first, config)
    files = {
        "train" if split == ALL else split: [str(shard) for shard in files]
        for split, files in shards.files.items()
    }
    try:
        loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(cache_dir() / "parquet"))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise RunError(f"{config.path}: could not be read ({error}: {error.__cause__})") from error
    group = [config.group] if config.group in loaded[next(iter(loaded))].features else []
    loaded = loaded.select_columns([image, label, *group]).cast_column(image, datasets.Image())
    names = read_class_names(shards.root)
    if names and not isinstance(loaded[next(iter(loaded))].features[label], datasets.ClassLabel):
        loaded = loaded.cast_column(label, datasets.ClassLabel(names=names))
    chosen = config.model_copy(update={"image_column": image, "label_column": label})
    source = arrange_columns(loaded, chosen)
    return Source("parquet", source.splits, source.labels, source.notices)


# --------------------------------------------------------------------------- the Hub and what is built in


def _from_hub(config: DataConfig) -> Source:
    try:
        loaded = datasets.load_dataset(config.path, name=config.subset, revision=config.revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise RunError(
            f"{config.path}: could not be loaded from the Hub ({type(error).__name__}: {error}). It is no "
            f"folder or file on this machine either; set data.path=…"
        ) from error
    return arrange_columns(loaded, config)


def arrange_columns(loaded: datasets.DatasetDict, config: DataConfig) -> Source:
    """A Hub dataset under our split and column names, with the row's number as its id.

    Classes keep the dataset's own order where it has one, else they are sorted naturally.

    Raises:
        RunError: columns or splits that cannot be told apart, several labels per image, one class only, or
            class lists that differ between splits.
    """
    notices: list[str] = []
    splits = _name_splits(loaded, config, notices)
    features = splits.get("train", next(iter(splits.values()))).features
    image = typed_column(config, features, config.image_column, datasets.Image, "data.image_column")
    if not isinstance(features[image], datasets.Image):
        raise RunError(f"{config.path}: the column {image} holds {features[image]}; expected images")
    label = typed_column(config, features, config.label_column, datasets.ClassLabel, "data.label_column")
    labels_of: dict[str, list[str | None]] = {}
    classes: dict[str, set[str]] = {}
    for split, dataset in list(splits.items()):
        if split == "test" and label not in dataset.features:
            labels_of[split], classes[split] = [None] * len(dataset), set()
        else:
            labels_of[split], classes[split] = _row_labels(f"{config.path}: {split}", dataset, image, label)
        unlabelled = labels_of[split].count(None)
        if unlabelled == len(dataset) and split == "test" and len(splits) > 1:
            # Competitions publish their test images without labels, or with -1.
            notices.append(f"test has no labels: its {count_of(unlabelled, 'image')} left out")
            del splits[split], classes[split]
        elif unlabelled:
            notices.append(f"{count_of(unlabelled, 'image')} of {split} left out: they have no label")
    labels = common_labels(config.path, classes)
    if isinstance(features[label], datasets.ClassLabel):
        labels = list(features[label].names)
    arranged = {
        split: _arrange_rows(dataset, image, labels_of[split], labels, config.group)
        for split, dataset in splits.items()
    }
    return Source("hub", arranged, labels, notices)


def _name_splits(
    loaded: datasets.DatasetDict, config: DataConfig, notices: list[str]
) -> dict[str, datasets.Dataset]:
    """The splits under our names; others are left out, unless there is only one."""
    splits: dict[str, datasets.Dataset] = {}
    for name, dataset in loaded.items():
        split = SPLIT_NAMES.get(str(name).lower(), ALL if len(loaded) == 1 else None)
        if split in splits:
            raise RunError(f"{config.path}: found the splits {', '.join(loaded)}, two of which mean {split}")
        if split is None:
            notices.append(f"the split {name} left out")
        elif not len(dataset):
            notices.append(f"the split {name} left out: it has no images")
        else:
            splits[split] = dataset
    if not splits:
        raise RunError(
            f"{config.path}: found the splits {', '.join(loaded)}; expected train, validation or test with "
            f"images in them"
        )
    return splits


def _row_labels(
    where: str, dataset: datasets.Dataset, image: str, label: str
) -> tuple[list[str | None], set[str]]:
    """The class name of each row, None where there is none, and the names of all classes."""
    absent = [column for column in (image, label) if column not in dataset.features]
    if absent:
        raise RunError(f"{where} has no column {absent[0]}; found {', '.join(dataset.features)}")
    feature, values = dataset.features[label], column_values(dataset, label)
    if isinstance(feature, datasets.ClassLabel):
        names = [None if value is None or value < 0 else feature.names[value] for value in values]
        return names, set(feature.names)
    if any(isinstance(value, list | dict) for value in values):
        raise RunError(f"{where}: {label} holds several labels per image; expected one class")
    names = [None if value is None or value == "" else str(value) for value in values]
    return names, {name for name in names if name is not None}


def _arrange_rows(
    dataset: datasets.Dataset,
    image: str,
    names: Sequence[str | None],
    labels: Sequence[str],
    group: str | None,
) -> datasets.Dataset:
    ids = {label: number for number, label in enumerate(labels)}
    images = dataset.select_columns([image])
    if image != "image":
        images = images.rename_column(image, "image")
    arranged = images.add_column(
        "label",
        [-1 if name is None else ids[name] for name in names],
        feature=datasets.ClassLabel(names=list(labels)),
    ).add_column("id", [str(number) for number in range(len(names))])
    if group is not None and group in dataset.features:
        arranged = arranged.add_column("group", _row_groups(dataset, group), feature=datasets.Value("string"))
    labelled = [number for number, name in enumerate(names) if name is not None]
    return arranged if len(labelled) == len(names) else arranged.select(labelled)


def _row_groups(dataset: datasets.Dataset, group: str) -> list[str | None]:
    feature, values = dataset.features[group], column_values(dataset, group)
    if isinstance(feature, datasets.ClassLabel):
        values = [None if value is None or value < 0 else feature.names[value] for value in values]
    return group_names(group, values)


def typed_column(config: DataConfig, features: Any, asked: str | None, kind: type, key: str) -> str:
    """The column that was asked for, or the only one of a `datasets` type, or one with a usual name.

    Raises:
        RunError: none of these.
    """
    if asked is None:
        typed = [name for name, feature in features.items() if isinstance(feature, kind)]
        if len(typed) == 1:
            return str(typed[0])
    usual = FILE_COLUMNS if kind is datasets.Image else LABEL_COLUMNS
    return find_column(config.path, list(features), asked, usual, key)


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
