"""What an exported file is compared with its model on; how its answers differ, and how right they are."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from transformers import BaseImageProcessor, PreTrainedModel

from vit_finetune.console import progress
from vit_finetune.data.checkup.checkup import leave_out_unreadable
from vit_finetune.data.images import decode_image
from vit_finetune.data.sources.folders import ALL
from vit_finetune.data.sources.labels import multi_hot, with_labels
from vit_finetune.data.sources.source import load_source
from vit_finetune.data.sources.webdataset import read_encoded
from vit_finetune.data.transforms import EvaluationImages, collate, normalize, resize
from vit_finetune.evaluation.images import check_labels, other_data, own_split, take_split
from vit_finetune.evaluation.multi_label import read_thresholds
from vit_finetune.evaluation.scoring import probabilities_of, scoring_mode
from vit_finetune.hub_repos import quiet_client
from vit_finetune.model.loading import is_multi_label
from vit_finetune.recipe import load_recipe
from vit_finetune.run import Run, RunError, wilson_interval

MODEL = "torch"
"""What the model itself is called beside its files."""
BATCH = 32
"""Images that are read at a time."""
CALIBRATED_ON = 256
"""Images, at most, that the ranges of int8 are found on."""
RANDOM_IMAGES = 64
"""How many images of random pixels stand in where there are none."""

Answers = Mapping[str, Callable[[torch.Tensor], np.ndarray]]
"""What answers, by name: from float32 `(batch, 3, height, width)` to logits, float32 `(batch, classes)`."""


@dataclass(frozen=True)
class ComparedImages:
    """What a model and its files are compared on."""

    items: Any
    """A dataset whose items are as those of `EvaluationImages`."""
    encoded: Callable[[int], bytes]
    """The file of an image, by its row."""
    source: str
    """Where they come from, in words without paths."""
    labels: np.ndarray | None
    """Class ids `(images,)`; of several labels 1 for each that an image has, `(images, classes)`.

    None of random pixels."""
    calibration: datasets.Dataset | None = None
    """Other images than these, for the ranges of int8."""


def open_compared(
    target: str,
    data: str | None,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    calibrated: bool,
) -> ComparedImages:
    """The run's test split, or those of other images; of a model without images random pixels.

    Args:
        target: a run, a model folder or a Hub id, as a person named it.
        data: a data source, or None.
        model: that `target` is.
        image_processor: the model's.
        calibrated: whether validation images are needed too.

    Raises:
        RunError: images that are not there, have changed or have other classes; no validation images.
    """
    run = Run(target)
    own = load_recipe(run.recipe).data if run.exists() else None
    labels = [model.config.id2label[number] for number in range(model.config.num_labels)]
    several = is_multi_label(model)
    splits: Mapping[str, datasets.Dataset] = {}
    if data is not None:
        other = other_data(own, data, labels if several else None)
        with quiet_client():
            splits = leave_out_unreadable(load_source(other), other).splits
        name = ALL if list(splits) == [ALL] else "test"
        split = take_split(splits, name, data)
        source = "all images of --data" if name == ALL else "the test images of --data"
    elif run.exists():
        split, source = own_split(run, "test"), "the run's test split"
    elif calibrated:
        raise RunError(
            f"{target} is a model, not a run: --quantize needs images to find the ranges of int8 on, and "
            f"others to compare on. Say which with --data PATH, a source with validation and test images"
        )
    else:
        return _random_images(image_processor)
    check_labels(labels, split, data or target)
    items = EvaluationImages(with_labels(split, labels), image_processor)
    return ComparedImages(
        items,
        lambda row: read_encoded(items.files.images[row]["image"]),
        source,
        multi_hot(items.labels, len(labels)) if several else np.asarray(items.labels),
        _validation(run, target, splits) if calibrated else None,
    )


def _validation(run: Run, target: str, splits: Mapping[str, datasets.Dataset]) -> datasets.Dataset:
    """The validation images of `--data` where it has them, else the run's; never those that are compared."""
    if "validation" in splits:
        return splits["validation"]
    if not run.exists():
        raise RunError(
            f"{target} is a model, not a run, and --data has no validation images, which --quantize needs to "
            f"find the ranges of int8 on. Expected a source with validation and test images"
        )
    return own_split(run, "validation")


