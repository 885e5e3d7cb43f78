"""Shards on this machine: which files hold which split, the class names beside them, their rows in order."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vit_finetune.data.sources.cells import check_columns
from vit_finetune.data.sources.folders import ALL, SPLIT_NAMES, count_of, first_of, is_image_name, natural_key
from vit_finetune.data.sources.tables import LABEL_COLUMNS, METADATA_NAMES, find_column
from vit_finetune.data.sources.webdataset import index_webdataset, is_webdataset, read_samples
from vit_finetune.recipe import DataConfig
from vit_finetune.run import RunError

READ_BYTES = 1_000_000
"""About how much of a Parquet file is in memory at a time, in bytes."""
_MAGIC = re.compile(r"[{*?\[]")
_SPLIT_WORD = re.compile(rf"(?:^|[-_. ])({'|'.join(SPLIT_NAMES)})(?:[-_. ]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Shards:
    """Files of labelled images, in natural order, by train, validation and test, or all under `all`."""

    kind: Literal["webdataset", "parquet"]
    root: Path
    """The folder that their names are counted from."""
    files: dict[str, list[Path]]

    def name_of(self, shard: Path) -> str:
        """The shard's path below the root, for ids and messages."""
        return shard.relative_to(self.root).as_posix()

    def fingerprint(self) -> str:
        """A hash of the names and sizes of all shards, wherever they lie."""
        facts = [
            f"{split}|{self.name_of(shard)}|{shard.stat().st_size}"
            for split, shards in self.files.items()
            for shard in shards
        ]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    def place(self) -> str:
        """What changes when any shard does: where they lie and when they were written."""
        times = [shard.stat().st_mtime_ns for shards in self.files.values() for shard in shards]
        return f"{self.root.resolve()}|{self.fingerprint()}|{times}"


def find_shards(path: str) -> Shards | None:
    """The shards that `data.path` names: a .tar or .parquet file, a folder of them, or a pattern.

    A tar of class folders is an archive, a Parquet file of file names a table, and a folder with image files
    a folder: none of them has shards.

    Raises:
        RunError: a pattern that no file matches, tars beside Parquet files, or shards of which some say their
            split and some do not.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        root, found = place, _shards_in(place)
    elif place.is_file():
        root, found = place.parent, [place] if _is_shard_name(place.name) else []
    elif _MAGIC.search(str(place)):
        root, found = _match(place)
    else:
        return None
    kinds = {shard.suffix.lower() for shard in found}
    if len(kinds) > 1:
        raise RunError(f"{path}: found both .tar and .parquet files; expected shards of one kind")
    holds_images = is_webdataset if kinds == {".tar"} else _has_image_bytes
    found = sorted(found, key=lambda shard: natural_key(str(shard)))
    if not any(map(holds_images, found)):
        if found and not place.exists():
            raise RunError(
                f"{path}: {found[0].name} holds no labelled images; expected WebDataset tars (key.jpg and "
                f"key.cls or key.json) or Parquet files with image bytes"
            )
        return None
    kind: Literal["webdataset", "parquet"] = "webdataset" if kinds == {".tar"} else "parquet"
    return Shards(kind, root, _by_split(path, root, found))


def _is_shard_name(name: str) -> bool:
    name = name.lower()
    return name.endswith((".tar", ".parquet")) and name not in METADATA_NAMES and not name.startswith(".")


def _shards_in(folder: Path) -> list[Path]:
    """Shards at the top of a folder, in `data/`, and in the folders of splits.

    None where images or other folders lie there: that is a folder of images with something beside them.
    """
    found: list[Path] = []
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        with os.scandir(place) as entries:
            for entry in entries:
                if is_image_name(entry.name) and entry.is_file():
                    return []
                if entry.is_dir():
                    if entry.name.lower() in {*SPLIT_NAMES, "data"}:
                        waiting.append(Path(entry.path))
                    elif not entry.name.startswith("."):
                        return []
                elif _is_shard_name(entry.name) and entry.is_file():
                    found.append(Path(entry.path))
    return found


def _match(pattern: Path) -> tuple[Path, list[Path]]:
    """The folder above a pattern (`{000..010}`, `{a,b}`, `*`, `?`, `[…]`), and the files that it names."""
    found: set[Path] = set()
    for place in _expand_braces(str(pattern)):
        matches = glob.glob(place) if glob.has_magic(place) else [place]  # noqa: PTH207 - any folder may hold a *
        missing = [match for match in matches or [place] if not Path(match).is_file()]
        if missing:
            raise RunError(f"{pattern}: there is no file {missing[0]}")
        found |= {Path(match) for match in matches}
    others = sorted(shard.name for shard in found if not _is_shard_name(shard.name))
    if others:
        raise RunError(f"{pattern}: names {first_of(others)}; expected .tar or .parquet files")
    root = next(parent for parent in pattern.parents if not _MAGIC.search(str(parent)))
    return root, list(found)


def _expand_braces(text: str) -> Iterator[str]:
    """All texts that a pattern with `{first..last}` and `{one,other}` stands for, as in a shell."""
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        yield text
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        width = len(numbers[1])
        choices: Iterable[str] = (
            f"{number:0{width}}" for number in range(int(numbers[1]), int(numbers[2]) + 1)
        )
    else:
        choices = match[1].split(",")
    for choice in choices:  # one by one: the first file that is not there ends a range that is too long
        yield from _expand_braces(text[: match.start()] + choice + text[match.end() :])


def _by_split(path: str, root: Path, shards: Sequence[Path]) -> dict[str, list[Path]]:
    """Shards by split: the one that a folder above the file names, or else the file's own name."""
    files: dict[str, list[Path]] = {}
    for shard in shards:
        folders = [part.lower() for part in shard.relative_to(root).parts[:-1] if part.lower() in SPLIT_NAMES]
        word = _SPLIT_WORD.search(shard.stem)
        split = SPLIT_NAMES[folders[0]] if folders else SPLIT_NAMES[word[1].lower()] if word else ALL
        files.setdefault(split, []).append(shard)
    if ALL in files and len(files) > 1:
        raise RunError(
            f"{path}: {files[ALL][0].name} and {count_of(len(files[ALL]) - 1, 'other shard')} name no split, "
            f"but others do; expected train, validation or test in the name or folder of all or of none"
        )
    return files


