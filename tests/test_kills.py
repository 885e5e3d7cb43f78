"""Killed at any moment, a run loses at most the steps since its last checkpoint: resumed, it ends the same, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from conftest import draw_folder, tiny_recipe
from fork_server import QUICK, Child, ForkServer, wait_for
from harmed_runs import check_same_end, check_whole, checkpoints, nameless, temporary

from vit_finetune.run import Run

EVERY = 3
"""Steps between two checkpoints; an epoch has five, so most lie inside one."""
STEPS = 20
# Large enough that writing a checkpoint takes a while.
MODEL = {
    "hidden_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "patch_size": 4,
    "image_size": 16,
    "hidden_dropout_prob": 0.2,
    "attention_probs_dropout_prob": 0.1,
}


@dataclass
class Killing:
    """Twenty kills, and what they hit."""

    forks: ForkServer
    folder: Path
    recipe: Path
    training_seconds: float = 0.0
    """From the first step to the last of the uninterrupted run, about."""
    saving_seconds: float = 0.0
    """That a checkpoint is being written."""
    hits: Counter[str] = field(default_factory=Counter)
    lives: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, run: Run, session: int, workers: int) -> Child:
        words = [f"training.output_dir={run.path}", f"training.dataloader_num_workers={workers}"]
        resume = ["--resume"] if session else []
        name = self.folder / f"{run.path.name}-session-{session}"
        cache = str(self.folder / "cache")
        return self.forks.start(
            name, "train", self.recipe, *words, *resume, before=QUICK, VIT_FINETUNE_CACHE=cache
        )

    def live(self, kinds: list[str], seed: int) -> None:
        """One run, killed as often as there are kinds of moments, and resumed each time."""
        chance = random.Random(seed)
        with self.lock:
            self.lives += 1
            run = Run(self.folder / f"run-{self.lives}")
        workers = chance.choice([0, 2])
        base, told = 0, []
        for session, kind in enumerate(kinds):
            child = self.begin(run, session, workers)
            hit = self.strike(child, run, kind, base, chance)
            told.append((kind, hit, f"{workers} workers", f"from step {base}"))
            ended_well = child.wait() == 0
            if not ended_well:
                assert child.wait() == -signal.SIGKILL, child.stderr
                base = self.look(run, child, base)
            with self.lock:
                self.hits[hit] += 1
            workers = 2 - workers
            if ended_well:  # it was faster than the kill, which has missed
                break
        else:
            child = self.begin(run, len(kinds), workers)
            assert child.wait() == 0, (told, child.stderr)
            expected = (
                f"resuming from {run.checkpoints / f'checkpoint-{base}'}" if base else "from the beginning"
            )
            assert expected in child.stderr, (told, child.stderr)
        assert "warning" not in child.stderr, (told, child.stderr)
        try:
            check_same_end(run, Run(self.folder / "whole"))
        except AssertionError as error:
            raise AssertionError(f"{run.path.name}, {told}: {error}") from error
        assert not temporary(run), told

    def strike(self, child: Child, run: Run, kind: str, base: int, chance: random.Random) -> str:
        """Kills a process at a moment of a kind; answers what was really hit."""
        begun = (lambda: "images per step" in child.stderr) if base else run.recipe.is_file
        wait_for(begun, child)
        if kind == "training":
            left = 1 - base / STEPS
            time.sleep(chance.uniform(0, left * self.training_seconds))
        else:
            saves = -(-(STEPS - base) // EVERY)
            self.wait_for_save(child, run, chance.randint(1, max(1, saves - 1)))
            time.sleep(chance.uniform(0, self.saving_seconds))
        child.signal(signal.SIGKILL)
        child.wait()
        if run.history.exists():
            return "missed"
        return "saving" if list(run.checkpoints.glob(".checkpoint-*")) else "training"

    def wait_for_save(self, child: Child, run: Run, number: int) -> None:
        """Returns as soon as something is being written, or removed, for that many times."""
        seen = set(run.checkpoints.glob(".checkpoint-*"))  # of the session before

        def count() -> bool:
            with suppress(FileNotFoundError):
                seen.update(run.checkpoints.glob(".checkpoint-*"))
            return len(seen) >= number + before or child.ended

        before = len(seen)
        wait_for(count, pause=0.001)

    def look(self, run: Run, child: Child, base: int) -> int:
        """What a kill left: all that is seen is whole, and nothing older than it must be.

        Answers the newest step that can be resumed from: of a checkpoint that lacked only its name, too.
        """
        found = checkpoints(run)
        for path in found.values():
            check_whole(path)
        newest = max(found, default=0)
        # An evaluation stands before each checkpoint: with the next one begun, the one before is written.
        evaluations = child.stderr.count("validation: ")
        assert newest >= min(STEPS, base + EVERY * (evaluations - 1)), child.stderr
        assert newest >= base
        return max(newest, *(int(path.name.split("-")[1].split(".")[0]) for path in nameless(run)), 0)


@pytest.mark.slow
def test_killed_at_twenty_moments_and_resumed_equals_uninterrupted(forks: ForkServer, tmp_path: Path) -> None:
    """10 moments of training and 10 of saving; some runs are killed twice, and resumed by other loader processes."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # shown where the test fails
    draw_folder(tmp_path / "photos")
    recipe = tiny_recipe(
        tmp_path / "photos",
        tmp_path / "run",
        model={"config": MODEL},
        augmentation={"policy": "trivialaugment", "random_erasing": 0.3},
        training={
            **{f"{what}_strategy": "steps" for what in ("save", "eval")},
            **{f"{what}_steps": EVERY for what in ("save", "eval")},
            "num_train_epochs": 4,
            "learning_rate": 3e-4,
            "label_smoothing_factor": 0.1,
            "logging_steps": 2,
            "save_total_limit": 2,
        },
    )
    (tmp_path / "tiny.yaml").write_text(recipe.to_yaml(resolved=False))
    killing = Killing(forks, tmp_path, tmp_path / "tiny.yaml")
    _measure(killing)
    chance = random.Random(seed)
    wanted = {"training": 10, "saving": 10}
    for _ in range(20):  # moments are missed: a process is faster than the kill that was meant for it
        missing = [kind for kind, count in wanted.items() for _ in range(count - killing.hits[kind])]
        if not missing:
            break
        chance.shuffle(missing)
        twice = missing[: len(missing) // 5 * 2]
        plans = [twice[at : at + 2] for at in range(0, len(twice), 2)] + [[k] for k in missing[len(twice) :]]
        with ThreadPoolExecutor(2) as two:
            list(two.map(killing.live, plans, [chance.getrandbits(32) for _ in plans]))
    print(killing.hits, f"{killing.lives} runs")
    assert all(killing.hits[kind] >= count for kind, count in wanted.items()), killing.hits
    wait_for(lambda: not _left_over(forks), timeout=30)


def _measure(killing: Killing) -> None:
    """Runs without a kill, to compare with, and to know how long training and saving take."""
    run = Run(killing.folder / "whole")
    child = killing.begin(run, 0, 0)
    wait_for(run.recipe.is_file, child)
    start, saves, since = time.monotonic(), [], None
    while not run.history.exists() and not child.ended:
        is_saving = bool(list(run.checkpoints.glob(".checkpoint-*.partial")))
        if is_saving and since is None:
            since = time.monotonic()
        elif not is_saving and since is not None:
            saves.append(time.monotonic() - since)
            since = None
        time.sleep(0.001)
    killing.training_seconds = time.monotonic() - start
    assert child.wait() == 0, child.stderr
    assert not temporary(run)
    assert max(checkpoints(run)) == STEPS
    assert saves, "no checkpoint was seen being written"
    killing.saving_seconds = statistics.median(saves)
    print(f"training {killing.training_seconds:.2f} s, saving {killing.saving_seconds:.3f} s")


def _left_over(forks: ForkServer) -> list[int]:
    """Loader processes of runs that were killed: they have to notice by themselves."""
    left = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) in forks.ended:
                left.append(process.pid)
    return left
