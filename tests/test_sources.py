"""Folders, tables and the built-in dataset, as sources."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import draw_folder
from drawn_data import groups, label_names

from vit_finetune.data.sources.columns import Source
from vit_finetune.data.sources.hub import is_hub_id
from vit_finetune.data.sources.source import load_source
from vit_finetune.recipe import DataConfig
from vit_finetune.run import RunError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


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


# --------------------------------------------------------------------------- what is built in


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
