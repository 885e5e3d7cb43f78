"""What tests of exactness share: trainers as `finetune` builds them, killed, resumed and compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_VIT
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from vit_finetune.data.augmentation import generator_of
from vit_finetune.data.batches import EpochSampler
from vit_finetune.data.mixing import build_mixing
from vit_finetune.data.sources.labels import label_names
from vit_finetune.data.splits.carving import load_splits
from vit_finetune.data.transforms import EvaluationImages, TrainingImages, collate, normalize
from vit_finetune.model.adaptation import adapt
from vit_finetune.model.loading import load_model
from vit_finetune.planning import validation_metrics
from vit_finetune.recipe import Recipe
from vit_finetune.training.arguments import build_arguments
from vit_finetune.training.checkpoints import list_checkpoints
from vit_finetune.training.distillation import load_teacher
from vit_finetune.training.hardware import choose_hardware
from vit_finetune.training.loading import choose_loading
from vit_finetune.training.trainer import ViTTrainer

DROPOUT = {"config": {**TINY_VIT, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.1}}
EPSILON = 1e-4
"""Of Adam, where float sums in another order are compared: the keys' biases have a gradient of zero but for rounding,
and a small epsilon turns that noise into steps."""
AUGMENTED = {"policy": "trivialaugment", "random_erasing": 0.3}


def build_trainer(recipe: Recipe, output_dir: Path, callbacks: Any = None) -> ViTTrainer:
    """The recipe's trainer, as `finetune` builds it."""
    splits = load_splits(recipe.data)
    torch.manual_seed(recipe.training.seed)
    labels = label_names(splits["train"])
    model, processor = load_model(recipe.model, labels, multi_label=recipe.data.multi_label)
    adapt(model, recipe.model)
    hardware = choose_hardware(recipe.training, recipe.model, model)
    images = TrainingImages(
        splits["train"],
        processor,
        recipe.augmentation,
        recipe.training.seed,
        recipe.data.balanced_sampling,
    )
    loading = choose_loading(recipe.training, "off", images, model, hardware)
    return ViTTrainer(
        model,
        processor,
        build_arguments(recipe.training, hardware, loading, output_dir, recipe.evaluation.batch_size),
        images,
        EvaluationImages(splits["validation"], processor),
        compute_metrics=validation_metrics,
        mixing=build_mixing(recipe.augmentation, model.config.num_labels),
        teacher=load_teacher(recipe.training, labels),
        callbacks=callbacks,
    )


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(value.equal(right[name]) for name, value in left.items())


class Diary(TrainerCallback):  # type: ignore[misc]
    """Keeps the live weights of every step."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **_: Any) -> None:
        self.steps[state.global_step] = weights_of(model)


class Killed(Exception):
    """Stands for the end of a process in the middle of training."""


class KillAt(TrainerCallback):  # type: ignore[misc]
    """Ends training without ceremony at the start of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise Killed


EVERY_SECOND = {
    f"{what}_{how}": value
    for what in ("save", "eval")
    for how, value in (("strategy", "steps"), ("steps", 2))
}
"""Saved and evaluated every second step."""


def with_and_without_a_break(
    build: Callable[..., ViTTrainer], folder: Path, kill_at: int
) -> tuple[ViTTrainer, ViTTrainer]:
    """A trainer that ran without a break, and one that was killed and went on from its newest checkpoint.

    Args:
        build: a new trainer of one and the same recipe, from where it writes to and its callbacks.
        folder: where they write to, below `whole` and `killed`.
        kill_at: number of the step that is not begun any more.
    """
    whole = build(folder / "whole")
    whole.train()
    killed = build(folder / "killed", [KillAt(kill_at)])
    with pytest.raises(Killed):
        killed.train()
    torch.manual_seed(999)  # another process begins with other random numbers
    resumed = build(folder / "killed")
    newest = list_checkpoints(folder / "killed")[-1]
    assert kill_at - killed.args.save_steps < int(newest.name.split("-")[1]) <= kill_at
    resumed.train(resume_from_checkpoint=str(newest))
    return whole, resumed


PLAIN = {
    "weight_decay": 0.0,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "warmup_steps": 0,
    "adam_epsilon": EPSILON,
}
"""What of our section `training:` is as `train_plainly` trains; its groups differ but without weight decay."""


def train_plainly(start: ViTTrainer, folder: Path) -> PreTrainedModel:
    """The model after transformers' own Trainer, with the model's own loss, has had the same batches.

    Args:
        start: ours, before it trains: a recipe with `PLAIN`.
        folder: where theirs writes to.
    """
    seed, processor = start.args.seed, start.image_processor

    class PlainTrainer(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
            return EpochSampler(len(self.train_dataset), seed)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            numbers = generator_of(seed, self.state.global_step, "batch 0")
            torch.manual_seed(numbers.getrandbits(63))  # dropout's, which ours takes from seed and step
            return super().training_step(*args, **kwargs)

    def collate_normalized(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(items)
        return {**batch, "pixel_values": normalize(batch["pixel_values"], processor)}

    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=2, per_device_train_batch_size=4, learning_rate=3e-3,
        weight_decay=0.0, lr_scheduler_type="cosine", use_cpu=True, report_to="none", remove_unused_columns=False,
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, adam_epsilon=EPSILON,
    )  # fmt: skip
    plain = PlainTrainer(
        start.model, arguments, train_dataset=start.train_dataset, data_collator=collate_normalized
    )
    with contextlib.redirect_stdout(None):
        plain.train()
    return plain.model
