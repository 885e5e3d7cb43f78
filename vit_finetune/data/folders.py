"""Folders of images in the layouts that people have: which file belongs to which split and class."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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

    Raises:
        RunError: a folder that cannot be opened, or a file name that is not UTF-8 and so fits in no report.
    """

    def refuse(error: OSError) -> None:
        raise RunError(f"{error.filename}: the folder cannot be opened: {error.strerror}") from error

    found: list[str] = []
    seen: set[str] = set()
    cut = len(str(root)) + 1
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        # In order, so that which of two links to one folder counts does not depend on the file system.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__MACOSX")))
        prefix = folder[cut:].replace(os.sep, "/")
        prefix = f"{prefix}/" if prefix else ""
        found += [prefix + name for name in files if not name.startswith(".")]
    try:
        "".join(found).encode()
    except UnicodeEncodeError:
        odd = [name for name in found if not name.isascii() and "\\udc" in ascii(name)]
        raise RunError(
            f"{root}: {len(odd):,} file names are not UTF-8: {', '.join(map(ascii, odd[:3]))}. Rename them"
        ) from None
    return sorted(found)


Entry = tuple[str, list[str]]
"""An image's id, and the folders above it, below the layout's top."""


def list_folder(root: Path, files: Iterable[str], class_folder: Literal["first", "last"] | None) -> Listing:
    """Splits and classes of the images below a folder, by the names of the folders above each.

    Args:
        root: the folder, for messages.
        files: paths below it, as `walk_files` gives them.
        class_folder: the folder that names the class where folders are nested; found out if None.

    Raises:
        RunError: no images, no class folders, or a layout that can be read in two ways.
    """
    images: list[str] = []
    others: list[str] = []
    for name in files:
        (images if is_image_name(name) else others).append(name)
    if not images:
        raise RunError(
            f"{root}: found no images ({len(others)} other files). Expected class folders with .jpg, .png, "
            f".webp… files in them, or train/ and test/ above such folders"
        )
    notices = _ignored(others)
    entries = [(name, name.split("/")[:-1]) for name in images]
    by_split = _by_split(root, _without_wrappers(entries), notices)
    labelled = _labelled(root, by_split, notices)
    label_of, notice = _label_rule(root, [f for rows in labelled.values() for _, f in rows], class_folder)
    notices += [notice] if notice else []
    return Listing(
        {split: [(name, label_of(f)) for name, f in rows] for split, rows in labelled.items() if rows},
        notices,
    )


def _labelled(root: Path, by_split: dict[str, list[Entry]], notices: list[str]) -> dict[str, list[Entry]]:
    """The entries below class folders; a test folder may be without any, as those of competitions are."""
    labelled: dict[str, list[Entry]] = {}
    for split, entries in by_split.items():
        labelled[split] = [entry for entry in entries if entry[1]]
        loose = [name for name, folders in entries if not folders]
        if labelled[split] and loose:
            images = count_of(len(loose), "image")
            notices.append(f"{images} outside the class folders left out: {first_of(loose)}")
        elif loose and split == "test" and len(by_split) > 1:
            images = count_of(len(loose), "image")
            notices.append(f"the test folder has no class folders: its {images} left out")
        elif loose:
            where = str(root) if split == ALL else f"{root}: the {split} folder"
            raise RunError(
                f"{where}: found {count_of(len(loose), 'image')} but no class folders. Expected one folder "
                f"per class, or a metadata.csv with the columns file_name and label"
            )
    return labelled


def _ignored(others: Iterable[str]) -> list[str]:
    others = [name for name in others if name.rpartition("/")[2] not in ("Thumbs.db", "desktop.ini")]
    are = "is no image" if len(others) == 1 else "are no images"
    return [f"{count_of(len(others), 'file')} that {are} left out: {first_of(others)}"] if others else []


def _without_wrappers(entries: list[Entry], classes: Iterable[str] = ()) -> list[Entry]:
    """The entries below folders that only wrap all others, such as the one at the top of most archives.

    A few images beside the class folders do not keep a folder from being a wrapper: all that it could be
    otherwise is the only class.

    Args:
        entries: the images.
        classes: folders that are known to wrap nothing.
    """
    while True:
        tops = {folders[0] if folders else "" for _, folders in entries}
        (top,) = tops if len(tops) == 1 else ("",)
        if not top or top.lower() in SPLIT_NAMES or top in classes:
            return entries
        inside = Counter(folders[1] for _, folders in entries if len(folders) > 1)
        loose = len(entries) - inside.total()
        if not inside or (loose and (len(inside) < 2 or 2 * loose > len(entries))):
            return entries
        entries = [(name, folders[1:]) for name, folders in entries]