# --------------------------------------------------------------------------- class names


def read_class_names(root: Path) -> list[str] | None:
    """The class names in id order that `classes.txt` or `classes.json` beside shards tells; None without one.

    Raises:
        RunError: neither a name a line nor a JSON list of distinct names or an object of ids.
    """
    for file in (root / "classes.txt", root / "classes.json"):
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8-sig")
            names = json.loads(text) if file.suffix == ".json" else text.splitlines()
        except (ValueError, RecursionError) as error:
            raise RunError(f"{file}: cannot be read: {error}") from error
        if isinstance(names, dict):
            names = [names.get(str(number)) for number in range(len(names))]
        names = names if isinstance(names, list) else [None]
        names = [name.strip() if isinstance(name, str) else name for name in names]
        if file.suffix == ".txt":
            names = names[: max((number + 1 for number, name in enumerate(names) if name), default=0)]
        distinct = {name for name in names if isinstance(name, str) and name}
        if len(distinct) < max(2, len(names)):
            raise RunError(
                f"{file}: expected one distinct class name for each id from 0, two at least: a line each, or "
                f'in JSON a list or {{"0": "name"}}'
            )
        return list(names)
    return None


def label_ids(names: Sequence[str]) -> dict[str, int]:
    """Class ids by the labels that shards may write: the class's name or, where no class has it, the id."""
    return {str(number): number for number in range(len(names))} | {
        name: number for number, name in enumerate(names)
    }


def class_id(label: str, ids: dict[str, int], where: str) -> int:
    """The class id of a label, among those of `label_ids`.

    Raises:
        RunError: no class has it.
    """
    if label not in ids:
        raise RunError(f"{where}: found the label {label!r}; expected one of {first_of(list(ids), 12)}")
    return ids[label]


def number_labels(dataset: datasets.Dataset, labels: Sequence[str], where: str) -> datasets.Dataset:
    """The same images with class ids for labels that are texts: names of classes, or their ids.

    Args:
        dataset: column label, text.
        labels: class names in id order.
        where: what holds the images, for messages.

    Raises:
        RunError: a label that is neither.
    """
    texts, positions = distinct_labels(dataset)
    ids = label_ids(labels)
    numbers = np.array([class_id(text, ids, where) for text in texts], np.int64)[positions]
    return dataset.remove_columns("label").add_column(
        "label", numbers, feature=datasets.ClassLabel(names=list(labels))
    )


def distinct_labels(dataset: datasets.Dataset) -> tuple[list[str], np.ndarray]:
    """The different labels of a dataset, and for each row the position of its own among them."""
    column = dataset.with_format("arrow")[:]["label"].combine_chunks().dictionary_encode()
    return column.dictionary.to_pylist(), column.indices.to_numpy()


# --------------------------------------------------------------------------- Parquet


def _has_image_bytes(file: Path) -> bool:
    return bool(_image_columns(read_schema(file)))


def read_schema(file: Path) -> pa.Schema:
    """The columns of a Parquet file.

    Raises:
        RunError: it is none.
    """
    try:
        schema: pa.Schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{file}: not a readable Parquet file: {error}") from error
    return schema


