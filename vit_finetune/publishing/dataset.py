"""Images → a dataset repository of the Hub: Parquet files that hold the very bytes, and a card."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import filelock
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import ExifTags, Image

from vit_finetune.console import answer, progress, say, show_table, warn, warn_of_findings
from vit_finetune.data.checkup.checkup import Checkup, check_up, raise_errors, require_images
from vit_finetune.data.images import BROKEN, hash_content
from vit_finetune.data.sources.archives import cache_dir
from vit_finetune.data.sources.columns import Source, column_values
from vit_finetune.data.sources.folders import ALL, SPLIT_NAMES, count_of, first_of
from vit_finetune.data.sources.hub import FILE_NAME
from vit_finetune.data.sources.source import load_source
from vit_finetune.data.sources.webdataset import read_encoded
from vit_finetune.hub_repos import explaining_errors, persist, quiet_client
from vit_finetune.publishing.dataset_card import SplitFacts, build_dataset_card, renew_dataset_card
from vit_finetune.publishing.hub import Commit, Files, check_access, check_card, check_name, commit_files
from vit_finetune.publishing.markdown import join_card, read_card
from vit_finetune.recipe import DataConfig, build_data_config
from vit_finetune.run import RunError

GROUP_IMAGES = 100
"""Images of a row group at most: what a viewer or a stream reads at a time."""
GROUP_BYTES = 100_000_000
"""Encoded bytes of a row group, but for its last image."""
READ_ROWS = 16
"""Images that are taken from a source at a time."""
FILE_BYTES = 500_000_000
"""Size of a Parquet file, but for its last row group."""
_PARQUET = re.compile(rf"data/({'|'.join(sorted(set(SPLIT_NAMES.values())))})-\d{{5}}-of-\d{{5}}\.parquet")


@dataclass
class Written:
    """Parquet files of a source, and what was seen while they were written."""

    files: dict[str, Path]
    """By path in the repository."""
    splits: dict[str, SplitFacts] = field(default_factory=dict)
    located: list[str] = field(default_factory=list)
    """Ids of images that tell where they were taken."""


def upload_data(
    data: str | Path | DataConfig,
    repo_id: str,
    private: bool = False,
    license: str | None = None,
    with_gps: bool = False,
    dry_run: bool = False,
) -> Commit | None:
    """The commit of a data source that was published as a dataset of the Hub; None of a dry run.

    Files are taken as they are. Saying the same again sends what is not there yet, and nothing twice. What
    others wrote into the card on the Hub stays.

    Args:
        data: as `data.path` of a recipe, or the whole section: its keys that say what is read, and `group`.
        repo_id: `owner/name`.
        private: whether a new repository is.
        license: identifier of the images' licence, such as `cc-by-4.0`.
        with_gps: whether images that tell where they were taken may become public.
        dry_run: whether to show what would be published only; the Hub is not asked then.

    Raises:
        RecipeError: `data` names a revision as well.
        RunError: the data cannot be used, or may not be published; or the Hub does not take it.
    """
    config = data if isinstance(data, DataConfig) else build_data_config(str(data))
    with quiet_client():
        hidden, exists = private, False
        if dry_run:
            check_name(repo_id)
        else:  # at once, before the minutes that reading takes
            access = check_access(repo_id, "dataset", private or None)
            if license is not None:
                check_card(repo_id, join_card({"license": license}, ""), "dataset")
            exists = access.exists
            hidden = bool(access.private) if exists else private
        checkup = _check_source(config)
        with _work_folder(repo_id) as folder:
            written = write_parquet(checkup.source, folder)
            if not hidden and not with_gps:
                _refuse_located(written.located, config)
            card = build_dataset_card(repo_id, checkup, written.splits, len(written.located), license)
            if dry_run:
                _show(written.files, card)
                return None
            if exists:
                card = _with_their_text(repo_id, card, license, folder)
            if "license" not in read_card(card)[0]:
                warn("the card names no license, so nobody knows what they may do with it: say --license ID")
            files = Files({"README.md": card.encode(), **written.files})
            message = f"Upload {count_of(_count(checkup), 'image')} of {len(checkup.source.labels):,} classes"
            commit = commit_files(repo_id, "dataset", files, _is_stale, message, private=private or None)
            _prove(commit, files)
    _tell(commit, checkup, len(written.files))
    return commit


def _check_source(config: DataConfig) -> Checkup:
    """The images, checked up; raises RunError where they cannot be used."""
    # Nothing is carved here, so no class is too small for it.
    config = config.model_copy(update={"validation_fraction": 0.0, "test_fraction": 0.0, "fold": None})
    source = load_source(config)
    # As people look at them; by name, test would be what the Hub's viewer shows first.
    order = [split for split in (ALL, "train", "validation", "test") if split in source.splits]
    checkup = check_up(replace(source, splits={split: source.splits[split] for split in order}), config)
    raise_errors(checkup.findings, config)
    require_images(checkup.source, config)
    warn_of_findings(checkup.findings)
    return checkup


@contextmanager
def _work_folder(repo_id: str) -> Iterator[Path]:
    """An empty folder for the files on their way to a repository; what a killed upload left there goes.

    Raises:
        RunError: another process is at it.
    """
    folder = cache_dir() / "uploads" / repo_id.replace("/", "--")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(f"{folder}.lock", timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except filelock.Timeout:
        raise RunError(
            f"{repo_id}: another upload to it is under way on this machine. Wait for its end"
        ) from None


def _with_their_text(repo_id: str, card: str, license: str | None, folder: Path) -> str:
    """The card with what others wrote into the one that the repository has, if any."""

    def fetch() -> Path:
        return Path(hf_hub_download(repo_id, "README.md", repo_type="dataset", local_dir=folder))

    with explaining_errors(repo_id, "dataset"):
        try:
            there = persist(f"reading the card of {repo_id}", fetch)
        except EntryNotFoundError:
            return card
    return renew_dataset_card(there.read_bytes().decode("utf-8", "replace"), card, license)


def _count(checkup: Checkup) -> int:
    return sum(map(len, checkup.source.splits.values()))


def _is_stale(path: str) -> bool:
    return _PARQUET.fullmatch(path) is not None


def _prove(commit: Commit, files: Files) -> None:
    """Says that what the Hub holds is what was written here.

    Raises:
        RunError: it is not.
    """
    with explaining_errors(commit.repo_id, "dataset"):
        held = persist(
            f"looking at {commit.repo_id}",
            lambda: HfApi().dataset_info(commit.repo_id, revision=commit.oid, files_metadata=True),
        )
    if different := files.differing(held.siblings):
        raise RunError(
            f"{commit.repo_id}: on the Hub there is something else than was sent: {first_of(different)}. Say "
            f"the same again"
        )
    say(f"verified: {count_of(len(files.sizes), 'file')} on the Hub with the checksums of those here")


def _tell(commit: Commit, checkup: Checkup, count: int) -> None:
    what = f"{count_of(_count(checkup), 'image')} in {count_of(count, 'Parquet file')}"
    done = f"{len(commit.sent)} sent" if commit.sent or commit.deleted else "all there already"
    if commit.deleted:
        done += f", {len(commit.deleted)} of an earlier upload deleted"
    say(f"{commit.address}: {what}; {done}")
    say(f"train from it with: data.path={commit.repo_id}")


def _show(files: Mapping[str, Path], card: str) -> None:
    rows = [[name, f"{path.stat().st_size:,}"] for name, path in files.items()]
    show_table("would be published", ["file", "bytes"], [*rows, ["README.md", f"{len(card.encode()):,}"]])
    answer(card)


# --------------------------------------------------------------------------- Parquet


def write_parquet(source: Source, folder: Path) -> Written:
    """Parquet files of all images of a source, the same bytes whenever the images are the same.

    Args:
        source: columns id, image, label and digest, and group where there is one.
        folder: where to write.

    Raises:
        RunError: an id that is a path of this machine, or an image that has changed since it was checked.
    """
    written = Written({})
    with progress("writing Parquet files", sum(map(len, source.splits.values())), "images") as advance:
        for split, dataset in source.splits.items():
            name = "train" if split == ALL else split
            written.splits[name] = _write_split(name, dataset, folder, written, advance)
    return written


def _write_split(
    name: str, dataset: datasets.Dataset, folder: Path, written: Written, advance: Callable[[], None]
) -> SplitFacts:
    features = _features(dataset)
    facts = SplitFacts(features)
    paths: list[Path] = []
    writer: pq.ParquetWriter | None = None
    try:
        for group in _row_groups(dataset, features, written.located, advance):
            if writer is None:
                paths.append(folder / f"{name}-{len(paths):05}")
                # Encoded images do not get smaller; a dictionary of them would be their copies.
                writer = pq.ParquetWriter(
                    paths[-1], features.arrow_schema, compression="none", use_dictionary=["label", FILE_NAME]
                )
            writer.write_table(group)
            facts.num_bytes += group.nbytes
            if paths[-1].stat().st_size > FILE_BYTES:
                writer.close()
                writer = None
    finally:
        if writer is not None:
            writer.close()
    for number, path in enumerate(paths):
        facts.file_bytes += path.stat().st_size
        written.files[f"data/{name}-{number:05}-of-{len(paths):05}.parquet"] = path
    return facts


def _features(dataset: datasets.Dataset) -> datasets.Features:
    text = datasets.Value("string")
    columns = {"image": datasets.Image(), "label": dataset.features["label"], FILE_NAME: text}
    return datasets.Features(columns | ({"group": text} if "group" in dataset.features else {}))


def _row_groups(
    dataset: datasets.Dataset, features: datasets.Features, located: list[str], advance: Callable[[], None]
) -> Iterator[pa.Table]:
    """The rows as tables of bounded size; notes which of the images tell where they were taken."""
    ids, digests = column_values(dataset, "id"), column_values(dataset, "digest")
    labels = column_values(dataset, "label")
    groups = column_values(dataset, "group") if "group" in features else None
    rows: list[dict[str, Any]] = []
    size = 0
    for row, (identity, stored) in enumerate(zip(ids, _stored_images(dataset))):
        _check_public(identity)
        try:
            data = read_encoded(stored)
        except OSError as error:
            raise RunError(f"{identity}: cannot be read any more: {error.strerror}") from error
        if hash_content(data) != digests[row]:
            raise RunError(f"{identity} has changed since it was checked up. Say the same again")
        if tells_place(data):
            located.append(identity)
        image = {"bytes": data, "path": PurePosixPath(identity).name}
        rows.append({"image": image, "label": labels[row], FILE_NAME: identity})
        if groups is not None:
            rows[-1]["group"] = groups[row]
        size += len(data)
        advance()
        if len(rows) == GROUP_IMAGES or size >= GROUP_BYTES:
            yield pa.Table.from_pylist(rows, features.arrow_schema)
            rows, size = [], 0
    if rows:
        yield pa.Table.from_pylist(rows, features.arrow_schema)


def _stored_images(dataset: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """`bytes` and `path` of each row, a few at a time: of selected rows the whole column would be copied."""
    for some in dataset.select_columns(["image"]).with_format("arrow").iter(READ_ROWS):
        yield from some["image"].to_pylist()


def _check_public(identity: str) -> None:
    path = PurePosixPath(identity.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", identity):
        raise RunError(
            f"{identity}: is a path of some machine, which is not to be published. Give the images names "
            f"below their folder"
        )


# --------------------------------------------------------------------------- where images were taken


_IN_XMP = b"GPSLatitude"


def tells_place(data: bytes) -> bool:
    """Whether an encoded image says where it was taken, in EXIF or XMP; decodes only PNG files with these."""
    if _IN_XMP in data:  # XMP is text
        return True
    # Looked for first, since Pillow decodes a whole PNG to find out that it has no EXIF.
    is_png = data.startswith(b"\x89PNG")
    if is_png and not any(mark in data for mark in (b"eXIf", b"zTXt", b"iTXt", b"Raw profile type")):
        return False
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _is_place(image.getexif()) or (is_png and any(map(_names_place, image.info.items())))
    except BROKEN:
        return False  # the checkup says what cannot be read; broken EXIF tells no place


def _is_place(exif: Image.Exif) -> bool:
    gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
    return bool(gps.keys() & {ExifTags.GPS.GPSLatitude, ExifTags.GPS.GPSLongitude})


def _names_place(item: tuple[Any, Any]) -> bool:
    """Whether a text of a PNG, which may have been compressed, is XMP or EXIF with a place."""
    name, text = item
    if not isinstance(text, str):
        return False
    if not str(name).startswith("Raw profile type"):
        return _IN_XMP.decode() in text
    raw = bytes.fromhex("".join(text.split("\n")[3:]))  # ImageMagick's: a name, a length, hexadecimal digits
    exif = Image.Exif()
    if raw.startswith(b"Exif\0\0"):
        exif.load(raw)
    return _IN_XMP in raw or _is_place(exif)


def _refuse_located(located: list[str], config: DataConfig) -> None:
    if located:
        raise RunError(
            f"{config.path}: {count_of(len(located), 'image')} would tell everybody where "
            f"{'it was' if len(located) == 1 else 'they were'} taken (GPS positions in EXIF or XMP): "
            f"{first_of(located)}. Remove the positions from the files, or publish with --private, or with "
            f"--with-gps if everybody may know"
        )
