"""WebDataset shards: tars whose members `key.jpg` and `key.cls` (or `key.json`) make one labelled image.

Nothing is unpacked: headers tell where each member lies, and images are read from there. Member names are
only ever names; no path is made of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import datasets
import pyarrow as pa

from vit_finetune.data.sources.archives import cache_dir
from vit_finetune.data.sources.folders import is_image_name
from vit_finetune.data.sources.tables import LABEL_COLUMNS
from vit_finetune.files import written_whole
from vit_finetune.recipe import DataConfig
from vit_finetune.run import RunError

LARGEST_LABEL = 1 << 20
"""Bytes of a member that names a label; a larger one is something else, and would fill the memory."""
CHUNK = 10_000
"""Rows of an index that are written at a time."""
_MEMBER = re.compile(r"tar:(\d+)\+(\d+):(.+)", re.DOTALL)


class Member(NamedTuple):
    """A file inside a tar: the sample that it belongs to, its kind, and where its bytes lie."""

    key: str
    extension: str
    """What follows the first dot of the file's own name, in lower case."""
    offset: int
    size: int
    """Both in bytes."""


class Sample(NamedTuple):
    """A labelled image of a shard."""

    key: str
    offset: int
    size: int
    """Of the image, in bytes."""
    label: str
    """Class id or name, as the shard writes it."""


def walk_members(shard: Path, file: IO[bytes]) -> Iterator[Member]:
    """The regular files of a tar in their order, by its headers alone.

    Args:
        shard: where the tar lies, for messages.
        file: the tar, open for reading.

    Raises:
        RunError: a broken or cut tar, a link or device, or a size beyond the end of the file.
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    position = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header that it has seen
                position = member.offset
                if member.isdir():
                    continue
                name = _checked_name(shard, member, end)
                folder, slash, base = name.rpartition("/")
                stem, dot, extension = base.partition(".")
                # Hidden files, such as the ._ that macOS writes beside each file, belong to no sample.
                if stem and dot:
                    yield Member(folder + slash + stem, extension.lower(), member.offset_data, member.size)
            position = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise RunError(f"{shard}: broken at byte {position:,}: {error}. Fetch or write it again") from error
    # tarfile takes a broken header for the end, silently; a true end is zeros, or the end of the file.
    file.seek(position)
    block = file.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0") or 0 < len(block) < tarfile.BLOCKSIZE:
        raise RunError(
            f"{shard}: broken at byte {position:,}: found no header there. Fetch or write it again"
        )


def _checked_name(shard: Path, member: tarfile.TarInfo, end: int) -> str:
    if not member.isreg() or member.issparse():
        raise RunError(f"{shard}: {member.name!r} is a link, device or sparse file; expected plain files")
    if member.size < 0 or member.offset_data + member.size > end:
        raise RunError(
            f"{shard}: {member.name!r}, at byte {member.offset:,}, says that it has {member.size:,} bytes, "
            f"beyond the end of the tar ({end:,} bytes). Fetch or write it again"
        )
    try:
        member.name.encode()
    except UnicodeEncodeError:
        raise RunError(f"{shard}: the name {member.name!a} is not UTF-8. Rename it") from None
    return member.name


def is_webdataset(path: Path) -> bool:
    """Whether a tar's first files are a sample, an image and its label under one key, rather than a folder.

    Of a broken tar, what comes before the break decides; whoever reads it says what is wrong.
    """
    kinds: dict[str, set[str]] = {}
    with path.open("rb") as file, suppress(RunError):
        for member, _ in zip(walk_members(path, file), range(16)):
            kinds.setdefault(member.key, set()).add(member.extension)
    return any(
        extensions & {"cls", "json"} and any(map(_is_image, extensions)) for extensions in kinds.values()
    )


def walk_samples(shard: Path, file: IO[bytes], config: DataConfig) -> Iterator[Sample]:
    """The labelled images of a shard, in its order.

    Args:
        shard: where the tar lies, for messages.
        file: the tar, open for reading.
        config: `image_column` and `label_column` are an extension and a key of the JSON.

    Raises:
        RunError: as `walk_members`, or a sample without image or label, or with several.
    """
    key: str | None = None
    members: list[Member] = []
    for member in walk_members(shard, file):
        if members and member.key != key:
            yield _sample_of(shard, file, members, config)
            members = []
        key = member.key
        members.append(member)
    if members:
        yield _sample_of(shard, file, members, config)


def _sample_of(shard: Path, file: IO[bytes], members: list[Member], config: DataConfig) -> Sample:
    where = f"{shard}: sample {members[0].key!r}"
    extensions = [member.extension for member in members]
    if len(set(extensions)) < len(extensions):
        raise RunError(f"{where} has a file twice: {', '.join(extensions)}. Expected every key once")
    asked = config.image_column
    images = [m for m in members if (m.extension == asked if asked else _is_image(m.extension))]
    if len(images) != 1:
        what = "several images" if images else "no image"
        raise RunError(
            f"{where} has {what}; found {', '.join(extensions)}. Name the extension of the one to use with "
            f"data.image_column=…"
        )
    label = next((m for m in members if m.extension == "cls" and config.class_column is None), None)
    label = label or next((m for m in members if m.extension == "json"), None)
    if label is None:
        raise RunError(f"{where} has no label; found {', '.join(extensions)}, expected .cls or .json")
    if label.size > LARGEST_LABEL:
        raise RunError(f"{where}: its .{label.extension} has {label.size:,} bytes; expected a label")
    data = os.pread(file.fileno(), label.size, label.offset)
    return Sample(
        members[0].key, images[0].offset, images[0].size, _label_of(where, data, label.extension, config)
    )


def _label_of(where: str, data: bytes, extension: str, config: DataConfig) -> str:
    """The label that a .cls or .json member holds, as text."""
    try:
        text = data.decode()
        value = json.loads(text) if extension == "json" else text.strip()
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where}: its .{extension} cannot be read: {error}") from error
    if isinstance(value, dict):
        asked = config.class_column
        value = next((value[name] for name in ([asked] if asked else LABEL_COLUMNS) if name in value), None)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise RunError(
            f"{where}: its .{extension} holds no class; expected a class id or name"
            + (", or an object with one under data.label_column" if extension == "json" else "")
        )
    return str(value)


def _is_image(extension: str) -> bool:
    return "." not in extension and is_image_name(f".{extension}")


# --------------------------------------------------------------------------- reading one image


def member_path(shard: Path, sample: Sample) -> str:
    """What stands for a sample's image in a column of paths: the shard and the place in it."""
    return f"tar:{sample.offset}+{sample.size}:{shard}"


