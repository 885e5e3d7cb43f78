"""Damaged checkpoints: said aloud and passed over for the one before; and runs that lie elsewhere now."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from harmed_runs import SIGNALLED, Place, at, checkpoints, ended, flip, send

from vit_finetune.run import Run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stopped(place: Place, whole: Run) -> Run:
    """A run that was stopped at step 12, with three checkpoints, of which the best so far is not the newest."""
    run = Run(place.folder / "stopped")
    ended(place.train(run, before=at(send(signal.SIGTERM), step=11)), [75], errors=0)
    assert set(checkpoints(run)) >= {10, 12}
    assert best_of(run, 12) < 10
    return run


def best_of(run: Run, step: int) -> int:
    state = json.loads((run.checkpoints / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return int(state["best_global_step"])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "model.safetensors is not what was written": lambda folder: flip(folder / "model.safetensors"),
    "optimizer.pt has": lambda folder: os.truncate(folder / "optimizer.pt", 1000),
    "scheduler.pt is missing": lambda folder: (folder / "scheduler.pt").unlink(),
    "checksums.json": lambda folder: os.truncate(folder / "checksums.json", 100),
    "trainer_state.json": lambda folder: (folder / "trainer_state.json").write_text("{}"),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_a_damaged_newest_checkpoint(
    said: str, place: Place, stopped: Run, whole: Run, tmp_path: Path
) -> None:
    run = Run(shutil.copytree(stopped.path, tmp_path / "run"))
    DAMAGES[said](run.checkpoints / "checkpoint-12")
    told = place.finish(run, whole, said=f"resuming from {run.checkpoints / 'checkpoint-10'}")
    assert f"warning: {run.checkpoints / 'checkpoint-12'}: {said}" in told
    assert (run.checkpoints / "checkpoint-12.damaged").is_dir()


def test_a_damaged_best_checkpoint(place: Place, stopped: Run, whole: Run, tmp_path: Path) -> None:
    """What comes after it would choose it again, so it cannot be gone on with either."""
    run = Run(shutil.copytree(stopped.path, tmp_path / "run"))
    best = run.checkpoints / f"checkpoint-{best_of(run, 12)}"
    flip(best / "model.safetensors")
    told = place.finish(run, whole, said="starting from the beginning")
    assert told.count("warning: ") >= 1
    assert str(best.name) in told
    assert "model.safetensors is not what was written" in told


def test_nothing_but_damaged_checkpoints(place: Place, stopped: Run, whole: Run, tmp_path: Path) -> None:
    run = Run(shutil.copytree(stopped.path, tmp_path / "run"))
    found = checkpoints(run)
    for path in found.values():
        flip(path / "optimizer.pt")
    told = place.finish(run, whole, said="starting from the beginning")
    assert told.count("warning: ") == len(found)


def test_a_best_checkpoint_that_is_damaged_while_training(place: Place, whole: Run, tmp_path: Path) -> None:
    """Nothing is published from it; the resumed run finds it again."""
    run = Run(tmp_path / "run")
    ruin = (
        "best = pathlib.Path(self.state.best_model_checkpoint, 'model.safetensors'); "
        "content = bytearray(best.read_bytes()); content[-1] ^= 1; best.write_bytes(content)"
    )
    told = ended(place.train(run, before=at(ruin, step=19)), [1])
    assert f"error: {run.checkpoints / 'checkpoint-'}" in told
    assert "--resume" in told
    assert not run.model.exists()
    assert "warning: " in place.finish(run, whole, said="")


@pytest.mark.parametrize("when", ["while training", "after training"])
def test_a_run_folder_that_was_moved(
    when: str, place: Place, stopped: Run, whole: Run, tmp_path: Path
) -> None:
    """Its checkpoints know the best one by step, not by the place where it was and another run may be now."""
    run = Run(shutil.copytree(stopped.path, tmp_path / "run"))
    stop = (
        at(send(signal.SIGTERM), step=13)
        if when == "while training"
        else SIGNALLED.format(function="score_splits")
    )
    ended(place.train(run, before=stop), [75], errors=0)
    moved = Run(run.path.rename(tmp_path / "moved"))
    shutil.copytree(stopped.path, tmp_path / "run")
    for path in checkpoints(run).values():
        flip(path / "model.safetensors")
    place.finish(moved, whole)
