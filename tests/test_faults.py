"""What happens to runs in the world: each ends with one clear message and its exit code, and can be gone on with.

Where a moment matters, the fault is dealt by the process itself at that very moment: a few lines that it runs first
(`before`) put it there. The processes, signals, disks and files are real.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import TINY_VIT, draw_folder, tiny_recipe
from fork_server import QUICK, Child, ForkServer, wait_for
from safetensors.torch import load_file
from test_kills import check_same_end, check_whole, checkpoints, temporary

from vit_finetune.run import Run

pytestmark = pytest.mark.slow

STEPS = 20
"""Five an epoch; a checkpoint after every second."""
MODEL = {**TINY_VIT, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.1}


@dataclass
class Place:
    """Where the runs of a test are, and what they should end with."""

    forks: ForkServer
    folder: Path
    photos: Path
    sessions: int = 0

    def train(
        self, run: Run, *words: object, processes: int = 1, before: str = "", launcher: bool = True
    ) -> list[Child]:
        """Starts `vit-finetune train`, in one process or several; resumes where the run is there already."""
        told = ["train", self.write_recipe(run, processes), *words, *(["--resume"] if run.exists() else [])]
        folder, before = self.folder / f"session-{self.sessions}", QUICK + before
        cache = {"VIT_FINETUNE_CACHE": str(self.folder / "cache")}
        if processes == 1:
            return [self.forks.start(folder, *told, before=before, **cache)]
        return self.forks.start_world(folder, processes, *told, before=before, launcher=launcher, **cache)

    def write_recipe(self, run: Run, processes: int) -> Path:
        """A recipe file for a run."""
        self.sessions += 1
        recipe = tiny_recipe(
            self.photos,
            run.path,
            model={"config": MODEL},
            augmentation={"policy": "trivialaugment", "random_erasing": 0.3},
            training={
                **{f"{what}_strategy": "steps" for what in ("save", "eval")},
                **{f"{what}_steps": 2 for what in ("save", "eval")},
                "num_train_epochs": 4,
                "per_device_train_batch_size": 4 // processes,
                "logging_steps": 3,
                "dataloader_num_workers": 0,
                "save_total_limit": 3,
            },
            evaluation={"batch_size": 2},
        )
        file = self.folder / f"session-{self.sessions}.yaml"
        file.write_text(recipe.to_yaml(resolved=False))
        return file

    def finish(
        self, run: Run, whole: Run, *words: object, processes: int = 1, said: str = "resuming from"
    ) -> str:
        """Resumes a run, which must end as the one without a fault did; answers what it said."""
        children = self.train(run, *words, processes=processes)
        assert [child.wait() for child in children] == [0] * processes, "\n".join(c.stderr for c in children)
        told = children[0].stderr
        assert said in told, told
        check_same_end(run, whole)
        assert not [path for path in temporary(run) if path.suffix != ".damaged"]
        return told


def ended(children: Sequence[Child], codes: Sequence[int], errors: int = 1) -> str:
    """What processes said together; makes sure of how they ended, and that only so many of them complained."""
    assert [child.wait() for child in children] == list(codes), "\n---\n".join(
        child.stderr for child in children
    )
    told = "".join(child.stderr for child in children)
    assert "Traceback" not in told, told
    assert "Warning" not in told, told
    assert "--debug" not in told, f"an error that nobody foresaw:\n{told}"
    assert len(re.findall(r"^(?:process \d+: )?error: ", told, re.MULTILINE)) == errors, told
    return told


def intact(run: Run, newest: int) -> None:
    """Makes sure that the newest checkpoint is that of a step, and all of them whole and of finite numbers."""
    found = checkpoints(run)
    assert max(found, default=0) == newest
    for path in found.values():
        check_whole(path)
        assert all(torch.isfinite(value).all() for value in load_file(path / "model.safetensors").values())
    assert not temporary(run)


def at(what: str, *, step: int, method: str = "training_step", rank: int = 0, also: str = "") -> str:
    """Source that does something in a process, once, when a method of the trainer is called at a step.

    Args:
        what: to do, Python source in which `self` is the trainer.
        step: that many steps are done then.
        method: which is called.
        rank: of the process that does it; -1 for all.
        also: done at every call.
    """
    return f"""
import os, pathlib, signal, subprocess, sys, time
import psutil, torch
from vit_finetune.training.trainer import ViTTrainer
plain, done = ViTTrainer.{method}, []
def changed(self, *args, **kwargs):
    {also or "pass"}
    if self.state.global_step == {step} and {rank} in (-1, self.args.process_index) and not done:
        done.append(1)
        {what}
    return plain(self, *args, **kwargs)
