"""Datasets with columns and splits of their own, as the Hub has them, under our names."""

from typing import Any

import datasets
import pytest
from conftest import draw_image
from drawn_data import Drawn, groups, label_names

from vit_finetune.data.sources.columns import Source, column_values
from vit_finetune.data.sources.hub import arrange_columns
from vit_finetune.data.sources.labels import with_labels
from vit_finetune.data.sources.source import load_source
from vit_finetune.recipe import DataConfig
from vit_finetune.run import RunError


def hub_split(labels: list[Any], feature: Any, image: str = "img", label: str = "label") -> datasets.Dataset:
    pictures = [draw_image((index, 0, 0), index, (4, 3)) for index in range(len(labels))]
    features = datasets.Features({"extra": datasets.Value("int64"), image: datasets.Image(), label: feature})
    return datasets.Dataset.from_dict(
        {"extra": labels and [0] * len(labels), image: pictures, label: labels}, features=features
    )


STRING = datasets.Value("string")
AB = hub_split(["a", "b"], STRING)
CAT_DOG = datasets.ClassLabel(names=["dog", "cat"])


def arrange(config: dict[str, Any] | None = None, **splits: datasets.Dataset) -> Source:
    return arrange_columns(datasets.DatasetDict(splits), DataConfig(path="owner/name", **(config or {})))


@pytest.mark.parametrize(("image", "label"), [("img", "fine_label"), ("image", "label"), ("picture", "kind")])
def test_hub_columns_get_our_names(image: str, label: str) -> None:
    split = hub_split([0, 1, 1], CAT_DOG, image, label)
    source = arrange(train=split, val=split)
    assert set(source.splits) == {"train", "validation"}
    train = source.splits["train"]
    assert set(train.column_names) == {"id", "image", "label"}
    assert source.labels == train.features["label"].names == ["dog", "cat"]  # the dataset's own order
    assert label_names(source, "train") == {"0": "dog", "1": "cat", "2": "cat"}
    assert train[1]["image"].size == (4, 3)
    assert isinstance(train.features["image"], datasets.Image)


@pytest.mark.parametrize(
    ("feature", "values"), [(STRING, ["10", "2", "1"]), (datasets.Value("int64"), [10, 2, 1])]
)
def test_labels_without_class_names_sort_naturally_over_all_splits(feature: Any, values: list[Any]) -> None:
    source = arrange(train=hub_split(values, feature), test=hub_split(values[:1], feature))
    assert source.labels == ["1", "2", "10"]
    assert all(split.features["label"].names == source.labels for split in source.splits.values())
    assert label_names(source, "test") == {"0": "10"}
    assert source.notices == []


def test_a_single_split_holds_everything() -> None:
    for name, split in {"full": "all", "train": "all", "test": "test"}.items():
        assert set(arrange(**{name: hub_split(["a", "b"], STRING)}).splits) == {split}


def test_file_names_are_ids_where_each_image_has_its_own() -> None:
    def ids(*names: list[Any]) -> list[list[str]]:
        splits = [AB.add_column("file_name", some, feature=STRING) for some in names]
        source = arrange(**dict(zip(("train", "test"), splits)))
        return [column_values(split, "id") for split in source.splits.values()]

    assert ids(["a/1.png", "2"], ["b/1.png", "3"]) == [["a/1.png", "2"], ["b/1.png", "3"]]
    for names in (["a", "a"], ["a", None]):
        assert ids(names) == [["0", "1"]]
    assert ids(["a", "b"], ["b", "c"]) == [["0", "1"], ["0", "1"]]


def test_other_splits_are_left_out_and_said() -> None:
    split = hub_split(["a", "b"], STRING)
    source = arrange(train=split, unsupervised=split, test=hub_split([], STRING))
    assert set(source.splits) == {"train"}
    assert source.notices == [
        "the split unsupervised left out",
        "the split test left out: it has no images",
    ]


