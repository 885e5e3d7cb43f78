"""Two or more runs on the same images: who is right where, and whether the difference could be chance."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet
from pydantic import BaseModel, ConfigDict
from scipy import stats

from vit_finetune.run import Run, RunError


@dataclass(frozen=True)
class Answers:
    """What a run said about each image of a split, in the order of the ids."""

    name: str
    """What to call the run."""
    ids: np.ndarray
    """str `(images,)`, sorted."""
    labels: list[Any]
    """Class name of each image; of several labels, the list of them."""
    predicted: list[Any]
    """The same as the run has it."""
    is_right: np.ndarray
    """bool `(images,)`; of several labels, whether all are right."""


class Pair(BaseModel):
    """Two runs on the same images, each of which has one true answer."""

    model_config = ConfigDict(frozen=True)
    first: str
    second: str
    num_images: int
    both_right: int
    only_first: int
    """Images that the first run alone gets right."""
    only_second: int
    both_wrong: int
    difference: float
    """Share of images that the second run gets right, less that of the first; in [-1, 1]."""
    interval: tuple[float, float]
    """95% interval of the difference (Bonett & Price, 2012)."""
    p_value: float
    """Exact two-sided McNemar test: how often as great a difference comes of chance between equals."""
    adjusted_p_value: float
    """The same with regard to how many pairs were looked at (Holm, 1979)."""


def load_answers(run: Run, name: str, split: str) -> Answers:
    """What a run's predictions say.

    Args:
        run: finished.
        name: what to call it.
        split: whose predictions.

    Raises:
        RunError: there are none of this split, or they are no predictions.
    """
    path = run.predictions(split)
    if not path.is_file():
        raise RunError(
            f"{run.path}: there are no predictions of the {split} split ({path.relative_to(run.path)}). "
            f"Expected a finished run whose {split} split was scored"
        )
    try:
        table = pyarrow.parquet.read_table(path, columns=["id", "label", "predicted"])
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{path}: these are no predictions of a run: {error}") from error
    table = table.sort_by("id")
    labels, predicted = table["label"].to_pylist(), table["predicted"].to_pylist()
    is_right = np.fromiter((a == b for a, b in zip(labels, predicted)), bool, len(labels))
    return Answers(name, np.asarray(table["id"].to_pylist(), dtype=object), labels, predicted, is_right)


def check_comparable(answers: Sequence[Answers]) -> None:
    """Makes sure that runs were scored on the same images with the same labels.

    Raises:
        RunError: they were not.
    """
    first = answers[0]
    for other in answers[1:]:
        if not np.array_equal(first.ids, other.ids):
            shared = len(np.intersect1d(first.ids, other.ids))
            raise RunError(
                f"{first.name} and {other.name} were not scored on the same images: {len(first.ids):,} and "
                f"{len(other.ids):,}, of which {shared:,} are of one name. Expected one split; train with "
                f"data.splits=RUN to repeat another run's"
            )
        if first.labels != other.labels:
            row = next(row for row, pair in enumerate(zip(first.labels, other.labels)) if pair[0] != pair[1])
            raise RunError(
                f"{first.name} and {other.name} disagree about the truth: {first.ids[row]} is "
                f"{first.labels[row]!r} to one and {other.labels[row]!r} to the other. Expected the same "
                f"labels"
            )


def compare_pairs(answers: Sequence[Answers]) -> list[Pair]:
    """Each two of several runs, in the order of the runs.

    Args:
        answers: of runs for which `check_comparable` holds.
    """
    pairs = list(itertools.combinations(answers, 2))
    counts = [_count(first.is_right, second.is_right) for first, second in pairs]
    raw = [mcnemar(only_first, only_second) for _, only_first, only_second, _ in counts]
    return [
        Pair(
            first=first.name,
            second=second.name,
            num_images=len(first.is_right),
            both_right=both_right,
            only_first=only_first,
            only_second=only_second,
            both_wrong=both_wrong,
            difference=(only_second - only_first) / max(len(first.is_right), 1),
            interval=difference_interval(only_first, only_second, len(first.is_right)),
            p_value=p_value,
            adjusted_p_value=adjusted,
        )
        for (first, second), (both_right, only_first, only_second, both_wrong), p_value, adjusted in zip(
            pairs, counts, raw, adjust(raw)
        )
    ]


def _count(first: np.ndarray, second: np.ndarray) -> tuple[int, int, int, int]:
    return (
        int((first & second).sum()),
        int((first & ~second).sum()),
        int((~first & second).sum()),
        int((~first & ~second).sum()),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """The p-value of McNemar's test, exact and two-sided (McNemar, 1947): of images that only one of two runs
    gets right, either is as likely to have been the one if the runs are equally good."""
    total = only_first + only_second
    return float(stats.binomtest(only_first, total, 0.5).pvalue) if total else 1.0


def difference_interval(only_first: int, only_second: int, total: int) -> tuple[float, float]:
    """The 95% interval of the second run's accuracy less the first's, paired by image: Wald's with one image
    more in each of the two cells that differ (Bonett & Price, 2012)."""
    z = 1.959963984540054
    first, second = (only_first + 1) / (total + 2), (only_second + 1) / (total + 2)
    spread = z * float(np.sqrt((first + second - (second - first) ** 2) / (total + 2)))
    return (max(-1.0, second - first - spread), min(1.0, second - first + spread))


def adjust(p_values: Sequence[float]) -> list[float]:
    """P-values made larger, so that the level of each is that of being wrong anywhere (Holm, 1979)."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, p_values[place] * (len(p_values) - rank)))
        adjusted[place] = highest
    return adjusted


def right_alone(answers: Sequence[Answers]) -> dict[str, list[int]]:
    """By run, the rows of the images that it alone of all gets right, in the order of the ids."""
    rights = np.stack([one.is_right for one in answers])  # (runs, images)
    alone = rights & (rights.sum(axis=0) == 1)
    return {one.name: np.flatnonzero(row).tolist() for one, row in zip(answers, alone)}
