"""Layouts of folders: lists of names in, splits and classes out; then real trees with links."""

import os
from pathlib import Path

import pytest
from conftest import draw_folder

from vit_finetune.data.sources.folders import (
    ALL,
    Folder,
    Listing,
    list_folder,
    natural_key,
    walk_files,
)
from vit_finetune.run import RunError

ROOT = Path("photos")


def listing(*files: str, class_folder: str | None = None) -> Listing:
    folders: dict[str, list[str]] = {}
    for file in sorted(files):
        path, _, name = file.rpartition("/")
        folders.setdefault(path, []).append(name)
    return list_folder(ROOT, [Folder(*item) for item in sorted(folders.items())], class_folder)  # type: ignore[arg-type]


def rows(found: Listing, split: str = ALL) -> list[tuple[str, str]]:
    """Id and class of each image of a split."""
    table = found.splits[split]
    return list(zip(table["id"].to_pylist(), table["label"].to_pylist()))


def classes(*files: str, class_folder: str | None = None) -> dict[str, dict[str, str]]:
    """Class by image, by split."""
    found = listing(*files, class_folder=class_folder)
    return {split: dict(rows(found, split)) for split in found.splits}


TWO_CLASSES = {"cat/1.jpg": "cat", "dog/2.jpg": "dog"}


def test_class_folders() -> None:
    assert classes(*TWO_CLASSES) == {ALL: TWO_CLASSES}
    assert listing(*TWO_CLASSES).notices == []


def test_upper_case_endings_and_stray_files() -> None:
    found = listing("cat/1.JPG", "cat/2.JpEg", "dog/3.PNG", "readme.txt", "cat/notes.md", "dog/Thumbs.db")
    assert list(found.splits) == [ALL]
    assert rows(found) == [("cat/1.JPG", "cat"), ("cat/2.JpEg", "cat"), ("dog/3.PNG", "dog")]
    assert found.notices == ["2 files that are no images left out: cat/notes.md, readme.txt"]


def test_long_listings_are_built_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [f"{name}/{number}.jpg" for name in ("cat", "dog", "emu") for number in range(3)]
    expected = rows(listing(*files))
    monkeypatch.setattr("vit_finetune.data.sources.folders.CHUNK", 4)
    assert rows(listing(*files)) == expected == [(file, file[:3]) for file in files]


def test_images_beside_class_folders_are_left_out_and_said() -> None:
    found = listing(*TWO_CLASSES, "cover.jpg")
    assert {name for name, _ in rows(found)} == set(TWO_CLASSES)
    assert found.notices == ["1 image outside the class folders left out: cover.jpg"]


@pytest.mark.parametrize("name", ["val", "valid", "validation", "VAL", "Validation", "dev"])
def test_split_folders(name: str) -> None:
    files = [f"{split}/{image}" for split in ("Train", name, "TEST") for image in TWO_CLASSES]
    found = classes(*files)
    assert set(found) == {"train", "validation", "test"}
    assert found["validation"] == {f"{name}/{image}": label for image, label in TWO_CLASSES.items()}


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_split_only(split: str) -> None:
    assert set(classes(*(f"{split}/{image}" for image in TWO_CLASSES))) == {split}


def test_two_folders_for_one_split() -> None:
    with pytest.raises(RunError, match="found val/, valid/, which both mean validation"):
        listing("train/cat/1.jpg", "train/dog/2.jpg", "val/cat/1.jpg", "valid/dog/1.jpg")


def test_splits_beside_classes() -> None:
    with pytest.raises(RunError, match="found train/ beside cat/, dog/"):
        listing("train/cat/1.jpg", "train/dog/2.jpg", *TWO_CLASSES)


def test_a_class_may_be_called_like_a_split() -> None:
    vehicles = {"train/1.jpg": "train", "car/2.jpg": "car"}
    assert classes(*vehicles) == {ALL: vehicles}


