"""Which images a finished run or a saved model is scored on: a run's own split, or others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import datasets
import numpy as np

from vit_finetune.data.sources.hub import is_hub_id
from vit_finetune.data.sources.labels import is_multi_label, label_names
from vit_finetune.data.sources.tables import has_column_per_label
from vit_finetune.data.splits.prepared import fingerprint, pinned
from vit_finetune.data.streaming.prepared import prepare_data
from vit_finetune.hub_repos import parse_hub_id, quiet_client
from vit_finetune.recipe import DataConfig, load_recipe
from vit_finetune.run import Run, RunError


def own_split(run: Run, split: str) -> datasets.Dataset:
    """The images of a run's split, read again: columns id, image and label.

    Raises:
        RunError: they are not there, or no longer those that the run had.
    """
    provenance = run.read_provenance()
    with quiet_client():
        splits = prepare_data(pinned(load_recipe(run.recipe).data, provenance)).splits
    images = take_split(splits, split, str(run.path))
    then = provenance["data"]["splits"].get(split)
    if then and fingerprint(images) != then["fingerprint"]:
        raise RunError(
            f"{run.path}: its images have changed since it was trained, so the {split} split would be "
            f"another one, and perhaps hold images trained on. Bring the old images back, or score others "
            f"with --data"
        )
    return images


def take_split(splits: Mapping[str, datasets.Dataset], split: str, where: str) -> datasets.Dataset:
    """One of several splits; `where` they come from is for the message.

    Raises:
        RunError: there is none of this name.
    """
    if split not in splits:
        raise RunError(f"{where}: there is no split {split!r}; found {', '.join(splits)}")
    return splits[split]


def other_data(own: DataConfig | None, data: str, several: list[str] | None = None) -> DataConfig:
    """The images that `--data` names, read as the run's own were as far as that has a meaning there.

    Args:
        own: the run's; None of a model without a run.
        data: a data source.
        several: the model's labels, where an image may have several: a table may have a column for each,
            whether or not the run's own had.
    """
    path, revision = parse_hub_id(data) or (data, None)
    if own is None:
        config = DataConfig(path=path, revision=revision, multi_label=several is not None)
        return _with_label_columns(config, several)
    # Groups decide what is carved apart, and nothing is carved here; nor is anything excluded.
    changes = {"path": path, "group": None, "revision": revision or own.revision}
    if path != own.path and (is_hub_id(path) or is_hub_id(own.path)):
        # Subsets, columns and commits are those of one dataset.
        changes |= {"subset": None, "image_column": None, "label_column": None, "revision": revision}
    return _with_label_columns(own.model_copy(update=changes), several)


def _with_label_columns(config: DataConfig, several: list[str] | None) -> DataConfig:
    """How a table says which of several labels an image has: in its own way, not in that of a run."""
    per_label = has_column_per_label(config.path, several) if several and config.multi_label else None
    if per_label:
        return config.model_copy(update={"label_column": several})
    by_column = isinstance(config.label_column, list)
    return config.model_copy(update={"label_column": None}) if per_label is False and by_column else config


def check_labels(known: Sequence[str], images: datasets.Dataset, where: str) -> None:
    """Makes sure that images have the classes that a model knows.

    Of several labels some may be missing: a column of lists cannot name one that none of its images has.

    Args:
        known: the model's class names.
        images: column label.
        where: they come from, for the message.

    Raises:
        RunError: they have others; or lack some, where each has one class.
    """
    found = label_names(images)
    unknown = [name for name in found if name not in known]
    absent = [] if is_multi_label(images) else [name for name in known if name not in found]
    if unknown or absent:
        raise RunError(
            f"{where}: the classes are not the model's."
            + (f" The model does not know {', '.join(map(repr, unknown[:10]))}." if unknown else "")
            + (f" The data lacks {', '.join(map(repr, absent[:10]))}." if absent else "")
            + " Expected the same class names"
        )


def spread_rows(total: int, most: int) -> list[int]:
    """Up to `most` of `total` rows, evenly spread: the first ones would often be of one class."""
    rows: list[int] = np.linspace(0, total - 1, min(most, total)).astype(int).tolist()
    return rows
