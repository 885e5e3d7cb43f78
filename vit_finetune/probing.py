"""A linear probe in the place of training: features once, then the head, fitted in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BaseImageProcessor, PreTrainedModel

from vit_finetune.console import say
from vit_finetune.data.sources.archives import cache_dir
from vit_finetune.data.sources.columns import column_values
from vit_finetune.data.splits.prepared import PreparedData
from vit_finetune.model.head import head_of
from vit_finetune.recipe import Recipe
from vit_finetune.run import RunError
from vit_finetune.training.features import FeatureStore, compute_features, feature_folder
from vit_finetune.training.hardware import Choice, Hardware, peak_memory
from vit_finetune.training.probe import Probe, fit_probe

USED = ("output_dir", "seed", "bf16", "fp16", "use_cpu", "metric_for_best_model")
"""Keys of `training:` that a linear probe has a use for."""


def check_probe(recipe: Recipe, model: PreTrainedModel, processes: int) -> None:
    """Says which keys of the recipe a linear probe does not use.

    Raises:
        RunError: it cannot be fitted to this model, or by several processes.
    """
    head_of(model)
    if processes > 1:
        raise RunError(
            f"a linear probe is fitted by one process, and there are {processes}: start it without a launcher"
        )
    unused = [f"augmentation.{name}" for name in sorted(recipe.augmentation.model_fields_set)]
    unused += [f"training.{name}" for name in sorted(recipe.training.model_fields_set - set(USED))]
    if unused:
        say(f"not used by a linear probe: {', '.join(unused)}")


def probe(
    recipe: Recipe,
    data: PreparedData,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    hardware: Hardware,
    scores: Callable[[np.ndarray, np.ndarray], dict[str, float]],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Fits the model's head; answers what was tried, for `history.json`, and facts for the provenance.

    Args:
        recipe: what to do.
        data: the splits.
        model: with a new head, which becomes the fitted one.
        image_processor: the model's.
        hardware: what was chosen for the machine.
        scores: from predicted and true class ids to scores by name.
    """
    start = time.perf_counter()
    kept = recipe.data.cache
    base = None if kept == "off" else cache_dir() if kept == "auto" else Path(kept).expanduser()
    store = FeatureStore(base and feature_folder(base, model, image_processor, hardware))
    features, labels = {}, {}
    for name in ("train", "validation"):
        split = data.splits[name]
        labels[name] = np.asarray(column_values(split, "label"))
        features[name] = compute_features(
            model, image_processor, split, name, hardware, recipe.evaluation.batch_size, store
        )
    computed = time.perf_counter()
    fitted = fit_probe(
        features["train"], labels["train"], features["validation"], labels["validation"],
        len(data.labels), recipe.training.metric_for_best_model, scores,
    )  # fmt: skip
    fitted.put_into(head_of(model))
    ended = time.perf_counter()
    _tell(fitted, recipe.training.metric_for_best_model)
    hardware.choices.append(_penalty(fitted, recipe.training.metric_for_best_model))
    seconds = {"features": computed - start, "fitting": ended - computed, "total": ended - start}
    return fitted.history, {
        "choices": [asdict(choice) for choice in hardware.choices],
        "train_seconds": round(ended - start, 2),
        "images_per_second": round(len(labels["train"]) / (ended - start), 2),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "verdict": f"time: {seconds['features']:.1f} s for the features, {seconds['fitting']:.1f} s for the "
        f"head" + (f"; the features are kept in {store.folder}" if store.folder else ""),
        "peak_memory_bytes": peak_memory(hardware.use_cpu),
    }


def _penalty(fitted: Probe, metric: str) -> Choice:
    reason = f"of {len(fitted.history)}, the best by the validation split's {metric.replace('_', ' ')}"
    return Choice("penalty of the head's weights", f"{fitted.penalty:.2g}", reason)


def _tell(fitted: Probe, metric: str) -> None:
    for entry in fitted.history:
        chosen = "  ← chosen" if entry["penalty"] == fitted.penalty else ""
        say(
            f"penalty {entry['penalty']:<8.2g} validation: accuracy {entry['eval_accuracy']:.4f}, "
            f"loss {entry['eval_loss']:.4f}{chosen}"
        )