@pytest.mark.parametrize("wrapper", ["photos/", "data/photos/"])
def test_wrappers_above_everything(wrapper: str) -> None:
    assert classes(*(wrapper + name for name in TWO_CLASSES)) == {
        ALL: {wrapper + name: label for name, label in TWO_CLASSES.items()}
    }
    splits = classes(*(f"{wrapper}{split}/{name}" for split in ("train", "test") for name in TWO_CLASSES))
    assert set(splits) == {"train", "test"}
    assert set(splits["train"].values()) == {"cat", "dog"}


def test_wrapper_with_images_beside_the_class_folders() -> None:
    found = listing("photos/cover.jpg", *(f"photos/{name}" for name in TWO_CLASSES))
    assert dict(rows(found)) == {f"photos/{name}": label for name, label in TWO_CLASSES.items()}
    assert "photos/cover.jpg" in found.notices[0]


def test_the_only_class_is_no_wrapper() -> None:
    found = classes("cat/1.jpg", "cat/2.jpg", "cat/3.jpg", "cat/old/4.jpg", "cat/new/5.jpg")
    assert set(found[ALL].values()) == {"cat"}


def test_wrappers_inside_splits() -> None:
    found = classes(*(f"{split}/images/{name}" for split in ("train", "test") for name in TWO_CLASSES))
    assert set(found["train"].values()) == set(found["test"].values()) == {"cat", "dog"}


def test_the_only_class_of_a_split_is_no_wrapper_inside_it() -> None:
    found = classes("train/cat/a/1.jpg", "train/dog/b/2.jpg", "test/cat/a/3.jpg", class_folder="first")
    assert found["test"] == {"test/cat/a/3.jpg": "cat"}


def test_folders_below_some_classes() -> None:
    found = listing("cat/1.jpg", "cat/2021/2.jpg", "dog/3.jpg")
    assert dict(rows(found)) == {"cat/1.jpg": "cat", "cat/2021/2.jpg": "cat", "dog/3.jpg": "dog"}
    assert "the outermost name the classes (cat/, dog/)" in found.notices[0]


def test_folders_above_the_classes() -> None:
    found = listing("animals/cat/1.jpg", "animals/dog/2.jpg", "plants/rose/3.jpg")
    assert {label for _, label in rows(found)} == {"cat", "dog", "rose"}
    assert "data.class_folder=first takes animals/, plants/" in found.notices[0]


@pytest.mark.parametrize("files", [("cat/2021/1.jpg", "dog/2021/2.jpg"), ("farm/cat/1.jpg", "zoo/cat/2.jpg")])
def test_ambiguous_nesting_is_decided_by_the_user(files: tuple[str, str]) -> None:
    (one, inner, _), (other, _, _) = (name.split("/") for name in files)
    with pytest.raises(RunError) as caught:
        listing(*files)
    assert f"by the first folder ({one}/, {other}/) or by the last ({inner}/)" in str(caught.value)
    assert "data.class_folder=first or data.class_folder=last" in str(caught.value)
    assert set(classes(*files, class_folder="first")[ALL].values()) == {one, other}
    assert set(classes(*files, class_folder="last")[ALL].values()) == {inner}


def test_unlabelled_test_folder_is_left_out() -> None:
    found = listing("train/cat/1.jpg", "train/dog/2.jpg", "test/3.jpg", "test/4.jpg")
    assert set(found.splits) == {"train"}
    assert found.notices == ["the test folder has no class folders: its 2 images left out"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "photos: found no images"),
        (["cat/notes.txt"], "found no images .1 other files"),
        (["1.jpg", "2.jpg"], "photos: found 2 images but no class folders"),
        (["photos/1.jpg", "train/2.jpg"], None),
        (["train/1.jpg", "train/2.jpg"], "the train folder: found 2 images but no class folders"),
        (["test/1.jpg"], "the test folder: found 1 image but no class folders"),
        (["train/1.jpg", "val/cat/2.jpg"], "the train folder: found 1 image but no class folders"),
    ],
)
def test_no_images_or_no_classes(files: list[str], message: str | None) -> None:
    if message is None:
        assert set(classes(*files)[ALL].values()) == {"photos", "train"}
        return
    with pytest.raises(RunError, match=message):
        listing(*files)


