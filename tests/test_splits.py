"""Folders on disk, split: by the recipe's shares, without leaks; and fingerprints of what came of it."""

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import draw_folder

from vit_finetune.data.sources.columns import column_values
from vit_finetune.data.splits.carving import load_splits
from vit_finetune.data.splits.prepared import fingerprint, prepare_splits
from vit_finetune.recipe import DataConfig
from vit_finetune.run import RunError


def touch_classes(root: Path, **counts: int) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.png").touch()
    return root


def config(path: Path, **options: Any) -> DataConfig:
    return DataConfig(path=str(path), **options)


def ids(splits: datasets.DatasetDict) -> dict[str, list[str]]:
    return {name: column_values(split, "id") for name, split in splits.items()}


def counts(splits: datasets.DatasetDict) -> dict[str, Counter[str]]:
    """Images by class, by split."""
    return {
        name: Counter(split.features["label"].names[label] for label in column_values(split, "label"))
        for name, split in splits.items()
    }


@pytest.mark.parametrize(("validation", "test"), [(0.1, 0.1), (0.25, 0.15), (0.4, 0.4), (0.05, 0.6)])
def test_every_split_has_its_share_of_every_class(tmp_path: Path, validation: float, test: float) -> None:
    sizes = {"a": 3, "b": 4, "c": 5, "d": 37, "e": 200}
    root = touch_classes(tmp_path, **sizes)
    splits = load_splits(config(root, validation_fraction=validation, test_fraction=test))
    assert list(splits) == ["train", "validation", "test"]
    by_class = counts(splits)
    for name, size in sizes.items():
        for split, share in (("validation", validation), ("test", test)):
            assert abs(by_class[split][name] - size * share) <= 1
        assert all(by_class[split][name] >= 1 for split in splits)
    everything = [identity for rows in ids(splits).values() for identity in rows]
    assert len(set(everything)) == len(everything) == sum(sizes.values())


def test_the_split_seed_alone_decides(tmp_path: Path) -> None:
    one = touch_classes(tmp_path / "one", a=40, b=40)
    other = touch_classes(tmp_path / "other", a=40, b=40)
    assert ids(load_splits(config(one))) == ids(load_splits(config(one)))
    assert ids(load_splits(config(one))) == ids(load_splits(config(other)))  # wherever it lies
    reseeded = ids(load_splits(config(one, split_seed=1)))
    assert all(set(reseeded[name]) != set(rows) for name, rows in ids(load_splits(config(one))).items())


def test_classes_of_one_size_are_not_carved_alike(tmp_path: Path) -> None:
    splits = load_splits(config(touch_classes(tmp_path, a=50, b=50), validation_fraction=0.4))
    chosen = [identity.split("/") for identity in ids(splits)["validation"]]
    assert {number for name, number in chosen if name == "a"} != {
        number for name, number in chosen if name == "b"
    }


def test_classes_with_too_few_images_are_all_named(tmp_path: Path) -> None:
    root = touch_classes(tmp_path, a=1, b=2, c=3, d=30)
    with pytest.raises(
        RunError, match=r"2 of 4 classes .* train, validation and test: a \(1\), b \(2\)\. Add"
    ):
        load_splits(config(root))
    with pytest.raises(RunError, match=r"1 of 4 classes .* train, validation: a \(1\)"):
        load_splits(config(root, test_fraction=0))


def test_fractions_of_0(tmp_path: Path) -> None:
    root = touch_classes(tmp_path, a=10, b=10)
    assert list(load_splits(config(root, test_fraction=0))) == ["train", "validation"]
    with pytest.raises(RunError, match=r"set data.validation_fraction above 0"):
        load_splits(config(root, validation_fraction=0))


@pytest.mark.parametrize("existing", ["validation", "test"])
def test_splits_that_the_data_has_are_kept(tmp_path: Path, existing: str) -> None:
    touch_classes(tmp_path / "train", a=20, b=20)
    touch_classes(tmp_path / existing, a=1, b=2)
    splits = load_splits(config(tmp_path))
    assert list(splits) == ["train", "validation", "test"]
    assert counts(splits)[existing] == {"a": 1, "b": 2}
    carved = "test" if existing == "validation" else "validation"
    assert all(identity.startswith("train/") for identity in ids(splits)[carved])
    assert counts(splits)["train"] == {"a": 18, "b": 18}


def test_without_training_images(tmp_path: Path) -> None:
    touch_classes(tmp_path / "test", a=5, b=5)
    with pytest.raises(RunError, match="found test only; expected training images"):
        load_splits(config(tmp_path))


def fingerprints(path: Path) -> dict[str, str]:
    return {name: fingerprint(split) for name, split in prepare_splits(config(path)).splits.items()}


