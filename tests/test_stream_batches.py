"""The batches of a stream: the same images whatever the workers and processes, in an order that is decided."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_VIT
from drawn_streams import (
    SIZES,
    build,
    epoch_of,
    expected_images,
    images_in,
    prepare,
)
from shard_files import NAMES, write_tars

from vit_finetune.data.images import EncodedImage
from vit_finetune.data.streaming import batches as batches_module
from vit_finetune.data.streaming.batches import StreamLoader, rebatch
from vit_finetune.data.streaming.prepared import PreparedStream, shuffled
from vit_finetune.model.loading import load_model
from vit_finetune.recipe import ModelConfig

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_model(ModelConfig(config=TINY_VIT), NAMES)[1]


@pytest.fixture
def data(tmp_path: Path) -> PreparedStream:
    return prepare(write_tars(tmp_path / "shards", SIZES), shuffle_buffer=6)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_any_number_of_workers_gives_the_same_images(
    data: PreparedStream, processor: Any, workers: int
) -> None:
    batches = build(data, processor, num_workers=workers)
    for epoch in (0, 1):
        found = epoch_of(batches, epoch)
        assert Counter(images_in(found)) == expected_images(data, processor, epoch)
        sizes = [len(batch["labels"]) for batch in found]
        assert sizes[:-1] == [4] * (len(sizes) - 1) and sum(sizes) == data.train.num_images


def test_the_order_depends_on_seed_and_epoch(data: PreparedStream, processor: Any) -> None:
    labels = {
        epoch: [int(label) for batch in epoch_of(build(data, processor), epoch) for label in batch["labels"]]
        for epoch in (0, 1)
    }
    again = [int(label) for batch in epoch_of(build(data, processor), 0) for label in batch["labels"]]
    assert labels[0] == again != labels[1]
    order = [row.key for row in data.train.read(0, 1, 7, 0)]
    assert order != [row.key for row in data.train.read(0, 1, 8, 0)]
    in_shards = [
        row.key for row in data.train.stream.read() if data.train.carving.split_of(row.key) == "train"
    ]
    assert order != in_shards and sorted(order) == sorted(in_shards)


@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_divide_the_images_and_have_equally_many_batches(
    data: PreparedStream, processor: Any, processes: int, workers: int
) -> None:
    every: list[tuple[bytes, int]] = []
    lengths = set()
    for rank in range(processes):
        batches = build(data, processor, processes=processes, rank=rank, num_workers=workers)
        found = epoch_of(batches, 1)
        lengths.add(len(found))
        every += images_in(found)
    assert Counter(every) == expected_images(data, processor, 1)
    assert len(lengths) == 1


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("start", [1, 3, 5])
def test_from_the_middle_of_an_epoch_the_batches_are_the_same(
    data: PreparedStream, processor: Any, workers: int, start: int
) -> None:
    whole = epoch_of(build(data, processor, num_workers=workers), 2)
    rest = epoch_of(build(data, processor, num_workers=workers), 2, start)
    assert len(rest) == len(whole) - start
    for left, right in zip(rest, whole[start:]):
        assert left["pixel_values"].equal(right["pixel_values"]) and left["labels"].equal(right["labels"])


def test_what_is_skipped_is_not_decoded(
    data: PreparedStream, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    monkeypatch.setattr(
        batches_module, "EncodedImage", lambda data: decoded.append(len(data)) or EncodedImage(data)
    )
    assert data.train.num_images is not None
    epoch_of(build(data, processor), 0, 5)
    assert len(decoded) == data.train.num_images - 20


def test_the_loader_goes_through_epochs_in_order(data: PreparedStream, processor: Any) -> None:
    loader = StreamLoader(build(data, processor))
    loader.set_epoch(1)
    assert len(loader) == len(build(data, processor))
    assert Counter(images_in(list(loader))) == expected_images(data, processor, 1)


def test_the_buffer_mixes_and_loses_nothing() -> None:
    rows: Any = list(range(500))
    found = list(shuffled(iter(rows), 50, Random(0)))
    assert sorted(found) == rows != found
    assert all(number - place < 50 for place, number in enumerate(found))  # none comes before it was read
    assert np.corrcoef(found[:50], rows[:50])[0, 1] < 0.9
    assert list(shuffled(iter(rows), 1, Random(0))) == rows


def test_rebatch_equals_slicing() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        sizes = random.integers(1, 9, size=random.integers(0, 8)).tolist()
        chunks = [{"labels": part} for part in torch.arange(sum(sizes)).split(sizes)]
        size, skip = int(random.integers(1, 7)), int(random.integers(0, 12))
        whole = torch.arange(sum(sizes))[skip:]
        expected = list(whole.split(size)) if len(whole) else []
        found = [batch["labels"] for batch in rebatch(chunks, size, skip)]
        assert [part.tolist() for part in found] == [part.tolist() for part in expected]
