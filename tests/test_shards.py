"""WebDataset tars and Parquet files with image bytes, as sources; and broken or hostile ones."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import draw_folder
from shard_files import NAMES, draw_png, sample, write_parquet, write_tar, write_tars

from vit_finetune.data.images import decode_image
from vit_finetune.data.sources import webdataset
from vit_finetune.data.sources.archives import cache_dir
from vit_finetune.data.sources.columns import Source, column_values
from vit_finetune.data.sources.shards import find_shards, read_class_names, read_rows
from vit_finetune.data.sources.source import load_source
from vit_finetune.data.sources.webdataset import is_webdataset, read_encoded, walk_members
from vit_finetune.data.splits.prepared import prepare_splits
from vit_finetune.data.transforms import ImageFiles
from vit_finetune.recipe import DataConfig
from vit_finetune.run import RunError


def load(path: Path | str, **options: Any) -> Source:
    return load_source(DataConfig(path=str(path), **options))


def labels_of(source: Source, split: str = "all") -> dict[str, str]:
    rows = zip(column_values(source.splits[split], "id"), column_values(source.splits[split], "label"))
    return {identity: source.labels[label] for identity, label in rows}


# --------------------------------------------------------------------------- WebDataset


def test_a_webdataset_is_read_in_place(tmp_path: Path) -> None:
    source = load(write_tars(tmp_path / "shards", [5, 4]))
    assert source.kind == "webdataset"
    assert source.labels == sorted(NAMES)
    expected = {f"part-00{int(n > 4)}.tar/{NAMES[n % 3]}/{n:06}": NAMES[n % 3] for n in range(9)}
    assert labels_of(source) == expected
    files = ImageFiles(source.splits["all"])
    for number in range(9):
        assert files[number].equal(decode_image(draw_png(number)))
    assert not (cache_dir() / "archives").exists()


def test_the_offsets_are_tarfiles(tmp_path: Path) -> None:
    """Long names and pax headers take blocks of their own."""
    path = tmp_path / "odd.tar"
    names = ["a.jpg", f"{'long' * 60}/b.jpg", "ü.jpg", "dir/c.seg.PNG"]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 700 * number
            info.pax_headers = {"comment": "x" * 600}
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
        folder = tarfile.TarInfo("dir")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    with tarfile.open(path) as tar:
        oracle = [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isreg()]
    with path.open("rb") as file:
        found = list(walk_members(path, file))
    assert [(m.offset, m.size) for m in found] == [(offset, size) for _, offset, size in oracle]
    assert [m.key for m in found] == ["a", f"{'long' * 60}/b", "ü", "dir/c"]
    assert [m.extension for m in found] == ["jpg", "jpg", "jpg", "seg.png"]


def test_indexed_once_until_the_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tars(tmp_path / "shards", [6])
    first = labels_of(load(folder))
    with monkeypatch.context() as patch:
        patch.setattr(webdataset, "_write_index", None)
        assert labels_of(load(folder)) == first
    write_tars(folder, [7])
    assert len(labels_of(load(folder))) == 7


@pytest.mark.parametrize("form", ["txt", "list", "object"])
def test_class_ids_take_their_names_from_a_file(tmp_path: Path, form: str) -> None:
    write_tar(tmp_path / "a.tar", *(m for n in range(6) for m in sample(n, label=str(n % 2))))
    match form:
        case "txt":
            (tmp_path / "classes.txt").write_text("zebra\nant\n\n")
        case "list":
            (tmp_path / "classes.json").write_text('["zebra", "ant"]')
        case "object":
            (tmp_path / "classes.json").write_text('{"0": "zebra", "1": "ant"}')
    source = load(tmp_path)
    assert source.labels == ["zebra", "ant"]
    assert column_values(source.splits["all"], "label") == [0, 1, 0, 1, 0, 1]


def test_without_names_the_ids_are_the_classes(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", *(m for n in range(12) for m in sample(n, label=str(n))))
    assert load(tmp_path / "a.tar").labels == [str(n) for n in range(12)]


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("txt", "a\n\nb\n"),
        ("txt", "a\na\n"),
        ("txt", "a\n"),
        ("json", '"ab"'),
        ("json", "7"),
        ("json", '{"1": "a"}'),
    ],
)
def test_class_names_that_cannot_be_ids(tmp_path: Path, suffix: str, text: str) -> None:
    (tmp_path / f"classes.{suffix}").write_text(text)
    with pytest.raises(RunError, match="one distinct class name for each id"):
        read_class_names(tmp_path)


def test_a_label_that_is_no_class(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", *sample(0, "0"), *sample(1, "2"))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(RunError, match="found the label '2'; expected one of"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("value", "options", "label"),
    [
        ("cat", {}, "cat"),
        (3, {}, "3"),
        ({"class": "cat"}, {}, "cat"),
        ({"label": 1, "x": "cat"}, {"label_column": "x"}, "cat"),
    ],
)
def test_labels_in_json(tmp_path: Path, value: Any, options: dict[str, str], label: str) -> None:
    write_tar(
        tmp_path / "a.tar",
        ("0.jpg", b"x"), ("0.json", json.dumps(value).encode()),
        ("1.jpg", b"x"), ("1.json", b'{"label": "dog", "class": "dog", "x": "dog"}'),
    )  # fmt: skip
    assert labels_of(load(tmp_path / "a.tar", **options)) == {"a.tar/0": label, "a.tar/1": "dog"}


def test_the_image_of_several_is_named(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        ("0.jpg", b"x"),
        ("0.png", b"yy"),
        ("0.cls", b"a"),
        ("1.png", b"yy"),
        ("1.cls", b"b"),
    )
    with pytest.raises(
        RunError, match=r"sample '0' has several images; found jpg, png, cls.*data.image_column"
    ):
        load(path)
    assert [
        read_encoded(row) for row in ImageFiles(load(path, image_column="png").splits["all"]).rows or []
    ] == [b"yy"] * 2


def test_what_belongs_to_no_sample_is_passed_over(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", ("README", b"x"), *sample(0), ("._cat.jpg", b"x"), *sample(1))
    assert len(labels_of(load(path))) == 2


def test_a_tar_of_class_folders_stays_an_archive(tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "photos", per_class=2)
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(folder, "photos")
    assert not is_webdataset(tmp_path / "photos.tar")
    assert load(tmp_path / "photos.tar").kind == "archive"


def test_a_folder_of_images_with_a_shard_beside_them_stays_a_folder(tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "photos", per_class=2)
    write_tars(folder, [6])
    assert load(folder).kind == "folder"


def test_unreadable_images_are_found_inside_shards(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        *(m for n in range(12) for m in sample(n)),
        ("x.png", b"broken"),
        ("x.cls", b"red"),
    )
    with pytest.raises(RunError, match=r"1 of 13 images cannot be read:\n  a.tar/x: not an image"):
        prepare_splits(DataConfig(path=str(tmp_path / "a.tar")))
    data = prepare_splits(DataConfig(path=str(tmp_path / "a.tar"), on_unreadable="skip"))
    assert sum(map(len, data.splits.values())) == 12


# --------------------------------------------------------------------------- hostile and broken tars


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(tmp_path: Path, kind: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", *sample(0), *sample(1))
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("x.jpg")
        link.type, link.linkname = kind, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(RunError, match=r"a.tar: 'x.jpg' is a link, device"):
        load(path)


@pytest.mark.parametrize("name", ["../../escaped", "/etc/escaped", "C:\\escaped"])
def test_names_are_only_names(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / "a.tar", (f"{name}.png", draw_png(0)), (f"{name}.cls", b"a"), *sample(1))
    files = ImageFiles(load(path).splits["all"])
    assert files[0].equal(decode_image(draw_png(0)))
    assert not list(cache_dir().rglob("escaped*")) and not list(tmp_path.rglob("escaped*"))


def test_a_size_beyond_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", *sample(0), *sample(1))
    info = tarfile.TarInfo("huge.png")
    info.size = 1 << 40
    start = -(-len(path.read_bytes().rstrip(b"\0")) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    path.write_bytes(path.read_bytes()[:start] + info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(
        RunError, match=rf"'huge.png', at byte {start:,}, says that it has 1,099,511,627,776 bytes"
    ):
        load(path)


@pytest.mark.parametrize("damage", ["cut", "header", "zero"])
def test_broken_shards_name_themselves_and_the_place(tmp_path: Path, damage: str) -> None:
    folder = write_tars(tmp_path / "shards", [6, 6])
    path = folder / "part-001.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        third = tar.getmembers()[4].offset
    match damage:
        case "cut":
            data = data[: third + 700]
        case "header":
            data[third + 20 : third + 60] = b"?" * 40
        case "zero":
            data = bytearray()
    path.write_bytes(data)
    place = "0" if damage == "zero" else f"{third:,}" if damage == "header" else r"[\d,]+"
    with pytest.raises(RunError, match=rf"part-001.tar: .*(broken at byte {place}|beyond the end)"):
        load(folder)
    with pytest.raises(RunError, match=r"part-001.tar"):
        list(read_rows([str(path)], str(folder), "webdataset", DataConfig(path="x")))
    assert len(list((cache_dir() / "shards").iterdir())) == 1  # of the whole shard only


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.jpg", b"x"), ("1.jpg", b"x"), ("1.cls", b"a")], "'0' has no label; found jpg"),
        ([*sample(0), ("1.cls", b"a")], "'1' has no image; found cls"),
        ([*sample(0), ("1.jpg", b"x"), ("1.cls", b"  ")], "its .cls holds no class"),
        ([*sample(0), ("1.jpg", b"x"), ("1.cls", b"\xff")], "its .cls cannot be read"),
        ([*sample(0), ("1.jpg", b"x"), ("1.json", b"{")], "its .json cannot be read"),
        ([*sample(0), ("1.jpg", b"x"), ("1.json", b'{"label": [1, 2]}')], "data.label_column"),
        ([*sample(0), ("1.jpg", b"x"), ("1.json", b"[" * 100_000)], "cannot be read|holds no class"),
        ([*sample(0), ("1.jpg", b"x"), ("1.cls", b" " * 2_000_000)], "has 2,000,000 bytes; expected a label"),
        ([*sample(0), *sample(1), *sample(0)], "comes twice"),
        ([*sample(0), *sample(0)], "has a file twice"),
        ([*sample(0), *sample(3)], "one class only"),
    ],
)  # fmt: skip
def test_samples_that_cannot_be_used(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(RunError, match=message):
        load(write_tar(tmp_path / "a.tar", *members))


def test_a_shard_that_became_shorter(tmp_path: Path) -> None:
    path = write_tars(tmp_path, [6]) / "part-000.tar"
    files = ImageFiles(load(path).splits["all"])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"part-000.tar: ends before byte .* changed since"):
        files[5]


# --------------------------------------------------------------------------- which files


@pytest.mark.parametrize(
    ("names", "pattern", "expected"),
    [
        (["a-000.tar", "a-001.tar", "a-002.tar"], "a-{000..001}.tar", {"all": ["a-000.tar", "a-001.tar"]}),
        (["a-8.tar", "a-9.tar", "a-10.tar"], "a-{8..10}.tar", {"all": ["a-8.tar", "a-9.tar", "a-10.tar"]}),
        (["a-1.tar", "b-1.tar", "c-1.tar"], "{a,c}-*.tar", {"all": ["a-1.tar", "c-1.tar"]}),
        (["train-0.tar", "val-0.tar"], "*.tar", {"train": ["train-0.tar"], "validation": ["val-0.tar"]}),
        (["train-0.tar", "test_0.tar"], "", {"train": ["train-0.tar"], "test": ["test_0.tar"]}),
        (["train/0.tar", "valid/0.tar"], "", {"train": ["train/0.tar"], "validation": ["valid/0.tar"]}),
        (["train/0.tar", "val/0.tar"], "{train,val}/*.tar", {"train": ["train/0.tar"], "validation": ["val/0.tar"]}),
        (["data/a.tar"], "", {"all": ["data/a.tar"]}),
        (["constrained.tar", "latest.tar"], "", {"all": ["constrained.tar", "latest.tar"]}),
    ],
)  # fmt: skip
def test_shards_by_split(
    tmp_path: Path, names: list[str], pattern: str, expected: dict[str, list[str]]
) -> None:
    root = tmp_path / "train"  # folders above the data say nothing
    for name in names:
        write_tar(root / name, *sample(0), *sample(1))
    shards = find_shards(str(root / pattern))
    assert shards is not None and shards.kind == "webdataset"
    assert {
        split: [shards.name_of(file) for file in files] for split, files in shards.files.items()
    } == expected


@pytest.mark.parametrize(
    ("names", "pattern", "message"),
    [
        (["a-000.tar"], "a-{000..001}.tar", "there is no file .*a-001.tar"),
        (["a-000.tar"], "b*.tar", "there is no file"),
        (["a.tar", "b.txt"], "*", "names b.txt; expected .tar or .parquet"),
        (["train-0.tar", "other.tar"], "", "name no split, but others do"),
        (["a.tar", "b.parquet"], "", "found both .tar and .parquet"),
    ],
)
def test_patterns_that_cannot_be_used(tmp_path: Path, names: list[str], pattern: str, message: str) -> None:
    for name in names:
        write_tar(tmp_path / name, *sample(0), *sample(1))
    with pytest.raises(RunError, match=message):
        load(tmp_path / pattern)


def test_a_pattern_of_other_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", ("cat/1.jpg", b"x"))
    with pytest.raises(RunError, match=r"a.tar holds no labelled images; expected WebDataset"):
        load(tmp_path / "*.tar")


# --------------------------------------------------------------------------- Parquet


@pytest.mark.parametrize("plain", [False, True], ids=["hub", "binary"])
def test_parquet_with_image_bytes(tmp_path: Path, plain: bool) -> None:
    folder = write_parquet(tmp_path / "shards", [5, 4], plain=plain)
    if plain:
        (folder / "classes.txt").write_text("\n".join(NAMES))
    source = load(folder)
    assert source.kind == "parquet"
    assert source.labels == NAMES
    (split,) = source.splits.values()
    assert column_values(split, "label") == [n % 3 for n in range(9)]
    files = ImageFiles(split)
    assert all(files[number].equal(decode_image(draw_png(number))) for number in range(9))
    assert prepare_splits(DataConfig(path=str(folder))).kind == "parquet"


def test_parquet_splits_by_name(tmp_path: Path) -> None:
    for split, start in (("train", 0), ("validation", 6), ("test", 12)):
        write_parquet(tmp_path / "data", [6], split, start)
    source = load(tmp_path)
    assert {split: len(rows) for split, rows in source.splits.items()} == dict.fromkeys(
        ("train", "validation", "test"), 6
    )
    assert ImageFiles(source.splits["test"])[0].equal(decode_image(draw_png(12)))


def test_a_shard_does_not_decide_which_files_are_read(tmp_path: Path) -> None:
    draw_folder(tmp_path / "private")
    rows = [
        {"bytes": draw_png(0), "path": "0.png"},
        {"bytes": None, "path": str(tmp_path / "private/red/0.png")},
    ]
    shard = tmp_path / "shards" / "a.parquet"
    shard.parent.mkdir()
    pq.write_table(pa.table({"image": rows, "label": ["cat", "dog"]}), shard)
    with pytest.raises(RunError, match=r"holds the name of a file, .*red/0.png', where the column image"):
        load(shard.parent)


def test_one_parquet_file_and_a_broken_one(tmp_path: Path) -> None:
    (file,) = write_parquet(tmp_path, [9]).iterdir()
    assert len(load(file).splits["all"]) == 9
    data = bytearray(file.read_bytes())
    data[4:60] = bytes(56)
    file.write_bytes(data)
    with pytest.raises(RunError, match=r"part.* could not be read"):
        load(file)
    with pytest.raises(RunError, match=r"part-00000-of-00001.parquet: not a readable Parquet file"):
        list(read_rows([str(file)], str(tmp_path), "parquet", DataConfig(path="x")))
    file.write_bytes(b"PAR1 nothing of the kind")
    with pytest.raises(RunError, match=r"part-00000-of-00001.parquet: not a readable Parquet file"):
        load(file)