def test_fingerprint_sees_content_and_labels_but_not_order_and_place(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for number, split in enumerate(("train", "val", "test")):
        draw_folder(root / split, classes=2, per_class=2)
        for file in (root / split).rglob("*.png"):  # the same images in two splits would be left out of one
            file.write_bytes(file.read_bytes() + bytes(number))
    original = fingerprints(root)
    assert all(value.startswith("sha256:") for value in original.values())

    def changed(name: str) -> Path:
        return Path(shutil.copytree(root, tmp_path / name))

    moved = changed("moved")
    for file in (moved / "train" / "blue").iterdir():  # the other way round
        file.rename(file.with_name(f"{9 - int(file.stem)}.png"))
    assert fingerprints(moved) == original
    relabelled = changed("relabelled")
    (relabelled / "train" / "blue" / "0.png").rename(relabelled / "train" / "green" / "new.png")
    edited = changed("edited")
    with (edited / "train" / "blue" / "0.png").open("ab") as file:
        file.write(b"\0")
    renamed = changed("renamed")
    for split in ("train", "val", "test"):
        (renamed / split / "blue").rename(renamed / split / "azure")
    for other in (relabelled, edited):
        found = fingerprints(other)
        assert found["train"] != original["train"]
        assert found["test"] == original["test"]
    assert all(value != original[name] for name, value in fingerprints(renamed).items())


def test_a_duplicate_is_never_on_both_sides(tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "photos", classes=2, per_class=30)
    for number in range(15):  # each twice more, under other names and one of them in the other class
        image = (root / "blue" / f"{number}.png").read_bytes()
        (root / "blue" / f"again {number}.png").write_bytes(image)
        (root / "green" / f"blue {number}.png").write_bytes(image)
    splits = prepare_splits(config(root, validation_fraction=0.25, test_fraction=0.25)).splits
    digests = [set(column_values(split, "digest")) for split in splits.values()]
    assert sum(map(len, digests)) == len(set().union(*digests)) == 60
    assert sum(map(len, splits.values())) == 90


def test_groups_and_duplicates_tie_images_together(tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "photos", classes=3, per_class=60)
    for name, number in (("blue", 0), ("green", 7), ("red", 13)):  # ties the groups of 0 to 5 and of 54 to 59
        shutil.copy(root / name / f"{number}.png", root / name / f"{number + 300}.png")
    splits = prepare_splits(config(root, group=r"^\w+/\d*?(?=\d\.png)")).splits  # all but the last digit
    where = {identity: name for name, rows in ids(splits).items() for identity in rows}
    assert len(where) == 183
    for name in ("blue", "green", "red"):
        for tens in range(1, 6):
            assert len({where[f"{name}/{tens}{ones}.png"] for ones in range(10)}) == 1
    assert where["red/13.png"] == where["red/313.png"] == where["red/19.png"]
    assert where["green/7.png"] == where["green/307.png"]


def test_images_of_train_that_are_in_test_are_left_out_and_said(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    draw_folder(root / "train", classes=2, per_class=20)
    (root / "test" / "blue").mkdir(parents=True)
    shutil.copy(root / "train" / "blue" / "3.png", root / "test" / "blue" / "leak.png")
    data = prepare_splits(config(root))
    assert "1 image of train left out, the same as images of test: train/blue/3.png" in [
        finding.message for finding in data.findings.findings
    ]
    assert sum(map(len, data.splits.values())) == 40
    assert ids(data.splits)["test"] == ["test/blue/leak.png"]


def test_prepared_data_describes_itself(folder: Path) -> None:
    (folder / "red" / "0.png").write_bytes(b"")
    data = prepare_splits(config(folder, on_unreadable="skip"))
    facts = data.describe("photos")
    (cut,) = data.findings.findings
    assert facts["source"] == "folder" and "revision" not in facts
    assert {split["origin"] for split in facts["splits"].values()} == {"carved"}
    assert sum(split["num_images"] for split in facts["splits"].values()) == 35
    assert [(image.id, image.detail) for image in cut.images] == [("red/0.png", "0 bytes")]


@pytest.mark.slow
def test_a_million_files_are_split_in_seconds_and_in_little_memory() -> None:
    script = Path(__file__).resolve().parent.parent / "scripts" / "bench_listing.py"
    memory = (
        ["--where", "/dev/shm"] if os.access("/dev/shm", os.W_OK) else []
    )  # drawn and removed in less time
    words = [sys.executable, str(script), *memory]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    for line, files, seconds in zip(printed.splitlines()[1:], (60_000, 1_000_000), (1.5, 30), strict=True):
        fields = line.replace(",", "").split()
        assert int(fields[0]) == files
        assert float(fields[-4]) < seconds, printed
        assert float(fields[-2]) < 1024, printed


@pytest.mark.slow
def test_splits_come_5_times_faster_than_with_imagefolder(tmp_path: Path) -> None:
    root = touch_classes(tmp_path / "photos", **{f"class {number}": 500 for number in range(10)})

    def seconds(function: Any, *args: Any, **options: Any) -> float:
        start = time.perf_counter()
        function(*args, **options)
        return time.perf_counter() - start

    try:
        theirs = seconds(
            datasets.load_dataset,
            "imagefolder",
            data_dir=os.fspath(root),
            cache_dir=os.fspath(tmp_path / "hf"),
        )
    except (OSError, ValueError) as error:
        pytest.skip(f"datasets cannot load a folder offline here: {error}")
    ours = min(seconds(load_splits, config(root)) for _ in range(3))
    assert ours < theirs / 5, f"{ours:.2f} s, where imagefolder takes {theirs:.2f} s"
