"""Splits written beside a run and read back: the same images in the same splits, or an error that says why not."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from conftest import draw_folder
from drawn_data import Drawn, draw, ids_of

from vit_finetune.data.sources.columns import Source, column_values
from vit_finetune.data.splits.carving import carve, load_splits
from vit_finetune.data.splits.files import read_splits, save_splits
from vit_finetune.data.splits.prepared import prepare_splits
from vit_finetune.recipe import DataConfig
from vit_finetune.run import Finding, Findings, FoundImage, Run, RunError


def save(drawn: Drawn, folder: Path, **options: Any) -> datasets.DatasetDict:
    splits = carve(drawn.source(), DataConfig(path="drawn", **options), drawn.twins)
    save_splits(splits, Run(folder))
    return splits


def repeat(source: Source, path: Path) -> datasets.DatasetDict:
    return carve(source, DataConfig(path="drawn", splits=str(path)))


def write(path: Path, *rows: str, head: str = "id,label,split") -> Path:
    path.write_bytes(("\n".join([head, *rows]) + "\n").encode(errors="surrogateescape"))
    return path


# --------------------------------------------------------------------------- written


def test_saved_splits_tell_where_each_image_went(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for name in ("with, comma", "b"):
        (root / name).mkdir(parents=True)
        for number in range(5):
            (root / name / f"{number}.png").touch()
    splits, run = load_splits(DataConfig(path=str(root))), Run(tmp_path / "run")
    save_splits(splits, run)
    for name, split in splits.items():
        with (run.splits / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [row["id"] for row in rows] == column_values(split, "id")
        assert all(row["label"] == row["id"].split("/")[0] and row["split"] == name for row in rows)
        assert set(rows[0]) == {"id", "label", "split"}


def test_groups_are_written_too(tmp_path: Path) -> None:
    drawn = Drawn(
        [f"{n}.jpg" for n in range(40)],
        [n % 2 for n in range(40)],
        [None if n < 2 else str(n) for n in range(40)],
    )
    save(drawn, tmp_path)
    with (tmp_path / "splits" / "train.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 32
    for row in rows:
        number = row["id"].removesuffix(".jpg")
        assert row["group"] == ("" if int(number) < 2 else number)


# --------------------------------------------------------------------------- and read back


@pytest.mark.parametrize("options", [{}, {"fold": "2/3"}, {"per_class": 4}, {"test_fraction": 0}])
@pytest.mark.parametrize("seed", range(6))
def test_what_was_written_is_repeated(tmp_path: Path, seed: int, options: dict[str, Any]) -> None:
    drawn = draw(seed, tied=seed % 2 == 1, smallest=10)
    splits = save(drawn, tmp_path, **options)
    source = drawn.source()
    for path in (tmp_path, tmp_path / "splits"):
        again = repeat(drawn.source(), path)
        assert ids_of(again) == ids_of(splits)
        assert list(again) == list(splits)
    repeat(source, tmp_path)
    left = len(drawn.ids) - sum(map(len, splits.values()))
    assert [notice.split(" ", 1)[0] for notice in source.notices] == ([str(left)] if left else [])


def test_names_that_csv_must_quote(tmp_path: Path) -> None:
    odd = [
        'a "quoted" one',
        "a, comma",
        "two\nlines",
        "or\rtwo",
        " spaces ",
        "Ä/ü",
        "null",
        "NA",
        "1",
        "01",
        "1.0",
    ]
    drawn = Drawn([*odd, *map(str, range(100, 119))], [n % 2 for n in range(30)])
    splits = save(drawn, tmp_path)
    assert ids_of(repeat(drawn.source(), tmp_path)) == ids_of(splits)


def test_one_file_moves_images_between_the_splits_of_a_folder(tmp_path: Path) -> None:
    for split in ("train", "test"):
        draw_folder(tmp_path / "photos" / split, classes=2, per_class=2)
    rows = [
        "train/blue/0.png,blue,TEST",
        "test/green/1.png,green,train",
        "test/blue/0.png,blue,train",
        "train/green/0.png,green,val",
    ]
    path = write(tmp_path / "mine.csv", *rows)
    config = DataConfig(path=str(tmp_path / "photos"), splits=str(path), on_unreadable="skip")
    data = prepare_splits(config)
    assert ids_of(data.splits) == {
        "train": ["test/blue/0.png", "test/green/1.png"],
        "validation": ["train/green/0.png"],
        "test": ["train/blue/0.png"],
    }
    assert [finding.message for finding in data.findings.findings if finding.kind == "listing"] == [
        f"4 images that data.splits={path} does not name left out: test/blue/1.png, test/green/0.png, train/blue/1.png …",
        f"1 image of train kept because data.splits={path} names them, though the same as images of test: test/blue/0.png",
    ]


def test_rows_that_are_counted_in_each_split_of_a_hub_dataset(tmp_path: Path) -> None:
    def source() -> Source:
        train = Drawn([str(n) for n in range(40)], [n % 2 for n in range(40)]).dataset()
        test = Drawn([str(n) for n in range(10)], [n // 5 for n in range(10)]).dataset()
        return Source("hub", {"train": train, "test": test}, ["c0", "c1"])

    splits = carve(source(), DataConfig(path="owner/name"))
    save_splits(splits, Run(tmp_path))
    again = repeat(source(), tmp_path)
    assert ids_of(again) == ids_of(splits)
    assert all(column_values(again[name], "label") == column_values(splits[name], "label") for name in splits)


def test_images_that_are_excluded_or_unreadable_stay_left_out(tmp_path: Path) -> None:
    photos = draw_folder(tmp_path / "photos", classes=2, per_class=10)
    config = DataConfig(path=str(photos), splits=str(tmp_path / "run"))
    before = load_splits(DataConfig(path=str(photos)))
    save_splits(before, Run(tmp_path / "run"))
    excluded, unreadable, absent = column_values(before["train"], "id")[:3]
    (photos / unreadable).write_bytes(b"no image")
    image = FoundImage(split="all", id=excluded)
    finding = Finding(kind="blank", severity="warning", message="x", count=1, images=[image], exclude=[image])
    document = tmp_path / "findings.json"
    document.write_text(Findings(path="x", num_images={}, findings=[finding]).to_json())
    config = config.model_copy(update={"exclude": str(document), "on_unreadable": "skip"})
    splits = ids_of(prepare_splits(config).splits)
    assert splits["train"] == column_values(before["train"], "id")[2:]
    assert {name: splits[name] for name in ("validation", "test")} == {
        name: column_values(before[name], "id") for name in ("validation", "test")
    }
    (photos / absent).unlink()
    with pytest.raises(RunError, match=f"1 of 20 images that it names are not in .*: {absent}"):
        prepare_splits(config)


def test_a_split_that_is_excluded_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", "0.jpg,c0,train", "1.jpg,c1,train", "2.jpg,c0,val", "3.jpg,c1,val")
    source = TEN.source()
    source = source.without({"all": np.isin(np.arange(10), [2, 3])})
    with pytest.raises(RunError, match="all images of validation are excluded or cannot be read"):
        repeat(source, path)


def test_what_is_left_out_does_not_change_where_rows_of_the_hub_are_looked_for(tmp_path: Path) -> None:
    def source() -> Source:
        train = Drawn([str(n) for n in range(40)], [n % 2 for n in range(40)]).dataset()
        test = Drawn([str(n) for n in range(4)], [n // 2 for n in range(4)]).dataset()
        return Source("hub", {"train": train, "test": test}, ["c0", "c1"])

    save_splits(carve(source(), DataConfig(path="owner/name")), Run(tmp_path))
    # The other rows of train have numbers that no row of test has.
    rest = source().without({"train": np.arange(40) < 4})
    again = ids_of(repeat(rest, tmp_path))
    assert again["test"] == ["0", "1", "2", "3"]
    assert not {"0", "1", "2", "3"} & {*again["train"], *again["validation"]}


def test_copies_on_both_sides_are_kept_and_said(tmp_path: Path) -> None:
    photos = draw_folder(tmp_path / "photos", classes=2, per_class=4)
    (photos / "blue" / "1.png").write_bytes((photos / "blue" / "0.png").read_bytes())
    rows = [f"{label}/{n}.png,{label},{split}" for label in ("blue", "green") for n, split in
            enumerate(("train", "test", "train", "val"))]  # fmt: skip
    path = write(tmp_path / "mine.csv", *rows)
    data = prepare_splits(DataConfig(path=str(photos), splits=str(path)))
    assert "blue/0.png" in ids_of(data.splits)["train"] and "blue/1.png" in ids_of(data.splits)["test"]
    assert [finding.message for finding in data.findings.findings if finding.kind == "listing"] == [
        f"1 image of train kept because data.splits={path} names them, though the same as images of test: "
        f"blue/0.png"
    ]


def test_splits_of_the_data_that_are_not_used_do_not_leak(tmp_path: Path) -> None:
    for split in ("train", "test"):
        draw_folder(tmp_path / "photos" / split, classes=2, per_class=3)  # the same images
    rows = [f"train/{label}/{n}.png,{label},{split}" for label in ("blue", "green") for n, split in
            enumerate(("train", "test", "val"))]  # fmt: skip
    path = write(tmp_path / "mine.csv", *rows)
    data = prepare_splits(DataConfig(path=str(tmp_path / "photos"), splits=str(path)))
    assert {finding.kind for finding in data.findings.findings} == {"listing"}


TEN = Drawn([f"{number}.jpg" for number in range(10)], [number % 2 for number in range(10)])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["0.jpg,c0,train", "x.jpg,c0,train", "y.jpg,c0,validation"], "2 of 3 images that it names are not in drawn: x.jpg, y.jpg"),
        (["0.jpg,c0,train", "1.jpg,c0,train", "3.jpg,c1,val"], r"1 of 3 images have another label in drawn: 1.jpg .c1, there c0."),
        (["0.jpg,c0,train", "1.jpg,c9,validation"], r"1.jpg .c1, there c9."),
        (["0.jpg,c0,train", "1.jpg,c1,validation", "0.jpg,c0,test"], "names 0.jpg more than once"),
        (["0.jpg,c0,train", "0.jpg,c0,train", "1.jpg,c1,validation"], "names 0.jpg more than once"),
        (["0.jpg,c0,train", "1.jpg,c1,holdout"], "found the split 'holdout'; expected train, validation or test"),
        (["0.jpg,c0,train", "1.jpg,c1,"], "found the split ''"),
        (["0.jpg,c0,train", "1.jpg,c1,test"], "names no images for validation; expected some"),
        (["0.jpg,c0"], "not a readable table"),
        (["0.jpg,c0,train", "\udcff.jpg,c0,val"], "not a readable table"),
        ([], "names no images for train and validation"),
    ],
)  # fmt: skip
def test_splits_that_do_not_fit_the_data(tmp_path: Path, rows: list[str], message: str) -> None:
    with pytest.raises(RunError, match=message):
        repeat(TEN.source(), write(tmp_path / "s.csv", *rows))


def test_what_is_no_table_of_splits(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nothing"):
        with pytest.raises(
            RunError, match="found no splits there; expected a run, its splits/ folder, or a csv"
        ):
            read_splits(path)
    with pytest.raises(RunError, match="found the columns id, class; expected id, label, split"):
        read_splits(write(tmp_path / "other.csv", "0.jpg,c0", head="id,class"))


def test_long_files_with_other_columns_and_line_breaks(tmp_path: Path) -> None:
    path, rows = tmp_path / "s.csv", [f'"{n}\n\n\n\n",c{n % 2},train,1' for n in range(80_000)]
    write(path, *rows, "x.jpg,c0,validation,late text", head="id,label,split,group")
    assert path.stat().st_size > 2**20
    assert read_splits(path)["id"].to_pylist()[-2:] == ["79999\n\n\n\n", "x.jpg"]


def test_excel_writes_a_mark_first(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_bytes("\ufeffid,label,split\r\n0.jpg,c0,train\r\n2.jpg,c0,validation\r\n".encode())
    assert ids_of(repeat(TEN.source(), path)) == {"train": ["0.jpg"], "validation": ["2.jpg"]}
