"""Repeated augmentation: fewer images, each several times and varied anew, the same whoever reads them."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe
from exactness import (
    AUGMENTED,
    DROPOUT,
    EVERY_SECOND,
    build_trainer,
    same,
    weights_of,
    with_and_without_a_break,
)

from vit_finetune.data.augmentation import generator_of
from vit_finetune.data.batches import EpochSampler, StepBatches, repeat_nearby
from vit_finetune.data.transforms import TrainingIndex
from vit_finetune.recipe import RecipeError, load_recipe


def drawn(size: int, times: int, epoch: int = 0, seed: int = 3) -> list[TrainingIndex]:
    sampler = EpochSampler(size, seed, repeats=times)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize(("size", "times"), [(100, 3), (101, 2), (257, 3), (48, 4), (24, 3), (5, 3), (1, 3)])
def test_an_epoch_reads_so_many_fewer_images_so_many_times(size: int, times: int) -> None:
    """As many readings as images; the images are the first of the epoch's permutation, as DeiT's RASampler has it."""
    for epoch in range(5):
        keys = drawn(size, times, epoch)
        assert len(keys) == len(set(keys)) == size and {key.epoch for key in keys} == {epoch}
        generator = torch.Generator().manual_seed(generator_of(3, epoch, -1).getrandbits(63))
        first = torch.randperm(size, generator=generator)[: -(-size // times)].tolist()
        counts = Counter(key.row for key in keys)
        assert set(counts) <= set(first)
        assert len(counts) == len(first) or size < 8  # of a handful, the last may come too late
        cut = times * len(first) - size
        assert sum(times - count for count in counts.values()) + times * (len(first) - len(counts)) == cut
        for row, count in counts.items():
            assert sorted(key.repeat for key in keys if key.row == row) == list(range(count))


def test_readings_are_near_one_another_but_never_side_by_side() -> None:
    for size, times in [(100, 3), (999, 3), (33, 2), (257, 4), (24, 3)]:
        rows = [key.row for key in drawn(size, times)]
        places: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row, []).append(place)
        gaps = {after - before for at in places.values() for before, after in pairwise(at)}
        assert min(gaps) >= 8 and max(gaps) <= 15, (size, times, gaps)


def test_over_many_epochs_all_images_are_read_as_often() -> None:
    epochs = 3000
    times = Counter(key.row for epoch in range(epochs) for key in drawn(30, 3, epoch))
    for row in range(30):
        assert times[row] / epochs == pytest.approx(
            1, abs=0.12
        )  # 4 standard deviations of 3 × Bernoulli(1/3)


def test_off_is_a_permutation_as_before() -> None:
    assert drawn(23, 1) == list(EpochSampler(23, 3))
    assert {key.repeat for key in drawn(23, 1)} == {0}
    rows, repeats = repeat_nearby(torch.arange(23), 1)
    assert rows.tolist() == list(range(23)) and not repeats.any()


@pytest.mark.parametrize(("batch", "processes"), [(8, 1), (4, 2), (2, 4), (3, 5)])
def test_batches_and_processes_divide_the_same_order(batch: int, processes: int) -> None:
    samplers = [EpochSampler(50, 3, repeats=3) for _ in range(processes)]
    shares = [list(StepBatches(one, batch, processes, rank)) for rank, one in enumerate(samplers)]
    together = [key for step in zip(*shares, strict=True) for part in step for key in part if key.row >= 0]
    assert together == drawn(50, 3)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_with_mixed_images(folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        folder,
        tmp_path,
        model=DROPOUT,
        augmentation={**AUGMENTED, "repeats": 3, "mixup_alpha": 0.8},
        training={**EVERY_SECOND, "num_train_epochs": 3, "dataloader_num_workers": 0},
    )
    whole, resumed = with_and_without_a_break(partial(build_trainer, recipe), tmp_path, 7)
    assert same(weights_of(resumed.model), weights_of(whole.model))


@pytest.mark.parametrize("key", ["data.balanced_sampling=true", "data.streaming=true"])
def test_what_a_recipe_cannot_ask_for(key: str) -> None:
    with pytest.raises(RecipeError, match=f"augmentation.repeats and {key.partition('=')[0]} both decide"):
        load_recipe("imagefolder", ["data.path=x", "augmentation.repeats=3", key])
