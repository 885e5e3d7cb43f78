"""Folders of images in the layouts that people have: which file belongs to which split and class."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

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

CHUNK = 65_536
"""Paths that are kept as Python's strings at a time, on their way into a table."""


SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif", ".jp2"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
"""File name endings, in lower case, that are taken for images."""


class Folder(NamedTuple):
    """The files right in one folder, not those in folders below it."""

    path: str
    """Below the root, with `/`; empty for the root itself."""
    names: list[str]
    """Sorted file names."""


@dataclass
class Listing:
    """Images by split: tables with the string columns id (path below the root) and label (the class's name).

    Where a table of the data's own names groups there is a string column group, too, null for none.
    """

    splits: dict[str, pa.Table]
    notices: list[str] = field(default_factory=list)
    """What was decided or left out, in sentences for the user."""


def is_image_name(name: str) -> bool:
    """Whether a file name ends like an image's, in any case."""
    return name[name.rfind(".") :].lower() in SUFFIXES  # pathlib would take a second over 60,000 files


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sorts 1, 2, 10 by value and text by letter, ignoring case where that decides."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part.casefold())
        for part in re.split(r"(\d+)", text)
        if part
    ] + [(2, 0, text)]


def walk_files(root: Path) -> list[str]:
    """The files below a folder, as sorted paths with `/`; passes over and raises what `walk_folders` does."""
    return sorted(join(folder.path, name) for folder in walk_folders(root) for name in folder.names)


def walk_folders(root: Path) -> list[Folder]:
    """The folders below a folder, itself included, with their files: each before those below it, in order.

    Hidden files and folders and macOS's `__MACOSX` are passed over; links to folders are followed, each real
    folder once.

    Raises:
        RunError: a folder that cannot be opened, or a name that is not UTF-8 and so fits in no report.
    """
    found: list[Folder] = []
    odd: list[str] = []
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        path = waiting.pop()
        place = join(os.fspath(root), path) if path else os.fspath(root)
        try:
            facts = os.stat(place)  # noqa: PTH116 - a Path for each of a million folders takes seconds
            if (facts.st_dev, facts.st_ino) in seen:
                continue
            seen.add((facts.st_dev, facts.st_ino))
            subfolders, names = _list_place(place)
        except OSError as error:
            raise RunError(f"{error.filename}: the folder cannot be opened: {error.strerror}") from error
        if names and not _is_utf8([path]):
            odd.append(path)
        elif not _is_utf8(names):
            odd += [join(path, name) for name in names if not _is_utf8([name])]
        if names:
            found.append(Folder(path, names))
        # In order, so that which of two links to one folder counts does not depend on the file system.
        waiting += [join(path, name) for name in reversed(subfolders)]
    if odd:
        odd.sort()
        raise RunError(
            f"{root}: {count_of(len(odd), 'name')} of files or folders not in UTF-8: "
            f"{', '.join(map(ascii, odd[:3]))}. Rename them"
        )
    return found


def _list_place(place: str) -> tuple[list[str], list[str]]:
    """The sorted names of the folders and of the other files in a folder, without those to pass over."""
    folders, files = [], []
    with os.scandir(
        place
    ) as entries:  # knows most kinds from the folder itself, without asking for each file
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link to itself; opening it as an image will say so
                is_folder = False
            if not is_folder:
                files.append(name)
            elif not name.startswith("__MACOSX"):
                folders.append(name)
    return sorted(folders), sorted(files)


def _is_utf8(names: Iterable[str]) -> bool:
    joined = "".join(names)
    if joined.isascii():
        return True
    try:
        joined.encode()
    except UnicodeEncodeError:
        return False
    return True


def join(folder: str, name: str) -> str:
    """The path of a file in a folder, with `/`; the folder may be empty."""
    return f"{folder}/{name}" if folder else name


class Entry(NamedTuple):
    """The images right in one folder."""

    path: str
    """The folder below the root."""
    above: list[str]
    """The folders above the images, below the layout's top."""
    names: list[str]
    """The images' file names."""

    def ids(self) -> list[str]:
        """The images' paths below the root."""
        prefix = f"{self.path}/" if self.path else ""
        return [prefix + name for name in self.names]

    def below(self, depth: int) -> Entry:
        """The same images in a layout whose top lies so many folders deeper."""
        return self._replace(above=self.above[depth:])


