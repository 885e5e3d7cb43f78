"""What happens to runs in the world: each ends with one clear message and its exit code, and can be gone on with.

Where a moment matters, the fault is dealt by the process itself at that very moment: a few lines that it runs first
(`before`) put it there. The processes, signals, disks and files are real.
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fork_server import QUICK
from harmed_runs import Place, at, check_whole, checkpoints, ended, intact, send, temporary

from vit_finetune.run import Run

pytestmark = pytest.mark.slow


# --------------------------------------------------------------------------- disks


@pytest.mark.distributed
def test_a_disk_that_fills_up_under_two_processes(
    place: Place, tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    """The first checkpoint has room, the second has not: one error, both processes end, the first is intact."""
    disk = small_disk("size=3m")
    run = Run(disk / "run")
    # 4.8 MB of weights; the optimizer takes twice that
    words = ["model.config.hidden_size=64", "model.config.num_hidden_layers=8"]  # 2 MB a checkpoint
    told = ended(place.train(run, *words, processes=2), [1, 1])
    assert "error: the disk is full" in told
    assert str(disk) in told
    assert "--resume" in told
    intact(run, 2)
    small_disk("size=32m")
    children = place.train(run, *words, processes=2)
    assert [child.wait() for child in children] == [0, 0], children[0].stderr
    assert "checkpoint-2" in children[0].stderr
    assert not temporary(run)


def test_a_folder_that_becomes_read_only_while_training(
    place: Place, whole: Run, tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("size=64m")
    run = Run(disk / "run")
    # A read-only view of the disk over itself: it cannot become read-only where a file is open, such as the lock.
    mounts = [["mount", "--bind", str(disk), str(disk)], ["mount", "-o", "remount,bind,ro", str(disk)]]
    shut = f"[subprocess.run(words, check=True) for words in {mounts!r}]"
    told = ended(place.train(run, before=at(shut, step=5)), [1])
    assert f"error: {run.path}" in told
    assert "ead-only" in told
    assert "--resume" in told
    intact(run, 4)
    subprocess.run(["umount", str(disk)], check=True)
    place.finish(run, whole)


def test_a_folder_that_is_read_only_from_the_start(
    place: Place, tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("size=64m")
    small_disk("ro")
    run = Run(disk / "runs" / "run")
    told = ended(place.train(run), [1])
    assert f"error: {disk}" in told
    assert "read-only" in told
    assert "another folder" in told and "--resume" not in told


# --------------------------------------------------------------------------- images


def image_of(run: Run, split: str, photos: Path) -> Path:
    """The file of an image that is in a split."""
    with (run.splits / f"{split}.csv").open(newline="") as opened:
        return photos / next(csv.DictReader(opened))["id"]


@pytest.mark.parametrize(
    ("fault", "split", "workers", "processes"),
    [
        ("vanished", "train", 0, 1),
        ("truncated", "train", 2, 1),
        ("vanished", "validation", 2, 1),
        pytest.param("vanished", "train", 0, 2, marks=pytest.mark.distributed),
    ],
)
def test_an_image_that_changes_while_training(
    fault: str,
    split: str,
    workers: int,
    processes: int,
    place: Place,
    whole: Run,
    whole_of_two: Run,
    tmp_path: Path,
) -> None:
    run, file = Run(tmp_path / "run"), image_of(whole, split, place.photos)
    content, times = file.read_bytes(), file.stat()
    deed = (
        f"os.unlink({str(file)!r})"
        if fault == "vanished"
        else f"os.truncate({str(file)!r}, {len(content) // 2})"
    )
    words = [f"training.dataloader_num_workers={workers}"]
    try:
        children = place.train(run, *words, processes=processes, before=at(deed, step=3))
        told = ended(children, [1] * processes)
        said = next(line for line in told.splitlines() if "error: " in line)
        assert str(file) in said
        assert ("No such file" if fault == "vanished" else "truncated") in said
        newest = max(checkpoints(run))
        assert newest >= 2
        intact(run, newest)
        if (
            fault == "vanished" and split == "train" and processes == 1
        ):  # resumed without it, nothing is trained
            assert "cannot be resumed" in ended(place.train(run), [1])
            intact(run, newest)
    finally:
        file.write_bytes(content)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    place.finish(run, whole if processes == 1 else whole_of_two, *words, processes=processes)


# --------------------------------------------------------------------------- processes


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        ("opening.save_splits = kill", "starting from the beginning"),
        ("opening._save_augmented = kill", "starting from the beginning"),
        (
            "finetuning.shutil = types.SimpleNamespace(rmtree=kill)",
            "resuming from",
        ),  # model/ is there, but aside
        ("run.Path.replace = lambda *_: kill() if _[1].name == 'test.json' else rename(*_)", "resuming from"),
    ],
    ids=["splits", "pictures", "model", "report"],
)
def test_killed_before_the_first_step_and_after_the_last(
    deed: str, said: str, place: Place, whole: Run, tmp_path: Path
) -> None:
    """While the folder is being made it is a run already; what was written aside at the end does not stay."""
    before = f"""
