"""Checkpoints on the disk: whole or not there, checked before use, the best and the newest kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vit_finetune.training.checkpoints import (
    CHECKSUMS,
    STATE,
    aside,
    find_damage,
    finish_checkpoint,
    list_checkpoints,
    newest_intact,
    remove_leftovers,
    rotate_checkpoints,
)


def write_checkpoint(folder: Path, step: int, best: int | None = None) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    written = aside(checkpoint)
    (written / "shards").mkdir(parents=True)
    (written / "model.safetensors").write_bytes(bytes([step % 256]) * 1000)
    (written / "shards" / "0.pt").write_bytes(b"part")
    (written / STATE).write_text(json.dumps({"best_global_step": best}))
    finish_checkpoint(checkpoint)
    return checkpoint


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 10)
    assert names(tmp_path) == ["checkpoint-10"]
    assert find_damage(checkpoint) is None
    assert set(json.loads((checkpoint / CHECKSUMS).read_text())) == {
        "model.safetensors",
        "shards/0.pt",
        STATE,
    }
    (checkpoint / "shards" / "0.pt").write_bytes(b"trap")
    write_checkpoint(tmp_path, 10)  # a resumed run comes by again
    assert names(tmp_path) == ["checkpoint-10"] and find_damage(checkpoint) is None


DAMAGES: dict[str, Callable[[Path], object]] = {
    "model.safetensors is not what was written": lambda c: _flip(c / "model.safetensors"),
    "model.safetensors has 990 bytes, 1,000 were written": lambda c: _cut(c / "model.safetensors"),
    "shards/0.pt is missing": lambda c: (c / "shards" / "0.pt").unlink(),
    "checksums.json is missing": lambda c: (c / CHECKSUMS).unlink(),
    "checksums.json cannot be read": lambda c: _cut(c / CHECKSUMS),
    "checksums.json does not name trainer_state.json": lambda c: (c / CHECKSUMS).write_text("{}"),
    "trainer_state.json has": lambda c: (c / STATE).write_text(""),
}


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[500] ^= 1
    file.write_bytes(content)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize("said", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_aloud(
    said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    intact, damaged = write_checkpoint(tmp_path, 9), write_checkpoint(tmp_path, 10)
    DAMAGES[said](damaged)
    assert newest_intact(tmp_path, needs_best=True) == intact
    error = capsys.readouterr().err
    assert error.startswith(f"warning: {damaged}: {said}") and "kept as checkpoint-10.damaged" in error
    assert names(tmp_path) == ["checkpoint-10.damaged", "checkpoint-9"]
    assert list_checkpoints(tmp_path) == [intact]


@pytest.mark.parametrize("lost", [False, True])
def test_a_checkpoint_without_the_best_up_to_it_is_of_no_use(lost: bool, tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path, 5, best=5)
    best, newest = write_checkpoint(tmp_path, 10, best=10), write_checkpoint(tmp_path, 15, best=10)
    if lost:
        best.rename(tmp_path / "elsewhere")
    else:
        _flip(best / "model.safetensors")
    assert newest_intact(tmp_path, needs_best=True) == first
    assert not newest.exists() and (tmp_path / "checkpoint-15.damaged").is_dir()


def test_where_the_last_weights_are_wanted_the_best_does_not_matter(tmp_path: Path) -> None:
    newest = write_checkpoint(tmp_path, 15, best=10)
    assert newest_intact(tmp_path, needs_best=False) == newest


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert newest_intact(tmp_path / "none", needs_best=True) is None
    _flip(write_checkpoint(tmp_path, 5) / "model.safetensors")
    assert newest_intact(tmp_path, needs_best=True) is None


def test_the_oldest_go_first_but_never_the_best_nor_the_newest(tmp_path: Path) -> None:
    for step in (9, 10, 100, 20, 110):
        write_checkpoint(tmp_path, step)
    rotate_checkpoints(tmp_path, None, best=9)
    assert len(list_checkpoints(tmp_path)) == 5
    rotate_checkpoints(tmp_path, 3, best=10)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "checkpoint-10",
        "checkpoint-100",
        "checkpoint-110",
    ]
    rotate_checkpoints(tmp_path, 1, best=10)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-110"]
    rotate_checkpoints(tmp_path, 1, best=None)
    assert names(tmp_path) == ["checkpoint-110"]


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5)
    for name in (".checkpoint-6.partial", ".checkpoint-4.leaving"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-5"]
