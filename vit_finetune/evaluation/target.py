"""What is to be scored: a run's or a saved model, and the images to score it on."""

from __future__ import annotations

from collections.abc import Sequence
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
        config = config or load_recipe(run.recipe).evaluation
    model, image_processor = load_checkpoint(str(run.model if run.exists() else target))
    [(split, images)] = open_images(target, data, [split], model).items()
    return Target(model.to(best_device()), image_processor, images, split, config or EvaluationConfig())


def open_images(
    target: str | Path, data: str | None, splits: Sequence[str], model: PreTrainedModel
) -> dict[str, datasets.Dataset]:
    """Images by the name of their split: columns id, image and label, whose ids are the model's.

    Args:
        target: whose images, as for `open_target`.
        data: a data source; the run's own if None. One without splits is given whole, as `all`, alone.
        splits: of train, validation and test those that are wanted.
        model: that `target` is.

    Raises:
        RunError: no such split, images of a run that have changed, or classes that are not the model's.
    """
    run = Run(target)
    labels = [model.config.id2label[number] for number in range(model.config.num_labels)]
    if data is not None:
        own = load_recipe(run.recipe).data if run.exists() else None
        other = other_data(own, data, labels if is_multi_label(model) else None)
        with quiet_client():
            found = leave_out_unreadable(load_source(other), other).splits
        wanted = [ALL] if list(found) == [ALL] else splits
        images = {split: take_split(found, split, data) for split in wanted}
    elif run.exists():
        images = {split: own_split(run, split) for split in splits}
    else:
        raise RunError(f"{target} is a model, not a run: say which images to score it on with --data PATH")
    for one in images.values():
        check_labels(labels, one, data or str(target))
    return {split: with_labels(one, labels) for split, one in images.items()}


def best_device() -> torch.device:
    """The accelerator, or else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")
