"""The reading pass: every image is decoded once, what is broken is found, and nothing is read twice."""

import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import draw_folder, draw_image
from test_images import png_header

from vit_finetune.data import checkup
from vit_finetune.data.archives import cache_dir
from vit_finetune.data.checkup import Finding, leave_out_unreadable
from vit_finetune.data.sources import Source, arrange_columns, column_values, load_source
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


def check(path: Path, **options: Any) -> tuple[Source, list[Finding]]:
    config = DataConfig(path=str(path), **options)
    return leave_out_unreadable(load_source(config), config)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was decoded since the start of the test."""
    seen: list[bytes] = []
    decode = checkup.decode_image
    monkeypatch.setattr(checkup, "decode_image", lambda data: (seen.append(data), decode(data))[1])
    return seen


def test_stop_lists_every_unreadable_image_with_its_reason(broken: Path) -> None:
    with pytest.raises(RunError) as caught:
        check(broken)
    first, *lines, last = str(caught.value).splitlines()
    assert "5 of 41 images cannot be read" in first
    assert len(lines) == len(BROKEN)
    for line, (name, reason) in zip(lines, BROKEN.items()):
        assert line.startswith(f"  {name}: {reason}")
    assert "data.on_unreadable=skip" in last


def test_skip_leaves_out_exactly_those(broken: Path) -> None:
    source, findings = check(broken, on_unreadable="skip")
    assert [finding.id for finding in findings] == list(BROKEN)
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
    _, findings = leave_out_unreadable(source, config)
    assert [(finding.id, finding.problem) for finding in findings] == [
        ("red/3.png", "cannot be opened: No such file or directory"),
        ("red/4.png", "cannot be opened: Is a directory"),
    ]


def test_the_second_pass_decodes_nothing_but_what_changed(broken: Path, decoded: list[bytes]) -> None:
    first = check(broken, on_unreadable="skip")
    assert len(decoded) == 41
    decoded.clear()
    second = check(broken, on_unreadable="skip")
    assert decoded == []
    assert second[1] == first[1]
    assert column_values(second[0].splits["all"], "digest") == column_values(first[0].splits["all"], "digest")

    changed = broken / "red" / "0.png"
    facts, data = changed.stat(), bytearray(changed.read_bytes())
    data[-20] ^= 1  # same size; only the time tells
    changed.write_bytes(data)
    os.utime(changed, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    check(broken, on_unreadable="skip")
    assert decoded == [bytes(data)]


def test_the_pass_that_stopped_is_remembered(broken: Path, decoded: list[bytes]) -> None:
    for _ in range(2):
        with pytest.raises(RunError, match="5 of 41"):
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
    source, _ = check(folder)
    assert len(source.splits["all"]) == 36


def test_a_class_that_loses_all_its_images_is_said(tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "train", classes=3, per_class=2).parent
    for file in (root / "train" / "red").iterdir():
        file.write_bytes(b"")
    source, _ = check(root, on_unreadable="skip")
    assert source.notices == ["train has no image of red"]


def test_a_split_that_loses_all_its_images_is_an_error(tmp_path: Path) -> None:
    draw_folder(tmp_path / "train", classes=2, per_class=2)
    for file in draw_folder(tmp_path / "test", classes=2, per_class=1).rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(RunError, match="test: not one image can be read; the first is 0 bytes"):
        check(tmp_path, on_unreadable="skip")


def test_rows_of_the_hub_are_named_by_split(decoded: list[bytes]) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    stored = [{"bytes": png_header(2, 2), "path": None}, None, draw_image((1, 2, 3), 0)]
    split = datasets.Dataset.from_dict({"image": stored, "label": [0, 1, 1]}, features=features)
    config = DataConfig(path="owner/name", on_unreadable="skip")
    source = arrange_columns(datasets.DatasetDict(train=split, test=split), config)
    checked, findings = leave_out_unreadable(source, config)
    assert [finding.id for finding in findings] == ["train 0", "train 1", "test 0", "test 1"]
    assert findings[1].problem == "the row holds no image"
    assert column_values(checked.splits["test"], "id") == ["2"]


def test_few_images_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "CHUNK", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    source, taken = load_source(DataConfig(path="digits")), []
    images = source.splits["all"].select_columns(["image"]).select(range(50))
    images = images.cast_column("image", datasets.Image(decode=False))
    get = type(images).__getitem__
    monkeypatch.setattr(type(images), "__getitem__", lambda self, key: (taken.append(key), get(self, key))[1])
    with checkup.ThreadPoolExecutor(1) as threads:
        for number, _ in enumerate(checkup._in_parallel(threads, images, checkup._Memory(Path("none")))):
            assert len(taken) <= number + 3
    assert len(taken) == 50