def _random_images(image_processor: BaseImageProcessor) -> ComparedImages:
    """Noise, of another size than the model's, so that fitting it to the model is compared too."""
    height, width = input_size(image_processor)
    generator = np.random.default_rng(0)
    files = []
    for _ in range(RANDOM_IMAGES):
        pixels = generator.integers(0, 256, (height + 9, width + 33, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=0)
        files.append(file.getvalue())
    items = [{"pixel_values": resize(decode_image(file), image_processor), "labels": -1} for file in files]
    return ComparedImages(items, files.__getitem__, "random pixels", None)


def input_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width in pixels of what an image processor makes of any image."""
    height, width = resize(torch.zeros(3, 50, 70, dtype=torch.uint8), image_processor).shape[-2:]
    return height, width


def spread(total: int, most: int) -> list[int]:
    """Up to `most` of `total` rows, evenly spread."""
    rows: list[int] = np.linspace(0, total - 1, min(most, total)).astype(int).tolist()
    return rows


def calibration_batches(
    images: ComparedImages, image_processor: BaseImageProcessor, description: str
) -> Iterator[np.ndarray]:
    """Up to 256 images to calibrate on, spread over the split, float32 `(batch, 3, height, width)`."""
    assert images.calibration is not None
    items = EvaluationImages(images.calibration, image_processor)
    rows = spread(len(items), CALIBRATED_ON)
    loader = DataLoader(Subset(items, rows), batch_size=BATCH, collate_fn=collate)
    with progress(description, len(rows), "images") as advance:
        for batch in loader:
            yield normalize(batch["pixel_values"], image_processor).numpy()
            advance(len(batch["pixel_values"]))


# --------------------------------------------------------------------------- how answers differ


def answer_all(
    answers: Answers, images: ComparedImages, model: PreTrainedModel, image_processor: BaseImageProcessor
) -> dict[str, np.ndarray]:
    """The logits of all that answer, by name, float32 `(images, classes)`; every image is read once.

    Raises:
        RunError: the model answers with NaN or infinity.
    """
    rows: dict[str, list[np.ndarray]] = {name: [] for name in answers}
    loader = DataLoader(images.items, batch_size=BATCH, collate_fn=collate)
    with scoring_mode(model), progress("comparing", len(images.items), "images") as advance:
        for batch in loader:
            pixel_values = normalize(batch["pixel_values"], image_processor)
            for name, answer in answers.items():
                rows[name].append(answer(pixel_values))
            advance(len(pixel_values))
    logits = {name: np.concatenate(parts) for name, parts in rows.items()}
    if not np.isfinite(logits[MODEL]).all():
        raise RunError("the model answers with NaN or infinity: its weights are broken. Nothing was written")
    return logits


def largest_difference(model: PreTrainedModel, expected: np.ndarray, found: np.ndarray) -> float:
    """Of a probability, between the logits of the model and others, both `(images, classes)`."""
    return float(np.abs(probabilities_of(expected, model) - probabilities_of(found, model)).max())


def compare_answers(
    model: PreTrainedModel, expected: np.ndarray, found: np.ndarray, labels: np.ndarray | None
) -> dict[str, Any]:
    """How answers differ from the model's, and how right they are where the labels are known.

    Args:
        model: whose they are.
        expected: its logits, `(images, classes)`.
        found: a file's, likewise.
        labels: as in `ComparedImages`.

    Returns:
        `largest_difference` of a probability; `changed_predictions`, a number of images; and `accuracy` or of
        several labels `exact_match`, each with its 95% Wilson interval.
    """
    facts: dict[str, Any] = {"largest_difference": largest_difference(model, expected, found)}
    theirs, ours = probabilities_of(expected, model), probabilities_of(found, model)
    if is_multi_label(model):
        thresholds = read_thresholds(model.config)
        facts["changed_predictions"] = int(((ours >= thresholds) != (theirs >= thresholds)).any(axis=1).sum())
        right = None if labels is None else ((ours >= thresholds) == labels.astype(bool)).all(axis=1)
        score = "exact_match"
    else:
        facts["changed_predictions"] = int((ours.argmax(axis=1) != theirs.argmax(axis=1)).sum())
        right = None if labels is None else ours.argmax(axis=1) == labels
        score = "accuracy"
    if right is not None:
        facts[score] = float(right.mean())
        facts[f"{score}_interval"] = list(wilson_interval(int(right.sum()), len(right)))
    return facts
