"""From files to batches: the image processor is the oracle for evaluation, repetition for training."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw_folder
from PIL import Image
from torch.utils.data import DataLoader
from transformers import BitImageProcessor, ViTImageProcessor
from transformers.image_utils import load_image

from vit_finetune.data import transforms
from vit_finetune.data.batches import EpochSampler
from vit_finetune.data.splits.carving import load_splits
from vit_finetune.data.transforms import (
    EvaluationImages,
    ImageFiles,
    TrainingImages,
    TrainingIndex,
    check_image_processor,
    collate,
    normalize,
    output_size,
    resize,
)
from vit_finetune.recipe import AugmentationConfig, DataConfig
from vit_finetune.run import RunError

PROCESSORS = {
    "squash": ViTImageProcessor(size={"height": 16, "width": 24}, do_convert_rgb=True),
    "crop": BitImageProcessor(
        size={"shortest_edge": 18},
        crop_size={"height": 16, "width": 16},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.25, 0.3],
    ),
    "plain": ViTImageProcessor(size={"height": 16, "width": 16}, do_normalize=False),
    "bicubic": ViTImageProcessor(size={"height": 16, "width": 16}, resample=Image.Resampling.BICUBIC),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("photos") / "photos", per_class=8, suffix=".png")


@pytest.fixture
def train(photos: Path) -> Any:
    return load_splits(DataConfig(path=str(photos)))["train"]


def training_images(train: Any, seed: int = 0, **options: Any) -> TrainingImages:
    config = AugmentationConfig(policy="trivialaugment", random_erasing=0.3, **options)
    return TrainingImages(train, PROCESSORS["squash"], config, seed)


@pytest.mark.parametrize("name", PROCESSORS)
def test_evaluation_is_the_image_processor_bit_for_bit(name: str, train: Any, photos: Path) -> None:
    processor = PROCESSORS[name]
    images = EvaluationImages(train, processor)
    batch = collate([images[index] for index in range(len(images))])
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_values"].shape == (len(train), 3, *output_size(processor))
    ours = normalize(batch["pixel_values"], processor)
    pictures = [load_image(str(photos / identity)) for identity in train["id"]]
    for index, picture in enumerate(pictures):  # as a pipeline does, one at a time from Pillow
        theirs = processor(picture, return_tensors="pt")["pixel_values"]
        assert torch.equal(ours[index : index + 1], theirs)
        assert torch.equal(normalize(resize(images.files[index], processor)[None], processor), theirs)
    same_size = [picture.resize((33, 29)) for picture in pictures]
    tensors = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in same_size]
    resized = torch.stack([resize(tensor, processor) for tensor in tensors])
    assert torch.equal(
        normalize(resized, processor), processor(same_size, return_tensors="pt")["pixel_values"]
    )
    assert batch["labels"].tolist() == train["label"][:]
    assert batch["labels"].dtype == torch.int64


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("source", ["folder", "digits"])
def test_files_are_decoded_from_paths_and_from_bytes(
    photos: Path, source: str, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transforms, "IN_MEMORY_BYTES", 10**9 if in_memory else 0)
    path = str(photos) if source == "folder" else source
    split = load_splits(DataConfig(path=path))["test"]  # a selection of rows, not a whole table
    files = ImageFiles(split)
    assert len(files) == len(split)
    for index in (0, len(split) - 1):
        picture = np.asarray(split[index]["image"].convert("RGB"))
        np.testing.assert_array_equal(files[index].permute(1, 2, 0).numpy(), picture)


def test_training_items_do_not_depend_on_the_order_of_access(train: Any) -> None:
    images, others = training_images(train), training_images(train)
    keys = [TrainingIndex(epoch, index) for epoch in range(3) for index in range(len(train))]
    once = {key: images[key] for key in keys}
    torch.manual_seed(5)
    for key in reversed(keys):
        item = others[key]
        assert torch.equal(item["pixel_values"], once[key]["pixel_values"])
        assert item["labels"] == once[key]["labels"] == train["label"][key.row]
    for index in range(len(train)):
        views = {once[TrainingIndex(epoch, index)]["pixel_values"].numpy().tobytes() for epoch in range(3)}
        assert len(views) > 1
    reseeded = training_images(train, seed=1)
    assert any(not torch.equal(reseeded[key]["pixel_values"], once[key]["pixel_values"]) for key in keys[:5])


def test_without_augmentation_training_sees_what_evaluation_sees(train: Any) -> None:
    config = AugmentationConfig(crop_scale=None, horizontal_flip=0)
    images = TrainingImages(train, PROCESSORS["crop"], config, seed=0)
    evaluated = EvaluationImages(train, PROCESSORS["crop"])
    for index in range(len(train)):
        expected = evaluated[index]["pixel_values"]
        assert torch.equal(images[TrainingIndex(0, index)]["pixel_values"], expected)
        assert torch.equal(
            training_images(train).augment.resize(images.files[index]),
            training_images(train).unaugmented(index),
        )


def test_training_uses_the_processors_interpolation_and_mean_colour(train: Any) -> None:
    images = TrainingImages(train, PROCESSORS["bicubic"], AugmentationConfig(), seed=0)
    assert images.augment.interpolation.value == "bicubic"
    images = TrainingImages(train, PROCESSORS["crop"], AugmentationConfig(), seed=0)
    assert list(images.augment.fill) == [102, 128, 153]


def test_workers_change_nothing(train: Any) -> None:
    def batches(workers: int, batch_size: int) -> dict[str, torch.Tensor]:
        sampler = EpochSampler(len(train), seed=3)
        sampler.set_epoch(2)
        loader = DataLoader(
            training_images(train), batch_size, sampler=sampler, num_workers=workers, collate_fn=collate
        )
        parts = list(loader)
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    alone, together = batches(0, 4), batches(2, 5)
    assert torch.equal(alone["pixel_values"], together["pixel_values"])
    assert torch.equal(alone["labels"], together["labels"])


def test_datasets_can_be_sent_to_spawned_workers(train: Any) -> None:
    images = training_images(train)
    sent = pickle.loads(pickle.dumps(images))
    key = TrainingIndex(1, 2)
    assert torch.equal(sent[key]["pixel_values"], images[key]["pixel_values"])
    assert len(pickle.dumps(EvaluationImages(train, PROCESSORS["squash"]))) < 100_000


def order(seed: int, epoch: int, size: int = 50) -> list[TrainingIndex]:
    sampler = EpochSampler(size, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_an_epoch_is_a_permutation_by_seed_and_epoch_alone() -> None:
    keys = [(seed, epoch) for seed in range(3) for epoch in range(3)]
    orders = {key: [index.row for index in order(*key)] for key in keys}
    assert all(sorted(rows) == list(range(50)) for rows in orders.values())
    assert len({tuple(rows) for rows in orders.values()}) == len(keys)
    torch.manual_seed(77)
    assert all([index.row for index in order(*key)] == orders[key] for key in keys)
    assert all(index.epoch == 2 for index in order(0, 2))
    assert len(EpochSampler(50, 0)) == 50
    state = torch.get_rng_state()
    order(0, 0)
    assert torch.equal(torch.get_rng_state(), state)  # and it draws nothing from torch's own generator


def test_processors_that_do_not_work_on_tensors_are_refused() -> None:
    check_image_processor(PROCESSORS["squash"])
    with pytest.raises(RunError, match="image processor is object, which does not work on tensors"):
        check_image_processor(object())
