"""The reading pass: every image is decoded once, what is broken is found, and nothing is read twice."""

import io
import os
from pathlib import Path
from typing import Any

import datasets
import imagehash
import numpy as np
import pytest
from conftest import draw_folder, draw_image
from PIL import Image
from shard_files import write_tars
from test_images import ENCODED, PHOTO, encode, png_header

from vit_finetune.data.checkup import readings
from vit_finetune.data.checkup.checkup import Checkup, check_up, leave_out_unreadable
from vit_finetune.data.sources.archives import cache_dir
from vit_finetune.data.sources.columns import Source, column_values
from vit_finetune.data.sources.hub import arrange_columns
from vit_finetune.data.sources.source import load_source
from vit_finetune.recipe import DataConfig
from vit_finetune.run import RunError

BROKEN = {
    "blue/bomb.png": "decompression bomb",
    "blue/empty.png": "0 bytes",
    "green/cut.jpg": "truncated JPEG",
    "green/cut.png": "truncated",
    "red/text.jpg": "not an image",
}


@pytest.fixture
def broken(folder: Path) -> Path:
    """A folder of 36 good images and the broken ones above."""
    (folder / "blue" / "bomb.png").write_bytes(png_header(50_000, 50_000))
    (folder / "blue" / "empty.png").touch()
    (folder / "red" / "text.jpg").write_text("no picture at all")
    for kind in ("jpg", "png"):
        file = folder / "green" / f"cut.{kind}"
        draw_image((40, 180, 60), 7, (200, 200)).save(file)
        file.write_bytes(file.read_bytes()[:-1000])
    return folder


def check(path: Path, **options: Any) -> Source:
    config = DataConfig(path=str(path), **options)
    return leave_out_unreadable(load_source(config), config)


