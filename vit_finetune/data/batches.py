"""Which images make up the batches of an epoch, in which process; and the loader processes that read them."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from vit_finetune.data.augmentation import generator_of
from vit_finetune.data.transforms import NO_IMAGE, TrainingIndex
from vit_finetune.run import STOPPING, RunError


class EpochSampler(Sampler[TrainingIndex]):
    """Every image once an epoch, or every class as often as another, as (seed, epoch) alone decide.

    Args:
        size: number of images, and of what an epoch draws.
        seed: of the order.
        labels: class id of each image, where the classes are to be balanced by `draw_balanced`.
        repeats: how many times `repeat_nearby` lets each image be read, of so many fewer.
    """

    def __init__(self, size: int, seed: int, labels: Sequence[int] | None = None, repeats: int = 1) -> None:
        self.size, self.seed, self.epoch, self.repeats = size, seed, 0, repeats
        self.labels = None if labels is None else torch.tensor(labels)

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, by accelerate and by the Trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[TrainingIndex]:
        # Seeds of consecutive epochs must not meet those of consecutive seeds.
        generator = torch.Generator().manual_seed(generator_of(self.seed, self.epoch, -1).getrandbits(63))
        if self.labels is not None:
            rows, repeats = draw_balanced(self.labels, generator)
            yield from map(TrainingIndex, repeat(self.epoch), rows.tolist(), repeats.tolist())
            return
        rows = torch.randperm(self.size, generator=generator)
        if self.repeats > 1:
            rows, repeats = repeat_nearby(rows, self.repeats)
            yield from map(TrainingIndex, repeat(self.epoch), rows.tolist(), repeats.tolist())
            return
        for index in rows.tolist():
            yield TrainingIndex(self.epoch, index)


def draw_balanced(labels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """As many images as there are, each class as often as another: rows, and how often each came before.

    Class-balanced sampling (Kang et al., 2020), as evenly as it goes: of a class that has more images than
    its share, that many different ones are drawn; of another all, and all again until the share is full.
    Shares differ by at most one image. Classes without an image have none.

    Args:
        labels: class id of each image, int64 `(images,)`.
        generator: what is drawn from.

    Returns:
        Two int64 tensors `(images,)`, in the order of the epoch.
    """
    counts = labels.bincount()
    members = [rows for rows in torch.split(labels.argsort(stable=True), counts.tolist()) if len(rows)]
    share, rest = divmod(len(labels), len(members))
    larger = set(torch.randperm(len(members), generator=generator)[:rest].tolist())
    drawn, repeats = [], []
    for number, rows in enumerate(members):
        size = share + (number in larger)
        rounds = -(-size // len(rows))
        shuffled = [rows[torch.randperm(len(rows), generator=generator)] for _ in range(rounds)]
        drawn.append(torch.cat(shuffled)[:size])
        repeats.append(torch.arange(size) // len(rows))
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat(drawn)[order], torch.cat(repeats)[order]


APART = 8
"""Images that lie at least between an image and its repetition, where there are as many."""


def repeat_nearby(rows: torch.Tensor, times: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first of the rows, each so many times: as many rows as before, and how often each came already.

    Repeated augmentation (Hoffer et al., 2020; Berman et al., 2019): 8 to 15 images, the same again, and so
    on, and then the next. A batch of 32 has most of an image's readings; that none lies beside another of its
    own keeps MixUp, which mixes neighbours, from mixing an image with itself.

    Args:
        rows: in the order of an epoch, int64 `(images,)`.
        times: at least 1.

    Returns:
        Two int64 tensors `(images,)`.
    """
    first = rows[: -(-len(rows) // times)]
    blocks = first.tensor_split(max(1, len(first) // APART))
    drawn = torch.cat([block.repeat(times) for block in blocks])
    repeats = torch.cat([torch.arange(times).repeat_interleave(len(block)) for block in blocks])
    return drawn[: len(rows)], repeats[: len(rows)]


class StepBatches(Sampler[list[TrainingIndex]]):
    """The batches of one process: whoever they are divided over, a step trains on the same images.

    All processes take one batch each of every `processes * batch_size` images of the epoch's order. Of the
    epoch's last, some get fewer images or none; those get a `NO_IMAGE`, so that none waits for another.

    Args:
        sampler: the epoch's order.
        batch_size: images per batch.
        processes: how many train together.
        rank: of this process among them.
    """

    def __init__(self, sampler: EpochSampler, batch_size: int, processes: int = 1, rank: int = 0) -> None:
        self.sampler, self.batch_size, self.processes, self.rank = sampler, batch_size, processes, rank

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, by the Trainer."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self.sampler) // (self.processes * self.batch_size))

    def __iter__(self) -> Iterator[list[TrainingIndex]]:
        order = list(self.sampler)
        for number in range(len(self)):
            start = (number * self.processes + self.rank) * self.batch_size
            batch = order[start : start + self.batch_size]
            yield batch or [TrainingIndex(self.sampler.epoch, NO_IMAGE)]


class EpochLoader(DataLoader[Any]):
    """A loader whose batches depend on the epoch: it passes the epoch's number on to its batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def outlive_signals(worker: int) -> None:
    """For loader processes (`worker_init_fn`): leaves what a signal means to the process they load for.

    Ctrl-C and a cluster's SIGTERM go to the whole group of processes; a loader process that died of it would
    take the checkpoint with it. Only what its own parent sends ends it.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)

    def wait() -> None:
        while signal.sigwaitinfo(STOPPING).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def naming_loader_errors() -> Iterator[None]:
    """A block in which errors of loader processes are said as if they had happened here.

    Raises:
        RunError: what a loader process met, without torch's two tracebacks around it; or that one was killed.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, RunError) and text.startswith("Caught RunError in DataLoader worker"):
            raise RunError(text.rpartition("RunError: ")[2].strip()) from None
        if re.search(r"DataLoader worker .*(killed by signal|exited unexpectedly)", text):
            cause = "shared memory (/dev/shm) is full" if "Bus error" in text else "memory ran out"
            raise RunError(
                f"a loader process was killed, most likely because {cause}. Lower "
                f"training.dataloader_num_workers, and go on with --resume"
            ) from error
        raise
