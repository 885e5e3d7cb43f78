"""Balanced sampling: each class as often as another, the same whoever reads it; images read again are varied anew."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw_lopsided, tiny_recipe
from exactness import (
    AUGMENTED,
    DROPOUT,
    EVERY_SECOND,
    build_trainer,
    same,
    weights_of,
    with_and_without_a_break,
)
from fork_server import ForkServer
from worlds import Division, Place, Signal, Trained, check_same, finish, said

from vit_finetune.data.augmentation import generator_of
from vit_finetune.data.batches import EpochSampler, StepBatches
from vit_finetune.data.splits.carving import load_splits
from vit_finetune.data.transforms import TrainingImages, TrainingIndex
from vit_finetune.finetuning import finetune
from vit_finetune.model.loading import load_model
from vit_finetune.recipe import ModelConfig, load_recipe
from vit_finetune.run import Run

LABELS = [0, 1, 0, 2, 0, 0, 4, 0, 0, 4, 0, 0, 0, 1, 0, 0, 4, 0, 0, 0, 1, 0, 0]
"""16 images of class 0, 3 of class 1, 1 of class 2, none of class 3, 3 of class 4: 23."""
COUNTS = {0: 16, 1: 3, 2: 1, 4: 3}


def drawn(epoch: int, labels: list[int] = LABELS, seed: int = 3) -> list[TrainingIndex]:
    sampler = EpochSampler(len(labels), seed, labels)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_each_class_has_its_share_and_images_come_again_only_after_all_did() -> None:
    for epoch in range(50):
        keys = drawn(epoch)
        assert len(keys) == len(set(keys)) == len(LABELS)
        assert {key.epoch for key in keys} == {epoch}
        shares = Counter(LABELS[key.row] for key in keys)
        assert sorted(shares.values()) == [5, 6, 6, 6] and shares.keys() == COUNTS.keys()
        times = Counter(key.row for key in keys)
        for label, share in shares.items():
            rows = [row for row, other in enumerate(LABELS) if other == label]
            least, more = divmod(share, COUNTS[label])
            assert sorted(times[row] for row in rows) == [least] * (len(rows) - more) + [least + 1] * more
        for row, count in times.items():
            assert sorted(key.repeat for key in keys if key.row == row) == list(range(count))


def test_over_many_epochs_all_images_of_a_class_are_drawn_as_often() -> None:
    """As torch's WeightedRandomSampler has it on average: 23 / 4 of each class, by its images."""
    epochs = 2000
    times = Counter(key.row for epoch in range(epochs) for key in drawn(epoch))
    for row, label in enumerate(LABELS):
        assert times[row] / epochs == pytest.approx(23 / 4 / COUNTS[label], abs=0.05)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    orders = {(seed, epoch): drawn(epoch, seed=seed) for seed in range(3) for epoch in range(3)}
    assert len({tuple(key.row for key in keys) for keys in orders.values()}) == 9
    state = torch.get_rng_state()
    assert drawn(1, seed=2) == orders[2, 1]
    assert torch.get_rng_state().equal(state)
    labels = [LABELS[key.row] for key in drawn(0)]
    assert labels != sorted(labels)


@pytest.mark.parametrize(("batch", "processes"), [(1, 1), (8, 1), (4, 2), (2, 4), (3, 5)])
def test_batches_and_processes_divide_the_same_order(batch: int, processes: int) -> None:
    shares = [list(StepBatches(EpochSampler(23, 3, LABELS), batch, processes, rank)) for rank in range(processes)]  # fmt: skip
    together = [key for step in zip(*shares, strict=True) for part in step for key in part if key.row >= 0]
    assert together == drawn(0)


def test_off_is_a_permutation_as_before() -> None:
    generator = torch.Generator().manual_seed(generator_of(3, 2, -1).getrandbits(63))
    expected = [TrainingIndex(2, row) for row in torch.randperm(23, generator=generator).tolist()]
    sampler = EpochSampler(23, 3)
    sampler.set_epoch(2)
    assert list(sampler) == expected
    assert TrainingIndex(2, 5).key == 5 and TrainingIndex(2, 5, 1).key != TrainingIndex(2, 5, 2).key


def test_an_image_that_is_read_again_is_varied_anew(folder: Path) -> None:
    recipe = tiny_recipe(folder, "unused")
    split = load_splits(recipe.data)["train"]
    _, processor = load_model(ModelConfig(config=DROPOUT["config"]), ["a", "b"])
    images, others = (TrainingImages(split, processor, recipe.augmentation, seed=7) for _ in range(2))
    for row in range(len(split)):
        readings = [images[TrainingIndex(3, row, repeat)] for repeat in range(3)]
        assert images[TrainingIndex(3, row)]["pixel_values"].equal(readings[0]["pixel_values"])
        assert {item["labels"] for item in readings} == {split["label"][row]}
        assert len({item["pixel_values"].numpy().tobytes() for item in readings}) == 3
        again = others[TrainingIndex(3, row, 2)]["pixel_values"]
        assert again.equal(readings[2]["pixel_values"])


