"""What is to be scored: a run's or a saved model, and the images to score it on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from transformers import BaseImageProcessor, PreTrainedModel

from vit_finetune.data.checkup.checkup import leave_out_unreadable
from vit_finetune.data.sources.folders import ALL
from vit_finetune.data.sources.labels import with_labels
from vit_finetune.data.sources.source import load_source
from vit_finetune.evaluation.images import check_labels, other_data, own_split, take_split
from vit_finetune.hub_repos import quiet_client
from vit_finetune.model.loading import is_multi_label, load_checkpoint
from vit_finetune.recipe import EvaluationConfig, load_recipe
from vit_finetune.run import Run, RunError


@dataclass(frozen=True)
class Target:
    """A model on the device to compute on, and the images of a split with its labels."""

    model: PreTrainedModel
    image_processor: BaseImageProcessor
    images: datasets.Dataset
    """Columns id, image and label; the labels' ids are the model's."""
    split: str
    config: EvaluationConfig


def open_target(
    target: str | Path, data: str | None, split: str, config: EvaluationConfig | None = None
) -> Target:
    """What `vit-finetune evaluate` scores.

    Args:
        target: a run folder, a model folder or a Hub id (`owner/name`, `owner/name@revision`).
        data: a data source as in `data.path`; the run's own if None.
        split: train, validation or test; a source without splits is scored whole, as `all`.
        config: how to score; the run's own if None.

    Raises:
        RunError: no model there, no such split, or classes that are not the model's.
    """
    run = Run(target)
    if run.exists():
        recipe = load_recipe(run.recipe)
        own, config = recipe.data, config or recipe.evaluation
        model, image_processor = load_checkpoint(str(run.model))
    else:
        own = None
        model, image_processor = load_checkpoint(str(target))
    labels = [model.config.id2label[number] for number in range(model.config.num_labels)]
    if data is None:
        if own is None:
            raise RunError(
                f"{target} is a model, not a run: say which images to score it on with --data PATH"
            )
        images = own_split(run, split)
    else:
        other = other_data(own, data, labels if is_multi_label(model) else None)
        with quiet_client():
            splits = leave_out_unreadable(load_source(other), other).splits
        split = ALL if list(splits) == [ALL] else split
        images = take_split(splits, split, data)
    check_labels(labels, images, data or str(target))
    images = with_labels(images, labels)
    return Target(model.to(best_device()), image_processor, images, split, config or EvaluationConfig())


def best_device() -> torch.device:
    """The accelerator, or else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")
