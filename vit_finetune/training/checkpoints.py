"""Checkpoints that are there whole or not at all: written aside and renamed; checked before use."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from vit_finetune.console import warn
from vit_finetune.files import sha256_of, sync

CHECKSUMS = "checksums.json"
"""In every checkpoint: bytes and SHA-256 of each of its files, by name."""
STATE = "trainer_state.json"


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run in the order of their steps; whether they are intact is not looked at."""
    found = folder.iterdir() if folder.is_dir() else iter(())
    named = (path for path in found if re.fullmatch(r"checkpoint-[1-9][0-9]*", path.name))
    return sorted((path for path in named if path.is_dir()), key=step_of)


def aside(checkpoint: Path) -> Path:
    """Where a checkpoint is written before it takes its name."""
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def finish_checkpoint(checkpoint: Path) -> None:
    """Lets what was written aside take the checkpoint's name, once all of it is on the disk.

    Whenever the machine stops, either the whole checkpoint is there or none of this name.
    """
    written = aside(checkpoint)
    sums = {}
    for file in sorted(path for path in written.rglob("*") if path.is_file()):
        digest = sha256_of(file)
        sync(file)
        sums[file.relative_to(written).as_posix()] = {"bytes": file.stat().st_size, "sha256": digest}
    (written / CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
    for path in (written / CHECKSUMS, *(path for path in written.rglob("*") if path.is_dir()), written):
        sync(path)
    before = _leaving(checkpoint)
    with suppress(FileNotFoundError):  # a resumed run comes to the same step again
        checkpoint.rename(before)
    written.rename(checkpoint)
    sync(checkpoint.parent)
    shutil.rmtree(before, ignore_errors=True)


def remove_checkpoint(checkpoint: Path) -> None:
    """Takes a checkpoint away: it is gone at once, not file by file."""
    leaving = _leaving(checkpoint)
    checkpoint.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def _leaving(checkpoint: Path) -> Path:
    """A free name for what is on its way out."""
    leaving = checkpoint.with_name(f".{checkpoint.name.lstrip('.')}.leaving")
    shutil.rmtree(leaving, ignore_errors=True)
    return leaving


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed run had not finished writing, or removing; what only lacked its name gets it."""
    for written in folder.glob(".checkpoint-*.partial"):
        checkpoint = written.with_name(written.name.removeprefix(".").removesuffix(".partial"))
        if not checkpoint.exists() and find_damage(written) is None:
            written.rename(checkpoint)
    for path in folder.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def rotate_checkpoints(folder: Path, limit: int | None, best: int | None) -> None:
    """Removes the oldest checkpoints beyond a limit, never the newest nor the best.

    Args:
        folder: of the run's checkpoints.
        limit: how many to keep; None for all.
        best: step of the checkpoint that scored best so far.
    """
    if limit is None:
        return
    found = list_checkpoints(folder)
    removable = [path for path in found[:-1] if step_of(path) != best]
    for path in removable[: max(0, len(found) - limit)]:
        remove_checkpoint(path)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None where every file is what was written."""
    try:
        sums: dict[str, dict[str, Any]] = json.loads((checkpoint / CHECKSUMS).read_bytes())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in sums.items()}
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{CHECKSUMS} cannot be read"
    if STATE not in expected:
        return f"{CHECKSUMS} does not name {STATE}"
    for name, (size, digest) in expected.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes, {size:,} were written"
        try:
            found = sha256_of(file)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found != digest:
            return f"{name} is not what was written (its checksum differs)"
    return None


def newest_intact(folder: Path, needs_best: bool) -> Path | None:
    """The newest checkpoint that can be trusted; None where there is none.

    Damaged ones are named aloud and set aside as `checkpoint-<step>.damaged`.

    Args:
        folder: of the run's checkpoints.
        needs_best: whether the checkpoint that scored best up to there must be intact as well.
    """
    for checkpoint in reversed(list_checkpoints(folder)):
        damage = find_damage(checkpoint)
        if damage is None and needs_best:
            best = json.loads((checkpoint / STATE).read_bytes()).get("best_global_step")
            best = best and folder / f"checkpoint-{best}"
            if best and best != checkpoint and (problem := _find_damage_or_absence(best)):
                damage = f"the best checkpoint up to it, {best.name}, cannot be used: {problem}"
        if damage is None:
            return checkpoint
        kept = checkpoint.with_name(f"{checkpoint.name}.damaged")
        warn(f"{checkpoint}: {damage}. It is passed over, and kept as {kept.name}")
        shutil.rmtree(kept, ignore_errors=True)
        checkpoint.rename(kept)
    return None


def _find_damage_or_absence(checkpoint: Path) -> str | None:
    return find_damage(checkpoint) if checkpoint.is_dir() else "it is missing"
