"""Train, validation and test: the source's own where it has them, else carved from its training images.

Images are chosen in the order of a hash of the split seed and their id, or group. Test is taken from the
lower end of that order, validation from the upper one: so an image that comes or goes moves at most one other
of its class across each border, none moves between test and validation, and neither depends on the other's
share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import datasets
import numpy as np
import numpy.typing as npt

from vit_finetune.data.sources.columns import Source, column_array
from vit_finetune.data.sources.folders import ALL, count_of, first_of
from vit_finetune.data.sources.labels import count_labels, is_multi_label, label_names, strata
from vit_finetune.data.sources.source import load_source
from vit_finetune.data.splits.files import repeat_splits
from vit_finetune.data.splits.leaks import describe_leaks, drop_leaks
from vit_finetune.data.splits.units import Integers, Units, find_units, hash_keys
from vit_finetune.recipe import DataConfig
from vit_finetune.run import RunError

SPLITS = ("train", "validation", "test")


def load_splits(config: DataConfig) -> datasets.DatasetDict:
    """The images of a data source by split, undecoded: columns id, image, label, and group if any.

    Images are not opened, so duplicates are not known and may come to lie in several splits; a run, which
    reads every image before it carves, keeps them together.

    Raises:
        RunError: the source cannot be used, or a class has too few images to be split.
    """
    return carve(load_source(config), config)


def carve(source: Source, config: DataConfig, twins: Iterable[tuple[str, str]] = ()) -> datasets.DatasetDict:
    """Train, validation and, unless `test_fraction` is 0, test: stratified by class, by the seed alone.

    An image with several labels counts for the rarest of them (`strata`).

    Every class gives each carved split its share, rounded, and at least one image. Images of one group, of
    the same content (where the source has a column digest) and twins stay together; so tied, they count for
    the class of most of them, and shares are met as closely as can be.

    Args:
        source: what to carve; what there is to say about the splits is added to its notices.
        config: shares, seed, fold and number of images per class; or the splits to repeat.
        twins: pairs of ids of near duplicates.

    Raises:
        RunError: no training images, nothing to validate on, a class with fewer images than splits, or groups
            that leave a split empty.
    """
    if config.splits is not None:
        repeated = repeat_splits(source, config)
        source.notices += describe_leaks(
            repeated, f"kept because data.splits={config.splits} names them, though"
        )
        _check_trained(repeated, source, config)
        return repeated
    splits = dict(source.splits)
    if ALL in splits:
        splits["train"] = splits.pop(ALL)
    carved = _find_carved(splits, config)
    splits, notices = drop_leaks(splits)
    source.notices += notices
    if carved:
        splits |= _carve_train(splits["train"], carved, source, config, twins)
    _check_trained(splits, source, config)
    if config.per_class is not None:
        splits["train"] = _take_per_class(splits["train"], config.per_class, config.split_seed)
    return datasets.DatasetDict({split: splits[split] for split in SPLITS if split in splits})


def _find_carved(splits: dict[str, datasets.Dataset], config: DataConfig) -> list[str]:
    """The names of the splits to carve, test first.

    Raises:
        RunError: nothing to train or to validate on, or a fold of data that has its own validation split.
    """
    if "train" not in splits:
        raise RunError(f"{config.path}: found {', '.join(splits)} only; expected training images, too")
    if config.fold is not None and "validation" in splits:
        raise RunError(
            f"{config.path}: has validation images of its own, but data.fold={config.fold} makes them of the "
            f"training images. Leave out data.fold, or take the validation images away"
        )
    if "validation" not in splits and config.validation_fraction == 0 and config.fold is None:
        raise RunError(
            "there are no validation images to choose the best checkpoint by: set data.validation_fraction "
            "above 0"
        )
    test = ["test"] if "test" not in splits and config.test_fraction > 0 else []
    return test + (["validation"] if "validation" not in splits else [])


def _carve_train(
    train: datasets.Dataset,
    carved: list[str],
    source: Source,
    config: DataConfig,
    twins: Iterable[tuple[str, str]],
) -> dict[str, datasets.Dataset]:
    """Train and the carved splits, each in the order of the source."""
    labels, names = strata(train)
    classes = len(names)
    _check_sizes(count_labels(train), carved, source, config)
    units = find_units(train, config.split_seed, twins)
    totals = np.bincount(labels, minlength=classes)
    split_of = np.full(len(units.sizes), "train", dtype="<U10")
    wanted: dict[str, npt.NDArray[np.floating]] = {}
    if "test" in carved:
        split_of[_take_share(units, split_of == "train", config.test_fraction, len(carved))] = "test"
        wanted["test"] = totals * config.test_fraction
    if config.fold is not None:
        part, parts = map(int, config.fold.split("/"))
        left = split_of[units.of_image] == "train"
        rest = np.bincount(labels[left], minlength=classes)
        _check_folds(count_labels(train.select(np.flatnonzero(left))), parts, source, config)
        seeds = hash_keys(config.split_seed, (f"class {name}" for name in names))
        split_of[cut_folds(units, split_of == "train", parts, seeds % np.uint64(parts)) == part - 1] = (
            "validation"
        )
        wanted["validation"] = rest / parts
    elif "validation" in carved:
        split_of[_take_share(units, split_of == "train", config.validation_fraction, 1, True)] = "validation"
        wanted["validation"] = totals * config.validation_fraction
    of_image = split_of[units.of_image]
    found = {split: np.bincount(labels[of_image == split], minlength=classes) for split in ("train", *carved)}
    _check_filled(found, config)
    if len(units.sizes) < len(train):
        source.notices += _compare(wanted, found, names, is_multi_label(train))
    splits = {split: train.select(np.flatnonzero(of_image == split)) for split in found}
    source.notices += _find_unscored({split: splits[split] for split in carved})
    return splits


def _check_sizes(sizes: Integers, carved: list[str], source: Source, config: DataConfig) -> None:
    """Raises RunError where a class has fewer images than splits."""
    too_few = _name_sizes(sizes, (sizes > 0) & (sizes <= len(carved)), source.labels)
    if too_few:
        raise RunError(
            f"{config.path}: {len(too_few)} of {len(source.labels)} classes have too few images to be split "
            f"into train, {' and '.join(reversed(carved))}: {', '.join(too_few)}. Add images, "
            f"remove the class, or carve less (data.test_fraction=0)"
        )


def _check_folds(sizes: Integers, parts: int, source: Source, config: DataConfig) -> None:
    """Raises RunError where a class has fewer training images than there are folds."""
    too_few = _name_sizes(sizes, (sizes > 0) & (sizes < parts), source.labels)
    if too_few:
        raise RunError(
            f"{config.path}: {len(too_few)} of {len(source.labels)} classes have too few training images for "
            f"data.fold={config.fold}: {', '.join(too_few)}. Add images, remove the class, or make fewer "
            f"folds"
        )


def _name_sizes(sizes: Integers, which: npt.NDArray[np.bool_], names: list[str]) -> list[str]:
    return [f"{names[number]} ({sizes[number]})" for number in np.flatnonzero(which)]


def _by_class(units: Units, free: npt.NDArray[np.bool_]) -> Iterator[tuple[int, Integers]]:
    """Each class with the numbers of its units that are still free, in the order of choosing."""
    numbers = np.flatnonzero(free)
    order = numbers[np.lexsort((units.keys[numbers], units.labels[numbers]))]
    labels = units.labels[order]
    starts = np.flatnonzero(np.diff(labels, prepend=-1))
    for label, chosen in zip(labels[starts], np.split(order, starts[1:])):
        yield int(label), chosen


def _take_share(
    units: Units, free: npt.NDArray[np.bool_], share: float, waiting: int, from_above: bool = False
) -> Integers:
    """The units of a carved split: of each class its share of all images of the class, at least one unit.

    Args:
        units: all of them; a unit counts for the class of most of its images.
        free: which of them can be taken, `(num_units,)`.
        share: of the images.
        waiting: how many splits are still to come, train included; a unit is left for each.
        from_above: take from the upper end of the order.
    """
    totals = np.bincount(units.labels, weights=units.sizes)
    taken = [np.zeros(0, np.int64)]
    for label, numbers in _by_class(units, free):
        ordered = numbers[::-1] if from_above else numbers
        # Where there are too few units for all splits, the first to choose still gets one, and train.
        most = max(len(numbers) - waiting, min(1, len(numbers) - 1))
        target = max(1, round(totals[label] * share))
        taken.append(ordered[_fill(units.sizes[ordered], target, most)])
    return np.concatenate(taken)


def _fill(sizes: Integers, target: int, most: int) -> Integers:
    """Positions of units, in order, that together come closest to so many images.

    Units that would exceed the target are passed over; at the end the smallest of them is taken where that
    comes closer, or where there is nothing else.

    Args:
        sizes: images of each unit, in the order of choosing.
        target: images to take, at least one.
        most: units that may be taken.
    """
    count = min(int(np.searchsorted(np.cumsum(sizes), target, side="right")), most)
    taken = list(range(count))
    left = target - int(sizes[:count].sum())
    passed = []
    for position, size in enumerate(sizes[count:].tolist() if left and count < most else [], start=count):
        if size <= left:
            taken.append(position)
            left -= size
        else:
            passed.append(position)
        if not left or len(taken) == most:
            break
    if passed and len(taken) < most:
        smallest = min(passed, key=lambda position: int(sizes[position]))
        if not taken or sizes[smallest] < 2 * left:
            taken.append(smallest)
    return np.asarray(taken, dtype=np.int64)


def cut_folds(
    units: Units, free: npt.NDArray[np.bool_], parts: int, phases: npt.NDArray[np.uint64]
) -> Integers:
    """The fold of each unit, from 0, or -1 for those that are not free, `(num_units,)`: stratified and equal.

    Of each class, units of several images go to the emptiest fold, the largest first; single images fill the
    folds up, in blocks of the order of choosing, so that one image that comes or goes moves at most one other
    from each fold to the next.

    Args:
        units: all of them.
        free: which of them to cut, `(num_units,)`.
        parts: how many folds.
        phases: of each class, from 0 to parts - 1: which folds get what cannot be divided, `(num_classes,)`.
    """
    folds = np.full(len(units.sizes), -1, dtype=np.int64)
    for label, numbers in _by_class(units, free):
        sizes = units.sizes[numbers]
        phase = int(phases[label])
        room = np.diff((np.arange(parts + 1) * int(sizes.sum()) + phase) // parts)
        several = np.flatnonzero(sizes > 1)
        for position in several[np.argsort(-sizes[several], kind="stable")]:
            # Of equally empty folds not always the first: the largest units of all classes would meet there.
            fold = (int(np.argmax(np.roll(room, -phase))) + phase) % parts
            folds[numbers[position]] = fold
            room[fold] -= sizes[position]
        single = numbers[sizes == 1]
        folds[single] = np.repeat(np.arange(parts), _level(room, len(single)))
    return folds


def _level(room: Integers, amount: int) -> Integers:
    """How much of an amount each of several vessels gets so that the room left in them is as equal as can be.

    Args:
        room: of each; negative where too much is in it already. The sum is the amount.
        amount: to be divided.
    """
    ordered = np.sort(room)[::-1]
    # The level that the first k reach together; all that are lower than it are among them.
    levels = (np.cumsum(ordered) - amount) / np.arange(1, len(room) + 1)
    level = int(np.floor(levels[np.flatnonzero(ordered >= levels)[-1]]))
    poured = np.maximum(room - level, 0)
    over = int(poured.sum()) - amount
    poured[np.flatnonzero(poured)[:over]] -= 1
    return poured


def _check_filled(found: dict[str, Integers], config: DataConfig) -> None:
    """Raises RunError where a split stayed empty."""
    total = sum(int(counts.sum()) for counts in found.values())
    empty = [split for split, counts in found.items() if not counts.any()]
    if empty:
        tied = f"data.group={config.group}" if config.group else "duplicates"
        raise RunError(
            f"{config.path}: no image is left for {' and '.join(empty)}: of {count_of(total, 'image')}, too "
            f"many belong together ({tied}) to be divided. Add images of other groups, or carve less"
        )


def _check_trained(splits: Mapping[str, datasets.Dataset], source: Source, config: DataConfig) -> None:
    """Raises RunError where another split has images of a class that train has none of."""
    has = {split: count_labels(dataset) > 0 for split, dataset in splits.items()}
    lost = np.logical_or.reduce(list(has.values())) & ~has["train"]
    if lost.any():
        others = [split for split, here in has.items() if (here & lost).any()]
        raise RunError(
            f"{config.path}: no image of {first_of([source.labels[n] for n in np.flatnonzero(lost)], 8)} is "
            f"left to train on, but {' and '.join(others)} has some. Add images of the class in other "
            f"groups, no copies of these, or remove it"
            + ("; or draw other splits with data.split_seed" if config.multi_label else "")
        )


def _find_unscored(carved: Mapping[str, datasets.Dataset]) -> list[str]:
    """A sentence for each carved split without an image of some label; of one class each, none lacks any."""
    notices = []
    for split, dataset in carved.items():
        absent = [name for name, count in zip(label_names(dataset), count_labels(dataset)) if not count]
        if absent and is_multi_label(dataset):
            notices.append(
                f"{split} has no image of {first_of(absent, 8)}: its scores there say nothing"
                + (", and its threshold stays at 0.5" if split == "validation" else "")
            )
    return notices


def _compare(
    wanted: dict[str, npt.NDArray[np.floating]],
    found: dict[str, Integers],
    labels: list[str],
    by_rarest: bool,
) -> list[str]:
    """A sentence for each carved split in which images that belong together made other shares than asked.

    `by_rarest` of several labels an image counts.
    """
    counted = " (each image by the rarest of its labels)" if by_rarest else ""
    notices = []
    for split, shares in wanted.items():
        off = np.abs(found[split] - shares) > np.maximum(1, shares / 4)
        classes = [
            f"{labels[n]} {found[split][n]:,} instead of {shares[n]:,.0f}" for n in np.flatnonzero(off)
        ]
        if classes:
            notices.append(
                f"{split} has {found[split].sum():,} images where {shares.sum():,.0f} were asked for, "
                f"because some belong together: {first_of(classes, 8)}{counted}"
            )
    return notices


def _take_per_class(train: datasets.Dataset, per_class: int, seed: int) -> datasets.Dataset:
    """At most so many images of each class, in the order of the source, chosen by the hash of their ids."""
    labels = column_array(train, "label").to_numpy()
    order = np.lexsort((hash_keys(seed, column_array(train, "id").to_pylist()), labels))
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    sizes = np.diff(np.append(starts, len(labels)))
    rank = np.arange(len(labels)) - np.repeat(starts, sizes)
    return train.select(np.sort(order[rank < per_class]))