# --------------------------------------------------------------------------- training


def balancing(lopsided: Path, tmp_path: Path, name: str, callbacks: Any = None, **training: Any) -> Any:
    recipe = tiny_recipe(
        lopsided,
        tmp_path,
        data={"balanced_sampling": True},
        model=DROPOUT,
        augmentation=AUGMENTED,
        training={"num_train_epochs": 3, **training},
    )
    return build_trainer(recipe, tmp_path / name, callbacks)


@pytest.mark.slow
@pytest.mark.parametrize(("kill_at", "workers"), [(5, 0), (8, 0), (7, 2)])
def test_resumed_equals_uninterrupted(lopsided: Path, tmp_path: Path, kill_at: int, workers: int) -> None:
    """Epochs of four steps, checkpoints every second: resumed within and between epochs, by loader processes too."""
    whole, resumed = with_and_without_a_break(
        lambda name, callbacks=None: balancing(
            lopsided, tmp_path, name, callbacks, **EVERY_SECOND, dataloader_num_workers=workers
        ),
        tmp_path,
        kill_at,
    )
    assert resumed.state.global_step == 12
    assert same(weights_of(resumed.model), weights_of(whole.model))
    labels = [label for batch in resumed.get_train_dataloader() for label in batch["labels"].tolist()]
    assert sorted(np.bincount(labels).tolist()) == [4, 5, 5]


@pytest.mark.slow
def test_a_run_and_its_card_name_the_sampling(lopsided: Path, tmp_path: Path) -> None:
    """With weights beside it, which are the recipe's own."""
    recipe = tiny_recipe(
        lopsided,
        tmp_path / "run",
        data={"balanced_sampling": True},
        training={"class_weights": {"red": 2}},
    )
    run = finetune(recipe)
    chosen = {choice["name"]: choice for choice in json.loads(run.provenance.read_text())["choices"]}
    assert chosen["sampling"]["value"] == "balanced"
    assert chosen["sampling"]["reason"].endswith(
        "of an epoch's 14 images 4 or 5 are of each class; training images: blue 8, green 4, red 2"
    )
    assert chosen["class weights"]["value"] == "blue 1, green 1, red 2"
    card = (run.model / "README.md").read_text()
    assert "| Sampling | balanced (the recipe says so: of an epoch" in card


def readings_of(run: Run) -> list[str]:
    """What three epochs of a run should read, image by image; those of red twice, and differently."""
    recipe = load_recipe(run.recipe)
    split = load_splits(recipe.data)["train"]
    _, processor = load_model(recipe.model, ["a", "b"])
    images = TrainingImages(split, processor, recipe.augmentation, recipe.training.seed)
    keys = [key for epoch in range(3) for key in drawn(epoch, split["label"][:], recipe.training.seed)]
    assert (
        sum(key.repeat > 0 for key in keys) == 3 * 6
    )  # six images of red, ten readings; eight of green, ten
    pixels = [images[key]["pixel_values"].contiguous().numpy().tobytes() for key in keys]
    found = [hashlib.sha256(one).hexdigest()[:16] for one in pixels]
    assert len(set(found)) == len(found) == 90
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_one_process_equals_two_also_where_it_goes_on_alone(forks: ForkServer, tmp_path: Path) -> None:
    photos = draw_lopsided(tmp_path / "photos", {"blue": 32, "green": 16, "red": 12})
    place, words = Place(forks, tmp_path, photos), ["data.balanced_sampling=true"]
    run, children = place.start("one", Division(1, 2, 4), *words, dropout=True)
    assert "sampling: balanced (the recipe says so: of an epoch's 30 images 10 are of each" in finish(
        children
    )
    one = Trained(run, [children])
    assert [image for images in one.steps().values() for image in images] == readings_of(run)
    run, children = place.start("two", Division(2, 2, 2), *words, dropout=True)
    finish(children)
    two = Trained(run, [children])
    assert two.steps() == one.steps()
    check_same(two, one)
    stopped = Signal(15, 5, 1)
    run, first = place.start("fewer", Division(2, 2, 2), *words, dropout=True, signal=stopped)
    assert [child.wait() for child in first] == [75, 75], said(first)
    run, second = place.start("fewer", Division(1, 2, 2), *words, dropout=True)
    finish(second)
    fewer = Trained(run, [first, second])
    assert fewer.steps() == one.steps()
    check_same(fewer, one)
