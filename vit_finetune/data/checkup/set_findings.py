"""What is wrong with a set of images: the same image twice, lopsided classes, groups torn apart."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from vit_finetune.data.checkup.image_findings import Images
from vit_finetune.data.sources.folders import ALL, count_of, first_of
from vit_finetune.recipe import DataConfig
from vit_finetune.run import Finding, FoundImage

RANK = {"test": 0, "validation": 1, "train": 2, ALL: 2}
"""Of an image in several splits, that of the lowest rank keeps its copy: scores stay comparable."""

IMBALANCE = 10
"""Times as many images in the largest class as in the smallest, from which on it is mentioned."""


# --------------------------------------------------------------------------- the same image twice


def find_duplicates(
    images: Images, groups: Sequence[np.ndarray], near: bool, splits_hold: bool = True
) -> list[Finding]:
    """Findings about images that are the same: under two labels, in two splits, or twice in one.

    Args:
        images: all of them.
        groups: rows of images that are the same, group by group.
        near: whether they are so to the eye only, rather than byte for byte.
        splits_hold: off where the recipe divides the images anew, so that being in two splits means nothing.
    """
    same = "nearly the same" if near else "byte for byte the same"
    ranks = np.array([RANK[split] for split in images.splits])[images.split]
    two_labels, leaks, copies = _Sets(images), _Sets(images), _Sets(images)
    for rows in groups:
        inside = rows[ranks[rows] > ranks[rows].min()]  # everywhere but in the split that keeps its copy
        labels, splits = np.unique(images.label[rows]), np.unique(images.split[rows])
        if len(labels) > 1:
            # Nobody knows which label is right. Of pictures that only look alike, a test keeps its own.
            two_labels.add(rows, inside if near and len(inside) else rows)
        if len(splits) > 1 and splits_hold:
            leaks.add(rows, inside)
        if len(labels) == 1:
            for split in splits:
                within = rows[images.split[rows] == split]
                if len(within) > 1:
                    copies.add(within, within[1:])
    prefix = "near-" if near else ""
    found = [
        two_labels.finding(
            f"{prefix}two-labels",
            "warning",
            f"{same} as another one with another label",
            "Look which label is right and correct the others; data.exclude leaves "
            + ("out those that are not in the test or validation split" if near else "all of them out"),
        ),
        leaks.finding(
            f"{prefix}leak",
            "warning",
            f"{same} as one in another split, so that scores flatter the model",
            "data.exclude takes those in train out"
            if near
            else "Training leaves its copies out; take them out of the data, too",
        ),
        copies.finding(
            f"{prefix}duplicate",
            "note" if near else "warning",
            f"{same} as another one of their class and split",
            "data.exclude keeps one of each; where the split is carved here, they stay on one side of it"
            if not near
            else "Harmless where they are frames or variants; data.exclude keeps one of each",
        ),
    ]
    return [finding for finding in found if finding.count]


def describe_alike(count: int) -> Finding:
    """A note that near duplicates were not told from the many images that only look alike."""
    return Finding(
        kind="all-alike",
        severity="note",
        message="so many images look alike that near duplicates cannot be told from others",
        advice="If they are frames of videos or several pictures of one thing, name these with data.group",
        count=count,
    )


class _Sets:
    """Sets of images that are the same, gathered for one finding."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self.rows: list[int] = []
        self.numbers: list[int] = []
        self.excluded: list[int] = []

    def add(self, rows: np.ndarray, excluded: np.ndarray) -> None:
        number = self.numbers[-1] + 1 if self.numbers else 0
        self.rows += rows.tolist()
        self.numbers += [number] * len(rows)
        self.excluded += excluded.tolist()

    def finding(self, kind: str, severity: str, message: str, advice: str) -> Finding:
        images, count = self.images, len(self.rows)
        are = "is" if count == 1 else "are"
        return Finding.model_validate(
            {
                "kind": kind,
                "severity": severity,
                "message": f"{count_of(count, 'image')} {are} {message}",
                "advice": advice,
                "count": count,
                "images": images.found(self.rows, lambda row: images.texts[images.label[row]], self.numbers),
                "exclude": images.found(self.excluded),
            }
        )


# --------------------------------------------------------------------------- classes


def find_class_faults(images: Images, config: DataConfig) -> list[Finding]:
    """Findings about classes: missing, lopsided, too small to split, named almost alike."""
    kept = images.readable
    counts = np.stack(
        [images.count_classes(kept & (images.split == split)) for split in range(len(images.splits))]
    )  # (splits, classes)
    return [
        *_find_missing(images, counts, stops=config.splits is None),
        *_find_too_small(images, counts, config),
        *_find_imbalance(images, counts, config.multi_label),
        *_find_alike_names(images.labels),
        *_find_unlabelled(images),
    ]


def _find_unlabelled(images: Images) -> list[Finding]:
    """A note of the images that have none of several labels."""
    labelled = np.zeros(len(images.ids), bool)
    labelled[images.pairs[0]] = True
    rows = np.flatnonzero(~labelled)
    if not len(rows):
        return []
    return [
        Finding(
            kind="no-label",
            severity="note",
            message=f"{count_of(len(rows), 'image')} with no label, which the model learns to give none",
            advice="If nobody has looked at them, take them out of the data",
            count=len(rows),
            images=images.found(rows),
        )
    ]