def file_of(path: str) -> str:
    """The file that an image's path names: the path itself, or the shard whose place it stands for."""
    place = _MEMBER.fullmatch(path)
    return place[3] if place else path


def read_encoded(image: dict[str, Any]) -> bytes:
    """The encoded image of a row: its own bytes, its file, or its place in a shard.

    Args:
        image: `bytes` and `path`, as `datasets.Image(decode=False)` gives them.

    Raises:
        OSError: the file cannot be opened.
        RunError: the shard has become shorter.
    """
    data: bytes | None = image["bytes"]
    if data is not None:
        return data
    place = _MEMBER.fullmatch(image["path"])
    if place is None:
        return Path(image["path"]).read_bytes()
    with Path(place[3]).open("rb") as file:
        return _read_place(file, image["path"])


# --------------------------------------------------------------------------- the index


def index_webdataset(shard: Path, name: str, config: DataConfig) -> datasets.Dataset:
    """The samples of a WebDataset shard: columns id, image (its place in the shard) and label (text).

    Made once by the shard's headers and kept in the cache, from where it is memory-mapped.

    Args:
        shard: the tar.
        name: what its ids begin with.
        config: which members to use.

    Raises:
        RunError: as `walk_samples`, or a key that comes twice.
    """
    facts = shard.stat()
    key = [
        str(shard.resolve()),
        facts.st_size,
        facts.st_mtime_ns,
        name,
        config.image_column,
        config.class_column,
    ]
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest()
    index = cache_dir() / "shards" / f"{shard.stem}-{digest}.arrow"
    if not index.is_file():
        with written_whole(index) as temporary:
            _write_index(temporary, shard, name, config)
    return datasets.Dataset.from_file(str(index))


def _write_index(path: Path, shard: Path, name: str, config: DataConfig) -> None:
    features = datasets.Features(
        {"id": datasets.Value("string"), "image": datasets.Image(), "label": datasets.Value("string")}
    )
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    with (
        shard.open("rb") as file,
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, features.arrow_schema) as writer,
    ):
        for sample in walk_samples(shard, file, config):
            if sample.key in seen:
                raise RunError(
                    f"{shard}: the key {sample.key!r} comes twice; expected the files of a key together"
                )
            seen.add(sample.key)
            place = {"bytes": None, "path": member_path(shard.resolve(), sample)}
            rows.append({"id": f"{name}/{sample.key}", "image": place, "label": sample.label})
            if len(rows) == CHUNK:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, features.arrow_schema))
                rows = []
        writer.write_batch(pa.RecordBatch.from_pylist(rows, features.arrow_schema))


def read_samples(shard: Path, name: str, config: DataConfig) -> Iterator[dict[str, Any]]:
    """The samples of a shard, front to back: `id`, `image` (encoded bytes) and `label` (text).

    Args:
        shard: the tar.
        name: what its ids begin with.
        config: which members to use.

    Raises:
        RunError: as `index_webdataset`, or the shard has become shorter.
    """
    index = index_webdataset(shard, name, config).cast_column("image", datasets.Image(decode=False))
    with shard.open("rb") as file:
        for some in index.iter(CHUNK):
            for identity, image, label in zip(some["id"], some["image"], some["label"]):
                yield {"id": identity, "image": _read_place(file, image["path"]), "label": label}


def _read_place(file: IO[bytes], path: str) -> bytes:
    """The bytes of a place in a shard that is open."""
    place = _MEMBER.fullmatch(path)
    assert place is not None
    offset, size = int(place[1]), int(place[2])
    data = os.pread(file.fileno(), size, offset)
    if len(data) < size:
        raise RunError(f"{place[3]}: ends before byte {offset + size:,}; it has changed since it was indexed")
    return data
