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
from vit_finetune.data.images import decode_image
from vit_finetune.data.sources.folders import ALL
from vit_finetune.data.sources.labels import multi_hot
from vit_finetune.data.sources.webdataset import read_encoded
from vit_finetune.data.transforms import EvaluationImages, collate, normalize, resize
from vit_finetune.evaluation.images import spread_rows
from vit_finetune.evaluation.multi_label import read_thresholds
from vit_finetune.evaluation.scoring import probabilities_of, scoring_mode
from vit_finetune.evaluation.target import open_images
from vit_finetune.model.loading import is_multi_label
from vit_finetune.model.processing import processor_size
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
    """The validation images of the same source, for the ranges of int8."""


def open_compared(
    target: str,
    data: str | None,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    calibrated: bool,
) -> ComparedImages:
    """The run's test split, or that of other images; of a model without images random pixels.

    Args:
        target: a run, a model folder or a Hub id, as a person named it.
        data: a data source, or None.
        model: that `target` is.
        image_processor: the model's.
        calibrated: whether validation images are needed too.

    Raises:
        RunError: images that are not there, have changed or have other classes; no validation images.
    """
    if data is None and not Run(target).exists():
        if calibrated:
            raise RunError(
                f"{target} is a model, not a run: --quantize needs validation images to find the ranges of "
                f"int8 on, and test images to compare on. Say which with --data PATH"
            )
        return _random_images(image_processor)
    found = open_images(target, data, ["test", "validation"] if calibrated else ["test"], model)
    if calibrated and ALL in found:
        raise RunError(
            f"{data}: there are no splits; --quantize finds the ranges of int8 on validation images, which "
            f"must not be those that are compared. Expected folders validation/ and test/"
        )
    whose = "the run's test split" if data is None else "the test images of --data"
    split = found.get("test") or found[ALL]
    items = EvaluationImages(split, image_processor)
    return ComparedImages(
        items,
        lambda row: read_encoded(items.files.images[row]["image"]),
        "all images of --data" if ALL in found else whose,
        multi_hot(items.labels, model.config.num_labels)
        if is_multi_label(model)
        else np.asarray(items.labels),
        found.get("validation"),
    )


def _random_images(image_processor: BaseImageProcessor) -> ComparedImages:
    """Noise, of another size than the model's, so that fitting it to the model is compared too."""
    height, width = processor_size(image_processor)
    generator = np.random.default_rng(0)
    files = []
    for _ in range(RANDOM_IMAGES):
        pixels = generator.integers(0, 256, (height + 9, width + 33, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=0)
        files.append(file.getvalue())
    items = [{"pixel_values": resize(decode_image(file), image_processor), "labels": -1} for file in files]
    return ComparedImages(items, files.__getitem__, "random pixels", None)


def calibration_batches(
    images: datasets.Dataset, image_processor: BaseImageProcessor, description: str
) -> Iterator[np.ndarray]:
    """Up to 256 images to calibrate on, spread over a split, float32 `(batch, 3, height, width)`."""
    items = EvaluationImages(images, image_processor)
    rows = spread_rows(len(items), CALIBRATED_ON)
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
