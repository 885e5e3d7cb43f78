"""How images are loaded: choices follow from measured speeds, measuring changes nothing, time is accounted for."""

from __future__ import annotations

import os
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from exactness import build_trainer
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from vit_finetune.data.splits.carving import load_splits
from vit_finetune.data.transforms import TrainingImages
from vit_finetune.model.loading import load_model
from vit_finetune.recipe import load_recipe
from vit_finetune.training import hardware, loading
from vit_finetune.training.hardware import Hardware, choose_hardware, estimate_memory, measure_step
from vit_finetune.training.loading import (
    Loading,
    Speeds,
    choose_loading,
    describe_waiting,
    measure_reading,
    waiting_seconds,
)

SPEEDS = Speeds(read=1e-3, read_cached=2e-4, cache=1e-3, cached_bytes=2e5, step=1e-3)
CPU, GPU = Hardware(True, False, False, "sdpa", 8), Hardware(False, True, False, "sdpa", 8)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Chooses as if these speeds had been measured on a machine with 8 cores."""

    def choose(
        speeds: Speeds,
        hardware: Hardware,
        cache: str = "auto",
        before: Any = None,
        images: int = 1000,
        shards: int | None = None,
        **keys: Any,
    ) -> Loading:
        answer = (speeds.read, speeds.read_cached, speeds.cache, speeds.cached_bytes)
        monkeypatch.setattr(loading, "measure_reading", lambda images: answer)
        monkeypatch.setattr(loading, "measure_step", lambda *arguments: speeds.step)
        monkeypatch.setattr(loading, "cores_here", lambda: 8)
        training = tiny_recipe("x", "y", training={"num_train_epochs": 10, **keys}).training
        fake: Any = range(images)
        nothing: Any = None
        return choose_loading(training, cache, fake, nothing, hardware, before, shards)

    return choose


def values(chosen: Loading) -> tuple[int, bool]:
    return chosen.num_workers, chosen.cache is not None


@pytest.mark.parametrize(
    ("hardware", "read", "cached", "step", "expected"),
    [
        (CPU, 1e-3, 2e-4, 0.2, (0, False)),  # a large model on a CPU: reading is nothing beside it
        (CPU, 1e-3, 9e-4, 1e-3, (2, False)),  # a tiny one: loader processes pay; a cache would not
        (CPU, 1e-3, 1e-4, 1e-2, (0, False)),  # 9% is not worth a cache
        (CPU, 2e-3, 1e-4, 1e-2, (0, True)),  # 16% is
        (GPU, 1e-3, 2e-4, 1e-2, (1, False)),  # one process keeps up
        (GPU, 1e-3, 2e-4, 5e-4, (3, False)),  # three do, with headroom
        (GPU, 1e-3, 2e-4, 1e-4, (3, True)),  # seven do not; from the cache three do
        (GPU, 1e-3, 9.9e-4, 1e-4, (7, False)),  # a cache would not help
    ],
)
def test_choices_follow_the_speeds(
    measured: Any, hardware: Hardware, read: float, cached: float, step: float, expected: tuple[int, bool]
) -> None:
    chosen = measured(replace(SPEEDS, read=read, read_cached=cached, step=step), hardware)
    assert values(chosen) == expected
    assert chosen.pin_memory == (not hardware.use_cpu)
    assert (chosen.prefetch_factor is None) == (chosen.num_workers == 0)
    assert all(choice.reason for choice in chosen.choices)


def test_the_recipe_decides_where_it_says_something(measured: Any, tmp_path: Path) -> None:
    starved = replace(SPEEDS, step=1e-5)
    assert values(measured(starved, GPU, dataloader_num_workers=0, cache="off")) == (0, False)
    told = measured(replace(SPEEDS, step=1.0), CPU, cache=str(tmp_path), dataloader_prefetch_factor=7)
    assert told.cache == tmp_path and told.prefetch_factor is None
    assert measured(starved, GPU, dataloader_prefetch_factor=7).prefetch_factor == 7


def test_a_cache_that_would_fill_the_disk_is_left_out(measured: Any) -> None:
    starved = replace(SPEEDS, step=1e-4)
    chosen = measured(starved, GPU, images=10**12)
    assert chosen.cache is None and "data.cache=FOLDER" in chosen.choices[1].reason


def test_a_cache_that_cannot_be_written_is_left_out(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.os, "access", lambda path, mode: mode != os.W_OK)
    chosen = measured(replace(SPEEDS, step=1e-4), GPU)
    assert chosen.cache is None and "cannot be written" in chosen.choices[1].reason


@pytest.mark.parametrize(("shards", "workers"), [(20, 3), (2, 2), (1, 1)])
def test_a_stream_has_no_cache_and_a_shard_for_each_loader_process(
    measured: Any, shards: int, workers: int
) -> None:
    chosen = measured(replace(SPEEDS, step=5e-4), GPU, shards=shards)
    assert values(chosen) == (workers, False)
    assert chosen.choices[1].reason == "streamed images are not kept"
    waited = {"total": 1.0, "images": 0.4, "evaluation": 0.0, "checkpoints": 0.0}
    assert "data.cache" not in describe_waiting(chosen, 10, waited, False)


def test_a_single_epoch_is_not_worth_a_cache(measured: Any) -> None:
    slow_to_make = replace(SPEEDS, step=1e-4, cache=0.1)
    chosen = measured(slow_to_make, GPU)
    assert chosen.cache is None and "too few epochs" in chosen.choices[1].reason


def test_a_few_steps_are_not_worth_a_cache(measured: Any) -> None:
    """With `max_steps` the Trainer does not look at the number of epochs."""
    starved = replace(SPEEDS, step=1e-4)
    assert measured(starved, GPU, images=10_000, max_steps=20).cache is None  # 160 of them are read
    assert measured(starved, GPU, images=10_000, max_steps=20_000, num_train_epochs=0.1).cache is not None


@pytest.mark.parametrize("kept", ["on", "off"])
def test_a_resumed_run_keeps_its_cache(measured: Any, kept: str) -> None:
    before = {"choices": [{"name": "image cache", "value": kept}]}
    for step in (1e-5, 1.0):
        chosen = measured(replace(SPEEDS, step=step), GPU, before=before)
        assert (chosen.cache is not None) == (kept == "on")


def test_waiting() -> None:
    assert waiting_seconds(3.0, 1.0, 0) == 3.0
    assert waiting_seconds(3.0, 1.0, 2) == 0.5
    assert waiting_seconds(3.0, 1.0, 4) == 0.0


# --------------------------------------------------------------------------- measuring


def test_measuring_reading_finds_real_costs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(folder, tmp_path)
    images = TrainingImages(
        load_splits(recipe.data)["train"],
        ViTImageProcessor(size={"height": 16, "width": 16}),
        recipe.augmentation,
        0,
    )
    monkeypatch.setattr(loading, "READING_SECONDS", 0.1)
    read, cached, into, size = measure_reading(images)
    assert 0 < cached < read < 0.1 and 0 < into < 0.1
    assert 18 * 20 * 3 * 0.5 < size < 25 * 25 * 3  # drawn images of about 20 × 20, below the edge
    opened = images.files.open

    def open_slowly(index: int) -> Any:
        time.sleep(0.02)
        return opened(index)

    monkeypatch.setattr(images.files, "open", open_slowly)
    slow, cached, _, _ = measure_reading(images)
    assert slow > 0.02 > cached


@pytest.mark.parametrize("crop_scale", [None, (0.5, 1.0)])
def test_measuring_reading_takes_what_training_takes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crop_scale: Any
) -> None:
    """Images are far smaller than the model's, and erasing counts on its size."""
    section = {"crop_scale": crop_scale, "random_erasing": 1.0}
    recipe = tiny_recipe(folder, tmp_path, augmentation=section)
    processor = ViTImageProcessor(size={"height": 64, "width": 64})
    images = TrainingImages(load_splits(recipe.data)["train"], processor, recipe.augmentation, 0)
    monkeypatch.setattr(loading, "READING_SECONDS", 0.1)
    *_, size = measure_reading(images)
    assert (size == 3 * 64 * 64) == (crop_scale is None)


