"""A streamed source, ready to train on: validation and test held, training images read as they are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from random import Random
from typing import Any

import datasets
import pyarrow as pa

from vit_finetune.data.augmentation import generator_of
from vit_finetune.data.checkup.checkup import Checkup, raise_errors, require_images, without_unreadable
from vit_finetune.data.checkup.image_findings import find_odd_images, find_unreadable, gather_images
from vit_finetune.data.checkup.readings import read_images
from vit_finetune.data.checkup.set_findings import describe_listing
from vit_finetune.data.images import UnreadableImage, decode_image
from vit_finetune.data.sources.columns import Source, build_dataset, common_labels
from vit_finetune.data.sources.folders import first_of
from vit_finetune.data.sources.shards import class_id, label_ids, number_labels
from vit_finetune.data.splits.leaks import drop_leaks
from vit_finetune.data.splits.prepared import PreparedData, describe_origins, prepare_splits
from vit_finetune.data.streaming.streams import READ_ROWS, Carving, Origin, Row, Stream, open_source
from vit_finetune.data.streaming.survey import Survey, take_survey
from vit_finetune.recipe import DataConfig
from vit_finetune.run import RunError

MIXED_ROWS = 10 * READ_ROWS
"""Rows that `datasets` mixes: those of the ten shards that it reads in turn. The larger buffer is ours: its
own holds images twice, and no more than 2 GiB of them (Arrow's offsets)."""


@dataclass(frozen=True)
class TrainStream:
    """The training images of a streamed source: what is left of a train split when others are carved out."""

    stream: Stream
    carving: Carving
    labels: list[str]
    shard_sizes: list[int] | None
    """Training images in each shard, where they were counted."""
    num_images: int | None
    """Of all shards, where it is known."""
    fingerprint: str
    shuffle_buffer: int
    skips_unreadable: bool

    def read(
        self, rank: int, processes: int, seed: int, epoch: int, worker: int = 0, workers: int = 1
    ) -> Iterator[Row]:
        """A loader process's training images of an epoch, undecoded, in an order that (seed, epoch) decides.

        A process keeps its shards through all epochs, so that its epochs have one length. Their order
        changes, and with it which loader process reads which; several are read in turn, and their images are
        mixed within the buffer.

        Args:
            rank: of the process among those that train.
            processes: how many train.
            seed: of the order.
            epoch: counted from 0.
            worker: the process's loader process.
            workers: how many it has, at most one for each of its shards.
        """
        generator = generator_of(seed, epoch, -1)
        shards = self.stream.shard(rank, processes).shuffle(
            seed=generator.getrandbits(63), buffer_size=min(self.shuffle_buffer, MIXED_ROWS)
        )
        shards = shards.shard(num_shards=workers, index=worker, contiguous=False)
        return shuffled(self._training_rows(self.stream.read(shards)), self.shuffle_buffer, generator)

    def _is_readable(self, row: Row) -> bool:
        try:
            decode_image(row.encoded)
        except UnreadableImage as problem:
            if not self.skips_unreadable:
                raise refuse_unreadable(row, problem) from None
            return False
        return True

    def _training_rows(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            if row.label is not None and self.carving.split_of(row.key) == "train":
                yield row

    def head(self, count: int) -> datasets.Dataset:
        """The first training images that can be read, held: columns id, image and label.

        Raises:
            RunError: one cannot be read, and is not to be skipped.
        """
        rows = list(islice(filter(self._is_readable, self._training_rows(self.stream.read())), count))
        images = pa.StructArray.from_arrays(
            [pa.array([row.encoded for row in rows], pa.binary()), pa.nulls(len(rows), pa.string())],
            names=["bytes", "path"],
        )
        ids = label_ids(self.labels)
        return build_dataset(
            [row.name for row in rows], images, [ids[row.label or ""] for row in rows], self.labels
        )


def refuse_unreadable(row: Row, problem: UnreadableImage) -> RunError:
    """What stops a stream at an image that cannot be decoded."""
    return RunError(
        f"{row.name}: cannot be read: {problem}. Repair or remove it, or leave out what cannot be read with "
        f"data.on_unreadable=skip"
    )


def shuffled(rows: Iterator[Row], size: int, generator: Random) -> Iterator[Row]:
    """The same rows, each taken at random from the `size` that wait."""
    waiting: list[Row] = []
    for row in rows:
        if len(waiting) < size:
            waiting.append(row)
            continue
        place = generator.randrange(size)
        yield waiting[place]
        waiting[place] = row
    generator.shuffle(waiting)
    yield from waiting


@dataclass
class PreparedStream(PreparedData):
    """Validation and test, held and checked as those of any source, and a stream of training images."""

    train: TrainStream = field(kw_only=True)

    def describe(self, path: str) -> dict[str, Any]:
        """Counts, fingerprints (of train, the shards') and what was left out, for the provenance."""
        facts = super().describe(path)
        counted = {} if self.train.num_images is None else {"num_images": self.train.num_images}
        train = counted | {
            "fingerprint": f"shards:sha256:{self.train.fingerprint}",
            "origin": self.origins["train"],
        }
        return facts | {"streaming": True, "splits": {"train": train} | facts["splits"]}


def prepare_data(config: DataConfig) -> PreparedData:
    """The splits of a data source, ready to train and score: held, or with the training images streamed.

    Raises:
        RunError: as `prepare_splits` and `prepare_stream`.
    """
    return prepare_stream(config) if config.streaming else prepare_splits(config)


def prepare_stream(config: DataConfig) -> PreparedStream:
    """Validation and test copied out of a stream and checked, and the training images as a stream.

    The copies lie in the cache: carved splits would otherwise need all shards read at every evaluation.

    Raises:
        RunError: a source that cannot be streamed, no labels, one class only, class lists that differ between
            splits, too few images to carve from, or unreadable images where `data.on_unreadable` is `stop`.
    """
    origin = open_source(config)
    carving = Carving(config.split_seed, _shares(origin, config))
    survey = take_survey(origin, carving, config)
    labels = _labels(origin, survey, config)
    held = {
        split: number_labels(dataset, labels, config.path)
        for split, dataset in survey.held.items()
        if len(dataset)
    }
    notices = [*origin.notices]
    for split in survey.held:
        if split not in held:
            if split == "validation":
                raise RunError(f"{config.path}: there are no labelled images to validate on; found none")
            notices.append(f"{split} has no labelled images: left out")
    source = Source(origin.kind, held, labels, notices + _missing_classes(held, survey, labels))
    checked = _check_held(source, config)
    sizes = survey.shard_sizes
    train = TrainStream(
        origin.streams["train"],
        carving,
        labels,
        sizes,
        origin.num_images if sizes is None else sum(sizes),
        hashlib.sha256(f"{origin.fingerprint}|{carving}".encode()).hexdigest(),
        config.shuffle_buffer,
        config.on_unreadable == "skip",
    )
    splits = datasets.DatasetDict(
        {split: checked.source.splits[split] for split in ("validation", "test") if split in held}
    )
    origins = describe_origins(["train", *splits], carving.shares)
    return PreparedStream(
        origin.kind, splits, labels, checked.document(config), origins, origin.revision, train=train
    )


def _check_held(source: Source, config: DataConfig) -> Checkup:
    """Validation and test without what cannot be read; of the training images nothing is known yet."""
    num_images = {split: len(dataset) for split, dataset in source.splits.items()}
    readings = read_images(source, config)
    images = gather_images(source, readings)
    findings = [
        *find_unreadable(images, config.on_unreadable == "skip"),
        *find_odd_images(images),
        *describe_listing(source.notices),
    ]
    raise_errors(findings, config)
    source = without_unreadable(source, readings)
    require_images(source, config)
    splits, leaks = drop_leaks(source.splits)
    return Checkup(replace(source, splits=splits), [*findings, *describe_listing(leaks)], num_images)


def _missing_classes(held: dict[str, datasets.Dataset], survey: Survey, labels: list[str]) -> list[str]:
    """A sentence for each split in which some class has no image."""
    ids = label_ids(labels)
    present = {split: set(dataset.unique("label")) for split, dataset in held.items()}
    if survey.classes is not None:
        present["train"] = {ids[label] for label in survey.classes}
    absent = {
        split: [labels[n] for n in range(len(labels)) if n not in found] for split, found in present.items()
    }
    return [f"{split} has no image of {first_of(names, 8)}" for split, names in absent.items() if names]


def _shares(origin: Origin, config: DataConfig) -> dict[str, float]:
    wanted = {"validation": config.validation_fraction, "test": config.test_fraction}
    shares = {split: share for split, share in wanted.items() if split not in origin.streams and share > 0}
    if "validation" not in {*origin.streams, *shares}:
        raise RunError(
            "there are no validation images to choose the best checkpoint by: set data.validation_fraction "
            "above 0"
        )
    return shares


def _labels(origin: Origin, survey: Survey, config: DataConfig) -> list[str]:
    """Class names in id order: the source's own, or the labels of the training images in natural order."""
    if origin.names is not None:
        ids = label_ids(origin.names)
        for label in survey.classes or ():
            class_id(label, ids, config.path)
        return origin.names
    assert survey.classes is not None  # a survey reads the training images where nothing else tells the names
    classes = {"train": set(survey.classes)} | {
        split: set(dataset.unique("label")) for split, dataset in survey.held.items()
    }
    return common_labels(config.path, classes)
