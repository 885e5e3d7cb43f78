"""The training images as the Trainer reads them: held and shuffled, or streamed in batches."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import BaseImageProcessor

from vit_finetune.data.batches import StreamBatches
from vit_finetune.data.checkup import Finding
from vit_finetune.data.splits import PreparedData
from vit_finetune.data.streaming import PreparedStream
from vit_finetune.data.transforms import TrainingImages
from vit_finetune.recipe import AugmentationConfig, TrainingConfig
from vit_finetune.run import RunError
from vit_finetune.training.hardware import Hardware


def build_training_images(
    data: PreparedData,
    image_processor: BaseImageProcessor,
    augmentation: AugmentationConfig,
    training: TrainingConfig,
    hardware: Hardware,
    before: dict[str, Any] | None,
) -> TrainingImages | StreamBatches:
    """What the Trainer reads: the training images, or the batches of a stream.

    Args:
        data: the splits.
        image_processor: the model's.
        augmentation: the recipe's section.
        training: the recipe's section.
        hardware: what was chosen; of a resumed stream, the loader processes become those of before.
        before: provenance of the run that is resumed.

    Raises:
        RunError: a stream that cannot be divided over the processes, does not tell its length, or was begun
            by another number of processes.
    """
    if not isinstance(data, PreparedStream):
        return TrainingImages(data.splits["train"], image_processor, augmentation, training.seed)
    state = PartialState()
    if before:  # who reads a stream decides its order
        chosen = {choice["name"]: choice["value"] for choice in before["choices"]}
        hardware.num_workers = int(chosen["loader processes"])
        processes = before["hardware"]["processes"]
        if processes != state.num_processes:
            raise RunError(
                f"the run was started with {processes} processes and streams its images, so only as many can "
                f"resume it; found {state.num_processes}"
            )
    max_steps = int(getattr(training, "max_steps", -1))
    return StreamBatches(
        data.train,
        image_processor,
        augmentation,
        training.seed,
        hardware.batch_size,
        num_workers=hardware.num_workers,
        pin_memory=not hardware.use_cpu,
        processes=state.num_processes,
        rank=state.process_index,
        max_batches=max_steps * training.gradient_accumulation_steps if max_steps > 0 else None,
    )


def first_images(
    data: PreparedData,
    image_processor: BaseImageProcessor,
    augmentation: AugmentationConfig,
    seed: int,
    count: int,
) -> TrainingImages:
    """Training images to look at before training: all of them, or the first `count` of a stream."""
    images = data.train.head(count) if isinstance(data, PreparedStream) else data.splits["train"]
    return TrainingImages(images, image_processor, augmentation, seed)


def add_unreadable(
    provenance: dict[str, Any], train: TrainingImages | StreamBatches, before: dict[str, Any] | None
) -> None:
    """Adds to the provenance what all processes met in a stream and left out, now and before resuming."""
    if not isinstance(train, StreamBatches):
        return
    here = [asdict(Finding(name, problem)) for name, problem in sorted(train.unreadable.items())]
    there = gather_object(here) if PartialState().num_processes > 1 else here
    known = provenance["data"]["unreadable"]
    for finding in [*(before or {"data": {"unreadable": []}})["data"]["unreadable"], *there]:
        if finding not in known:
            known.append(finding)
