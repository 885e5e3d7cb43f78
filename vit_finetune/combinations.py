"""Keys of different sections that do not go together, found out before any data is touched."""

from __future__ import annotations

from typing import Protocol

from vit_finetune.sections import AugmentationConfig, DataConfig, EvaluationConfig, ModelConfig
from vit_finetune.training_section import METRICS, MULTI_LABEL_METRICS, TrainingConfig

PROBED_WITHOUT = {
    "augmentation": ("mixup_alpha", "cutmix_alpha"),
    "data": ("balanced_sampling", "streaming"),
    "training": ("ema_decay", "class_weights", "focal_gamma", "early_stopping_patience", "teacher"),
}
"""Keys, by section, that `model.method: linear_probe` does not go with."""

ONE_CLASS_ONLY = {
    "augmentation": {"mixup_alpha": "0", "cutmix_alpha": "0"},
    "training": {
        "label_smoothing_factor": "0",
        "class_weights": "null",
        "focal_gamma": "0",
        "teacher": "null",
    },
    "evaluation": {"calibrate": "false"},
}
"""Keys, by section, about classes of which an image has exactly one, and how they are switched off:
`data.multi_label` refuses them."""


class Sections(Protocol):
    """A recipe, as far as it is looked at here."""

    data: DataConfig
    augmentation: AugmentationConfig
    model: ModelConfig
    training: TrainingConfig
    evaluation: EvaluationConfig


def check_combinations(recipe: Sections) -> None:
    """Makes sure that what a recipe asks for can be done together.

    Raises:
        ValueError: what cannot, and what to write instead.
    """
    _check_labels(recipe)
    _check_probe(recipe)
    _check_lora(recipe)
    _check_readings(recipe)


def _check_labels(recipe: Sections) -> None:
    """Everything goes with the number of labels that an image may have."""
    several, metric = recipe.data.multi_label, recipe.training.metric_for_best_model
    words = MULTI_LABEL_METRICS if several else METRICS
    if metric not in words:
        images = "may have several labels" if several else "have one class (data.multi_label is off)"
        raise ValueError(
            f"training.metric_for_best_model: there is no {metric} where images {images}: write one of "
            f"{', '.join(words)}"
        )
    if not several:
        return
    for name, keys in ONE_CLASS_ONLY.items():
        for key, off in keys.items():
            if getattr(getattr(recipe, name), key):
                raise ValueError(
                    f"{name}.{key} is about images of one class, and with data.multi_label they may have "
                    f"several labels: leave out {name}.{key}, or write {off}"
                )
    if recipe.model.method == "linear_probe":
        raise ValueError(
            "model.method=linear_probe fits a head for images of one class, and with data.multi_label they "
            "may have several labels: write model.method=head"
        )


def _check_probe(recipe: Sections) -> None:
    """A linear probe is asked for nothing that happens step by step."""
    if recipe.model.method != "linear_probe":
        return
    for name, keys in PROBED_WITHOUT.items():
        for key in keys:
            if getattr(getattr(recipe, name), key):
                raise ValueError(
                    f"{name}.{key} is about training step by step, and model.method=linear_probe fits "
                    f"its head to all images at once: leave out one of them, or write model.method=head"
                )


def _check_lora(recipe: Sections) -> None:
    """LoRA has the whole model in each process."""
    for name in ("fsdp", "deepspeed"):
        if recipe.model.method == "lora" and getattr(recipe.training, name, None):
            raise ValueError(
                f"model.method=lora needs the whole model in each process: leave out training.{name}, or "
                f"write another method"
            )


def _check_readings(recipe: Sections) -> None:
    """One key decides which images an epoch reads, and one evens the classes out."""
    for key in ("balanced_sampling", "streaming"):
        if recipe.augmentation.repeats > 1 and getattr(recipe.data, key):
            raise ValueError(
                f"augmentation.repeats and data.{key} both decide which images an epoch reads: leave out "
                f"one of them"
            )
    if recipe.training.class_weights != "auto":
        return
    if recipe.data.balanced_sampling:
        raise ValueError(
            "data.balanced_sampling and training.class_weights=auto both even the classes out, and "
            "together do it twice: leave out one of them"
        )
    if recipe.data.streaming:
        raise ValueError(
            "training.class_weights=auto counts the training images, which a stream does not hold: write "
            "the weights by name ({cat: 2.5, dog: 0.6}), or leave out data.streaming"
        )
