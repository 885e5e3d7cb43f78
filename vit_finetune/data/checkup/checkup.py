"""What is wrong with this data, finding by finding: every image is read before training starts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from vit_finetune.console import progress
from vit_finetune.data.checkup.duplicates import find_near, group_equal, group_linked
from vit_finetune.data.checkup.image_findings import Images, find_odd_images, find_unreadable, gather_images
from vit_finetune.data.checkup.pictures import open_image
from vit_finetune.data.checkup.readings import memory_path, read_images
from vit_finetune.data.checkup.set_findings import (
    describe_alike,
    describe_listing,
    find_class_faults,
    find_duplicates,
    find_straddling_groups,
)
from vit_finetune.data.sources.columns import Source, column_values
from vit_finetune.data.sources.folders import ALL, count_of, first_of
from vit_finetune.recipe import DataConfig
from vit_finetune.run import Finding, Findings, RunError

GRAVITY = ("error", "warning", "note")

MOST_LISTED = 20
"""Images that an error names; `vit-finetune check` writes all of them down."""


@dataclass
class Checkup:
    """A source that was looked at."""

    source: Source
    """Without what cannot be read or is excluded; with a column `digest` (content hash)."""
    findings: list[Finding]
    """Gravest first."""
    num_images: dict[str, int]
    """By split, before anything was left out."""
    twins: list[tuple[str, str]] = field(default_factory=list)
    """Ids of training images that are nearly the same, which carving must not part."""

    def document(self, config: DataConfig) -> Findings:
        """Everything found, to be saved as `findings.json`."""
        return Findings(path=config.path, num_images=self.num_images, findings=self.findings)


def check_up(source: Source, config: DataConfig) -> Checkup:
    """A source with every image read once, and what is wrong with it. Raises nothing for what it finds.

    Raises:
        RunError: `data.exclude` is no findings document, or of other data.
    """
    num_images = {split: len(dataset) for split, dataset in source.splits.items()}
    source, excluded = exclude_images(source, config)
    readings = read_images(source, config)
    images = gather_images(source, readings)
    equal = group_equal(images.digests)
    near_pairs = _near_pairs(source, images, config)
    pairs = np.empty((0, 2), np.int64) if near_pairs is None else near_pairs
    splits_hold = config.splits is None
    near = _with_copies(group_linked(pairs, len(images.ids)), equal)
    findings = [
        *find_unreadable(images, config.on_unreadable == "skip"),
        *find_straddling_groups(images),
        *find_class_faults(images, config),
        *find_duplicates(images, _readable(equal, images), False, splits_hold),
        *find_duplicates(images, near, True, splits_hold),
        *([describe_alike(len(images.ids))] if near_pairs is None else []),
        *find_odd_images(images),
        *describe_listing(source.notices),
        *excluded,
    ]
    findings.sort(key=lambda finding: GRAVITY.index(finding.severity))
    carved = [images.splits[split] in ("train", ALL) for split in images.split]
    twins = [
        (images.ids[one], images.ids[other]) for one, other in pairs.tolist() if carved[one] and carved[other]
    ]
    return Checkup(without_unreadable(source, readings), findings, num_images, twins)


def leave_out_unreadable(source: Source, config: DataConfig) -> Source:
    """The source without images that cannot be decoded, with a column `digest`; nothing else is looked for.

    Raises:
        RunError: images are unreadable and `data.on_unreadable` is `stop`; or a split has no others.
    """
    readings = read_images(source, config)
    raise_errors(find_unreadable(gather_images(source, readings), config.on_unreadable == "skip"), config)
    kept = without_unreadable(source, readings)
    require_images(kept, config)
    return kept


def raise_errors(findings: list[Finding], config: DataConfig) -> None:
    """Stops where there are errors among the findings.

    Raises:
        RunError: `explain_errors`.
    """
    reason = explain_errors(findings, config)
    if reason:
        raise RunError(reason)


def explain_errors(findings: list[Finding], config: DataConfig) -> str:
    """What was found, the images, and what to do, for each error; empty where there are none."""
    said = []
    for finding in findings:
        if finding.severity != "error":
            continue
        images = finding.images if finding.kind != "class-too-small" else []  # the message says it all
        lines = [
            f"\n  {image.name}" + (f": {image.detail}" if image.detail else "")
            for image in images[:MOST_LISTED]
        ]
        if len(images) > MOST_LISTED:
            lines.append(
                f"\n  … and {len(images) - MOST_LISTED:,} more; `vit-finetune check` writes all of them down"
            )
        said.append(f"{finding.message}:{''.join(lines)}\n{finding.advice}" if lines else finding.sentence)
    return f"{config.path}: " + "\n".join(said) if said else ""


def require_images(source: Source, config: DataConfig) -> None:
    """Makes sure that every split has images left.

    Raises:
        RunError: a split has none.
    """
    for split, dataset in source.splits.items():
        if not len(dataset):
            where = config.path if split == ALL else f"{config.path}: {split}"
            raise RunError(
                f"{where}: not one image can be read or is left. Bring images back, or remove the split"
            )


def exclude_images(source: Source, config: DataConfig) -> tuple[Source, list[Finding]]:
    """The source without the images that the document of `data.exclude` leaves out, and a note of them.

    The note excludes the same images again: a checkup that replaces the document must not bring them back.

    Raises:
        RunError: it is no findings document, or names images that are not there.
    """
    if config.exclude is None:
        return source, []
    path = Path(config.exclude).expanduser()
    document = Findings.load(path)
    if not document.whole:
        raise RunError(
            f"{path}: a run lists the first images of each finding only; expected the findings.json that "
            f"`vit-finetune check` wrote"
        )
    listed = {
        (image.split, image.id): image.model_copy(update={"detail": "", "group": None})
        for finding in document.findings
        for image in finding.exclude
    }
    gone = {}
    unknown = set(listed)
    for split, dataset in source.splits.items():
        here = [(split, identity) for identity in column_values(dataset, "id")]
        unknown.difference_update(here)
        gone[split] = np.array([image in listed for image in here], bool)
    if unknown:
        names = [listed[key].name for key in sorted(unknown)]
        raise RunError(
            f"{path}: {count_of(len(names), 'image')} to exclude {'is' if len(names) == 1 else 'are'} not in "
            f"{config.path}: {first_of(names)}. The data changed since it was checked; run "
            f"`vit-finetune check` again without data.exclude"
        )
    images = list(listed.values())
    note = Finding(
        kind="excluded",
        severity="note",
        message=f"{count_of(len(images), 'image')} left out by data.exclude",
        count=len(images),
        images=images,
        exclude=images,
    )
    return source.without(gone), [note] if images else []


# --------------------------------------------------------------------------- steps


def _near_pairs(source: Source, images: Images, config: DataConfig) -> np.ndarray | None:
    """Pairs of rows `(n, 2)` that show the same picture; of equal files, the first stands for all. None where
    all are alike."""
    hashes = images.readings["phash"]
    _, first = np.unique(images.digests.dictionary_encode().indices.to_numpy(), return_index=True)
    rows = first[hashes.is_valid().to_numpy()[first] & ~images.column("blank")[first]]
    if len(rows) < 2:
        return np.empty((0, 2), np.int64)
    starts = np.searchsorted(images.split, np.arange(len(images.splits)))

    def open_row(number: int) -> torch.Tensor:
        row = int(rows[number])
        split = int(images.split[row])
        return open_image(source.splits[images.splits[split]], row - int(starts[split]))

    with progress("looking for near duplicates", 1, "searches") as advance:
        pairs = find_near(
            images.digests.take(pa.array(rows)).to_pylist(),
            hashes.take(pa.array(rows)).to_numpy(),
            open_row,
            memory_path("duplicates", config),
        )
        advance()
    return None if pairs is None else np.asarray(rows[pairs])


def _readable(groups: list[np.ndarray], images: Images) -> list[np.ndarray]:
    good = images.readable
    return [rows for rows in groups if good[rows[0]]]  # equal content: all of them, or none


def _with_copies(groups: list[np.ndarray], equal: list[np.ndarray]) -> list[np.ndarray]:
    """The groups with the exact copies of their members."""
    copies = {int(rows[0]): rows for rows in equal}
    return [np.unique(np.concatenate([copies.get(int(row), [row]) for row in rows])) for rows in groups]


def without_unreadable(source: Source, readings: dict[str, pa.Table]) -> Source:
    """The source without images that cannot be decoded, with a column `digest`.

    Args:
        source: the images.
        readings: of each split, row for row.
    """
    with_digests = {
        split: dataset.add_column("digest", readings[split]["digest"].to_pylist())
        for split, dataset in source.splits.items()
    }
    bad = {split: pc.not_equal(table["problem"], "").to_numpy() for split, table in readings.items()}
    return replace(source, splits=with_digests).without(bad)