def list_folder(
    root: Path, folders: Iterable[Folder], class_folder: Literal["first", "last"] | None
) -> Listing:
    """Splits and classes of the images below a folder, by the names of the folders above each.

    Args:
        root: the folder, for messages.
        folders: what is below it, as `walk_folders` gives it.
        class_folder: the folder that names the class where folders are nested; found out if None.

    Raises:
        RunError: no images, no class folders, or a layout that can be read in two ways.
    """
    entries: list[Entry] = []
    others: list[str] = []
    for path, files in folders:
        names = [name for name in files if is_image_name(name)]
        if len(names) < len(files):
            others += [join(path, name) for name in files if not is_image_name(name)]
        if names:
            entries.append(Entry(path, path.split("/") if path else [], names))
    if not entries:
        raise RunError(
            f"{root}: found no images ({len(others)} other files). Expected class folders with .jpg, .png, "
            f".webp… files in them, or train/ and test/ above such folders"
        )
    notices = _ignored(others)
    by_split = _by_split(root, _without_wrappers(entries), notices)
    labelled = _labelled(root, by_split, notices)
    all_above = [entry.above for rows in labelled.values() for entry in rows]
    label_of, notice = _label_rule(root, all_above, class_folder)
    notices += [notice] if notice else []
    return Listing(
        {split: _build_rows(rows, label_of) for split, rows in labelled.items() if rows},
        notices,
    )


def _build_rows(entries: list[Entry], label_of: Callable[[list[str]], str]) -> pa.Table:
    """The table of a split: string columns id and label. The class is looked up once for each folder."""
    labels = pa.array([label_of(entry.above) for entry in entries], pa.string())
    folder_of_row = np.repeat(np.arange(len(entries)), [len(entry.names) for entry in entries])
    chunks: list[pa.Array] = []
    ids: list[str] = []
    for entry in entries:
        ids += entry.ids()
        if len(ids) > CHUNK:  # a million paths at once, as Python's strings, would take 100 MB
            chunks.append(pa.array(ids, pa.string()))
            ids = []
    chunks.append(pa.array(ids, pa.string()))
    return pa.table({"id": pa.concat_arrays(chunks), "label": labels.take(pa.array(folder_of_row))})


def _labelled(root: Path, by_split: dict[str, list[Entry]], notices: list[str]) -> dict[str, list[Entry]]:
    """The entries below class folders; a test folder may be without any, as those of competitions are."""
    labelled: dict[str, list[Entry]] = {}
    for split, entries in by_split.items():
        labelled[split] = [entry for entry in entries if entry.above]
        loose = _loose(entries)
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


def _loose(entries: list[Entry]) -> list[str]:
    """The sorted ids of images right at the layout's top."""
    return sorted(name for entry in entries if not entry.above for name in entry.ids())


def _ignored(others: Iterable[str]) -> list[str]:
    others = sorted(name for name in others if name.rpartition("/")[2] not in ("Thumbs.db", "desktop.ini"))
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
    total = sum(len(entry.names) for entry in entries)
    while True:
        tops = {entry.above[0] if entry.above else "" for entry in entries}
        (top,) = tops if len(tops) == 1 else ("",)
        if not top or top.lower() in SPLIT_NAMES or top in classes:
            return entries
        inside: Counter[str] = Counter()
        for entry in entries:
            if len(entry.above) > 1:
                inside[entry.above[1]] += len(entry.names)
        loose = total - inside.total()
        if not inside or (loose and (len(inside) < 2 or 2 * loose > total)):
            return entries
        entries = [entry.below(1) for entry in entries]


def _by_split(root: Path, entries: list[Entry], notices: list[str]) -> dict[str, list[Entry]]:
    """Entries by split, or all under ALL, with the split's folder and wrappers inside it taken off."""
    tops = {entry.above[0] for entry in entries if entry.above}
    split_tops = {top for top in tops if top.lower() in SPLIT_NAMES}
    if tops != split_tops:
        nested = {entry.above[0] for entry in entries if len(entry.above) > 1}
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
    for entry in entries:
        if entry.above:
            by_split[SPLIT_NAMES[entry.above[0].lower()]].append(entry.below(1))
    loose = _loose(entries)
    if loose:
        notices.append(
            f"{count_of(len(loose), 'image')} beside the split folders left out: {first_of(loose)}"
        )
    return _without_split_wrappers(by_split)


def _without_split_wrappers(by_split: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
    tops = {split: {entry.above[0] for entry in rows if entry.above} for split, rows in by_split.items()}
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
