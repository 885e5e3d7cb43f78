"""Properties of carved splits over many drawn data sets, against plain Python and scikit-learn."""

from __future__ import annotations

from collections import Counter
from typing import Any

import datasets
import numpy as np
import pytest
from drawn_data import Drawn, carve_ids, components, draw, hash_of, ids_of, split_by_id
from sklearn.model_selection import StratifiedGroupKFold

from vit_finetune.data.sources.columns import Source, column_values
from vit_finetune.data.splits.carving import carve
from vit_finetune.data.splits.leaks import drop_leaks
from vit_finetune.recipe import DataConfig
from vit_finetune.run import RunError

# --------------------------------------------------------------------------- shares


SHARES = [(0.1, 0.1), (0.25, 0.15), (0.4, 0.4), (0.05, 0.6), (0.3, 0.0)]


@pytest.mark.parametrize("seed", range(30))
def test_free_images_are_carved_by_hash_alone(seed: int) -> None:
    validation, test = SHARES[seed % len(SHARES)]
    drawn = draw(seed)
    expected: dict[str, str] = {}
    for label in set(drawn.labels):
        ordered = sorted((i for i, of in zip(drawn.ids, drawn.labels) if of == label), key=hash_of)
        tested = min(max(1, round(len(ordered) * test)), len(ordered) - 2) if test else 0
        validated = min(max(1, round(len(ordered) * validation)), len(ordered) - tested - 1)
        for position, identity in enumerate(ordered):
            is_test, is_train = position < tested, position < len(ordered) - validated
            expected[identity] = "test" if is_test else "train" if is_train else "validation"
    splits = carve_ids(drawn, validation_fraction=validation, test_fraction=test)
    assert split_by_id(splits) == expected
    assert sum(map(len, splits.values())) == len(drawn.ids)
    place = {identity: row for row, identity in enumerate(drawn.ids)}
    assert all(rows == sorted(rows, key=place.__getitem__) for rows in splits.values())


@pytest.mark.parametrize("seed", range(30))
def test_what_belongs_together_stays_together(seed: int) -> None:
    drawn = draw(seed, tied=True, smallest=8)
    splits = carve_ids(drawn, **({"fold": "2/3"} if seed % 2 else {}))
    where = split_by_id(splits)
    assert sorted(where) == sorted(drawn.ids) and sum(map(len, splits.values())) == len(drawn.ids)
    assert all(len({where[identity] for identity in together}) == 1 for together in components(drawn))


