"""Files written whole or not at all; disks that are full."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vit_finetune.files import folder_written_whole, is_disk_full, write_json, write_text, written_whole
from vit_finetune.run import CalibrationBin, ClassScore, Mistake, Report, RunError


def test_files_are_written_whole_or_left_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "text.txt"
    write_text(path, "old ü")
    assert path.read_bytes() == "old ü".encode()
    with pytest.raises(ZeroDivisionError), written_whole(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text(encoding="utf-8") == "old ü"
    assert os.listdir(path.parent) == ["text.txt"]


def test_what_is_no_file_stays_what_it_is(tmp_path: Path) -> None:
    """Such as /dev/null, the page of somebody who wants only what is printed, as root in a container."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(pipe, "page")
        assert pipe.is_fifo() and os.read(reading, 100) == b"page"
    finally:
        os.close(reading)


def test_a_failed_rename_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    write_text(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vit_finetune.files.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["text.txt"]


def test_a_folder_that_cannot_take_its_name_is_told(tmp_path: Path) -> None:
    """What another process made whole stays; of a link, or a mounted disk, the files would be gone."""
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "theirs").touch()
    with folder_written_whole(tmp_path / "first") as temporary:
        (temporary / "ours").touch()
    assert [file.name for file in (tmp_path / "first").iterdir()] == ["theirs"]
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(NotADirectoryError), folder_written_whole(tmp_path / "link") as temporary:
        (temporary / "ours").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"first", "link", "real"}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "text.txt", "text")
        assert os.umask(umask) == umask, "the umask was not put back"
    finally:
        os.umask(before)
    assert (tmp_path / "text.txt").stat().st_mode & 0o777 == mode


def test_json_is_readable_by_people(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"label": "Löwe"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "label": "Löwe"\n}\n'


def cause(error: Exception, of: Exception) -> Exception:
    error.__cause__ = of
    return error


def context(error: Exception, of: Exception) -> Exception:
    error.__context__ = of
    return error


@pytest.mark.parametrize(
    "make",
    [
        lambda: OSError(errno.ENOSPC, "No space left on device"),
        lambda: OSError(errno.EDQUOT, "Disk quota exceeded"),
        lambda: RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        lambda: RuntimeError("Error while serializing: I/O error: Kein Platz (os error 28)"),
        lambda: RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534"),
        lambda: RuntimeError(
            "[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0"
        ),
        lambda: cause(ValueError("saving failed"), OSError(errno.ENOSPC, "")),
        lambda: context(ValueError("a"), cause(ValueError("b"), OSError(errno.ENOSPC, ""))),
    ],
)
def test_a_full_disk_is_recognised(make: Callable[[], Exception]) -> None:
    assert is_disk_full(make())


@pytest.mark.parametrize(
    "make",
    [
        lambda: OSError(errno.EACCES, "Permission denied"),
        lambda: RuntimeError("[enforce fail at inline_container.cc:300] . file not found: data.pkl"),
        lambda: cause(ValueError("a"), OSError(errno.ENOENT, "")),
        lambda: RunError("the disk"),
    ],
)
def test_other_errors_are_no_full_disk(make: Callable[[], Exception]) -> None:
    assert not is_disk_full(make())


def test_a_report_survives_its_json(tmp_path: Path) -> None:
    report = Report(
        split="test",
        num_images=3,
        accuracy=2 / 3,
        accuracy_interval=(0.2, 0.9),
        macro_f1=0.1 + 0.2,
        balanced_accuracy=0.5,
        log_loss=1e-300,
        ece=0.0,
        per_class={"Löwe": ClassScore(precision=1, recall=0.5, f1=2 / 3, support=2)},
        confusion_matrix=[[1, 1], [0, 1]],
        labels=["Löwe", "<b>"],
        calibration=[CalibrationBin(low=0, high=1 / 15, count=1, confidence=0.05, accuracy=0)],
        worst_mistakes=[Mistake(id="a/ü.png", label="Löwe", predicted="<b>", probability=0.9)],
    )
    write_text(tmp_path / "test.json", report.to_json())
    assert Report.load(tmp_path / "test.json") == report
    assert "top_5_accuracy" not in json.loads(report.to_json())
    assert (
        Report.model_validate_json(report.model_copy(update={"top_5_accuracy": 1.0}).to_json()).top_5_accuracy
        == 1
    )