@pytest.mark.parametrize(("feature", "missing"), [(CAT_DOG, -1), (CAT_DOG, None), (STRING, None)])
def test_unlabelled_test_is_left_out(feature: Any, missing: Any) -> None:
    labels = [0, 1] if feature is CAT_DOG else ["dog", "cat"]
    source = arrange(train=hub_split(labels, feature), test=hub_split([missing] * 3, feature))
    assert set(source.splits) == {"train"}
    assert source.notices == ["test has no labels: its 3 images left out"]


def test_unlabelled_rows_are_left_out_and_keep_the_numbers_of_the_others() -> None:
    source = arrange(train=hub_split([0, -1, 1], CAT_DOG))
    assert label_names(source, "all") == {"0": "dog", "2": "cat"}
    assert source.notices == ["1 image left out: they have no label"]


@pytest.mark.parametrize(
    ("splits", "config", "message"),
    [
        (
            {"train": hub_split(["a", "b"], STRING), "test": hub_split(["c"], STRING)},
            {},
            "'c' is only in test",
        ),
        ({"train": hub_split(["a", "a"], STRING)}, {}, "found one class only .'a'."),
        ({"a": AB, "b": AB}, {}, "found the splits a, b; expected train"),
        ({"val": AB, "dev": AB}, {}, "two of which mean validation"),
        ({"train": hub_split([[0], [1]], datasets.List(CAT_DOG))}, {}, "holds several labels per image"),
        ({"train": AB}, {"label_column": "nope"}, "no column 'nope'; found extra, img, label"),
        ({"train": hub_split(["a", "b"], STRING, label="what")}, {}, "data.label_column"),
        ({"train": AB}, {"image_column": "label"}, "the column label holds .*; expected images"),
        ({"train": AB, "val": hub_split(["a"], STRING, label="x")}, {}, "validation has no column label"),
    ],
)
def test_hub_datasets_that_cannot_be_used(
    splits: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunError, match=f"owner/name.*{message}"):
        arrange(config, **splits)


def test_a_hub_column_names_the_group() -> None:
    train = hub_split(["a", None, "b"], STRING).add_column("kind", [1, 0, 1], feature=CAT_DOG)
    source = arrange({"group": "kind", "label_column": "label"}, train=train, test=hub_split(["a"], STRING))
    assert groups(source, "train") == {"0": "cat", "2": "cat"}
    assert set(source.splits["test"].column_names) == {"id", "image", "label"}


def test_a_split_without_the_column_has_no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    train = hub_split(["a", "b"], STRING).add_column("1", [1, 0], feature=CAT_DOG)
    loaded = datasets.DatasetDict({"train": train, "test": hub_split(["a", "b"], STRING)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: loaded)
    source = load_source(DataConfig(path="owner/name", group="1", label_column="label"))
    assert groups(source, "train") == {"0": "cat", "1": "dog"}
    assert groups(source, "test") == {"0": None, "1": None}  # not what the pattern 1 would find in the ids
    assert source.notices == ["2 images in no group of data.group=1: 0, 1"]


def test_columns_of_selected_rows_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [
        Drawn([f"{part}/{n}" for n in range(9)], [n % 2 for n in range(9)]).dataset() for part in range(3)
    ]
    rows = datasets.concatenate_datasets(parts).select([26, 0, 9, 8, 8]).select([4, 0, 1])
    # A million rows, cut out one by one, would take most of a minute.
    monkeypatch.setattr(datasets.table.Table, "fast_gather", None)
    assert column_values(rows, "id") == ["0/8", "2/8", "0/0"]
    assert column_values(rows, "label") == [0, 0, 0]


def test_with_labels_renumbers() -> None:
    split = arrange(train=hub_split([0, 1, 1], CAT_DOG)).splits["all"]
    renumbered = with_labels(split, ["cat", "dog"])
    assert column_values(renumbered, "label") == [1, 0, 0]
    assert renumbered.features["label"].names == ["cat", "dog"]
    assert with_labels(split, ["dog", "cat"]) is split