def batches_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, batch_size: int, fits: int = 10**9
) -> list[int]:
    """The batches that a step is measured with, on a device that takes as long for many images as for few."""
    model, _ = load_model(tiny_recipe("x", tmp_path).model, ["a", "b"])
    forward, seen, clock = model.forward, [], [0.0]

    def answer(pixel_values: torch.Tensor) -> Any:
        if len(pixel_values) > fits:
            raise torch.OutOfMemoryError
        seen.append(len(pixel_values))
        clock[0] += 0.03
        return forward(pixel_values=pixel_values)

    monkeypatch.setattr(model, "forward", answer)
    monkeypatch.setattr(hardware, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    each = measure_step(model, torch.device("cpu"), None, batch_size)
    assert each == pytest.approx(0.03 / seen[-1])
    assert all(parameter.grad is None for parameter in model.parameters())
    return seen


def test_the_step_is_measured_with_the_batch_that_is_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert batches_measured(monkeypatch, tmp_path, 128)[-1] == 128


def test_a_batch_that_does_not_fit_is_measured_smaller(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert batches_measured(monkeypatch, tmp_path, 128, fits=40)[-1] == 32


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_measuring_the_step_leaves_no_trace(kind: str, tmp_path: Path) -> None:
    recipe = tiny_recipe("x", tmp_path)
    model, _ = load_model(recipe.model, ["a", "b"])
    if kind == "resnet":  # its batch norms would learn
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=2)
        config.image_size = 32
        model = ResNetForImageClassification(config)
    hardware = choose_hardware(recipe.training, recipe.model, model)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert 0 < measure_step(model, hardware.device, hardware.autocast, 8) < 1
    assert min(estimate_memory(model)) > 0
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# --------------------------------------------------------------------------- afterwards


def told(parts: dict[str, float], use_cpu: bool = True, images: int = 8000, **options: Any) -> str:
    seconds = {"total": 100.0, "images": 0.0, "evaluation": 0.0, "checkpoints": 0.0} | parts
    values: dict[str, Any] = {"num_workers": 0, "prefetch_factor": None, "pin_memory": False, "cache": None}
    return describe_waiting(Loading(**{**values, "speeds": SPEEDS, **options}), images, seconds, use_cpu)


def test_the_verdict_accounts_for_all_the_time() -> None:
    line = told({"images": 3.0, "evaluation": 12.0, "checkpoints": 5.0})
    assert "80% training steps, 3% waiting for images, 12% evaluation, 5% checkpoints" in line
    assert "read at 1,000/s from the files (0 loader processes), the step took 100/s" in line
    assert line.endswith("nothing to change, the model is the limit") and "\n" not in line


def test_the_verdict_says_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "cores_here", lambda: 8)
    assert told({"images": 40.0}).endswith("data.cache=FOLDER would read 5.0 times faster")
    cached = {"cache": Path("x"), "num_workers": 2, "images": 3_000_000}  # the step takes 50,000/s
    assert told({"images": 40.0}, False, **cached).endswith("set training.dataloader_num_workers=7")
    ready = told({"images": 40.0}, False, cache=Path("x"), num_workers=2)  # of which 100/s are needed
    assert ready.endswith("nothing to change, only the first images of each epoch are waited for")
    assert "read at 10,000/s from the cache (2 loader processes)" in told({"images": 40.0}, False, **cached)
    assert told({"images": 40.0}, False, **cached | {"num_workers": 7}).endswith("more cores would help")
    for part in ("evaluation", "checkpoints"):
        words = re.search(r"\((training\S+) (training\S+)\)$", told({part: 40.0}))
        assert words, told({part: 40.0})
        # As a shell would read them, they are a recipe's.
        overrides = [
            word.replace("{eval,save}", name).replace("…", "100")
            for word in words.groups()
            for name in ("eval", "save")
        ]
        assert load_recipe("digits", overrides).training.eval_strategy == "steps"


@pytest.mark.slow
def test_the_trainer_counts_what_it_waits_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build_trainer(
        tiny_recipe(folder, tmp_path, training={"num_train_epochs": 1, "dataloader_num_workers": 0}),
        tmp_path / "run",
    )
    opened = trainer.train_dataset.files.open

    def open_slowly(index: int) -> Any:
        time.sleep(0.05)
        return opened(index)

    monkeypatch.setattr(trainer.train_dataset.files, "open", open_slowly)
    total = trainer.train().metrics["train_runtime"]
    assert 18 * 0.05 <= trainer.seconds["images"] < total
    assert trainer.seconds["evaluation"] > 0 and trainer.seconds["checkpoints"] > 0
    assert trainer.seen_images == 18
    assert sum(trainer.seconds.values()) < total
