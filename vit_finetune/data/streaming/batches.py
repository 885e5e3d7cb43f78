"""Batches of a streamed epoch: read, decoded and augmented in loader processes, equally many everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from transformers import BaseImageProcessor

from vit_finetune.console import warn
from vit_finetune.data.augmentation import generator_of
from vit_finetune.data.batches import EpochLoader, outlive_signals
from vit_finetune.data.images import EncodedImage, UnreadableImage
from vit_finetune.data.sources.shards import label_ids
from vit_finetune.data.streaming.prepared import TrainStream, refuse_unreadable
from vit_finetune.data.streaming.streams import Row
from vit_finetune.data.transforms import (
    NO_LABEL,
    TrainingIndex,
    build_augmentation,
    collate,
    filling,
    output_size,
    read_varied,
)
from vit_finetune.recipe import AugmentationConfig
from vit_finetune.run import RunError

Batch = dict[str, torch.Tensor]
"""`pixel_values`, uint8 `(batch, 3, height, width)`, and `labels`, int64 `(batch,)`."""


class StreamBatches(Dataset[Batch]):
    """The batches of a process, by `TrainingIndex`: the number of the epoch and of the batch in it.

    Read in order, as `StreamLoader` does, they come from one pass over the process's shards; from anywhere
    else, that pass is made again up to there, without decoding what lies before. All processes have equally
    many: one whose shards hold fewer images fills up with batches that hold none (`NO_LABEL`), so that none
    waits for another and every image counts once.

    Args:
        stream: the training images.
        image_processor: the model's.
        config: the recipe's section.
        seed: of order and augmentation.
        batch_size: images per batch.
        num_workers: loader processes; their number decides the order of a stream, so a resumed run keeps it.
        prefetch_factor: batches that each loader process keeps ready.
        pin_memory: for copies to an accelerator.
        processes: how many train together.
        rank: of this process among them.
        max_batches: how many batches to make where the source does not tell its number of images; the pass
            over the shards begins again as often as needed.

    Raises:
        RunError: fewer shards than processes, or no number of images and no `max_batches`.
    """

    def __init__(
        self,
        stream: TrainStream,
        image_processor: BaseImageProcessor,
        config: AugmentationConfig,
        seed: int,
        batch_size: int,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        pin_memory: bool = False,
        processes: int = 1,
        rank: int = 0,
        max_batches: int | None = None,
    ) -> None:
        num_shards = stream.stream.rows.num_shards
        if num_shards < processes:
            raise RunError(
                f"{num_shards} shards cannot be divided over {processes} processes; expected at least one "
                f"for each. Make more shards, start fewer processes, or leave out data.streaming"
            )
        self.batch_size, self.pin_memory, self.prefetch_factor = batch_size, pin_memory, prefetch_factor
        self.num_images = stream.num_images
        self.num_workers = min(num_workers, num_shards // processes)  # more would find no shard to read
        batches = count_batches(stream, batch_size, processes)
        self.endless = batches is None
        if batches is None and max_batches is None:
            raise RunError(
                "the source does not tell how many images it has, so the number of steps is not known; set "
                "training.max_steps"
            )
        self.length: int = batches or max_batches or 0
        self.images = _StreamedImages(stream, image_processor, config, seed, batch_size, rank, processes)
        self.size = output_size(image_processor)
        self.unreadable: dict[str, str] = {}
        """What is wrong with the images of this process that were left out, by name."""
        self.batches: Iterator[Batch] = iter(())
        self.next: TrainingIndex | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: TrainingIndex) -> Batch:
        if key != self.next:
            self.batches = rebatch(self._chunks(key), self.batch_size, key.row * self.batch_size)
        self.next = TrainingIndex(key.epoch, key.row + 1)
        batch = next(self.batches, None)
        return batch if batch is not None else collate([filling(self.size)])

    def _chunks(self, key: TrainingIndex) -> Iterator[Batch]:
        """What the loader processes make of the shards, in order; of what is skipped, the labels alone."""
        skip = key.row * self.batch_size
        for epoch in count() if self.endless else [key.epoch]:
            self.images.epoch, self.images.skip = epoch, skip
            loader = DataLoader(
                self.images,
                batch_size=None,
                num_workers=self.num_workers,
                prefetch_factor=self.prefetch_factor if self.num_workers else None,
                pin_memory=self.pin_memory,
                worker_init_fn=outlive_signals,
            )
            images = 0
            for chunk in loader:
                if "problem" in chunk:
                    raise RunError(chunk["problem"])
                for name, problem in chunk.pop("unreadable", {}).items():
                    if name not in self.unreadable:
                        warn(f"{name}: {problem}: left out")
                    self.unreadable[name] = problem
                images += len(chunk["labels"])
                yield chunk
            if not images:
                raise RunError(
                    "a process found no training images in its shards; make fewer and larger shards"
                )
            skip = max(0, skip - images)


def count_batches(stream: TrainStream, batch_size: int, processes: int) -> int | None:
    """Batches of a process in an epoch, the same for all; None where the images are not counted."""
    if stream.shard_sizes is not None:
        most = max(sum(stream.shard_sizes[rank::processes]) for rank in range(processes))
    elif processes == 1 and stream.num_images is not None:
        most = stream.num_images
    else:
        return None
    return max(1, -(-most // batch_size))


class _StreamedImages(IterableDataset[dict[str, Any]]):
    """Batches as one loader process makes them of its shards: all full but its last one.

    Before `skip` images of the process have passed, of what surely lies before, only the labels. An error is
    an item `problem`: torch would wrap an exception in two tracebacks.
    """

    def __init__(
        self,
        stream: TrainStream,
        image_processor: BaseImageProcessor,
        config: AugmentationConfig,
        seed: int,
        batch_size: int,
        rank: int,
        processes: int,
    ) -> None:
        self.stream, self.seed, self.batch_size = stream, seed, batch_size
        self.rank, self.processes = rank, processes
        self.augment = build_augmentation(config, image_processor)
        self.size = output_size(image_processor)
        self.ids = label_ids(stream.labels)
        self.epoch = self.skip = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        rows = self.stream.read(self.rank, self.processes, self.seed, self.epoch, number, workers)
        try:
            for chunk in count():
                some = list(islice(rows, self.batch_size))
                if not some:
                    break
                # The loader takes the workers in turn: no image of this chunk comes later than this in the
                # process's order, and earlier only where another worker has run out of images.
                latest = (chunk * workers + number + 1) * self.batch_size
                if latest <= self.skip:
                    yield {"labels": torch.full((len(some),), NO_LABEL)}
                else:
                    yield self._batch(some)
        except RunError as error:
            yield {"problem": str(error)}

    def _batch(self, rows: Sequence[Row]) -> dict[str, Any]:
        unreadable: dict[str, str] = {}
        items = []
        for row in rows:
            generator = generator_of(self.seed, self.epoch, row.key)
            try:
                image = read_varied(EncodedImage(row.encoded), self.augment, generator)
            except UnreadableImage as problem:
                if not self.stream.skips_unreadable:
                    raise refuse_unreadable(row, problem) from None
                unreadable[row.name] = str(problem)
                items.append(filling(self.size))
                continue
            items.append({"pixel_values": image, "labels": self.ids[row.label or ""]})
        return {**collate(items), "unreadable": unreadable}


def rebatch(chunks: Iterable[Batch], size: int, skip: int = 0) -> Iterator[Batch]:
    """The images of chunks of any size in batches of one size, only the last of which may be smaller.

    Args:
        chunks: in order; those that are skipped may lack pixel values.
        size: images per batch.
        skip: how many images to leave out at the beginning.
    """
    held: Batch | None = None
    for chunk in chunks:
        images = len(chunk["labels"])
        if skip >= images:
            skip -= images
            continue
        chunk = {name: values[skip:] for name, values in chunk.items()} if skip else chunk
        skip = 0
        held = {name: torch.cat([held[name], chunk[name]]) for name in chunk} if held else chunk
        while held and len(held["labels"]) >= size:
            if len(held["labels"]) == size:
                full, held = held, None
            else:
                full = {name: values[:size] for name, values in held.items()}
                held = {name: values[size:] for name, values in held.items()}
            yield full
    if held:
        yield held


class StreamLoader(EpochLoader):
    """The batches of an epoch, in order; the Trainer resumes it as it does any loader, by skipping indices.

    Args:
        batches: of this process.
    """

    def __init__(self, batches: StreamBatches) -> None:
        super().__init__(batches, batch_sampler=_BatchOrder(len(batches)), collate_fn=_only)


class _BatchOrder(Sampler[list[TrainingIndex]]):
    def __init__(self, length: int) -> None:
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[TrainingIndex]]:
        for number in range(self.length):
            yield [TrainingIndex(self.epoch, number)]


def _only(items: list[Batch]) -> Batch:
    (batch,) = items
    return batch
