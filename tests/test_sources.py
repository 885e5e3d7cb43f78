"""Folders, tables, Hub-shaped datasets and the built-in one, as sources."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import draw_folder, draw_image
from drawn_data import Drawn

from vit_finetune.data.sources.columns import Source, column_values, with_labels
from vit_finetune.data.sources.hub import arrange_columns, is_hub_id
from vit_finetune.data.sources.source import load_source
from vit_finetune.recipe import DataConfig
from vit_finetune.run import RunError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def label_names(source: Source, split: str) -> dict[str, str]:
    """Class name by id."""
    rows = zip(column_values(source.splits[split], "id"), column_values(source.splits[split], "label"))
    return {identity: source.labels[label] for identity, label in rows}


def load(path: Path, **options: Any) -> Source:
    return load_source(DataConfig(path=str(path), **options))


# --------------------------------------------------------------------------- folders


def test_classes_are_in_natural_order_and_the_same_in_every_split(tmp_path: Path) -> None:
    root = touch(
        tmp_path, *(f"{split}/{name}/1.jpg" for split in ("test", "train") for name in ("10", "2", "1"))
    )
    source = load(root)
    assert source.kind == "folder"
    assert source.labels == ["1", "2", "10"]
    for split in ("train", "test"):
        assert source.splits[split].features["label"].names == ["1", "2", "10"]
        assert label_names(source, split) == {f"{split}/{name}/1.jpg": name for name in ("1", "2", "10")}


def test_images_are_read_from_below_the_root(folder: Path) -> None:
    source = load(folder)
    row = source.splits["all"][0]
    assert row["id"] == "blue/0.png"
    assert row["image"].size == (20, 18)


def test_classes_that_differ_between_splits_are_named(tmp_path: Path) -> None:
    root = touch(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "val/Dog/1.jpg")
    with pytest.raises(RunError, match="'Dog' is only in validation, 'dog' only in train"):
        load(root)


def test_a_split_without_a_class_is_said(tmp_path: Path) -> None:
    source = load(touch(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg"))
    assert source.notices == []
    assert source.labels == ["cat", "dog"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("empty", "found no images"),
        ("single", "found one class only .'cat'.. Expected at least two classes"),
        ("nothing", "no such folder or file. Expected a folder"),
        ("note.txt", "expected a folder, an archive"),
    ],
)
def test_what_is_no_source(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "single/cat/1.jpg", "note.txt")
    with pytest.raises(RunError, match=message):
        load(tmp_path / path)


def test_hub_ids_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "here/photos/1.jpg")
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("owner/name") and is_hub_id("owner-1/name_2.0")
    paths = [
        "here/photos",
        "./name",
        "../name",
        "a/b/c",
        "/a/b",
        "~/photos",
        "digits",
        "a/photos.zip",
        "a/b.csv",
        "photos/",
        "öä/fotos",
        "a/.hidden",
        "a--b/c",
        "a/b@v1",
    ]
    assert not any(map(is_hub_id, paths))


def test_what_the_hub_does_not_have_is_one_message() -> None:
    with pytest.raises(RunError, match="owner/nothing is not in the cache, and HF_HUB_OFFLINE"):
        load_source(DataConfig(path="owner/nothing"))


# --------------------------------------------------------------------------- tables


ROWS = [{"file_name": "images/1.png", "label": "10"}, {"file_name": "images/2.png", "label": "9"}]


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix.lower():
        case ".csv":
            text = io.StringIO()
            writer = csv.DictWriter(text, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
            path.write_text(text.getvalue(), encoding="utf-8-sig")  # as Excel does
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, rows)) + "\n")
        case _:
            pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet", "METADATA.CSV"])
@pytest.mark.parametrize("top", ["", "wrapped/"])
def test_metadata_names_files_and_labels(tmp_path: Path, name: str, top: str) -> None:
    touch(tmp_path, f"{top}images/1.png", f"{top}images/2.png", f"{top}images/3.png")
    write_table(tmp_path / top / name, ROWS)
    source = load(tmp_path)
    assert label_names(source, "all") == {f"{top}images/1.png": "10", f"{top}images/2.png": "9"}
    assert source.labels == ["9", "10"]
    assert source.notices == [f"1 image that the metadata does not name left out: {top}images/3.png"]


def test_a_table_by_itself(tmp_path: Path) -> None:
    touch(tmp_path, "images/1.png", "images/2.png")
    rows = [{"Image": row["file_name"], "kind": row["label"], "x": 1} for row in ROWS]
    write_table(tmp_path / "rows.csv", rows)
    source = load(tmp_path / "rows.csv", label_column="kind")
    assert source.kind == "table"
    assert label_names(source, "all") == {"images/1.png": "10", "images/2.png": "9"}
    with pytest.raises(
        RunError, match=r"found the columns Image, kind, x; say which one to use with data.label_column"
    ):
        load(tmp_path / "rows.csv")
    with pytest.raises(RunError, match="there is no column 'nope'; found Image, kind, x"):
        load(tmp_path / "rows.csv", image_column="nope", label_column="kind")


def test_metadata_in_split_folders(tmp_path: Path) -> None:
    for split in ("train", "Val"):
        touch(tmp_path, f"{split}/images/1.png", f"{split}/images/2.png")
        write_table(tmp_path / split / "metadata.csv", ROWS)
    source = load(tmp_path)
    assert set(source.splits) == {"train", "validation"}
    assert label_names(source, "validation") == {"Val/images/1.png": "10", "Val/images/2.png": "9"}


def test_metadata_with_a_split_column(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number}.png" for number in range(4)))
    rows = [
        {"file_name": f"{number}.png", "label": "ab"[number % 2], "split": split}
        for number, split in enumerate(["train", "train", "test", "valid"])
    ]
    write_table(tmp_path / "metadata.csv", rows)
    source = load(tmp_path)
    assert {split: len(rows) for split, rows in source.splits.items()} == {
        "train": 2,
        "test": 1,
        "validation": 1,
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file_name": "../secret.png", "label": "a"}], r"row 1 names '../secret.png', which lies outside"),
        (
            [{"file_name": "/etc/secret.png", "label": "a"}],
            r"row 1 names '/etc/secret.png', which lies outside",
        ),
        ([*ROWS, {"file_name": "3.png", "label": "a"}], "1 of 3 files that it names are not there: 3.png"),
        ([{"file_name": "images", "label": "a"}], "1 of 1 files that it names are not there"),
        ([*ROWS, ROWS[0]], "images/1.png is listed twice"),
        ([{**ROWS[0], "split": "train"}, {**ROWS[0], "split": "test"}], "images/1.png is listed twice"),
        ([{**ROWS[0], "label": ["a", "b"]}], "row 1 has several labels; expected one class per image"),
        ([{**ROWS[0], "label": ""}], "row 1 has no label"),
        ([ROWS[0], {**ROWS[1], "file_name": ""}], "row 2 has no file_name"),
        ([{**ROWS[0], "file_name": {"bytes": "x"}}], "file_name holds dict; expected file names"),
        ([{**ROWS[0], "split": "holdout"}], "found the split 'holdout'; expected train, validation or test"),
        ([{**ROWS[0], "split": "train"}, {**ROWS[1], "split": ""}], "some rows of the table name a split"),
        (["images/1.png"], "row 1 is 'images/1.png'; expected an object"),
        ([], "the table has no rows"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    root = touch(tmp_path / "data", "images/1.png", "images/2.png")
    touch(tmp_path, "secret.png")
    write_table(root / "metadata.jsonl", rows)
    with pytest.raises(RunError, match=message):
        load(root)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "metadata.csv",
            "file_name,label\nimages/1.png,a,b\n",
            "row 1 has more values than there are columns",
        ),
        ("metadata.csv", b"\xff\xfe\x00", "not a readable table"),
        ("metadata.jsonl", '{"file_name": ', "not a readable table"),
        ("metadata.parquet", b"PAR1 no", "not a readable table"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    touch(tmp_path, "images/1.png")
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(RunError, match=message):
        load(tmp_path)


def test_two_tables_for_the_same_images(tmp_path: Path) -> None:
    touch(tmp_path, "train/images/1.png", "train/images/2.png")
    write_table(tmp_path / "metadata.csv", ROWS)
    write_table(tmp_path / "train" / "metadata.csv", ROWS)
    with pytest.raises(RunError, match="at the top and in split folders"):
        load(tmp_path)
    (tmp_path / "train" / "metadata.csv").unlink()
    write_table(tmp_path / "metadata.jsonl", ROWS)
    with pytest.raises(RunError, match=r"found both metadata.csv and metadata.jsonl"):
        load(tmp_path)


def test_a_table_inside_a_class_folder_is_a_stray_file(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.png", "dog/1.png", "cat/metadata.csv")
    assert load(tmp_path).labels == ["cat", "dog"]


# --------------------------------------------------------------------------- groups


def groups(source: Source, split: str = "all") -> dict[str, str | None]:
    """Group by id."""
    return dict(zip(column_values(source.splits[split], "id"), column_values(source.splits[split], "group")))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"p(\d+)_", ["1", "1", "2"]),  # the parenthesis
        (r"p\d+_", ["p1_", "p1_", "p2_"]),  # the match
        (r"(?:left|(right))", [None, "right", None]),  # a parenthesis that took no part
        (r"^[^/]+", ["cat", "cat", "dog"]),
    ],
)
def test_a_pattern_in_the_id_names_the_group(
    tmp_path: Path, pattern: str, expected: list[str | None]
) -> None:
    names = ["cat/p1_left.jpg", "cat/p1_right.jpg", "dog/p2_left.jpg"]
    assert groups(load(touch(tmp_path, *names), group=pattern)) == dict(zip(names, expected))


def test_images_in_no_group_are_said(tmp_path: Path) -> None:
    root = touch(tmp_path, "train/cat/p1.jpg", "train/dog/x.jpg", "test/dog/y.jpg")
    source = load(root, group=r"p\d")
    assert groups(source, "train") == {"train/cat/p1.jpg": "p1", "train/dog/x.jpg": None}
    assert groups(source, "test") == {"test/dog/y.jpg": None}
    assert source.notices[-1] == "2 images in no group of data.group=p\\d: test/dog/y.jpg, train/dog/x.jpg"


@pytest.mark.parametrize("pattern", ["patient", "x*", "()"])
def test_a_pattern_that_matches_nothing(tmp_path: Path, pattern: str) -> None:
    root = touch(tmp_path, "cat/1.jpg", "dog/2.jpg")
    message = (
        r"is no column of the data and matches no image's id; the 2 images are called cat/1.jpg, dog/2.jpg"
    )
    with pytest.raises(RunError, match=message):
        load(root, group=pattern)


def test_neither_a_column_nor_a_pattern(tmp_path: Path) -> None:
    root = touch(tmp_path, "cat/1.jpg", "dog/2.jpg")
    with pytest.raises(
        RunError, match=r"data.group=p\(\\d is neither a column of the data nor a regular expression"
    ):
        load(root, group=r"p(\d")


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_a_column_of_a_table_names_the_group(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "images/1.png", "images/2.png", "images/3.png")
    patients = [7, 7, None] if name.endswith("jsonl") else ["7", "7", ""]
    rows = [*ROWS, {"file_name": "images/3.png", "label": "9"}]
    write_table(tmp_path / name, [{**row, "patient": patient} for row, patient in zip(rows, patients)])
    source = load(tmp_path, group="patient")
    assert groups(source) == {"images/1.png": "7", "images/2.png": "7", "images/3.png": None}
    assert source.notices == ["1 image in no group of data.group=patient: images/3.png"]
    assert groups(load(tmp_path, group=r"\d"))["images/2.png"] == "2"


def test_columns_that_name_no_groups(tmp_path: Path) -> None:
    touch(tmp_path, "images/1.png", "images/2.png")
    write_table(tmp_path / "metadata.jsonl", [{**row, "patient": None, "tags": ["a"]} for row in ROWS])
    with pytest.raises(
        RunError, match=r"data\.group=patient has no value in any row; the 2 images are called images/1"
    ):
        load(tmp_path, group="patient")
    with pytest.raises(RunError, match=r"metadata\.jsonl: tags: holds list; expected one group per image"):
        load(tmp_path, group="tags")


# --------------------------------------------------------------------------- the Hub's shape


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


def test_digits_are_built_in() -> None:
    source = load_source(DataConfig(path="digits"))
    assert source.kind == "built-in"
    assert source.labels == [str(digit) for digit in range(10)]
    (images,) = source.splits.values()
    assert len(images) == 1797
    assert images[0]["image"].size == (8, 8)
    assert images[0]["image"].getextrema() == (0, 239)  # 15 of 16


def test_a_folder_called_digits_is_reached_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_folder(tmp_path / "digits", classes=2, per_class=1)
    monkeypatch.chdir(tmp_path)
    assert load_source(DataConfig(path="./digits")).labels == ["blue", "green"]
