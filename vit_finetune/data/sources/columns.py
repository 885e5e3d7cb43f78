"""What every data source becomes: datasets with the columns id, image and label, and group if any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vit_finetune.data.sources.folders import ALL, natural_key
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
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Ids by split of images that are there, but are excluded or cannot be read."""
    revision: str | None = None
    """The commit of a Hub dataset."""

    def without(self, rows: dict[str, npt.NDArray[np.bool_]]) -> Source:
        """The source without some rows of its splits, which it remembers as left out.

        Args:
            rows: which to leave out of each split, bool `(num_images,)`.
        """
        splits, left_out = dict(self.splits), dict(self.left_out)
        for split, gone in rows.items():
            if gone.any():
                ids = column_array(splits[split], "id").filter(pa.array(gone)).to_pylist()
                left_out[split] = left_out.get(split, []) + ids
                splits[split] = splits[split].select(np.flatnonzero(~gone))
        return replace(self, splits=splits, left_out=left_out)


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
        label_ids: class ids, int64, positions in `labels`; or lists of them, where images may have several.
        labels: class names.
        groups: names of groups, strings or null.
    """
    if not isinstance(label_ids, pa.Array):
        label_ids = pa.array(label_ids, pa.int64())
    kind = datasets.ClassLabel(names=list(labels))
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "image": datasets.Image(),
            "label": datasets.List(kind) if pa.types.is_list(label_ids.type) else kind,
        }
        | ({} if groups is None else {"group": datasets.Value("string")})
    )
    columns = {
        "id": ids if isinstance(ids, pa.Array) else pa.array(ids, pa.string()),
        "image": images,
        "label": label_ids,
    } | ({} if groups is None else {"group": groups})
    table = datasets.table.InMemoryTable(pa.table(columns, schema=features.arrow_schema))
    # A fingerprint of its own, as for any new dataset: taking it from the content would pickle all of it.
    return datasets.Dataset(table, fingerprint=datasets.fingerprint.generate_random_fingerprint())


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


def column_values(dataset: datasets.Dataset, column: str) -> list[Any]:
    """A column as a list; iterating the dataset's own column object is a hundred times slower."""
    values: list[Any] = column_array(dataset, column).to_pylist()
    return values


def column_array(dataset: datasets.Dataset, column: str) -> pa.ChunkedArray:
    """A column as Arrow keeps it: a million rows without a Python object for each."""
    values = dataset.data.column(column)
    # Asked for them, `datasets` cuts selected rows out one by one.
    return values if dataset._indices is None else values.take(dataset._indices.column(0))
