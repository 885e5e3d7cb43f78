"""Single images and folders of them → classes with probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import BaseImageProcessor

from vit_finetune.data.images import UnreadableImage, decode_image
from vit_finetune.data.sources.folders import is_image_name, walk_files
from vit_finetune.data.transforms import resize
from vit_finetune.evaluation.calibration import temper, temperature_of
from vit_finetune.evaluation.multi_label import read_thresholds
from vit_finetune.evaluation.scoring import best_device, predict_logits, probabilities_of
from vit_finetune.model.loading import is_multi_label, load_checkpoint
from vit_finetune.run import Run, RunError


class FileImages(Dataset[dict[str, Any]]):
    """Image files as a model sees them: items hold `pixel_values`, uint8 `(3, height, width)`.

    Args:
        paths: of the files.
        image_processor: the model's.
    """

    def __init__(self, paths: Sequence[Path], image_processor: BaseImageProcessor) -> None:
        self.paths, self.image_processor = paths, image_processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.read(index), "labels": -1}

    def read(self, index: int) -> torch.Tensor:
        """One image at the model's size, uint8 `(3, height, width)`.

        Raises:
            RunError: it cannot be opened, or is no image.
        """
        path = self.paths[index]
        try:
            return resize(decode_image(path.read_bytes()), self.image_processor)
        except UnreadableImage as error:
            raise RunError(f"{path}: cannot be read: {error}") from None
        except OSError as error:
            raise RunError(f"{path}: cannot be opened: {error.strerror}") from None


def find_images(images: Sequence[str | Path]) -> list[Path]:
    """Image files, and those in folders, however deep.

    Raises:
        RunError: one is not there, or a folder has none.
    """
    paths: list[Path] = []
    for image in map(Path, images):
        if image.is_dir():
            found = [image / name for name in walk_files(image) if is_image_name(name)]
            if not found:
                raise RunError(f"{image}: there are no images in this folder")
            paths += found
        elif image.is_file():
            paths.append(image)
        else:
            raise RunError(f"{image}: no such file or folder")
    return paths


def predict(
    target: str | Path, images: Sequence[str | Path], top: int = 5, calibrated: bool = False
) -> list[dict[str, Any]]:
    """The most probable classes of images.

    Args:
        target: a run folder, a model folder or a Hub id.
        images: image files, and folders whose image files are taken, however deep.
        top: how many classes for each.
        calibrated: whether the logits are divided by the model's temperature.

    Returns:
        For each image `path`, and `predictions`: `label` and `probability` in [0, 1], the most probable
        first. Of a model for several labels, each with its `threshold`, and `labels`: the names of all that
        reach theirs, in id order.

    Raises:
        RunError: no model there, or it has no temperature; or an image that is missing or cannot be read.
    """
    paths = find_images(images)
    run = Run(target)
    model, image_processor = load_checkpoint(str(run.model if run.exists() else target))
    temperature = temperature_of(model.config, str(target)) if calibrated else None
    model = model.to(best_device())
    files = FileImages(paths, image_processor)
    logits = predict_logits(model, image_processor, files, 32, "predicting")
    rows = torch.from_numpy(temper(logits, temperature) if temperature else probabilities_of(logits, model))
    thresholds = read_thresholds(model.config).tolist() if is_multi_label(model) else None
    names = model.config.id2label
    answers: list[dict[str, Any]] = []
    for path, row in zip(paths, rows):
        values, classes = row.topk(min(top, len(row)))
        predictions = [
            {"label": names[number], "probability": value}
            for number, value in zip(classes.tolist(), values.tolist())
        ]
        answer: dict[str, Any] = {"path": str(path), "predictions": predictions}
        if thresholds is not None:
            for prediction, number in zip(predictions, classes.tolist()):
                prediction["threshold"] = thresholds[number]
            pairs = enumerate(zip(row.tolist(), thresholds))
            answer["labels"] = [names[number] for number, (value, threshold) in pairs if value >= threshold]
        answers.append(answer)
    return answers