def test_natural_order() -> None:
    names = ["10", "2", "1", "class 10", "Class 2", "class 1", "b", "A", "a", "x2y10", "x2y9", "٣"]
    assert sorted(names, key=natural_key) == [
        "1", "2", "٣", "10", "A", "a", "b", "class 1", "Class 2", "class 10", "x2y9", "x2y10",
    ]  # fmt: skip


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_walk_passes_over_what_is_hidden(tmp_path: Path) -> None:
    junk = [".DS_Store", "cat/.1.jpg", ".git/2.jpg", "__MACOSX/cat/._1.jpg", ".ipynb_checkpoints/3.jpg"]
    touch(tmp_path, "cat/1.jpg", "dog.jpg/2.jpg", *junk)  # a folder's name may end like a file's
    assert walk_files(tmp_path) == ["cat/1.jpg", "dog.jpg/2.jpg"]


def test_walk_follows_links_once_and_out_of_cycles(tmp_path: Path) -> None:
    elsewhere = touch(tmp_path / "elsewhere", "1.jpg")
    root = touch(tmp_path / "photos", "cat/1.jpg")
    (root / "dog").symlink_to(elsewhere)
    (root / "cat" / "again").symlink_to(root)
    assert walk_files(root) == ["cat/1.jpg", "dog/1.jpg"]


def test_walk_lists_links_that_lead_nowhere_as_files(tmp_path: Path) -> None:
    root = touch(tmp_path / "photos", "cat/1.jpg")
    (root / "cat" / "2.jpg").symlink_to("2.jpg")
    (root / "cat" / "3.jpg").symlink_to("nowhere.jpg")
    assert walk_files(root) == ["cat/1.jpg", "cat/2.jpg", "cat/3.jpg"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every folder")
def test_a_folder_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    root = touch(tmp_path / "photos", "cat/1.jpg", "dog/1.jpg")
    (root / "dog").chmod(0)
    with pytest.raises(RunError, match=r"photos/dog: the folder cannot be opened: Permission denied"):
        walk_files(root)


def test_walk_does_not_depend_on_the_order_of_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = touch(tmp_path / "photos", "dog/1.jpg")
    (root / "cat").symlink_to(root / "dog")
    scandir = os.scandir

    class Backwards:
        def __init__(self, path: str) -> None:
            with scandir(path) as entries:
                self.entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

        def __enter__(self) -> "Backwards":
            return self

        def __exit__(self, *error: object) -> None: ...

        def __next__(self) -> "os.DirEntry[str]":
            return next(self.entries)

        def __iter__(self) -> "Backwards":
            return self

    expected = walk_files(root)
    monkeypatch.setattr(os, "scandir", Backwards)
    assert walk_files(root) == expected == ["cat/1.jpg"]


def test_names_that_are_not_utf_8_are_named(tmp_path: Path) -> None:
    draw_folder(tmp_path / "p", classes=2, per_class=1)
    image = tmp_path / "p" / "blue" / "0.png"
    image.rename(image.parent / os.fsdecode(b"\xff.png"))
    with pytest.raises(RunError, match=r"1 name of files or folders not in UTF-8: 'blue/\\udcff\.png'"):
        walk_files(tmp_path / "p")
    (tmp_path / "p" / "green").rename(tmp_path / "p" / os.fsdecode(b"gr\xfcn"))
    with pytest.raises(RunError, match=r"2 names .*'blue/\\udcff\.png', 'gr\\udcfcn'"):
        walk_files(tmp_path / "p")
