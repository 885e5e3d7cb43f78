"""Runs that something happens to: how they are started, harmed at a chosen moment, and compared with a run unharmed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import TINY_VIT, tiny_recipe
from fork_server import QUICK, Child, ForkServer
from safetensors.torch import load_file

from vit_finetune.run import Run

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


SHARING = re.compile(
    r"Traceback \(most recent call last\):\n(?:  .*multiprocessing/resource_sharer\.py.*\n)(?:  .*\n)*\w*Error.*\n"
)
"""What a thread of multiprocessing's says in a loader process that was just handing over a batch when the process at
the other end died: nothing that the product could keep back."""


def ended(children: Sequence[Child], codes: Sequence[int], errors: int = 1) -> str:
    """What processes said together; makes sure of how they ended, and that only so many of them complained."""
    assert [child.wait() for child in children] == list(codes), "\n---\n".join(
        child.stderr for child in children
    )
    told = SHARING.sub("", "".join(child.stderr for child in children))
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
    assert not temporary(run, lock=False)


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


def flip(file: Path) -> None:
    """Changes one bit in the middle, as disks do."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


SIGNALLED = f"""
import os, time
from vit_finetune import finetuning
plain = finetuning.{{function}}
def stopped(*args, **kwargs):
    {send(15)}
    time.sleep(60)
    return plain(*args, **kwargs)
finetuning.{{function}} = stopped
"""
"""Source with which a process gets SIGTERM in a function of `finetuning`, whose name is to be filled in."""


# --------------------------------------------------------------------------- what must hold of them


def checkpoints(run: Run) -> dict[int, Path]:
    """The checkpoints that can be seen, by step."""
    found = run.checkpoints.glob("checkpoint-*")
    return {int(path.name.removeprefix("checkpoint-")): path for path in found if path.name[11:].isdigit()}


def nameless(run: Run) -> list[Path]:
    """Checkpoints that were written to their end, and killed before they got their name."""
    found = []
    for path in run.checkpoints.glob(".checkpoint-*.partial"):
        with suppress(AssertionError, OSError, ValueError):
            check_whole(path)
            found.append(path)
    return found


def check_whole(checkpoint: Path) -> None:
    """Makes sure, without the package, that a checkpoint holds exactly what was written."""
    sums = json.loads((checkpoint / "checksums.json").read_text())
    files = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert files == {*sums, "checksums.json"}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= set(sums)
    for name, told in sums.items():
        content = (checkpoint / name).read_bytes()
        assert told == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}, (
            checkpoint,
            name,
        )


def check_same_end(run: Run, whole: Run) -> None:
    """Makes sure that two runs ended with the same weights, optimizer, scores and losses."""
    model = "model.safetensors"
    assert (run.model / model).read_bytes() == (whole.model / model).read_bytes()
    assert run.report("test").read_text() == whole.report("test").read_text()
    mine, theirs = checkpoints(run), checkpoints(whole)
    assert max(mine) == max(theirs)
    last, other = mine[max(mine)], theirs[max(theirs)]
    assert (last / model).read_bytes() == (other / model).read_bytes()
    for name in ("optimizer.pt", "scheduler.pt"):
        _same(torch.load(last / name), torch.load(other / name))
    state, expected = (json.loads((path / "trainer_state.json").read_text()) for path in (last, other))
    assert state["best_global_step"] == expected["best_global_step"]
    timeless = ("runtime", "per_second")
    logs = [
        [
            {key: value for key, value in line.items() if not key.endswith(timeless)}
            for line in told["log_history"]
        ]
        for told in (state, expected)
    ]
    assert logs[0] == logs[1]


def _same(left: Any, right: Any) -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            _same(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            _same(*pair)
    else:
        assert left == right


def temporary(run: Run, lock: bool = True) -> list[Path]:
    """What a run that ended well must not leave behind; the lock may lie on where the disk became read-only."""
    return [
        p
        for p in run.path.rglob("*")
        if (p.name.startswith((".", "tmp")) and (lock or p.name != ".lock"))
        or p.suffix in (".partial", ".damaged")
    ]
