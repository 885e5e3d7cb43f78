"""The label column of a dataset: one class id per image, or with several labels a list of them.

A column of several labels is a `List(ClassLabel)`: of each image its label ids, ascending and each once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vit_finetune.data.sources.columns import column_array, column_values

Integers = npt.NDArray[np.int64]

NONE = "no label"
"""What images without any label are called where they are counted."""


def label_feature(labels: Sequence[str], multi_label: bool = False) -> datasets.ClassLabel | datasets.List:
    """The type of a label column.

    Args:
        labels: class names in id order.
        multi_label: whether an image may have several, or none.
    """
    names = datasets.ClassLabel(names=list(labels))
    return datasets.List(names) if multi_label else names


def is_multi_label(dataset: datasets.Dataset) -> bool:
    """Whether an image may have several labels."""
    return isinstance(dataset.features["label"], datasets.List)


def label_names(dataset: datasets.Dataset) -> list[str]:
    """The class names in id order."""
    feature = dataset.features["label"]
    return list(feature.feature.names if isinstance(feature, datasets.List) else feature.names)


def number_names(names: Iterable[Iterable[str]], labels: Sequence[str]) -> list[list[int]]:
    """The values of a column of several labels: ids, ascending and each once.

    Args:
        names: of each image.
        labels: class names in id order.
    """
    ids = {label: number for number, label in enumerate(labels)}
    return [sorted({ids[name] for name in some}) for some in names]


def with_labels(dataset: datasets.Dataset, labels: Sequence[str]) -> datasets.Dataset:
    """The same images with their class ids counted in another order of the same class names."""
    names, column = label_names(dataset), column_values(dataset, "label")
    if names == list(labels):
        return dataset
    if is_multi_label(dataset):
        renumbered: list[Any] = number_names([[names[number] for number in some] for some in column], labels)
    else:
        ids = {label: number for number, label in enumerate(labels)}
        renumbered = [ids[names[label]] for label in column]
    feature = label_feature(labels, is_multi_label(dataset))
    return dataset.remove_columns("label").add_column("label", renumbered, feature=feature)


def label_pairs(dataset: datasets.Dataset) -> tuple[Integers, Integers]:
    """Row and label id of each label that an image has, both `(pairs,)`: one pair an image, or any number."""
    column = column_array(dataset, "label").combine_chunks()
    if not is_multi_label(dataset):
        values = column.to_numpy(zero_copy_only=False).astype(np.int64)
        return np.arange(len(values)), values
    rows = pc.list_parent_indices(column).to_numpy().astype(np.int64)
    return rows, pc.list_flatten(column).to_numpy(zero_copy_only=False).astype(np.int64)


def count_labels(dataset: datasets.Dataset) -> Integers:
    """Images of each class, in id order, `(classes,)`; one with several labels counts for each of them."""
    return np.bincount(label_pairs(dataset)[1], minlength=len(label_names(dataset)))


def label_texts(dataset: datasets.Dataset) -> pa.Array:
    """What a file says of each image's label, strings: the class's name; or a JSON list of sorted names."""
    names, column = label_names(dataset), column_array(dataset, "label").combine_chunks()
    if not is_multi_label(dataset):
        return pa.array(names, pa.string()).take(column)
    known: dict[tuple[int, ...], str] = {}
    rows = list(map(tuple, column.to_pylist()))
    for ids in set(rows):
        known[ids] = list_text(names[number] for number in ids)
    return pa.array([known[ids] for ids in rows], pa.string())


def list_text(names: Iterable[str]) -> str:
    """Several labels as a file has them: sorted names, as a JSON list."""
    return json.dumps(sorted(set(names)), ensure_ascii=False)


def spoken(names: Sequence[str]) -> str:
    """Several labels in words."""
    return ", ".join(names) if names else NONE


def multi_hot(ids: Sequence[Sequence[int]], classes: int) -> np.ndarray:
    """Label ids of images → 1 where an image has a label, float32 `(images, classes)`."""
    matrix = np.zeros((len(ids), classes), np.float32)
    for row, some in enumerate(ids):
        matrix[row, list(some)] = 1
    return matrix


def strata(dataset: datasets.Dataset) -> tuple[Integers, list[str]]:
    """What each image counts for where a split is to have a share of every class, and the names of these.

    With several labels an image counts for the rarest that it has, of equally rare ones the first; images
    without a label are a stratum of their own, the last.

    Returns:
        Positions in the names, int64 `(images,)`; and the names.
    """
    names = label_names(dataset)
    rows, ids = label_pairs(dataset)
    if not is_multi_label(dataset):
        return ids, names
    counts = count_labels(dataset)
    rank = np.empty_like(counts)
    order = np.argsort(counts, kind="stable")
    rank[order] = np.arange(len(counts))
    rarest = np.full(len(dataset), len(names), np.int64)
    np.minimum.at(rarest, rows, rank[ids])
    return np.append(order, len(names))[rarest], [*names, NONE]
