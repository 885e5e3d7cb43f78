"""Datasets of the Hub, and others with their own columns, under our names of splits and columns."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.table import embed_table_storage
from huggingface_hub import HfApi, constants

from vit_finetune.console import say
from vit_finetune.data.sources.archives import is_archive
from vit_finetune.data.sources.cells import check_columns, read_flags, read_names
from vit_finetune.data.sources.columns import Source, column_array, column_values, common_labels
from vit_finetune.data.sources.folders import ALL, SPLIT_NAMES, count_of, first_of
from vit_finetune.data.sources.groups import group_names
from vit_finetune.data.sources.labels import label_feature, number_names
from vit_finetune.data.sources.tables import FILE_COLUMNS, LABEL_COLUMNS, find_column
from vit_finetune.data.sources.tables import SUFFIXES as TABLE_SUFFIXES
from vit_finetune.files import is_disk_full
from vit_finetune.hub_repos import explaining_errors, parse_hub_id, resolve_commit
from vit_finetune.recipe import DataConfig
from vit_finetune.run import RunError

FILE_NAME = "file_name"
"""The column of Hub datasets and Parquet shards with the name of each image's file."""


def is_hub_id(path: str) -> bool:
    """Whether `data.path` names a dataset of the Hub rather than something on this machine.

    A Hub id has an owner; a misspelt path, archive or table should not send anybody to the network.
    """
    is_file_name = is_archive(Path(path)) or Path(path).suffix.lower() in TABLE_SUFFIXES
    return not is_file_name and parse_hub_id(path) == (path, None)


def load_hub_dataset(config: DataConfig) -> Source:
    """A dataset of the Hub, downloaded into the cache of `datasets`.

    Raises:
        RunError: as `load_from_hub` and `arrange_columns`.
    """
    loaded, commit = load_from_hub(config)
    # A dataset of image files or archives is one of names: where the client put those of this very dataset.
    own = f"{constants.HF_HUB_CACHE}/datasets--{config.path.replace('/', '--')}"
    return replace(arrange_columns(loaded, config, own), revision=commit)


def load_from_hub(config: DataConfig, streaming: bool = False) -> tuple[Any, str | None]:
    """What `datasets` loads of a dataset of the Hub, and its commit where that is known.

    The commit is asked for first and loaded by its name: a push meanwhile changes nothing.

    Args:
        config: which dataset, subset and revision.
        streaming: whether to read it as it arrives.

    Raises:
        RunError: there is no such dataset or revision, it is not to be had, or cannot be loaded.
    """
    where, wanted = config.path, config.revision
    commit = resolve_commit(where, wanted, "dataset")
    if commit is None and streaming:
        raise RunError(
            f"{where} is streamed from the Hub, and HF_HUB_OFFLINE keeps this command from the network. "
            f"Unset it, or leave out data.streaming"
        )
    with explaining_errors(where, "dataset", wanted):
        try:
            loaded = datasets.load_dataset(
                where, name=config.subset, revision=commit or wanted, streaming=streaming
            )
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            if is_disk_full(error):
                raise
            if commit is not None:
                HfApi().auth_check(where, repo_type="dataset")  # `datasets` hides that it is gated
            if isinstance(error, ValueError):
                _check_subset(config, commit)
            raise RunError(
                f"{where}: could not be loaded from the Hub ({_reason(error)}). It is no folder or file on "
                f"this machine either; set data.path=…"
            ) from error
    if streaming:
        return loaded, commit
    found = _check_commit(loaded, commit, config)
    if commit is None:
        say(f"{where}: HF_HUB_OFFLINE is set; taken from the cache{f', commit {found}' if found else ''}")
    return loaded, found


def _reason(error: Exception) -> str:
    """What an error says, and behind the few words of a `DatasetGenerationError` what it came from."""
    return f"{type(error).__name__}: {error}" + (f": {error.__cause__}" if error.__cause__ else "")


def _check_subset(config: DataConfig, commit: str | None) -> None:
    """Raises RunError where it is the subset that a dataset could not be loaded for."""
    try:
        subsets = datasets.get_dataset_config_names(config.path, revision=commit or config.revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError):
        return  # something else is wrong with it
    if config.subset in subsets or (config.subset is None and len(subsets) < 2):
        return
    instead = "" if config.subset is None else f", and no {config.subset}"
    raise RunError(
        f"{config.path} has the subsets {first_of(subsets, 20)}{instead}. Set data.subset=… to one of them"
    )