def problems(checkup: Checkup) -> dict[str, str]:
    """What cannot be read, and why."""
    found = [f for f in checkup.findings if f.kind in ("unreadable", "truncated")]
    return {image.id: image.detail for finding in found for image in finding.images}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was decoded since the start of the test."""
    seen: list[bytes] = []
    decode = readings.decode_image
    monkeypatch.setattr(readings, "decode_image", lambda data: (seen.append(data), decode(data))[1])
    return seen


def test_stop_lists_every_unreadable_image_with_its_reason(broken: Path) -> None:
    with pytest.raises(RunError) as caught:
        check(broken)
    said = str(caught.value).splitlines()
    assert said[0].endswith("3 of 41 images cannot be read:")
    assert said[5] == "2 of 41 images are truncated:"
    listed = sorted(line for line in said if line.startswith("  "))
    for line, (name, reason) in zip(listed, BROKEN.items(), strict=True):
        assert line.startswith(f"  {name}: {reason}")
    assert "data.on_unreadable=skip" in said[4] and said[-1] == said[4]


def test_an_error_names_a_few_of_many_images(folder: Path) -> None:
    for number in range(30):
        (folder / "red" / f"empty{number}.png").touch()
    with pytest.raises(RunError, match="30 of 66 images") as caught:
        check(folder)
    assert str(caught.value).count("0 bytes") == 20 and "… and 10 more" in str(caught.value)


def test_skip_leaves_out_exactly_those(broken: Path) -> None:
    source = check(broken, on_unreadable="skip")
    left = column_values(source.splits["all"], "id")
    assert len(left) == 36
    assert not set(left) & set(BROKEN)
    digests = column_values(source.splits["all"], "digest")
    assert len(set(digests)) == 36 and all(digests)


def test_files_that_went_away_since_they_were_listed(folder: Path) -> None:
    config = DataConfig(path=str(folder), on_unreadable="skip")
    source = load_source(config)
    (folder / "red" / "3.png").unlink()
    (folder / "red" / "4.png").unlink()
    (folder / "red" / "4.png").mkdir()
    assert problems(check_up(source, config)) == {
        "red/3.png": "cannot be opened: No such file or directory",
        "red/4.png": "cannot be opened: Is a directory",
    }


def test_pipes_and_devices_are_not_read(folder: Path) -> None:
    os.mkfifo(folder / "blue" / "pipe.png")
    (folder / "red" / "zero.jpg").symlink_to("/dev/zero")
    config = DataConfig(path=str(folder))
    assert problems(check_up(load_source(config), config)) == dict.fromkeys(
        ("blue/pipe.png", "red/zero.jpg"), "is a pipe or device"
    )


def test_of_shards_the_second_pass_reads_nothing_but_what_changed(
    tmp_path: Path, decoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tars(tmp_path, [5, 4])
    first = check(folder)
    assert len(decoded) == 9
    decoded.clear()
    with monkeypatch.context() as patch:
        patch.setattr(readings, "read_encoded", None)
        second = check(folder)
    assert column_values(second.splits["all"], "digest") == column_values(first.splits["all"], "digest")
    write_tars(tmp_path, [6])
    check(folder)
    assert len(decoded) == 6


def test_the_second_pass_decodes_nothing_but_what_changed(broken: Path, decoded: list[bytes]) -> None:
    first = check(broken, on_unreadable="skip")
    assert len(decoded) == 41
    decoded.clear()
    second = check(broken, on_unreadable="skip")
    assert decoded == []
    for column in ("id", "digest"):
        assert column_values(second.splits["all"], column) == column_values(first.splits["all"], column)

    changed = broken / "red" / "0.png"
    facts, data = changed.stat(), bytearray(changed.read_bytes())
    data[-20] ^= 1  # same size; only the time tells
    changed.write_bytes(data)
    os.utime(changed, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    check(broken, on_unreadable="skip")
    assert decoded == [bytes(data)]


def test_the_pass_that_stopped_is_remembered(broken: Path, decoded: list[bytes]) -> None:
    for _ in range(2):
        with pytest.raises(RunError, match="3 of 41"):
            check(broken)
    assert len(decoded) == 41


@pytest.mark.parametrize("damage", [b"", b"PAR1 no table PAR1"])
def test_a_damaged_memory_is_survived(folder: Path, decoded: list[bytes], damage: bytes) -> None:
    check(folder)
    (memory,) = (cache_dir() / "readings").iterdir()
    memory.write_bytes(damage)
    check(folder)
    assert len(decoded) == 2 * 36
    check(folder)
    assert len(decoded) == 2 * 36


def test_a_cache_that_cannot_be_written_is_survived(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = folder / "note.txt"
    blocked.touch()
    monkeypatch.setenv("VIT_FINETUNE_CACHE", str(blocked))
    source = check(folder)
    assert len(source.splits["all"]) == 36


def test_a_class_that_loses_all_its_images_is_said(tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "train", classes=3, per_class=2).parent
    for file in (root / "train" / "red").iterdir():
        file.write_bytes(b"")
    config = DataConfig(path=str(root), on_unreadable="skip")
    found = {finding.kind: finding for finding in check_up(load_source(config), config).findings}
    assert found["class-empty"].message == "the data has no image of red"


def test_a_split_that_loses_all_its_images_is_an_error(tmp_path: Path) -> None:
    draw_folder(tmp_path / "train", classes=2, per_class=2)
    for file in draw_folder(tmp_path / "test", classes=2, per_class=1).rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(RunError, match="test: not one image can be read or is left"):
        check(tmp_path, on_unreadable="skip")


def test_rows_of_the_hub_are_named_by_split(decoded: list[bytes]) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    stored = [{"bytes": png_header(2, 2), "path": None}, None, draw_image((1, 2, 3), 0)]
    split = datasets.Dataset.from_dict({"image": stored, "label": [0, 1, 1]}, features=features)
    config = DataConfig(path="owner/name", on_unreadable="skip")
    source = arrange_columns(datasets.DatasetDict(train=split, test=split), config)
    checkup = check_up(source, config)
    (unreadable,) = [finding for finding in checkup.findings if finding.kind == "unreadable"]
    assert [(image.split, image.id, image.detail) for image in unreadable.images if image.id == "1"] == [
        ("train", "1", "the row holds no image"),
        ("test", "1", "the row holds no image"),
    ]
    assert column_values(checkup.source.splits["test"], "id") == ["2"]
    with pytest.raises(RunError, match=r"(?s)\n  test 1: the row.*\n  train 0: truncated"):
        leave_out_unreadable(source, config.model_copy(update={"on_unreadable": "stop"}))


def test_few_images_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    taken: list[int] = []
    chunks = (taken.append(number) or [None] for number in range(50))
    with readings.ThreadPoolExecutor(1) as threads:
        for number, _ in enumerate(readings._in_parallel(threads, chunks)):
            assert len(taken) <= number + 3
    assert len(taken) == 50


def read(*images: bytes) -> list[dict[str, Any]]:
    """What reading these images tells, row by row."""
    stored = [{"bytes": image, "path": None} for image in images]
    features = datasets.Features({"image": datasets.Image()})
    split = datasets.Dataset.from_dict({"image": stored}, features=features)
    source = Source("hub", {"all": split}, ["a", "b"])
    return readings.read_images(source, DataConfig(path="owner/name"))["all"].to_pylist()


@pytest.mark.parametrize("kind", ENCODED)
def test_facts_are_those_of_pillow(kind: str) -> None:
    (row,) = read(ENCODED[kind])
    with Image.open(io.BytesIO(ENCODED[kind])) as image:
        assert (row["format"], row["mode"]) == (image.format, image.mode)
        assert (row["width"], row["height"]) == image.size
        assert row["frames"] == (1 if kind == "mpo" else getattr(image, "n_frames", 1))
        alpha = np.asarray(image.convert("RGBA"))[..., 3] if image.has_transparency_data else np.array(255)
    assert row["transparent"] == bool((alpha < 255).any())
    assert row["problem"] == "" and not row["blank"] and row["orientation"] == 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_turned_image_is_as_wide_as_it_is_shown_and_hashed_upright(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, upright = read(
        encode(PHOTO.transpose(Image.Transpose.ROTATE_90), kind, exif=exif), encode(PHOTO, kind)
    )
    assert (turned["orientation"], turned["width"], turned["height"]) == (6, *PHOTO.size)
    assert (turned["phash"] ^ upright["phash"]).bit_count() <= 4


def test_an_opaque_alpha_channel_is_not_transparent() -> None:
    image = PHOTO.copy()
    image.putalpha(255)
    assert [row["transparent"] for row in read(encode(image, "PNG"))] == [False]


def test_one_dot_of_another_colour_is_not_blank() -> None:
    flat = Image.new("RGB", (3000, 3000), (250, 250, 250))
    dotted = flat.copy()
    dotted.putpixel((1501, 1501), (0, 0, 0))  # no small picture shows it
    assert [row["blank"] for row in read(encode(flat, "PNG"), encode(dotted, "PNG"))] == [True, False]


def test_hashes_are_those_of_the_library_and_hardly_change_with_size() -> None:
    large = PHOTO.resize((900, 640), Image.Resampling.BICUBIC)
    one, other = (row["phash"] for row in read(encode(PHOTO, "PNG"), encode(large, "PNG")))
    assert one == int(str(imagehash.phash(PHOTO)), 16)
    assert (one ^ other).bit_count() <= 4
    small = draw_image((1, 2, 3), 0, size=(24, 23))
    assert [row["phash"] for row in read(encode(small, "PNG"))] == [None]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_block_is_survived() -> None:
    data = encode(PHOTO, "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    assert [(row["problem"], row["orientation"]) for row in read(data)] == [("", 1)]


def test_rows_stay_in_order_when_some_are_remembered(folder: Path, decoded: list[bytes]) -> None:
    config = DataConfig(path=str(folder))
    first = readings.read_images(load_source(config), config)["all"]
    decoded.clear()
    for name in ("blue/5.png", "green/0.png", "red/11.png"):
        draw_image((9, 9, 9), len(name), (30, 40)).save(folder / name)
    second = readings.read_images(load_source(config), config)["all"]
    assert len(decoded) == 3
    changed = [row for row, (a, b) in enumerate(zip(first.to_pylist(), second.to_pylist())) if a != b]
    ids = column_values(load_source(config).splits["all"], "id")
    assert [ids[row] for row in changed] == ["blue/5.png", "green/0.png", "red/11.png"]
    assert all(second["width"][row].as_py() == 30 for row in changed)