def _by_split(root: Path, entries: list[Entry], notices: list[str]) -> dict[str, list[Entry]]:
    """Entries by split, or all under ALL, with the split's folder and wrappers inside it taken off."""
    tops = {folders[0] for _, folders in entries if folders}
    split_tops = {top for top in tops if top.lower() in SPLIT_NAMES}
    if tops != split_tops:
        nested = {folders[0] for _, folders in entries if len(folders) > 1}
        if any(SPLIT_NAMES[top.lower()] == "train" for top in split_tops & nested):
            raise RunError(
                f"{root}: found {_names(split_tops)} beside {_names(tops - split_tops)}. Expected either "
                f"splits only (train/, validation/, test/) or class folders only; move the others elsewhere"
            )
    if not tops or tops != split_tops:
        return {ALL: entries}
    by_split: dict[str, list[Entry]] = {}
    for top in sorted(tops):
        split = SPLIT_NAMES[top.lower()]
        if split in by_split:
            both = [other for other in tops if SPLIT_NAMES[other.lower()] == split]
            raise RunError(f"{root}: found {_names(both)}, which both mean {split}; expected one of them")
        by_split[split] = []
    for name, folders in entries:
        if folders:
            by_split[SPLIT_NAMES[folders[0].lower()]].append((name, folders[1:]))
    loose = [name for name, folders in entries if not folders]
    if loose:
        notices.append(
            f"{count_of(len(loose), 'image')} beside the split folders left out: {first_of(loose)}"
        )
    return _without_split_wrappers(by_split)


def _without_split_wrappers(by_split: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
    tops = {split: {folders[0] for _, folders in rows if folders} for split, rows in by_split.items()}
    # The only folder of a small split is a class, no wrapper, where it is one of several in another split.
    classes = {top for names in tops.values() if len(names) > 1 for top in names}
    return {split: _without_wrappers(rows, classes) for split, rows in by_split.items()}


def _label_rule(
    root: Path, all_folders: list[list[str]], class_folder: Literal["first", "last"] | None
) -> tuple[Callable[[list[str]], str], str | None]:
    """Which of the folders above an image names its class, and what to tell the user about it.

    Folders deeper than the class's are common (`cat/2021/x.jpg`), and so are folders above it
    (`animals/cat/x.jpg`). A name below two parents may be either, a class that is spread (`farm/cat`,
    `zoo/cat`) or what classes have in common (`cat/2021`, `dog/2021`): then it is the user who decides.
    """
    first = {folders[0] for folders in all_folders}
    last = {folders[-1] for folders in all_folders}
    if class_folder == "last":
        return (lambda folders: folders[-1]), None
    if class_folder == "first" or all(len(folders) == 1 for folders in all_folders):
        return (lambda folders: folders[0]), None
    if any(len(folders) == 1 for folders in all_folders):
        return (lambda folders: folders[0]), (
            f"some class folders hold folders: the outermost name the classes ({_names(first)}); "
            f"data.class_folder=last takes the innermost"
        )
    parents = Counter(leaf for _, leaf in {(folders[0], folders[-1]) for folders in all_folders})
    if any(count > 1 for count in parents.values()):
        raise RunError(
            f"{root}: class folders are nested and can be read in two ways: by the first folder "
            f"({_names(first)}) or by the last ({_names(last)}). Write data.class_folder=first or "
            f"data.class_folder=last"
        )
    return (lambda folders: folders[-1]), (
        f"class folders are nested: the innermost name the classes ({_names(last)}); "
        f"data.class_folder=first takes {_names(first)}"
    )


def count_of(number: int, what: str) -> str:
    """A number with its noun: 1 image, 2,000 images."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def first_of(names: Sequence[str], most: int = 3) -> str:
    """The first few names of many."""
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


def _names(names: Iterable[str]) -> str:
    ordered = sorted(names, key=natural_key)
    more = f" … ({len(ordered)} in all)" if len(ordered) > 6 else ""
    return ", ".join(f"{name}/" for name in ordered[:6]) + more
