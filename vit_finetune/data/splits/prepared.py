"""The splits that a run trains and scores on, every image of them read once; and their fingerprints."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import datasets

from vit_finetune.data.checkup.checkup import Checkup, check_up, raise_errors, require_images
from vit_finetune.data.checkup.set_findings import describe_listing
from vit_finetune.data.sources.columns import column_values
from vit_finetune.data.sources.labels import label_texts
from vit_finetune.data.sources.source import load_source
from vit_finetune.data.splits.carving import carve
from vit_finetune.recipe import DataConfig
from vit_finetune.run import Findings


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
    origins: dict[str, str]
    """Where each split comes from: `source`, `carved` or `splits file`, as `describe_origins` has it."""
    revision: str | None = None
    """The commit of a Hub dataset."""

    def describe(self, path: str) -> dict[str, Any]:
        """Counts and fingerprints, for the provenance."""
        return {
            "path": path,
            "source": self.kind,
            **({"revision": self.revision} if self.revision else {}),
            "splits": {
                name: {
                    "num_images": len(split),
                    "fingerprint": fingerprint(split),
                    "origin": self.origins[name],
                }
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
    splits = carve(checkup.source, config, checkup.twins)
    document = checkup.document(config)
    # What carving has to say belongs to the same document.
    later = describe_listing(notice for notice in checkup.source.notices if notice not in said)
    document = document.model_copy(update={"findings": [*document.findings, *later]})
    origins = (
        dict.fromkeys(splits, "splits file")
        if config.splits is not None
        else describe_origins(splits, [name for name in splits if name not in checkup.source.splits])
    )
    source = checkup.source
    return PreparedData(source.kind, splits, source.labels, document, origins, source.revision)


def describe_origins(splits: Iterable[str], carved: Collection[str]) -> dict[str, str]:
    """Where each split comes from: the data's own (`source`), or made of its training images (`carved`).

    Training images that others were carved out of are no longer the data's own split.

    Args:
        splits: names of all.
        carved: of those that the data does not have.
    """
    return {name: "carved" if name in carved or (name == "train" and carved) else "source" for name in splits}


def pinned(config: DataConfig, provenance: Mapping[str, Any] | None) -> DataConfig:
    """The data of a run at the commit that it read, whatever the Hub's branch holds today.

    Args:
        config: the run's.
        provenance: the run's; None where it has none yet.
    """
    data = (provenance or {}).get("data") or {}
    if data.get("revision") and data.get("path") == config.path:
        return config.model_copy(update={"revision": data["revision"]})
    return config


def fingerprint(split: datasets.Dataset) -> str:
    """A hash of a split's images and labels that does not depend on their order or on where they lie.

    Args:
        split: columns label and digest (each image's content hash, from the reading pass).
    """
    rows = zip(column_values(split, "digest"), label_texts(split).to_pylist())
    lines = sorted(f"{digest} {label}" for digest, label in rows)
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()
