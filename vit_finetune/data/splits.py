"""The splits that a run trains and scores on, every image of them read once; and their fingerprints."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import datasets

from vit_finetune.data.carving import carve
from vit_finetune.data.checkup import Finding, leave_out_unreadable
from vit_finetune.data.sources import column_values, load_source
from vit_finetune.recipe import DataConfig


@dataclass
class PreparedData:
    """Splits that every image of was read once, and what there is to say about them."""

    kind: str
    """folder, archive, table, hub or built-in."""
    splits: datasets.DatasetDict
    """Columns id, image, label and digest."""
    labels: list[str]
    unreadable: list[Finding]
    """Images that were left out."""
    notices: list[str]

    def describe(self, path: str) -> dict[str, Any]:
        """Counts, fingerprints and what was left out, for the provenance."""
        return {
            "path": path,
            "source": self.kind,
            "splits": {
                name: {"num_images": len(split), "fingerprint": fingerprint(split)}
                for name, split in self.splits.items()
            },
            "unreadable": [asdict(finding) for finding in self.unreadable],
            "notices": self.notices,
        }


def prepare_splits(config: DataConfig) -> PreparedData:
    """The splits of a data source with every image read once and the unreadable ones dealt with.

    Raises:
        RunError: as `load_splits`, or unreadable images and `data.on_unreadable` is `stop`.
    """
    source, unreadable = leave_out_unreadable(load_source(config), config)
    return PreparedData(source.kind, carve(source, config), source.labels, unreadable, source.notices)


def fingerprint(split: datasets.Dataset) -> str:
    """A hash of a split's images and labels that does not depend on their order or on where they lie.

    Args:
        split: columns label and digest (each image's content hash, from the reading pass).
    """
    names = split.features["label"].names
    rows = zip(column_values(split, "digest"), column_values(split, "label"))
    lines = sorted(f"{digest} {names[label]}" for digest, label in rows)
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()