ViTTrainer.{method} = changed
"""


def send(number: int) -> str:
    return f"os.kill(os.getpid(), {int(number)})"


@pytest.fixture(scope="module")
def place(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("faults")
    return Place(forks, folder, draw_folder(folder / "photos"))


@pytest.fixture(scope="module")
def whole(place: Place) -> Run:
    """The run without a fault."""
    run = Run(place.folder / "whole")
    ended(place.train(run), [0], errors=0)
    return run


@pytest.fixture(scope="module")
def whole_of_two(place: Place) -> Run:
    """The run without a fault, of two processes."""
    run = Run(place.folder / "whole-of-two")
    ended(place.train(run, processes=2), [0, 0], errors=0)
    return run


# --------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)],
    ids=["TERM", "USR1", "INT"],
)
def test_a_signal_while_training(number: int, code: int, place: Place, whole: Run, tmp_path: Path) -> None:
    """In the seventh step, from outside: a checkpoint after that step, then the end."""
    run = Run(tmp_path / "run")
    # A step in which there is time for somebody else to send a signal.
    children = place.train(
        run, before=at("sys.stderr.write('NOW'); sys.stderr.flush(); time.sleep(0.3)", step=6)
    )
    wait_for(lambda: "NOW" in children[0].stderr, children[0])
    children[0].signal(number)
    told = ended(children, [code], errors=0)
    assert "stopped at step 7 of 20, checkpoint kept. Go on with: vit-finetune train" in told
    assert "--resume" in told
    intact(run, 7)
    place.finish(run, whole, said=f"resuming from {run.checkpoints / 'checkpoint-7'}")


def test_the_same_ctrl_c_handed_on_twice_is_one(place: Place, whole: Run, tmp_path: Path) -> None:
    """Terminals send it to launcher and process alike, and the launcher hands it on."""
    run = Run(tmp_path / "run")
    ended(
        place.train(run, before=at(f"{send(signal.SIGINT)}; {send(signal.SIGINT)}", step=6)), [130], errors=0
    )
    intact(run, 7)


def test_ctrl_c_twice_stops_at_once(place: Place, whole: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    children = place.train(
        run, before=at("sys.stderr.write('NOW'); sys.stderr.flush(); time.sleep(600)", step=7)
    )
    wait_for(lambda: "NOW" in children[0].stderr, children[0])
    children[0].signal(signal.SIGINT)
    wait_for(lambda: "Ctrl-C again stops at once" in children[0].stderr, children[0])
    assert not children[0].ended
    time.sleep(1.2)  # sooner, it is taken for the first one, handed on
    children[0].signal(signal.SIGINT)
    told = ended(children, [130], errors=0)
    assert "--resume" in told
    intact(run, 6)
    place.finish(run, whole)


@pytest.mark.parametrize("step", [6, 20])
def test_a_signal_while_evaluating(step: int, place: Place, whole: Run, tmp_path: Path) -> None:
    """The evaluation is broken off, not waited for; also the last one. The resumed run makes it."""
    run = Run(tmp_path / "run")
    counted = f"open('batches', 'a').write('x') if self.state.global_step == {step} else None"
    children = place.train(
        run, before=at(send(signal.SIGTERM), step=step, method="prediction_step", also=counted)
    )
    ended(children, [75], errors=0)
    assert len((children[0].folder / "batches").read_text()) <= 2, "of five"
    intact(run, step)
    assert not (run.model / "model.safetensors").exists()
    place.finish(run, whole)


SIGNALLED = f"""
import os, time
from vit_finetune import finetuning
plain = finetuning.{{function}}
def stopped(*args, **kwargs):
    {send(signal.SIGTERM)}
    time.sleep(60)
    return plain(*args, **kwargs)
finetuning.{{function}} = stopped
"""
"""Source with which a process gets SIGTERM in a function of `finetuning`, whose name is to be filled in."""


@pytest.mark.parametrize(
    ("function", "begun"),
    [("prepare_data", False), ("ViTTrainer", True), ("_score", True), ("write_card", True)],
)
def test_a_signal_before_the_first_step_and_after_the_last(
    function: str, begun: bool, place: Place, whole: Run, tmp_path: Path
) -> None:
    """While there is nothing to keep, or all is kept already, it ends at once."""
    run = Run(tmp_path / "run")
    before = SIGNALLED.format(function=function)
    told = ended(place.train(run, before=before), [75], errors=0)
    assert "SIGTERM" in told
    assert "--resume" in told
    assert run.exists() == begun
    if not begun:
        assert not run.path.exists()
    place.finish(
        run, whole, said="" if not begun else "starting from" if function == "ViTTrainer" else "resuming"
    )


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["training_step", "prediction_step"])
def test_a_signal_to_one_of_two_processes(
    method: str, place: Place, whole_of_two: Run, tmp_path: Path
) -> None:
    """Both stop at the same step, whichever got it."""
    run = Run(tmp_path / "run")
    children = place.train(run, processes=2, before=at(send(signal.SIGUSR1), step=6, rank=1, method=method))
    told = ended(children, [75, 75], errors=0)
    stopped = 7 if method == "training_step" else 6
    assert f"stopped at step {stopped} of 20, checkpoint kept" in told
    intact(run, stopped)
    place.finish(run, whole_of_two, processes=2)


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
    shut = f"subprocess.run(['mount', '-o', 'remount,ro', {str(disk)!r}], check=True)"
    told = ended(place.train(run, before=at(shut, step=5)), [1])
    assert f"error: {run.path}" in told
    assert "ead-only" in told
    assert "--resume" in told
    intact(run, 4)
    small_disk("rw")
    place.finish(run, whole)


def test_a_folder_that_is_read_only_from_the_start(
    place: Place, tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("size=64m")
    small_disk("ro")
    run = Run(disk / "runs" / "run")
    told = ended(place.train(run), [1])
    assert f"error: {disk}" in told
    assert "ead-only" in told
    assert "another folder" in told


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
        ("finetuning.save_splits = kill", "starting from the beginning"),
        ("finetuning._save_augmented = kill", "starting from the beginning"),
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
from vit_finetune import finetuning, run
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


# --------------------------------------------------------------------------- damaged checkpoints


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


def flip(file: Path) -> None:
    """Changes one bit in the middle, as disks do."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


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
        at(send(signal.SIGTERM), step=13) if when == "while training" else SIGNALLED.format(function="_score")
    )
    ended(place.train(run, before=stop), [75], errors=0)
    moved = Run(run.path.rename(tmp_path / "moved"))
    shutil.copytree(stopped.path, tmp_path / "run")
    for path in checkpoints(run).values():
        flip(path / "model.safetensors")
    place.finish(moved, whole)