def _find_missing(images: Images, counts: np.ndarray, stops: bool) -> list[Finding]:
    """Classes that a split lacks; `stops` is off where the recipe divides the images anew."""
    found = []
    nowhere = counts.sum(axis=0) == 0
    if nowhere.any():
        names = _names(images, nowhere)
        found.append(
            Finding(
                kind="class-empty",
                severity="error" if nowhere.all() else "warning",  # there is nothing to learn
                message=f"the data has no image of {first_of(names, 8)}",
                advice="The model will have a class that it never sees; remove the class, or add images",
                count=len(names),
            )
        )
    for split, row in zip(images.splits, counts):
        absent = (row == 0) & ~nowhere
        if not absent.any():
            continue
        names, trained = _names(images, absent), RANK[split] == RANK["train"]
        others = [name for name, other in zip(images.splits, counts) if (other[absent] > 0).any()]
        found.append(
            Finding(
                kind="class-missing",
                severity="error" if trained and stops else "warning",
                message=f"{split} has no image of {first_of(names, 8)}, "
                f"{'which is' if len(names) == 1 else 'which are'} in {' and '.join(others)} only",
                advice=f"Add images of {'it' if len(names) == 1 else 'them'} to {split}"
                + (", or remove the class everywhere" if trained else ": their scores there say nothing"),
                count=len(names),
            )
        )
    return found


def _find_too_small(images: Images, counts: np.ndarray, config: DataConfig) -> list[Finding]:
    carved = [
        split
        for split, share in (("validation", config.validation_fraction), ("test", config.test_fraction))
        if split not in images.splits and (share > 0 or (split == "validation" and config.fold is not None))
    ]
    whole = [row for split, row in zip(images.splits, counts) if RANK[split] == RANK["train"]]
    if not carved or not whole or config.splits is not None:
        return []
    few = np.flatnonzero((whole[0] > 0) & (whole[0] <= len(carved)))
    if not len(few):
        return []
    row, label = images.pairs
    rows = np.unique(row[np.isin(label, few) & images.readable[row]])
    listed = ", ".join(f"{images.labels[number]} ({whole[0][number]})" for number in few)
    return [
        Finding(
            kind="class-too-small",
            severity="error",
            message=f"{len(few)} of {len(images.labels)} classes have too few images to be split into train, "
            f"{' and '.join(carved)}: {listed}",
            advice="Add images, remove the class, or carve less (data.test_fraction=0)",
            count=len(few),
            images=images.found(rows, lambda row: images.texts[images.label[row]]),
        )
    ]


def _find_imbalance(images: Images, counts: np.ndarray, multi_label: bool) -> list[Finding]:
    scores = (
        "macro F1 rather than micro F1"
        if multi_label
        else "balanced accuracy and macro F1 rather than accuracy"
    )
    remedy = "" if multi_label else ", or try data.balanced_sampling=true or training.class_weights=auto"
    for split, row in zip(images.splits, counts):
        present = row[row > 0]
        if RANK[split] != RANK["train"] or not len(present) or present.max() < IMBALANCE * present.min():
            continue
        small = (row > 0) & (row * IMBALANCE <= row.max())
        largest, smallest = _names(images, row == row.max())[0], _names(images, row == present.min())[0]
        return [
            Finding(
                kind="imbalance",
                severity="warning",
                message=f"{largest} has {row.max():,} images, {smallest} {present.min():,}: "
                f"{row.max() / present.min():.0f} times fewer",
                advice=f"Read {scores}; add images of {first_of(_names(images, small), 8)}{remedy}",
                count=int(small.sum()),
            )
        ]
    return []


def _find_alike_names(labels: Sequence[str]) -> list[Finding]:
    alike = defaultdict(list)
    for label in labels:
        alike[_spoken(label)].append(label)
    sets = [names for names in alike.values() if len(names) > 1]
    if not sets:
        return []
    listed = "; ".join(" and ".join(map(repr, names)) for names in sets)
    return [
        Finding(
            kind="label-names-alike",
            severity="warning",
            message=f"class names that differ only in case, spaces or dashes: {listed}",
            advice="If they mean the same, give their images one name",
            count=sum(map(len, sets)),
        )
    ]


def _spoken(label: str) -> str:
    """A class name as it would be said aloud; single letters keep their case, which is what they mean."""
    words = re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", label)).strip()
    return words.casefold() if len(words) > 1 else words


def _names(images: Images, which: np.ndarray) -> list[str]:
    return [images.labels[number] for number in np.flatnonzero(which)]


# --------------------------------------------------------------------------- groups and the listing


def find_straddling_groups(images: Images) -> list[Finding]:
    """An error where images of one group lie in several of the source's splits."""
    members: dict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(images.group):
        if group is not None:
            members[group].append(row)
    torn = {name: rows for name, rows in members.items() if len({int(images.split[row]) for row in rows}) > 1}
    if not torn:
        return []
    listed: list[FoundImage] = []
    exclude: list[FoundImage] = []
    for number, (name, rows) in enumerate(torn.items()):
        ranks = [RANK[images.splits[images.split[row]]] for row in rows]
        listed += images.found(rows, lambda row, name=name: name, [number] * len(rows))  # type: ignore[misc]
        exclude += images.found(row for row, rank in zip(rows, ranks) if rank > min(ranks))
    return [
        Finding(
            kind="group-straddles",
            severity="error",
            message=f"{count_of(len(torn), 'group')} in several splits: {first_of(list(torn), 5)}",
            advice="Move each group into one split; data.exclude leaves its images out of train",
            count=len(listed),
            images=listed,
            exclude=exclude,
        )
    ]


def describe_listing(notices: Iterable[str]) -> list[Finding]:
    """What was decided or left out when the files were listed, as notes."""
    return [Finding(kind="listing", severity="note", message=notice, count=1) for notice in notices]
