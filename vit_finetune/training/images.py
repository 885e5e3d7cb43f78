"""The training images as the Trainer reads them: held and shuffled, or streamed in batches."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader
from transformers import BaseImageProcessor

from vit_finetune.data.batches import EpochLoader, EpochSampler, StepBatches, outlive_signals
from vit_finetune.data.splits.prepared import PreparedData
from vit_finetune.data.streaming.batches import StreamBatches, StreamLoader
from vit_finetune.data.streaming.prepared import PreparedStream
from vit_finetune.data.transforms import TrainingImages, collate
from vit_finetune.recipe import AugmentationConfig, TrainingConfig
from vit_finetune.run import RunError
from vit_finetune.training.arguments import ViTTrainingArguments
from vit_finetune.training.hardware import Hardware
from vit_finetune.training.loading import Loading
from vit_finetune.training.world import World

LOOKED_AT = 256
"""Images of a stream that are held for measuring how fast they are read, and for showing."""


def first_images(
    data: PreparedData,
    image_processor: BaseImageProcessor,
    augmentation: AugmentationConfig,
    seed: int,
    balanced: bool = False,
) -> TrainingImages:
    """The training images, one by one: all of them, or the first of a stream, to look at."""
    images = data.train.head(LOOKED_AT) if isinstance(data, PreparedStream) else data.splits["train"]
    return TrainingImages(images, image_processor, augmentation, seed, balanced)


def keep_workers(training: TrainingConfig, before: dict[str, Any]) -> TrainingConfig:
    """The section with as many loader processes as the run to resume had: they decide a stream's order."""
    chosen = {choice["name"]: choice["value"] for choice in before["choices"]}
    return training.model_copy(update={"dataloader_num_workers": int(chosen["loader processes"])})


def build_batches(
    data: PreparedData,
    image_processor: BaseImageProcessor,
    augmentation: AugmentationConfig,
    training: TrainingConfig,
    hardware: Hardware,
    loading: Loading,
    world: World,
    before: dict[str, Any] | None,
) -> StreamBatches | None:
    """The batches of a stream; None where the training images are held.

    Args:
        data: the splits.
        image_processor: the model's.
        augmentation: the recipe's section.
        training: the recipe's section.
        hardware: what was chosen for the machine.
        loading: likewise.
        world: who they are divided over.
        before: provenance of the run that is resumed.

    Raises:
        RunError: a stream that cannot be divided over the processes, does not tell its length, or was begun
            by another number of processes or with other batches.
    """
    if not isinstance(data, PreparedStream):
        return None
    if before:  # who reads a stream, and how much at a time, decides its order
        batch = next(choice["value"] for choice in before["choices"] if choice["name"] == "batch")
        then = f"{before['hardware']['processes']} processes and batches of {batch}"
        now = f"{world.size} processes and batches of {hardware.batch_size}"
        if then != now:
            raise RunError(
                f"the run was started with {then}, and streams its images, so only the same can resume it; "
                f"found {now}"
            )
    max_steps = int(getattr(training, "max_steps", -1))
    return StreamBatches(
        data.train,
        image_processor,
        augmentation,
        training.seed,
        hardware.batch_size,
        num_workers=loading.num_workers,
        prefetch_factor=loading.prefetch_factor,
        pin_memory=loading.pin_memory,
        processes=world.size,
        rank=world.rank,
        max_batches=max_steps * hardware.accumulation if max_steps > 0 else None,
    )


def build_loader(images: TrainingImages | StreamBatches, args: ViTTrainingArguments) -> DataLoader[Any]:
    """This process's batches, epoch by epoch.

    Args:
        images: to train on; those of a stream are divided over the processes already.
        args: the Trainer's.
    """
    if isinstance(images, StreamBatches):
        return StreamLoader(images)
    seed = args.data_seed if args.data_seed is not None else args.seed
    return EpochLoader(
        images,
        batch_sampler=StepBatches(
            EpochSampler(
                len(images),
                seed,
                images.labels if images.balanced else None,
                images.augment.config.repeats,
            ),
            args.per_device_train_batch_size,
            args.world_size,
            args.process_index,
        ),
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        worker_init_fn=outlive_signals,
    )


def add_unreadable(
    provenance: dict[str, Any], batches: StreamBatches | None, world: World, before: dict[str, Any] | None
) -> None:
    """Adds to the provenance what all processes met in a stream and left out, now and before resuming."""
    if batches is None:
        return
    here = [{"id": name, "problem": problem} for name, problem in sorted(batches.unreadable.items())]
    there = [finding for findings in world.from_all(here) for finding in findings]
    known = before["data"].get("unreadable", []) if before else []
    provenance["data"]["unreadable"] = known + [finding for finding in there if finding not in known]
