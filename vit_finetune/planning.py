"""What training and looking begin with: the processes, what the machine gives, and the plan said aloud."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from transformers import BaseImageProcessor, EvalPrediction, PreTrainedModel

from vit_finetune.console import progress, say
from vit_finetune.data.batches import naming_loader_errors
from vit_finetune.data.mixing import build_mixing
from vit_finetune.data.sources.columns import column_values
from vit_finetune.data.splits.prepared import PreparedData
from vit_finetune.data.streaming.batches import count_batches
from vit_finetune.data.streaming.prepared import PreparedStream
from vit_finetune.data.transforms import TrainingImages
from vit_finetune.evaluation.multi_label import compute_multi_label_metrics
from vit_finetune.evaluation.scoring import compute_label_metrics
from vit_finetune.hub_repos import quiet_client
from vit_finetune.model.loading import describe_model, load_skeleton, quiet_transformers
from vit_finetune.model.lora import check_targets, import_peft
from vit_finetune.recipe import Recipe, TrainingConfig
from vit_finetune.run import Diverged, Run
from vit_finetune.training.checkpoints import list_checkpoints
from vit_finetune.training.distillation import Teacher, describe_teacher
from vit_finetune.training.hardware import AS_BEFORE, Choice, Hardware, choose_hardware, estimate_memory
from vit_finetune.training.images import build_batches, keep_workers
from vit_finetune.training.imbalance import describe_classes
from vit_finetune.training.loading import Loading, choose_loading
from vit_finetune.training.range_test import PLAN, STEPS, choose_rate, run_range_test
from vit_finetune.training.world import PeerLost, World, check_undivided


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
    if recipe.training.ema_decay:
        check_undivided("training.ema_decay", os.environ)
    if recipe.model.method == "lora":
        check_undivided("model.method: lora", os.environ)
    if recipe.training.learning_rate == "auto":
        check_undivided("training.learning_rate: auto", os.environ)
    use_cpu = recipe.training.use_cpu or not torch.accelerator.is_available()
    world = World(recipe.training.ddp_timeout, use_cpu)
    try:
        with world.noticing_losses():
            yield world
    except PeerLost as lost:
        checkpoints = list_checkpoints(Run(recipe.output_dir).checkpoints)
        kept = f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
        raise PeerLost(f"{lost}. What it said, if anything, is above; {kept}. Go on with --resume") from lost


def check_method(recipe: Recipe, world: World) -> None:
    """Makes sure, before any data is read, that the model can be trained by the recipe's `model.method`.

    Raises:
        RunError: LoRA's library is not installed, or its targets match nothing.
    """
    if recipe.model.method == "lora":
        import_peft()
        with world.one_per_machine_first():  # it may have to be downloaded
            skeleton = load_skeleton(recipe.model)
        check_targets(skeleton, recipe.model.lora_targets)


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
    recipe: Recipe,
    model: PreTrainedModel,
    world: World,
    before: dict[str, Any] | None = None,
    teacher: Teacher | None = None,
) -> Hardware:
    """What to use of the machine, the same in every process."""
    is_probe = recipe.model.method == "linear_probe"  # which has no batches, and nothing that it went on from
    hardware: Hardware = world.from_main(
        choose_hardware(
            recipe.training,
            recipe.model,
            model,
            None if is_probe else before,
            world.size,
            teacher and teacher.model,
        )
    )
    hardware.choices += describe_teacher(teacher, recipe.training)
    if is_probe:
        hardware.choices = [choice for choice in hardware.choices if choice.name != "batch"]
    model.set_attn_implementation(hardware.attn_implementation)
    if teacher and hardware.attn_implementation == "eager":  # which all have
        teacher.model.set_attn_implementation("eager")
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


def plan_learning_rate(
    recipe: Recipe,
    data: PreparedData,
    train: TrainingImages,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    hardware: Hardware,
    loading: Loading,
    world: World,
    before: dict[str, Any] | None = None,
    teacher: Teacher | None = None,
) -> tuple[TrainingConfig, dict[str, Any]]:
    """The section `training:` with a number for its learning rate, and what a range test saw.

    Where the recipe says `auto`, the test finds it, or the run to resume has had it found; said aloud as the
    machine's choices are, which it joins. The same in every process. What was seen are facts by name.

    Raises:
        RunError: the loss falls at no rate.
    """
    training = recipe.training
    if training.learning_rate != "auto":
        return training, {}
    if before:
        (rate,) = (c["value"] for c in before["choices"] if c["name"] == "learning rate")
        choice, facts = Choice("learning rate", rate, AS_BEFORE), {}
    else:
        say(f"learning rate: {PLAN}")
        tested = training.model_copy(update={"max_steps": STEPS})
        batches = build_batches(
            data, image_processor, recipe.augmentation, tested, hardware, loading, world, None
        )
        mixing = build_mixing(recipe.augmentation, len(data.labels))
        with progress("range test", STEPS, "steps") as advance, naming_loader_errors():
            curve = run_range_test(
                model,
                image_processor,
                training,
                hardware,
                loading,
                batches or train,
                mixing,
                teacher,
                advance,
            )
        facts = {"range_test": curve.facts(choose_rate(curve))}
        reason = f"the middle of the loss's longest descent in a range test of {len(curve.rates)} steps"
        choice = Choice("learning rate", f"{facts['range_test']['chosen']:.2g}", reason)
    hardware.choices.append(choice)
    say(f"{choice.name}: {choice.value} ({choice.reason})")
    return training.model_copy(update={"learning_rate": float(choice.value)}), facts


def show_plan(
    recipe: Recipe,
    data: PreparedData,
    model: PreTrainedModel,
    hardware: Hardware,
    world: World,
    teacher: Teacher | None = None,
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
    tested = recipe.training.learning_rate == "auto"
    fixed, each = estimate_memory(model, recipe.training.ema_decay > 0, teacher and teacher.model, tested)
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


def validation_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The validation images' scores by name, from the Trainer's predictions.

    Raises:
        Diverged: the model answers with NaN or infinity.
    """
    if not np.isfinite(prediction.predictions).all():
        raise Diverged(
            "training diverged: the model answers with NaN or infinity. Lower training.learning_rate, or "
            "raise training.warmup_steps"
        )
    if prediction.label_ids.ndim == 2:  # images may have several labels: F1 is that at 0.5
        return compute_multi_label_metrics(prediction.label_ids, expit(prediction.predictions))
    return compute_label_metrics(prediction.predictions.argmax(axis=-1), prediction.label_ids)
