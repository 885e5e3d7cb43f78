"""Train, validation and test: the source's own where it has them, else carved from its training images."""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from vit_finetune.data.checkup import Checkup, check_up, raise_errors, require_images
from vit_finetune.data.folders import ALL
from vit_finetune.data.set_findings import describe_listing
from vit_finetune.data.sources import Source, column_values, load_source
from vit_finetune.recipe import DataConfig
from vit_finetune.run import Findings, Run, RunError, write_text


def load_splits(config: DataConfig) -> datasets.DatasetDict:
    """The images of a data source by split, undecoded: columns id, image and label.

    Raises:
        RunError: the source cannot be used, or a class has too few images to be split.
    """
    return carve(load_source(config), config)


@dataclass
class PreparedData:
    """Splits that every image of was read once, and what there is to say about them."""

    kind: str
    """folder, archive, table, hub or built-in."""
    splits: datasets.DatasetDict
    """Columns id, image, label and digest."""
    labels: list[str]
    findings: Findings
    """What the checkup saw; no errors."""

    def describe(self, path: str) -> dict[str, Any]:
        """Counts and fingerprints, for the provenance."""
        return {
            "path": path,
            "source": self.kind,
            "splits": {
                name: {"num_images": len(split), "fingerprint": fingerprint(split)}
                for name, split in self.splits.items()
            },
        }


def prepare_splits(config: DataConfig, checkup: Checkup | None = None) -> PreparedData:
    """The splits of a data source that was checked up: what is excluded or unreadable is left out.

    Args:
        config: which data.
        checkup: of this data, where it was done already.

    Raises:
        RunError: as `load_splits`; or the checkup found errors.
    """
    checkup = checkup or check_up(load_source(config), config)
    raise_errors(checkup.findings, config)
    require_images(checkup.source, config)
    said = list(checkup.source.notices)
    splits = carve(checkup.source, config)
    document = checkup.document(config)
    # What carving has to say belongs to the same document.
    later = describe_listing(notice for notice in checkup.source.notices if notice not in said)
    document = document.model_copy(update={"findings": [*document.findings, *later]})
    return PreparedData(checkup.source.kind, splits, checkup.source.labels, document)


def carve(source: Source, config: DataConfig) -> datasets.DatasetDict:
    """Train, validation and, unless `test_fraction` is 0, test: stratified by class, by the seed alone.

    Every class gives each carved split its share, rounded, and at least one image.

    Raises:
        RunError: no training images, nothing to validate on, or a class with fewer images than splits.
    """
    splits = dict(source.splits)
    if ALL in splits:
        splits["train"] = splits.pop(ALL)
    if "train" not in splits:
        raise RunError(f"{config.path}: found {', '.join(splits)} only; expected training images, too")
    if "validation" not in splits and config.validation_fraction == 0:
        raise RunError(
            "there are no validation images to choose the best checkpoint by: set data.validation_fraction "
            "above 0"
        )
    shares = {
        split: share
        for split, share in (("validation", config.validation_fraction), ("test", config.test_fraction))
        if split not in splits and share > 0
    }
    if shares:
        rows = _carve_rows(np.asarray(column_values(splits["train"], "label")), shares, source, config)
        whole = splits["train"]
        splits |= {split: whole.select(indices) for split, indices in rows.items()}
    return datasets.DatasetDict(
        {split: splits[split] for split in ("train", "validation", "test") if split in splits}
    )


def _carve_rows(
    labels: np.ndarray, shares: dict[str, float], source: Source, config: DataConfig
) -> dict[str, np.ndarray]:
    """Row numbers, ascending, of train and of each carved split."""
    parts: dict[str, list[np.ndarray]] = {split: [] for split in ("train", *shares)}
    too_few = []
    for label, name in enumerate(source.labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) <= len(shares):
            if len(rows):
                too_few.append(f"{name} ({len(rows)})")
            continue
        rows = np.random.default_rng([config.split_seed, label]).permutation(rows)
        start = 0
        for waiting, (split, share) in zip(range(len(shares), 0, -1), shares.items()):
            # At least one image stays for each split that is still to come, and for train.
            count = min(max(1, round(len(rows) * share)), len(rows) - start - waiting)
            parts[split].append(rows[start : start + count])
            start += count
        parts["train"].append(rows[start:])
    if too_few:
        raise RunError(
            f"{config.path}: {len(too_few)} of {len(source.labels)} classes have too few images to be split "
            f"into train, {' and '.join(shares)}: {', '.join(too_few)}. Add images, "
            f"remove the class, or carve less (data.test_fraction=0)"
        )
    return {split: np.sort(np.concatenate(rows)) for split, rows in parts.items()}


def fingerprint(split: datasets.Dataset) -> str:
    """A hash of a split's images and labels that does not depend on their order or on where they lie.

    Args:
        split: columns label and digest (each image's content hash, from the reading pass).
    """
    names = split.features["label"].names
    rows = zip(column_values(split, "digest"), column_values(split, "label"))
    lines = sorted(f"{digest} {names[label]}" for digest, label in rows)
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def save_splits(splits: datasets.DatasetDict, run: Run) -> None:
    """Writes which image went where: `splits/<split>.csv` with the columns id, label, split."""
    for name, split in splits.items():
        labels = split.features["label"].names
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["id", "label", "split"])
        rows = zip(column_values(split, "id"), column_values(split, "label"))
        writer.writerows((identity, labels[label], name) for identity, label in rows)
        write_text(run.splits / f"{name}.csv", text.getvalue())