def _image_columns(schema: pa.Schema) -> list[str]:
    """Columns of binary values, or of structs with binary `bytes`, as `datasets` writes images."""

    def is_binary(kind: pa.DataType) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    return [
        field.name
        for field in schema
        if is_binary(field.type)
        or (
            pa.types.is_struct(field.type)
            and field.type.get_field_index("bytes") >= 0
            and is_binary(field.type.field("bytes").type)
        )
    ]


def image_column(file: Path, config: DataConfig) -> str:
    """The column of a Parquet shard that holds the encoded images.

    Raises:
        RunError: there is none, or several.
    """
    columns = _image_columns(read_schema(file))
    if len(columns) == 1 and config.image_column is None:
        return columns[0]
    return find_column(file, columns, config.image_column, ("image", "img"), "data.image_column")


def label_column(file: Path, config: DataConfig) -> str:
    """The column of a Parquet shard that holds the class: what was asked for, found by type, or by name.

    Raises:
        RunError: there is none.
    """
    features = parquet_features(file)
    kind = datasets.List if config.multi_label else datasets.ClassLabel
    typed = [name for name, feature in features.items() if isinstance(feature, kind)]
    if config.class_column is None and len(typed) == 1:
        return str(typed[0])
    return find_column(file, list(features), config.class_column, LABEL_COLUMNS, "data.label_column")


def label_columns(file: Path, config: DataConfig) -> list[str]:
    """That column of a Parquet shard; or all, where there is one per label. Raises RunError likewise."""
    if not isinstance(config.label_column, list):
        return [label_column(file, config)]
    check_columns(file, list(parquet_features(file)), config.label_column)
    return config.label_column


def parquet_features(file: Path) -> datasets.Features:
    """The columns of a Parquet file as `datasets` types; ClassLabel where it was written with class names."""
    return datasets.Features.from_arrow_schema(read_schema(file))


def count_labels(shards: Shards, shard: Path, config: DataConfig) -> Counter[str]:
    """How often each label, as text, comes in a shard; no image is read.

    Raises:
        RunError: as `read_rows`.
    """
    if shards.kind == "webdataset":
        index = index_webdataset(shard, shards.name_of(shard), config)
        return Counter(index.with_format("arrow")[:]["label"].to_pylist())
    column = label_column(shard, config)
    feature = parquet_features(shard)[column]
    counts: Counter[str] = Counter()
    for labels in _read_batches(shard, [column]):
        texts = (label_text(value, feature) for value in labels.column(column).to_pylist())
        counts.update(text for text in texts if text is not None)
    return counts


# --------------------------------------------------------------------------- rows in order


def read_rows(shards: Sequence[str], root: str, kind: str, config: DataConfig) -> Iterator[dict[str, Any]]:
    """The rows of shards, front to back: `id`, `image` (encoded bytes) and `label` (its text, or None).

    Args:
        shards: paths of the files.
        root: the folder that ids are counted from.
        kind: webdataset or parquet.
        config: which columns to use.

    Raises:
        RunError: a shard that cannot be read, with the place where it breaks.
    """
    for shard in map(Path, shards):
        name = shard.relative_to(root).as_posix()
        read = _read_parquet if kind == "parquet" else read_samples
        yield from read(shard, name, config)


def _read_parquet(shard: Path, name: str, config: DataConfig) -> Iterator[dict[str, Any]]:
    image, label = image_column(shard, config), label_column(shard, config)
    feature = parquet_features(shard)[label]
    number = 0
    for batch in _read_batches(shard, [image, label]):
        images, labels = batch.column(image), batch.column(label).to_pylist()
        if pa.types.is_struct(images.type):
            images = images.field("bytes")
        for data, value in zip(images, labels):
            yield {"id": f"{name}/{number}", "image": data.as_py(), "label": label_text(value, feature)}
            number += 1


def _read_batches(shard: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(shard) as file:
            # Group by group: asked for all at once, pyarrow holds what it has read until the end of the file.
            for number in range(file.metadata.num_row_groups):
                group = file.metadata.row_group(number)
                rows = READ_BYTES * group.num_rows // max(group.total_byte_size, 1)
                yield from file.iter_batches(
                    min(max(rows, 1), 1000), row_groups=[number], columns=columns, use_threads=False
                )
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{shard}: not a readable Parquet file: {error}. Fetch or write it again") from error


def label_text(value: Any, feature: Any) -> str | None:
    """A label as text: the class's name where the column knows it; None where a row has no label."""
    if value is None or value == "" or (isinstance(feature, datasets.ClassLabel) and value == -1):
        return None
    return str(feature.int2str(value) if isinstance(feature, datasets.ClassLabel) else value)