@pytest.mark.parametrize("size", [2, 5, 9])
@pytest.mark.parametrize("seed", range(5))
def test_groups_miss_a_share_by_less_than_one_of_them(seed: int, size: int) -> None:
    random = np.random.default_rng(seed)
    labels = np.repeat([0, 1, 2], [400, 150, 60])
    groups = [
        f"{label}-{random.integers(counts)}"
        for label, counts in zip(labels, np.repeat([400 // size, 150 // size, 60 // size], [400, 150, 60]))
    ]
    drawn = Drawn([str(number) for number in range(len(labels))], labels.tolist(), list(groups))
    largest = max(Counter(groups).values())
    for name, rows in carve_ids(drawn, validation_fraction=0.2, test_fraction=0.3).items():
        found = Counter(drawn.labels[int(identity)] for identity in rows)
        for label, total in ((0, 400), (1, 150), (2, 60)):
            share = {"validation": 0.2, "test": 0.3}.get(name)
            assert share is None or abs(found[label] - share * total) < largest


@pytest.mark.parametrize(("share", "expected"), [(0.25, 18), (0.3, 27), (0.04, 9)])
def test_of_two_sums_of_groups_the_closer_one_is_taken(share: float, expected: int) -> None:
    drawn = Drawn([str(n) for n in range(90)], [0] * 81 + [1] * 9, [str(n // 9) for n in range(90)])
    rows = carve_ids(drawn, test_fraction=0, validation_fraction=share)
    assert sum(int(identity) < 81 for identity in rows["validation"]) == expected


@pytest.mark.parametrize("seed", range(8))
def test_a_unit_is_left_for_each_split(seed: int) -> None:
    groups = ["large"] * 50 + [None] * 53
    drawn = Drawn([str(n) for n in range(103)], [0] * 53 + [1] * 50, groups)  # class 0: 50 together, and 3
    splits = carve_ids(drawn, test_fraction=0.5, split_seed=seed)
    assert all(any(int(identity) < 53 for identity in rows) for rows in splits.values())


def test_groups_too_large_for_a_share_are_said_with_numbers() -> None:
    drawn = Drawn(
        [str(number) for number in range(120)], [0] * 60 + [1] * 60, [f"{n // 20}" for n in range(120)]
    )
    source = drawn.source()
    splits = carve(source, DataConfig(path="drawn"))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 40, "validation": 40, "test": 40}
    assert source.notices == [
        "test has 40 images where 12 were asked for, because some belong together: c0 20 instead of 6, "
        "c1 20 instead of 6",
        "validation has 40 images where 12 were asked for, because some belong together: c0 20 instead of 6, "
        "c1 20 instead of 6",
    ]


def test_small_classes_alone_are_nothing_to_say() -> None:
    source = Drawn([str(number) for number in range(43)], [0] * 40 + [1] * 3).source()
    splits = carve(source, DataConfig(path="drawn", validation_fraction=0.05, test_fraction=0.8))
    assert Counter(column_values(splits["test"], "label")) == {0: 32, 1: 1}  # 2.4 of 3 were asked for
    assert source.notices == []


def test_a_class_in_one_group_stays_in_train_and_is_said() -> None:
    groups = ["one"] * 20 + [None] * 80
    source = Drawn([str(number) for number in range(100)], [0] * 20 + [1] * 80, groups).source()
    splits = carve(source, DataConfig(path="drawn"))
    assert Counter(column_values(splits["train"], "label"))[0] == 20
    assert [notice.partition(":")[2] for notice in source.notices] == [" c0 0 instead of 2"] * 2


def test_groups_that_leave_a_split_empty() -> None:
    ids = [str(number) for number in range(40)]
    two = Drawn(ids, [0] * 20 + [1] * 20, [str(number // 10) for number in range(40)])
    with pytest.raises(
        RunError,
        match=r"no image is left for validation: of 40 images, too many belong together .data.group=g",
    ):
        carve(two.source(), DataConfig(path="drawn", group="g"))
    assert set(carve_ids(two, test_fraction=0)) == {"train", "validation"}
    one = Drawn(ids, [0] * 20 + [1] * 20, digests=["same"] * 40)
    with pytest.raises(RunError, match=r"no image is left for test and validation: .* .duplicates."):
        carve(one.source(), DataConfig(path="drawn"))


# --------------------------------------------------------------------------- stability


@pytest.mark.parametrize("seed", range(15))
def test_one_image_more_moves_at_most_one_other_across_each_border(seed: int) -> None:
    drawn = draw(seed, smallest=6)
    random = np.random.default_rng(seed)
    before = split_by_id(carve_ids(drawn))
    for number in range(10):
        label = int(random.choice(drawn.labels))
        more = Drawn([*drawn.ids, f"c{label}/new{number}.jpg"], [*drawn.labels, label])
        after = split_by_id(carve_ids(more))
        moved = [identity for identity in before if before[identity] != after[identity]]
        borders = {(before[identity], after[identity]) for identity in moved}
        assert len(moved) == len(borders) <= 2
        assert all("train" in border for border in borders)
        assert all(identity.startswith(f"c{label}/") for identity in moved)


@pytest.mark.parametrize("seed", range(8))
def test_one_image_more_hardly_moves_groups(seed: int) -> None:
    drawn = draw(3 * seed + 2, tied=True, smallest=60)
    before = split_by_id(carve_ids(drawn))
    moved = []
    for number in range(10):
        label = drawn.labels[number]
        assert drawn.groups is not None and drawn.digests is not None
        more = Drawn(
            [*drawn.ids, f"new{number}"],
            [*drawn.labels, label],
            [*drawn.groups, None],
            [*drawn.digests, f"new{number}"],
            drawn.twins,
        )
        after = split_by_id(carve_ids(more))
        moved.append(sum(before[identity] != after[identity] for identity in before))
    assert np.mean(moved) < 0.03 * len(drawn.ids)


@pytest.mark.parametrize("options", [{}, {"fold": "1/3"}, {"per_class": 3}])
@pytest.mark.parametrize("tied", [False, True])
def test_the_order_of_the_source_does_not_matter(options: dict[str, Any], tied: bool) -> None:
    drawn = draw(5, tied, smallest=10)
    shuffled = drawn.rows(np.random.default_rng(0).permutation(len(drawn.ids)).tolist())
    one, other = carve_ids(drawn, **options), carve_ids(shuffled, **options)
    assert {name: set(rows) for name, rows in one.items()} == {
        name: set(rows) for name, rows in other.items()
    }


def test_test_does_not_depend_on_validation() -> None:
    drawn = draw(8, smallest=20)
    test = carve_ids(drawn)["test"]
    assert carve_ids(drawn, validation_fraction=0.3)["test"] == test
    assert carve_ids(drawn, test_fraction=0)["validation"] == carve_ids(drawn)["validation"]


# --------------------------------------------------------------------------- folds


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_over_all_folds_each_image_is_validated_once(seed: int, tied: bool) -> None:
    drawn, parts = draw(seed, tied, smallest=11), 2 + seed % 4
    unfolded = carve_ids(drawn)
    folds = [carve_ids(drawn, fold=f"{part}/{parts}") for part in range(1, parts + 1)]
    assert all(fold["test"] == unfolded["test"] for fold in folds)
    everyone = sorted(unfolded["train"] + unfolded["validation"])
    assert sorted(identity for fold in folds for identity in fold["validation"]) == everyone
    assert all(sorted(fold["train"] + fold["validation"]) == everyone for fold in folds)
    if not tied:
        label_of = dict(zip(drawn.ids, drawn.labels))
        for label in set(drawn.labels):
            sizes = [sum(label_of[identity] == label for identity in fold["validation"]) for fold in folds]
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("mixed", [0.0, 0.1])
def test_folds_are_balanced_like_scikit_learns(mixed: float) -> None:
    """Mean absolute deviation, in images, of a fold's class counts from a fifth, over many draws.

    scikit-learn weighs all classes of a group, at a cost that grows with their number; we the most frequent one.
    """
    ours, theirs = [], []
    for seed in range(12):
        random = np.random.default_rng(seed)
        labels = np.repeat(np.arange(4), random.integers(60, 400, size=4))
        groups = np.array(
            [f"{label if random.random() >= mixed else 9}-{random.integers(25)}" for label in labels]
        )
        drawn = Drawn([str(number) for number in range(len(labels))], labels.tolist(), groups.tolist())
        wanted = np.bincount(labels) / 5
        for part in range(1, 6):
            rows = [
                int(identity)
                for identity in carve_ids(drawn, fold=f"{part}/5", test_fraction=0)["validation"]
            ]
            ours.append(np.abs(np.bincount(labels[rows], minlength=4) - wanted).mean())
        for _, held in StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(labels, labels, groups):
            theirs.append(np.abs(np.bincount(labels[held], minlength=4) - wanted).mean())
    assert np.mean(ours) <= np.mean(theirs) + (1.5 if mixed else 0.1)


def test_one_image_more_moves_one_other_at_most_from_each_fold_to_the_next() -> None:
    drawn = Drawn([str(number) for number in range(100)], [0] * 60 + [1] * 40)
    more = Drawn([*drawn.ids, "new"], [*drawn.labels, 0])

    def fold_of(data: Drawn) -> dict[str, int]:
        folds = [carve_ids(data, fold=f"{part}/5", test_fraction=0)["validation"] for part in range(1, 6)]
        return {identity: number for number, rows in enumerate(folds) for identity in rows}

    before, after = fold_of(drawn), fold_of(more)
    moves = [
        (before[identity], after[identity]) for identity in before if before[identity] != after[identity]
    ]
    assert len(moves) == len(set(moves)) <= 4
    assert all(abs(one - other) == 1 for one, other in moves)


def test_remainders_do_not_all_go_to_one_fold() -> None:
    drawn = Drawn(
        [f"{label}/{number}" for label in range(30) for number in range(6)], np.repeat(range(30), 6).tolist()
    )
    sizes = [len(carve_ids(drawn, fold=f"{part}/5", test_fraction=0)["validation"]) for part in range(1, 6)]
    assert sum(sizes) == 180 and max(sizes) <= 30 + 15


def test_large_groups_of_many_classes_do_not_meet_in_one_fold() -> None:
    labels = np.repeat(range(30), 10).tolist()
    drawn = Drawn([str(n) for n in range(300)], labels, [str(n // 5) for n in range(300)])  # two to a class
    sizes = [len(carve_ids(drawn, fold=f"{part}/5", test_fraction=0)["validation"]) for part in range(1, 6)]
    assert sum(sizes) == 300 and max(sizes) <= 100


def test_folds_need_a_train_split_alone_and_enough_images() -> None:
    drawn = Drawn([str(number) for number in range(40)], [0] * 37 + [1] * 3)
    with pytest.raises(
        RunError, match=r"1 of 2 classes have too few training images for data.fold=1/4: c1 .2."
    ):
        carve_ids(drawn, fold="1/4")
    whole = drawn.dataset()
    source = Source("folder", {"train": whole, "validation": whole}, ["c0", "c1"])
    with pytest.raises(RunError, match=r"has validation images of its own, but data.fold=1/2"):
        carve(source, DataConfig(path="drawn", fold="1/2"))


# --------------------------------------------------------------------------- few-shot


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_per_class_bounds_training_images_alone(seed: int, tied: bool) -> None:
    drawn = draw(seed, tied, smallest=8)
    whole, label_of = carve_ids(drawn), dict(zip(drawn.ids, drawn.labels))
    smaller: set[str] = set()
    for per_class in (1, 4, 16):
        few = carve_ids(drawn, per_class=per_class)
        assert few["validation"] == whole["validation"] and few["test"] == whole["test"]
        counts = Counter(label_of[identity] for identity in few["train"])
        everyone = Counter(label_of[identity] for identity in whole["train"])
        assert counts == {label: min(per_class, count) for label, count in everyone.items()}
        assert smaller <= set(few["train"]) <= set(whole["train"])  # more shots add to fewer
        smaller = set(few["train"])
    other = carve_ids(drawn, per_class=4, split_seed=1)["train"]
    assert other != carve_ids(drawn, per_class=4)["train"]


# --------------------------------------------------------------------------- leaks


def given(**digests: list[Any]) -> dict[str, datasets.Dataset]:
    return {
        split: Drawn(
            [f"{split}/{n}" for n in range(len(values))], [n % 2 for n in range(len(values))], digests=values
        ).dataset()
        for split, values in digests.items()
    }


def test_what_two_given_splits_share_stays_in_the_upper_one() -> None:
    splits, notices = drop_leaks(
        given(train=["a", "b", "c", "d", "e", "e"], validation=["b", "f", "g"], test=["c", "g", "h", "h"])
    )
    assert ids_of(splits) == {
        "train": ["train/0", "train/3", "train/4", "train/5"],
        "validation": ["validation/0", "validation/1"],
        "test": ["test/0", "test/1", "test/2", "test/3"],
    }
    assert notices == [
        "1 image of validation left out, the same as images of test: validation/2",
        "1 image of train left out, the same as images of test: train/2",
        "1 image of train left out, the same as images of validation: train/1",
    ]
    clean = given(train=["a", None], test=["b", None])  # nothing is known about the content of two images
    assert drop_leaks(clean) == (clean, [])


def test_a_split_of_leaks_only() -> None:
    with pytest.raises(
        RunError, match="each of the 2 images of validation is also in test, such as validation/0"
    ):
        drop_leaks(given(train=["a"], validation=["b", "c"], test=["c", "b"]))


def test_leaks_are_left_out_before_anything_is_carved() -> None:
    digests = [str(number) for number in range(40)]
    source = Source("folder", given(train=digests, test=["3", "x"]), ["c0", "c1"])
    splits = carve(source, DataConfig(path="drawn"))
    assert sum(map(len, splits.values())) == 41
    assert "train/3" not in split_by_id(ids_of(splits))
    assert source.notices == ["1 image of train left out, the same as images of test: train/3"]


def test_a_class_that_leaves_nothing_to_train_on_is_named() -> None:
    # The only image of c2 is a copy of one that the test holds.
    train = Drawn(
        [f"train/{n}" for n in range(41)], [*(n % 2 for n in range(40)), 2], digests=[*map(str, range(41))]
    )
    test = Drawn(["test/0", "test/1", "test/2"], [0, 1, 2], digests=["x", "y", "40"])
    source = Source("folder", {"train": train.dataset(), "test": test.dataset()}, ["c0", "c1", "c2"])
    with pytest.raises(RunError, match="drawn: no image of c2 is left to train on, but test has some"):
        carve(source, DataConfig(path="drawn"))


def test_a_class_within_groups_of_others_is_not_carved_away() -> None:
    # Each image of c1 is in a group of c0; were all of these groups carved out, nobody would learn c1.
    lost = 0
    for seed in range(40):
        drawn = Drawn(
            [str(n) for n in range(40)],
            [int(n < 3) for n in range(40)],
            [str(n % 20) for n in range(40)],
        )
        try:
            splits = carve_ids(drawn, split_seed=seed, validation_fraction=0.4, test_fraction=0.4)
        except RunError as error:
            assert "no image of c1 is left to train on, but" in str(error)
            lost += 1
            continue
        assert {"0", "1", "2"} & set(splits["train"])
    assert 0 < lost < 40