def _check_commit(loaded: datasets.DatasetDict, commit: str | None, config: DataConfig) -> str | None:
    """The commit of what was loaded, which lies in a folder of its name.

    Raises:
        RunError: it is another than was asked for: where the Hub does not answer, `datasets` takes the newest
            that it has in its cache.
    """
    files = [file["filename"] for split in loaded.values() for file in split.cache_files]
    found = Path(files[0]).parent.name if files else commit
    wanted = commit or config.revision
    if wanted and found != wanted:
        why = "the Hub stopped answering" if commit else "HF_HUB_OFFLINE keeps this command from the network"
        raise RunError(
            f"{config.path}: the commit {wanted} is asked for, but {why}, and the cache holds {found}. "
            + ("Say the same again" if commit else "Unset it, or leave out data.revision")
        )
    return found if found and re.fullmatch(r"[0-9a-f]{40}", found) else commit


def arrange_columns(loaded: datasets.DatasetDict, config: DataConfig, own: str | None = None) -> Source:
    """A Hub dataset under our split and column names.

    An image's id is the name in the string column `file_name` where each has one of its own, else its row's
    number. Classes keep the dataset's own order where it has one, else they are sorted naturally.

    Args:
        loaded: by split.
        config: which columns.
        own: the folder with the dataset's own files, which it may name in the place of images.

    Raises:
        RunError: names of other files, columns or splits that cannot be told apart, several labels per image,
            one class only, or class lists that differ between splits.
    """
    notices: list[str] = []
    splits = _name_splits(loaded, config, notices)
    features = splits.get("train", next(iter(splits.values()))).features
    image = typed_column(config, features, config.image_column, datasets.Image, "data.image_column")
    if not isinstance(features[image], datasets.Image):
        raise RunError(f"{config.path}: the column {image} holds {features[image]}; expected images")
    label = _find_label_columns(config, features)
    splits = {split: _check_names(config.path, rows, image, own) for split, rows in splits.items()}
    labels_of: dict[str, list[Any]] = {}
    classes: dict[str, set[str]] = {}
    for split, dataset in list(splits.items()):
        if split == "test" and not set(label) <= set(dataset.features):
            labels_of[split], classes[split] = [None] * len(dataset), set()
        else:
            where = f"{config.path}: {split}"
            read = _row_label_sets if config.multi_label else _row_labels
            labels_of[split], classes[split] = read(where, dataset, image, label)
        unlabelled = labels_of[split].count(None)
        if unlabelled == len(dataset) and split == "test" and len(splits) > 1:
            # Competitions publish their test images without labels, or with -1.
            notices.append(f"test has no labels: its {count_of(unlabelled, 'image')} left out")
            del splits[split], classes[split]
        elif unlabelled:
            of = "" if split == ALL else f" of {split}"
            notices.append(f"{count_of(unlabelled, 'image')}{of} left out: they have no label")
    labels = common_labels(config.path, classes)
    feature = getattr(features[label[0]], "feature", features[label[0]])  # a list's, or the column's own
    if len(label) > 1:
        labels = label
    elif isinstance(feature, datasets.ClassLabel):
        labels = list(feature.names)
    named = _has_file_names(splits.values())
    arranged = {
        split: _arrange_rows(dataset, image, labels_of[split], labels, config, named)
        for split, dataset in splits.items()
    }
    return Source("hub", arranged, labels, notices)


def _check_names(path: str, rows: datasets.Dataset, image: str, own: str | None) -> datasets.Dataset:
    """The rows, those that name a place in an archive with the image itself.

    Raises:
        RunError: other files than the dataset's own are named: it does not decide what is read.
    """
    if image not in rows.features:
        return rows  # which is said elsewhere
    archived = False
    for chunk in column_array(rows, image).chunks:
        names = chunk.field("path").filter(pc.is_null(chunk.field("bytes"))).drop_null()
        if own is None:
            foreign = names
        else:
            inside = r"(?:[^:]|:[^:])*"  # without the :: behind which fsspec names another file
            is_own = pc.match_substring_regex(names, rf"^(?:\w+://{inside}::)?\Q{own}\E/{inside}$")
            foreign = names.filter(pc.or_(pc.invert(is_own), pc.match_substring(names, "/../")))
            archived |= bool(pc.any(pc.match_substring(names, "::")).as_py())
        if len(foreign):
            raise RunError(
                f"{path}: holds the name of a file, {foreign[0].as_py()!r}, where the column {image} should "
                f"hold an image's bytes. Write the bytes into it"
            )
    if not archived:
        return rows
    # Once; `datasets` finds them again in its cache.
    return rows.with_format("arrow").map(embed_table_storage, batched=True, batch_size=100).with_format(None)


