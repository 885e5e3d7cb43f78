"""What training and looking begin with: the processes, what the machine gives, and the plan said aloud."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel

from vit_finetune.console import say
from vit_finetune.data.sources.columns import column_values
from vit_finetune.data.splits.prepared import PreparedData
from vit_finetune.data.streaming.batches import count_batches
from vit_finetune.data.streaming.prepared import PreparedStream
from vit_finetune.data.transforms import TrainingImages
from vit_finetune.hub_repos import quiet_client
from vit_finetune.model.loading import describe_model, quiet_transformers
from vit_finetune.recipe import Recipe
from vit_finetune.run import Run
from vit_finetune.training.checkpoints import list_checkpoints
from vit_finetune.training.ema import check_average
from vit_finetune.training.hardware import Choice, Hardware, choose_hardware, estimate_memory
from vit_finetune.training.images import keep_workers
from vit_finetune.training.imbalance import describe_classes
from vit_finetune.training.loading import Loading, choose_loading
from vit_finetune.training.world import PeerLost, World


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the libraries' own log lines and bars; what matters of them is said by ours."""
    with quiet_client(), quiet_transformers(), warnings.catch_warnings():
        # DDP's, of the class token (1, 1, width): its gradient's strides differ only where the size is 1.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        yield


@contextmanager
def form_world(recipe: Recipe) -> Iterator[World]:
    """The processes that train together.

    Raises:
        RunError: the launcher meant more of them, or one was lost; or it divides what the recipe cannot.
    """
    check_average(recipe.training.ema_decay, os.environ)
    use_cpu = recipe.training.use_cpu or not torch.accelerator.is_available()
    world = World(recipe.training.ddp_timeout, use_cpu)
    try:
        with world.noticing_losses():
            yield world
    except PeerLost as lost:
        checkpoints = list_checkpoints(Run(recipe.output_dir).checkpoints)
        kept = f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
        raise PeerLost(f"{lost}. What it said, if anything, is above; {kept}. Go on with --resume") from lost


def plan_classes(recipe: Recipe, data: PreparedData) -> list[Choice]:
    """How unequal classes are made up for, where the recipe asks for it.

    Raises:
        RunError: weights of classes that the data does not have.
    """
    if recipe.data.multi_label:  # which refuses both
        return []
    held = None if isinstance(data, PreparedStream) else column_values(data.splits["train"], "label")
    return describe_classes(recipe.training.class_weights, recipe.data.balanced_sampling, data.labels, held)


def plan_hardware(
    recipe: Recipe, model: PreTrainedModel, world: World, before: dict[str, Any] | None = None
) -> Hardware:
    """What to use of the machine, the same in every process."""
    is_probe = recipe.model.method == "linear_probe"  # which has no batches, and nothing that it went on from
    hardware: Hardware = world.from_main(
        choose_hardware(recipe.training, recipe.model, model, None if is_probe else before, world.size)
    )
    if is_probe:
        hardware.choices = [choice for choice in hardware.choices if choice.name != "batch"]
    model.set_attn_implementation(hardware.attn_implementation)
    return hardware


def plan_loading(
    recipe: Recipe,
    data: PreparedData,
    train: TrainingImages,
    model: PreTrainedModel,
    hardware: Hardware,
    world: World,
    before: dict[str, Any] | None = None,
) -> Loading:
    """How images are loaded, the same in every process; its choices join the machine's."""
    training, shards = recipe.training, None
    if isinstance(data, PreparedStream):
        shards = data.train.stream.rows.num_shards // world.size
        if before:  # who reads a stream decides its order
            training = keep_workers(training, before)
    # Each process measures, the main one decides.
    loading: Loading = world.from_main(
        choose_loading(training, recipe.data.cache, train, model, hardware, before, shards)
    )
    hardware.choices += loading.choices
    return loading


def show_plan(
    recipe: Recipe, data: PreparedData, model: PreTrainedModel, hardware: Hardware, world: World
) -> dict[str, Any]:
    """Says what is about to be done, and answers it as facts by name."""
    facts = _show_data_and_model(recipe, data, model, hardware, world)
    if recipe.model.method == "linear_probe":
        images = len(data.splits["train"])
        say(f"linear probe: the features of {images:,} training images, computed once, and then the head")
        return facts
    processes, accumulation = world.size, hardware.accumulation
    per_step = processes * hardware.batch_size * accumulation
    epochs, steps = recipe.training.num_train_epochs, int(getattr(recipe.training, "max_steps", -1))
    if isinstance(data, PreparedStream):
        batches = count_batches(data.train, hardware.batch_size, processes) or steps * accumulation
    else:
        batches = -(-len(data.splits["train"]) // (processes * hardware.batch_size))
    steps_per_epoch = max(1, -(-batches // accumulation))
    if steps <= 0:
        steps = -(-int(steps_per_epoch * epochs * 1000) // 1000)
    fixed, each = estimate_memory(model, averages=recipe.training.ema_decay > 0)
    memory = fixed + each * hardware.batch_size
    say(
        f"{processes} process{'es' if processes > 1 else ''} × {hardware.batch_size} images × "
        f"{accumulation} accumulation = {per_step} images per step; {steps:,} steps, "
        f"{steps_per_epoch:,} an epoch; about {memory / 1e9:.1f} GB"
    )
    return facts | {"images_per_step": per_step, "steps": steps, "memory_bytes": memory}


def _show_data_and_model(
    recipe: Recipe, data: PreparedData, model: PreTrainedModel, hardware: Hardware, world: World
) -> dict[str, Any]:
    """Says what is trained on what and by what; answers it as facts by name."""
    counts: dict[str, int | None] = {name: len(split) for name, split in data.splits.items()}
    if isinstance(data, PreparedStream):
        counts = {"train": data.train.num_images} | counts
    facts = describe_model(model)
    say(
        f"data: {data.kind} {recipe.data.path}: {len(data.labels)} "
        f"{'labels' if recipe.data.multi_label else 'classes'}, "
        + ", ".join(
            f"{name} {'unknown' if count is None else f'{count:,}'}" for name, count in counts.items()
        )
    )
    size = "×".join(map(str, facts["image_size"]))
    tokens = f", {facts['tokens']} tokens" if "tokens" in facts else ""
    origin = recipe.model.path or "from scratch"
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = f", of which {learning:,} learn" if learning < facts["parameters"] else ""
    say(
        f"model: {facts['architecture']}, {origin}, {facts['parameters']:,} parameters{frozen}, {size} "
        f"pixels{tokens}"
    )
    for choice in hardware.choices:
        say(f"{choice.name}: {choice.value} ({choice.reason})")
    if not hardware.use_cpu and world.size == 1 < torch.accelerator.device_count():
        say(
            f"this process uses one of {torch.accelerator.device_count()} devices; "
            f"`accelerate launch -m vit_finetune …` uses all"
        )
    return facts | {
        "labels": data.labels,
        "splits": counts,
        "choices": [asdict(choice) for choice in hardware.choices],
    }
