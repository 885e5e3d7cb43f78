"""Folder, archive, table, Hub id or built-in name → images and labels of each split that the source has."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vit_finetune.data.sources.archives import cache_dir, is_archive, unpack
from vit_finetune.data.sources.columns import (
    Source,
    build_dataset,
    column_values,
    common_labels,
)
from vit_finetune.data.sources.folders import (
    ALL,
    Listing,
    count_of,
    first_of,
    list_folder,
    walk_folders,
)
from vit_finetune.data.sources.groups import match_groups
from vit_finetune.data.sources.hub import FILE_NAME, arrange_columns, is_hub_id, load_hub_dataset
from vit_finetune.data.sources.labels import label_feature, number_names
from vit_finetune.data.sources.shards import (
    Shards,
    distinct_labels,
    find_shards,
    image_column,
    label_columns,
    number_labels,
    read_class_names,
)
from vit_finetune.data.sources.tables import SUFFIXES as TABLE_SUFFIXES
from vit_finetune.data.sources.tables import find_tables, list_tables
from vit_finetune.data.sources.webdataset import index_webdataset
from vit_finetune.recipe import DataConfig
from vit_finetune.run import RunError


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
            return _from_listing("table", path.parent, list_tables(path.parent, {ALL: path}, config), config)
        kinds = ", ".join(TABLE_SUFFIXES)
        raise RunError(f"{path}: expected a folder, an archive (.zip, .tar…) or a table ({kinds})")
    if is_hub_id(config.path):
        return load_hub_dataset(config)
    raise RunError(
        f"{config.path}: no such folder or file. Expected a folder of images, an archive, a table, a Hub "
        f"dataset id (owner/name) or `digits`; set data.path=…"
    )


# --------------------------------------------------------------------------- folders and tables


def _from_folder(root: Path, config: DataConfig, kind: str) -> Source:
    folders = walk_folders(root)
    tables = find_tables(root, folders)
    if tables:
        return _from_listing(kind, root, list_tables(root, tables, config, folders), config)
    if config.multi_label:
        raise RunError(
            f"{root}: the folder of an image names one class, and with data.multi_label images may have "
            f"several. Write them into a table: metadata.jsonl with file_name and a list of labels, or "
            f"metadata.csv with one column per label"
        )
    return _from_listing(kind, root, list_folder(root, folders, config.class_folder), config)


def _from_listing(kind: str, root: Path, listing: Listing, config: DataConfig) -> Source:
    names = {
        split: pc.list_flatten(rows["label"]) if config.multi_label else rows["label"]
        for split, rows in listing.splits.items()
    }
    if isinstance(config.label_column, list):
        labels = config.label_column
    else:
        labels = common_labels(
            str(root), {split: set(column.unique().to_pylist()) for split, column in names.items()}
        )
    splits = {}
    for split, rows in listing.splits.items():
        ids = rows["id"].combine_chunks()
        paths = pc.binary_join_element_wise(pa.scalar(f"{root}/"), ids, "")
        images = pa.StructArray.from_arrays([pa.nulls(len(ids), pa.binary()), paths], names=["bytes", "path"])
        if config.multi_label:
            numbers = number_names(rows["label"].to_pylist(), labels)
            label_ids = pa.array(numbers, pa.list_(pa.int64()))
        else:
            label_ids = (
                pc.index_in(rows["label"], value_set=pa.array(labels)).combine_chunks().cast(pa.int64())
            )
        groups = rows["group"].combine_chunks() if "group" in rows.column_names else None
        splits[split] = build_dataset(ids, images, label_ids, labels, groups)
    return Source(kind, splits, labels, listing.notices)


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
    return replace(source, splits=splits, notices=notices)


# --------------------------------------------------------------------------- shards


def _from_webdataset(shards: Shards, config: DataConfig) -> Source:
    """The samples of WebDataset tars by their indices; no image is read."""
    if config.multi_label:
        raise RunError(
            f"{config.path}: several labels of an image (data.multi_label) are not read from WebDataset "
            f"shards. Write them as .parquet with a column of lists"
        )
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
    image, labels = image_column(first, config), label_columns(first, config)
    files = {
        "train" if split == ALL else split: [str(shard) for shard in files]
        for split, files in shards.files.items()
    }
    try:
        loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(cache_dir() / "parquet"))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise RunError(f"{config.path}: could not be read ({error}: {error.__cause__})") from error
    found = loaded[next(iter(loaded))].features
    others = [column for column in (config.group, FILE_NAME) if column in found]
    loaded = loaded.select_columns(list(dict.fromkeys([image, *labels, *others]))).cast_column(
        image, datasets.Image()
    )
    names = read_class_names(shards.root)
    label = labels[0]
    if isinstance(config.label_column, list):
        chosen = config.model_copy(update={"image_column": image})
    else:
        if names and not _names_classes(loaded[next(iter(loaded))].features[label]):
            try:
                loaded = loaded.cast_column(label, label_feature(names, config.multi_label))
            except ValueError as error:  # how `datasets` says that a label is none of the names
                raise RunError(
                    f"{config.path}: {label} holds a label that the class names beside the shards lack "
                    f"({error}); expected one of {first_of(names, 12)}"
                ) from error
        chosen = config.model_copy(update={"image_column": image, "label_column": label})
    source = arrange_columns(loaded, chosen)
    return replace(source, kind="parquet")


def _names_classes(feature: Any) -> bool:
    """Whether a column knows the names of its classes."""
    return isinstance(getattr(feature, "feature", feature), datasets.ClassLabel)


# --------------------------------------------------------------------------- what is built in


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
