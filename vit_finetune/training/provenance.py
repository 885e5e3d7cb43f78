"""Where a run came from: what `provenance.json` says."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import yaml
from transformers import PreTrainedModel

from vit_finetune.data.splits.prepared import PreparedData
from vit_finetune.model.loading import describe_model
from vit_finetune.recipe import Recipe
from vit_finetune.run import RunError
from vit_finetune.training.hardware import Hardware, describe_hardware, peak_memory
from vit_finetune.training.loading import Loading, describe_waiting
from vit_finetune.training.trainer import ViTTrainer
from vit_finetune.training.world import division_of

PACKAGES = [
    "vit-finetune",
    "torch",
    "torchvision",
    "transformers",
    "datasets",
    "accelerate",
    "evaluate",
    "huggingface-hub",
    "numpy",
    "pillow",
    "scikit-learn",
    "simplejpeg",
]
"""Packages whose versions can change a result."""


def describe_start(
    recipe: Recipe,
    data: PreparedData,
    model: PreTrainedModel,
    hardware: Hardware,
    processes: int,
    command: str | None,
    before: dict[str, Any] | None,
) -> dict[str, Any]:
    """What is known before the first step: versions, hardware, choices, data with fingerprints, model.

    Args:
        recipe: what is done.
        data: on which images.
        model: what is trained.
        hardware: what was chosen.
        processes: how many train together.
        command: how the user said it.
        before: provenance of the run that is resumed.

    Raises:
        RunError: the images are not those that the run to resume was started with.
    """
    facts = {
        "created": before["created"] if before else datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command or f"finetune(load_recipe({recipe.name!r}))",
        "recipe_name": recipe.name,
        "recipe": yaml.safe_load(recipe.to_yaml(resolved=False)),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES},
        "hardware": describe_hardware(hardware.use_cpu, processes) | {"division": division_of(os.environ)},
        "choices": [asdict(choice) for choice in hardware.choices],
        "seed": recipe.training.seed,
        "images_per_step": processes * hardware.batch_size * hardware.accumulation,
        "data": data.describe(recipe.data.path),
        "labels": data.labels,
        "model": describe_model(model) | {"base_model": recipe.model.path, "method": recipe.model.method},
    }
    if before and _fingerprints(before["data"]) != _fingerprints(facts["data"]):
        raise RunError(
            f"{recipe.data.path}: the images are not those that the run was started with, so it cannot be "
            f"resumed. Start another run with training.output_dir=…"
        )
    return (before or {}) | facts  # what was spent so far stays, also where this session is killed


def _fingerprints(data: dict[str, Any]) -> dict[str, tuple[int | None, str]]:
    return {name: (split.get("num_images"), split["fingerprint"]) for name, split in data["splits"].items()}


def describe_training(
    trainer: ViTTrainer,
    metrics: dict[str, float],
    hardware: Hardware,
    loading: Loading,
    before: dict[str, Any] | None,
) -> dict[str, Any]:
    """What is known after the last step: seconds, images per second (whole loop), bytes, best checkpoint.

    `train_seconds` are those of all sessions of a run that was resumed; the rest is of the last that trained.

    Args:
        trainer: after training.
        metrics: that it answered.
        hardware: what was chosen for the machine.
        loading: likewise.
        before: provenance of the run that was resumed.
    """
    seconds = trainer.seconds | {"total": metrics["train_runtime"]}
    images = trainer.seen_images
    state, average = trainer.state, trainer.average
    chosen = trainer.args.load_best_model_at_end  # else the last weights are kept, whatever scored best
    facts = {
        "train_seconds": round(metrics["train_runtime"] + (before or {}).get("train_seconds", 0.0), 2),
        "images_per_second": round(metrics["train_samples_per_second"], 2),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "speeds": asdict(loading.speeds),
        "verdict": describe_waiting(loading, images, seconds, hardware.use_cpu),
        "peak_memory_bytes": peak_memory(hardware.use_cpu),
        "steps": state.global_step,
        "best_step": state.best_global_step if chosen else None,
        "best_metric": {"name": trainer.args.metric_for_best_model, "value": state.best_metric}
        if chosen
        else None,
        "ema": {"decay": average.decay, "last_decay": average.last_decay} if average else None,
    }
    if before and not images:  # all was trained already, and only scoring was left to do
        facts |= {name: before[name] for name in facts if name in before}
    return facts