def _name_splits(
    loaded: datasets.DatasetDict, config: DataConfig, notices: list[str]
) -> dict[str, datasets.Dataset]:
    """The splits under our names; others are left out, unless there is only one."""
    splits: dict[str, datasets.Dataset] = {}
    for name, dataset in loaded.items():
        split = SPLIT_NAMES.get(str(name).lower())
        if len(loaded) == 1 and split in ("train", None):
            split = ALL  # every dataset has a split, also one that has none
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


def _has_file_names(splits: Collection[datasets.Dataset]) -> bool:
    """Whether every image has a file name of its own, over all splits."""
    if not all(split.features.get(FILE_NAME) == datasets.Value("string") for split in splits):
        return False
    chunks = [chunk for split in splits for chunk in column_array(split, FILE_NAME).chunks]
    names = pa.chunked_array(chunks, pa.string())
    return not names.null_count and len(names.unique()) == len(names)


def _find_label_columns(config: DataConfig, features: Any) -> list[str]:
    """The column of the class, or of lists of labels; or all columns, where there is one per label."""
    if isinstance(config.label_column, list):
        check_columns(config.path, list(features), config.label_column)
        return config.label_column
    kind = datasets.List if config.multi_label else datasets.ClassLabel
    return [typed_column(config, features, config.class_column, kind, "data.label_column")]


def _check_there(where: str, dataset: datasets.Dataset, columns: Sequence[str]) -> None:
    absent = [column for column in columns if column not in dataset.features]
    if absent:
        raise RunError(f"{where} has no column {absent[0]}; found {', '.join(dataset.features)}")


def _row_label_sets(
    where: str, dataset: datasets.Dataset, image: str, columns: Sequence[str]
) -> tuple[list[list[str] | None], set[str]]:
    """The labels of each row, None where nothing is known of them, and the names of all labels."""
    _check_there(where, dataset, [image, *columns])
    cells = [column_values(dataset, column) for column in columns]
    if len(columns) > 1:
        rows = [dict(zip(columns, values)) for values in zip(*cells)]
        found = [read_flags(f"{where}: row {n}", row, columns) for n, row in enumerate(rows)]
        return found, set(columns)  # type: ignore[return-value]
    feature, known = getattr(dataset.features[columns[0]], "feature", None), set()
    if isinstance(feature, datasets.ClassLabel):
        known = set(feature.names)
    names = [
        None if value is None else read_names(f"{where}: row {number}", columns[0], value, feature)
        for number, value in enumerate(cells[0])
    ]
    return names, known or {name for some in names for name in some or []}


def _row_labels(
    where: str, dataset: datasets.Dataset, image: str, columns: Sequence[str]
) -> tuple[list[str | None], set[str]]:
    """The class name of each row, None where there is none, and the names of all classes."""
    (label,) = columns
    _check_there(where, dataset, [image, label])
    feature, values = dataset.features[label], column_values(dataset, label)
    if isinstance(feature, datasets.ClassLabel):
        names = [None if value is None or value < 0 else feature.names[value] for value in values]
        return names, set(feature.names)
    if any(isinstance(value, list | dict) for value in values):
        raise RunError(
            f"{where}: {label} holds several labels per image; expected one class. If images may have "
            f"several, write data.multi_label=true"
        )
    names = [None if value is None or value == "" else str(value) for value in values]
    return names, {name for name in names if name is not None}


def _arrange_rows(
    dataset: datasets.Dataset,
    image: str,
    names: Sequence[Any],
    labels: Sequence[str],
    config: DataConfig,
    named: bool,
) -> datasets.Dataset:
    group = config.group
    if config.multi_label:
        values: list[Any] = number_names([some or [] for some in names], labels)
    else:
        ids = {label: number for number, label in enumerate(labels)}
        values = [-1 if name is None else ids[name] for name in names]
    images = dataset.select_columns([image])
    if image != "image":
        images = images.rename_column(image, "image")
    arranged = images.add_column(
        "label", values, feature=label_feature(labels, config.multi_label)
    ).add_column("id", column_values(dataset, FILE_NAME) if named else [str(n) for n in range(len(names))])
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