import os, types
from vit_finetune import finetuning, opening, run
rename, kill = run.Path.replace, lambda *_, **__: os.kill(os.getpid(), 9)
{deed}
"""
    run = Run(tmp_path / "run")
    assert [child.wait() for child in place.train(run, before=before)] == [-9]
    assert run.exists()
    place.finish(run, whole, said=said)


def test_a_loader_process_that_is_killed(place: Place, whole: Run, tmp_path: Path) -> None:
    """What the kernel does where memory runs out."""
    run = Run(tmp_path / "run")
    kill = "psutil.Process().children()[0].kill()"
    words = ["training.dataloader_num_workers=2", "training.dataloader_persistent_workers=true"]
    told = ended(place.train(run, *words, before=at(kill, step=3)), [1])
    assert "error: a loader process was killed" in told
    assert "training.dataloader_num_workers" in told
    newest = max(checkpoints(run))
    intact(run, newest)
    place.finish(run, whole, *words)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("method", "killed", "launcher"),
    [
        ("training_step", 1, True),
        ("training_step", 0, False),
        ("prediction_step", 0, True),
        ("_save_optimizer_and_scheduler", 0, True),
    ],
)
def test_a_peer_that_is_killed(
    method: str, killed: int, launcher: bool, place: Place, whole_of_two: Run, tmp_path: Path
) -> None:
    """In a step, an evaluation, or while a checkpoint is being written: the other one says so and ends."""
    run = Run(tmp_path / "run")
    step = 7 if method == "training_step" else 6
    before = at(send(signal.SIGKILL), step=step, rank=killed, method=method)
    children = place.train(run, "training.ddp_timeout=300", processes=2, before=before, launcher=launcher)
    told = ended(children, [-9, 1] if killed == 0 else [1, -9])
    assert f"{'' if killed else 'process 1: '}error: another process of this run" in told
    assert "frame #" not in told, "what C++ says of it"
    assert "--resume" in told
    found = checkpoints(run)
    newest = 6 if method == "training_step" else 4
    assert max(found) == newest
    assert f"checkpoint-{newest}" in told
    for path in found.values():
        check_whole(path)
    if method == "training_step":
        place.finish(run, whole_of_two, processes=2)


@pytest.mark.distributed
def test_a_peer_that_is_killed_under_a_launcher(place: Place, whole_of_two: Run, tmp_path: Path) -> None:
    """torchrun notices, too, and sends SIGTERM to the others: whoever is first, all end and the cause is said."""
    run, script = Run(tmp_path / "run"), tmp_path / "train.py"
    kill = at(send(signal.SIGKILL), step=7, rank=1)
    script.write_text(f"{QUICK}\n{kill}\nfrom vit_finetune.cli import main\nmain()\n")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--redirects=3"]
    done = subprocess.run(
        [sys.executable, *launcher, f"--log-dir={tmp_path}", script, "train", place.write_recipe(run, 2)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "VIT_FINETUNE_CACHE": str(place.folder / "cache")},
    )
    assert done.returncode == 1
    assert "exitcode  : -9" in done.stderr  # the launcher says who was first
    told = next(tmp_path.rglob("0/stderr.log")).read_text()
    assert "Traceback" not in told
    assert "frame #" not in told
    assert "--resume" in told
    intact(run, 6)
    place.finish(run, whole_of_two, processes=2)


# --------------------------------------------------------------------------- numbers


POISON = "next(self.model.parameters()).data.fill_(float('nan'))"


@pytest.mark.parametrize(
    ("processes", "method", "newest"),
    [
        (1, "training_step", 4),
        pytest.param(2, "training_step", 4, marks=pytest.mark.distributed),
        (1, "_maybe_log_save_evaluate", 2),  # after a step whose loss was finite
    ],
)
def test_a_weight_that_is_no_number(
    processes: int, method: str, newest: int, place: Place, tmp_path: Path
) -> None:
    """In one of the processes: all of them end, and no checkpoint keeps it."""
    run = Run(tmp_path / "run")
    words = ["training.eval_strategy=no", "training.load_best_model_at_end=false"]
    before = at(POISON, step=4, method=method, rank=processes - 1)
    told = ended(place.train(run, *words, processes=processes, before=before), [1] * processes)
    assert "training diverged" in told
    assert "training.learning_rate" in told
    intact(run, newest)


def test_a_learning_rate_that_diverges(place: Place, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    told = ended(place.train(run, "training.learning_rate=1e30", "training.max_grad_norm=0"), [1])
    assert "error: training diverged" in told
    assert "training.learning_rate" in told
    intact(run, 0)
    assert not run.model.exists()
