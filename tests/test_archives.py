"""Archives of any layout, and hostile ones."""

import io
import shutil
import tarfile
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
from conftest import draw_folder

from vit_finetune.data.sources import archives
from vit_finetune.data.sources.archives import cache_dir, is_archive, unpack
from vit_finetune.data.sources.source import load_source
from vit_finetune.recipe import DataConfig
from vit_finetune.run import RunError

KINDS = {"zip": "zip", "tar": "tar", "tar.gz": "gztar", "tgz": "gztar", "tar.bz2": "bztar", "tar.xz": "xztar"}


def pack(folder: Path, archive: Path, kind: str) -> Path:
    made = shutil.make_archive(str(archive), KINDS[kind], folder.parent, folder.name)
    return Path(made).rename(archive.with_name(f"{archive.name}.{kind}"))


def nothing_is_left() -> bool:
    return not list((cache_dir() / "archives").iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_is_what_its_folder_is(tmp_path: Path, kind: str) -> None:
    folder = draw_folder(tmp_path / "photos", per_class=2)
    (folder / "cover.png").write_bytes((folder / "blue" / "0.png").read_bytes())
    archive = pack(folder, tmp_path / "packed", kind)
    source, original = load_source(DataConfig(path=str(archive))), load_source(DataConfig(path=str(folder)))
    assert source.kind == "archive"
    assert source.labels == original.labels == ["blue", "green", "red"]
    images = dict(zip(source.splits["all"]["id"], source.splits["all"]["image"]))
    for row in original.splits["all"]:
        assert images[f"photos/{row['id']}"].tobytes() == row["image"].tobytes()


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive_with_splits_and_metadata(tmp_path: Path, kind: str) -> None:
    for split in ("train", "val"):
        draw_folder(tmp_path / "photos" / split, classes=2, per_class=1)
    splits = load_source(DataConfig(path=str(pack(tmp_path / "photos", tmp_path / "splits", kind)))).splits
    assert set(splits) == {"train", "validation"}
    table = (
        "file_name,label,split\ntrain/blue/0.png,a,test\ntrain/green/0.png,b,train\nval/green/0.png,a,train\n"
    )
    (tmp_path / "photos" / "metadata.csv").write_text(table)
    source = load_source(DataConfig(path=str(pack(tmp_path / "photos", tmp_path / "tables", kind))))
    assert source.labels == ["a", "b"]
    assert source.splits["test"]["id"][:] == ["photos/train/blue/0.png"]


def test_unpacked_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = draw_folder(tmp_path / "photos", classes=2, per_class=1)
    archive = pack(folder, tmp_path / "packed", "zip")
    first = unpack(archive)
    with monkeypatch.context() as patch:
        patch.setattr(archives, "_unpack_into", None)
        assert unpack(archive) == first
    (folder / "blue" / "new.png").write_bytes(b"new")
    assert (unpack(pack(folder, tmp_path / "packed", "zip")) / "photos" / "blue" / "new.png").is_file()


HOSTILE_NAMES = [
    "../escaped.jpg",
    "a/../../escaped.jpg",
    "/tmp/escaped.jpg",
    "..\\escaped.jpg",
    "a\\..\\..\\escaped.jpg",
    "C:\\escaped.jpg",
    "C:escaped.jpg",
    "\\\\server\\share\\escaped.jpg",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_point_outside(tmp_path: Path, name: str, kind: str) -> None:
    archive = tmp_path / f"hostile.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("cat/1.jpg", b"x")
            file.writestr(name, b"x")
    else:
        write_tar(archive, tarfile.TarInfo("cat/1.jpg"), tarfile.TarInfo(name))
    with pytest.raises(RunError, match="points outside the archive"):
        unpack(archive)
    assert nothing_is_left()
    assert not list(tmp_path.rglob("escaped*")) and not list(cache_dir().rglob("escaped*"))


def write_tar(path: Path, *members: tarfile.TarInfo) -> None:
    with tarfile.open(path, "w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"\0" * member.size))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("cat/1.jpg")
    member.type, member.linkname = kind, "/etc/passwd"
    write_tar(tmp_path / "hostile.tar", tarfile.TarInfo("cat/0.jpg"), member)
    with pytest.raises(RunError, match=r"'cat/1.jpg' is a link or device"):
        unpack(tmp_path / "hostile.tar")
    assert nothing_is_left()


def test_links_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "hostile.zip", "w") as file:
        link = zipfile.ZipInfo("cat/1.jpg")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "/etc/passwd")
    with pytest.raises(RunError, match=r"'cat/1.jpg' is a link"):
        unpack(tmp_path / "hostile.zip")
    assert nothing_is_left()


def test_more_than_the_disk_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("cat/1.jpg", bytes(3_000_000))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2_000_000))
    with pytest.raises(RunError, match=r"unpacks to 0.0 GB, but .* has 0.0 GB free"):
        unpack(tmp_path / "bomb.zip")
    assert nothing_is_left()


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.bz2", "tar.xz", "tar"])
@pytest.mark.parametrize("damage", ["cut", "overwritten", "text"])
def test_damaged_archives(tmp_path: Path, kind: str, damage: str) -> None:
    archive = pack(draw_folder(tmp_path / "photos", classes=2, per_class=6), tmp_path / "packed", kind)
    data = bytearray(archive.read_bytes())
    match damage:
        case "cut":
            data = data[: len(data) // 2]
        case "overwritten":
            start = 400 if kind != "tar" else 0
            data[start : start + 200] = bytes(range(200))
        case "text":
            data = bytearray(b"this is no archive")
    archive.write_bytes(data)
    with pytest.raises(RunError, match="not a readable archive"):
        unpack(archive)
    assert nothing_is_left()


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as file:
        file.writestr("cat", b"x")
        file.writestr("cat/1.jpg", b"x")
    with pytest.raises(RunError, match="not a readable archive"):
        unpack(tmp_path / "odd.zip")
    assert nothing_is_left()


def test_windows_separators_in_a_zip_are_folders(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "windows.zip", "w") as file:
        file.writestr("photos\\cat\\1.jpg", b"x")
    assert (unpack(tmp_path / "windows.zip") / "photos" / "cat" / "1.jpg").is_file()


def test_archive_names() -> None:
    assert all(is_archive(Path(name)) for name in ("a.zip", "b.TAR.GZ", "c.d.tgz", "e.tar.xz"))
    assert not any(is_archive(Path(name)) for name in ("a.gz", "zip", "a.zip.txt", "a.rar"))
