"""Zip and tar archives, unpacked once into the cache; their names are not trusted."""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from vit_finetune.console import progress
from vit_finetune.files import folder_written_whole, is_disk_full
from vit_finetune.run import RunError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")

_BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, ValueError)
"""What damaged archives raise, beside OSError and RuntimeError (encrypted, or an unknown compression)."""


def cache_dir() -> Path:
    """Where unpacked archives and remembered checks lie: $VIT_FINETUNE_CACHE, or ~/.cache/vit_finetune."""
    base = os.environ.get("VIT_FINETUNE_CACHE")
    if base:
        return Path(base).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "vit_finetune"


def is_archive(path: Path) -> bool:
    """Whether a file name ends like an archive's."""
    return path.name.lower().endswith(SUFFIXES)


def unpack(path: Path) -> Path:
    """The folder with an archive's files; unpacked at the first call, found again at the next.

    Raises:
        RunError: the archive is broken, names a place outside itself, holds links or devices, or unpacks to
            more than the disk has free. Nothing is left behind then.
    """
    facts = path.stat()
    key = hashlib.blake2b(
        f"{path.resolve()}|{facts.st_size}|{facts.st_mtime_ns}".encode(), digest_size=8
    ).hexdigest()
    target = cache_dir() / "archives" / f"{path.name.split('.')[0]}-{key}"
    if target.is_dir():
        return target
    with folder_written_whole(target) as aside:
        try:
            _unpack_into(aside, path)
        except (*_BROKEN, OSError, RuntimeError) as error:
            if isinstance(error, RunError) or is_disk_full(error):
                raise
            raise RunError(f"{path}: not a readable archive: {error}") from error
    return target


def _unpack_into(folder: Path, path: Path) -> None:
    with _members(path) as members:
        total = sum(size for _, size, _ in members)
        free = shutil.disk_usage(folder).free
        if total > free:
            raise RunError(
                f"{path}: unpacks to {total / 1e9:.1f} GB, but {folder.parent} has {free / 1e9:.1f} GB free"
            )
        for name, _, _ in members:
            _check_name(path, name)
        with progress(f"unpacking {path.name}", len(members), "files") as advance:
            for name, size, source in members:
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with source() as stream, target.open("wb") as file:
                    shutil.copyfileobj(stream, file, 1 << 20)
                    if file.tell() > size:
                        raise RunError(f"{path}: {name!r} is larger than the archive's index says")
                advance()


def _check_name(path: Path, name: str) -> None:
    # Both readings of the name: a backslash or a drive letter only matters where the other system unpacks.
    for reading in (PurePosixPath(name), PureWindowsPath(name)):
        if reading.is_absolute() or reading.drive or ".." in reading.parts:
            raise RunError(
                f"{path}: holds a file named {name!r}, which points outside the archive. Nothing was "
                f"unpacked; expected plain relative names"
            )


class _Member:
    """A file of an archive, opened on call."""

    def __init__(
        self, archive: zipfile.ZipFile | tarfile.TarFile, info: zipfile.ZipInfo | tarfile.TarInfo
    ) -> None:
        self.archive, self.info = archive, info

    def __call__(self) -> IO[bytes]:
        if isinstance(self.archive, zipfile.ZipFile):
            assert isinstance(self.info, zipfile.ZipInfo)
            return self.archive.open(self.info)
        assert isinstance(self.info, tarfile.TarInfo)
        stream = self.archive.extractfile(self.info)
        assert stream is not None  # only links and devices have none, and they were refused
        return stream


@contextmanager
def _members(path: Path) -> Iterator[list[tuple[str, int, _Member]]]:
    """Name, size in bytes and content of each regular file in an archive, in its order."""
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
            for info in infos:
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise RunError(f"{path}: {info.filename!r} is a link; expected files and folders only")
            # Some Windows programs write backslashes between folders, against the format.
            yield [(i.filename.replace("\\", "/"), i.file_size, _Member(archive, i)) for i in infos]
    else:
        with tarfile.open(path) as tar:
            files = [info for info in tar.getmembers() if not info.isdir()]
            for file in files:
                if not file.isreg():
                    raise RunError(
                        f"{path}: {file.name!r} is a link or device; expected files and folders only"
                    )
            yield [(file.name, file.size, _Member(tar, file)) for file in files]
            # Gzip's checksum comes behind the last byte that tar itself reads.
            while tar.fileobj is not None and tar.fileobj.read(1 << 20):
                pass
