"""Folders of images in the layouts that people have: which file belongs to which split and class."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vit_finetune.data.images import is_image_name
from vit_finetune.run import RunError

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
"""Names that folders, Hub splits and tables give to a split, in lower case, and ours."""

ALL = "all"
"""The split of images whose source does not say one."""


@dataclass
class Listing:
    """Images by split, as (id, class name) pairs; the id is the path below the root."""

    splits: dict[str, list[tuple[str, str]]]
    notices: list[str] = field(default_factory=list)
    """What was decided or left out, in sentences for the user."""


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sorts 1, 2, 10 by value and text by letter, ignoring case where that decides."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part.casefold())
        for part in re.split(r"(\d+)", text)
        if part
    ] + [(2, 0, text)]


def walk_files(root: Path) -> list[str]:
    """The files below a folder, as sorted paths with `/`; hidden ones and macOS's `__MACOSX` are passed over.

    Links to folders are followed, each real folder once.
    """
    found: list[str] = []
    seen: set[str] = set()
    cut = len(str(root)) + 1
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__MACOSX"))]
        prefix = folder[cut:].replace(os.sep, "/")
        prefix = f"{prefix}/" if prefix else ""
        found += [prefix + name for name in files if not name.startswith(".")]
    return sorted(found)


def list_folder(root: Path, files: Iterable[str], class_folder: Literal["first", "last"] | None) -> Listing:
    """Splits and classes of the images below a folder, by the names of the folders above each.

    Args:
        root: the folder, for messages.
        files: paths below it, as `walk_files` gives them.
        class_folder: the folder that names the class where folders are nested; found out if None.

    Raises:
        RunError: no images, or a layout that can be read in two ways.
    """
    files = list(files)
    images = [name for name in files if is_image_name(name)]
    if not images:
        raise RunError(
            f"{root}: found no images ({len(files)} other files). Expected class folders with .jpg, .png, .webp… "
            f"files in them, or train/ and test/ above such folders"
        )
    notices = _ignored(f for f in files if not is_image_name(f))
    # A path is split once here: (id, folders above the file below the layout's top).
    entries = _without_wrappers([(name, name.split("/")[:-1]) for name in images])
    tops = {folders[0] for _, folders in entries if folders}
    loose = [name for name, folders in entries if not folders]
    split_tops = {top for top in tops if top.lower() in SPLIT_NAMES}
    if tops and tops == split_tops:
        by_split = _by_split(root, entries)
    else:
        nested = {folders[0] for _, folders in entries if len(folders) > 1}
        if any(SPLIT_NAMES[top.lower()] == "train" for top in split_tops & nested):
            raise RunError(
                f"{root}: found {_names(split_tops)} beside {_names(tops - split_tops)}. Expected either splits only "
                f"(train/, validation/, test/) or class folders only; move the others elsewhere"
            )
        by_split = {ALL: [entry for entry in entries if entry[1]]}
    if loose:
        if len(loose) == len(entries):
            raise RunError(
                f"{root}: found {len(loose)} images but no class folders. Expected one folder per class, or a "
                f"metadata.csv with the columns file_name and label"
            )
        notices.append(f"{_count(len(loose), 'image')} outside the class folders left out: {_some(loose)}")
    if "test" in by_split and not any(folders for _, folders in by_split["test"]):
        count = len(by_split.pop("test"))
        notices.append(f"the test folder has no class folders: its {_count(count, 'image')} left out")
    labelled: dict[str, list[tuple[str, list[str]]]] = {}
    for split, split_entries in by_split.items():
        labelled[split] = [entry for entry in split_entries if entry[1]]
        unlabelled = [name for name, folders in split_entries if not folders]
        if unlabelled:
            notices.append(f"{_count(len(unlabelled), 'image')} in no class folder left out: {_some(unlabelled)}")
    label_of, notice = _label_rule(root, [f for entries in labelled.values() for _, f in entries], class_folder)
    if notice:
        notices.append(notice)
    return Listing(
        {split: [(name, label_of(folders)) for name, folders in rows] for split, rows in labelled.items() if rows},
        notices,
    )


def _ignored(files: Iterable[str]) -> list[str]:
    others = [name for name in files if Path(name).name not in ("Thumbs.db", "desktop.ini")]
    return [f"{_count(len(others), 'file')} that are not images left out: {_some(others)}"] if others else []


def _without_wrappers(entries: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """The entries below folders that only wrap everything else, such as the one at the top of most archives."""
    while True:
        tops = {folders[0] if folders else "" for _, folders in entries}
        (top,) = tops if len(tops) == 1 else ("",)
        if not top or top.lower() in SPLIT_NAMES or any(len(folders) < 2 for _, folders in entries):
            return entries
        entries = [(name, folders[1:]) for name, folders in entries]


def _by_split(root: Path, entries: list[tuple[str, list[str]]]) -> dict[str, list[tuple[str, list[str]]]]:
    """Entries by split, with the split's folder (and wrappers inside it) taken off."""
    folders_of: dict[str, set[str]] = {}
    by_split: dict[str, list[tuple[str, list[str]]]] = {}
    for name, folders in entries:
        if folders:
            split = SPLIT_NAMES[folders[0].lower()]
            folders_of.setdefault(split, set()).add(folders[0])
            by_split.setdefault(split, []).append((name, folders[1:]))
    for split, names in folders_of.items():
        if len(names) > 1:
            raise RunError(f"{root}: found {_names(names)}, which both mean {split}; expected one of them")
    return {split: _without_wrappers(rows) for split, rows in by_split.items()}


def _label_rule(
    root: Path, all_folders: list[list[str]], class_folder: Literal["first", "last"] | None
) -> tuple[Callable[[list[str]], str], str | None]:
    """Which of the folders above an image names its class, and what to tell the user about it.

    Folders deeper than the class's are common (`cat/2021/x.jpg`), and so are folders above it
    (`animals/cat/x.jpg`). The names decide where they can: a name found below two parents is no class of the first
    kind. Where they cannot, it is the user who decides.
    """
    first = {folders[0] for folders in all_folders}
    last = {folders[-1] for folders in all_folders}
    if class_folder == "last":
        return (lambda folders: folders[-1]), None
    if class_folder == "first" or any(len(folders) == 1 for folders in all_folders):
        return (lambda folders: folders[0]), None
    parents = Counter(leaf for _, leaf in {(folders[0], folders[-1]) for folders in all_folders})
    repeated = sorted((leaf for leaf, count in parents.items() if count > 1), key=natural_key)
    if repeated:
        raise RunError(
            f"{root}: class folders are nested and can be read in two ways: by the first folder "
            f"({_names(first)}) or by the last ({_names(last)}). Write data.class_folder=first or "
            f"data.class_folder=last"
        )
    return (lambda folders: folders[-1]), (
        f"class folders are nested: the innermost name the classes ({_names(last)}); "
        f"data.class_folder=first takes {_names(first)}"
    )


def _names(names: Iterable[str]) -> str:
    ordered = sorted(names, key=natural_key)
    return ", ".join(f"{name}/" for name in ordered[:6]) + (f" … ({len(ordered)} in all)" if len(ordered) > 6 else "")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
