"""A model and a split in, a report out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from accelerate.utils import gather_object
from sklearn import metrics as sk
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import BaseImageProcessor, PreTrainedModel

from vit_finetune.console import progress
from vit_finetune.data.checkup.checkup import leave_out_unreadable
from vit_finetune.data.sources.columns import column_values
from vit_finetune.data.sources.folders import ALL
from vit_finetune.data.sources.labels import multi_hot, with_labels
from vit_finetune.data.sources.source import load_source
from vit_finetune.data.transforms import EvaluationImages, collate, cores_here, normalize
from vit_finetune.evaluation.calibration import measure_calibrated, temperature_of
from vit_finetune.evaluation.images import check_labels, other_data, own_split, take_split
from vit_finetune.evaluation.metrics import (
    build_metrics,
    calibration_bins,
    class_scores,
    expected_calibration_error,
    log_loss,
    top_k_accuracy,
)
from vit_finetune.evaluation.multi_label import build_multi_label_report, read_thresholds, tune_thresholds
from vit_finetune.files import written_whole
from vit_finetune.hub_repos import quiet_client
from vit_finetune.model.loading import is_multi_label, load_checkpoint
from vit_finetune.recipe import EvaluationConfig, load_recipe
from vit_finetune.reports import AnyReport, MultiLabelReport
from vit_finetune.run import Mistake, Report, Run, RunError, wilson_interval


@dataclass
class Scores:
    """A report and what it was computed from, row by row."""

    report: AnyReport
    ids: list[str]
    label_ids: np.ndarray
    """int64 `(images,)`; with several labels 1 where an image has one, float32 `(images, classes)`."""
    probabilities: np.ndarray
    """float32 `(images, classes)`, in label order."""
    logits: np.ndarray
    """The same before softmax or sigmoid."""

    def calibrated(self, temperature: float) -> Scores:
        """The same with a report that also tells what dividing the logits by a temperature makes of them."""
        measured = measure_calibrated(self.label_ids, self.logits, temperature)
        return replace(self, report=self.report.model_copy(update={"calibrated": measured}))

    def save_predictions(self, path: Path) -> None:
        """Writes id, label, predicted and probabilities as Parquet."""
        names = np.asarray(self.report.labels, dtype=object)
        if isinstance(self.report, MultiLabelReport):
            thresholds = [score.threshold for score in self.report.per_class.values()]
            kind: pa.DataType = pa.list_(pa.string())
            label = [names[row == 1].tolist() for row in self.label_ids]
            predicted = [names[row >= thresholds].tolist() for row in self.probabilities]
        else:
            kind = pa.string()
            label = names[self.label_ids].tolist()
            predicted = names[self.probabilities.argmax(axis=1)].tolist()
        table = pa.table(
            {
                "id": self.ids,
                "label": pa.array(label, kind),
                "predicted": pa.array(predicted, kind),
                "probabilities": list(self.probabilities),
            }
        )
        with written_whole(path) as temporary:
            pyarrow.parquet.write_table(table, temporary)


def score(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    split: datasets.Dataset,
    name: str,
    config: EvaluationConfig,
) -> Scores:
    """The report of a model on a split: each image counts once, at any batch size and number of processes.

    With several labels it is that of the thresholds in the model's config, or 0.5. Computed in float32, as a
    pipeline does: these are the probabilities that serving gives.

    Args:
        model: on the device to compute on.
        image_processor: the model's.
        split: columns id, image and label.
        name: of the split.
        config: the recipe's section.
    """
    images = EvaluationImages(split, image_processor)
    # On a CPU loader processes would take the cores that compute.
    workers = 0 if model.device.type == "cpu" else min(8, max(1, cores_here() - 1))
    logits = predict_logits(model, image_processor, images, config.batch_size, f"scoring {name}", workers)
    probabilities = probabilities_of(logits, model)
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    ids = column_values(split, "id")
    if is_multi_label(model):
        labels = multi_hot(images.labels, len(names))
        report: AnyReport = build_multi_label_report(
            name, ids, labels, probabilities, names, read_thresholds(model.config), config.num_mistakes
        )
    else:
        labels = np.asarray(images.labels)
        report = build_report(name, ids, labels, probabilities, names, config.num_mistakes)
    return Scores(report, ids, labels, probabilities, logits)


def at_best_thresholds(scores: Scores, model: PreTrainedModel, config: EvaluationConfig) -> Scores:
    """The scores at the thresholds that are best on these images; the model's config has them afterwards.

    Args:
        scores: of the validation images, which may have several labels.
        model: whose they are.
        config: the recipe's section.
    """
    model.config.thresholds = tune_thresholds(scores.label_ids, scores.probabilities)
    report = build_multi_label_report(
        scores.report.split,
        scores.ids,
        scores.label_ids,
        scores.probabilities,
        scores.report.labels,
        read_thresholds(model.config),
        config.num_mistakes,
    )
    return replace(scores, report=report)


def probabilities_of(logits: np.ndarray, model: PreTrainedModel) -> np.ndarray:
    """What a model's logits say, as a pipeline has it, in the same shape: of each label its own probability
    where images may have several, else of each class its share."""
    values = torch.from_numpy(logits)
    return (values.sigmoid() if is_multi_label(model) else values.softmax(dim=-1)).numpy()


def predict_logits(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    images: Dataset[dict[str, Any]],
    batch_size: int,
    description: str,
    num_workers: int = 0,
) -> np.ndarray:
    """A model's answers before softmax or sigmoid, float32 `(images, classes)`, in the images' order.

    Under a launcher every process computes a share and all get the whole.

    Args:
        model: on the device to compute on.
        image_processor: the model's.
        images: items with `pixel_values`, as `EvaluationImages` has them.
        batch_size: images per step.
        description: what the progress bar says.
        num_workers: loader processes.
    """
    rank, world = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    total = len(images)  # type: ignore[arg-type]
    share = range(rank, total, world)
    loader = DataLoader(
        Subset(images, share), batch_size=batch_size, collate_fn=collate, num_workers=num_workers
    )
    mine: list[np.ndarray] = []
    with scoring_mode(model), progress(description, len(share), "images") as advance:
        for batch in loader:
            pixel_values = normalize(batch["pixel_values"].to(model.device), image_processor)
            mine.append(model(pixel_values=pixel_values).logits.float().cpu().numpy())
            advance(len(pixel_values))
    rows = np.concatenate(mine) if mine else np.zeros((0, model.config.num_labels), np.float32)
    if not np.isfinite(rows).all():
        raise RunError(
            "the model answers with NaN or infinity: its weights are broken. Train again with a lower "
            "learning rate"
        )
    if world == 1:
        return rows
    parts = gather_object([rows])
    whole = np.zeros((total, model.config.num_labels), np.float32)
    for number, part in enumerate(parts):
        whole[number::world] = part
    return whole


@contextmanager
def scoring_mode(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout and gradients; as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def build_report(
    split: str,
    ids: Sequence[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    names: Sequence[str],
    num_mistakes: int = 0,
) -> Report:
    """The report of these probabilities.

    Args:
        split: its name.
        ids: of the images.
        labels: true class ids, int64 `(images,)`.
        probabilities: float `(images, classes)`.
        names: class names in id order.
        num_mistakes: how many of the worst to list: those of which the model was surest.
    """
    predicted = probabilities.argmax(axis=1)
    simple = compute_label_metrics(predicted, labels)
    bins = calibration_bins(labels, probabilities)
    wrong = np.flatnonzero(predicted != labels)
    sureness = probabilities[wrong, predicted[wrong]]
    # By id where equally sure, so that the order of the images does not show.
    worst = sorted(zip(-sureness, (ids[row] for row in wrong.tolist()), wrong))[:num_mistakes]
    return Report(
        split=split,
        num_images=len(labels),
        accuracy=simple["accuracy"],
        accuracy_interval=wilson_interval(len(labels) - len(wrong), len(labels)),
        top_5_accuracy=top_k_accuracy(labels, probabilities) if len(names) > 5 else None,
        macro_f1=simple["macro_f1"],
        balanced_accuracy=simple["balanced_accuracy"],
        log_loss=log_loss(labels, probabilities),
        ece=expected_calibration_error(bins),
        per_class=class_scores(labels, predicted, names),
        confusion_matrix=sk.confusion_matrix(labels, predicted, labels=np.arange(len(names))).tolist(),
        labels=list(names),
        calibration=bins,
        worst_mistakes=[
            Mistake(
                id=identity,
                label=names[labels[row]],
                predicted=names[predicted[row]],
                probability=float(-minus),
            )
            for minus, identity, row in worst
        ],
    )


def compute_label_metrics(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, macro F1 and balanced accuracy by name, each in [0, 1], for class ids `(images,)`."""
    scores: dict[str, float] = build_metrics().compute(predictions=predicted, references=labels)
    return scores


def evaluate(
    target: str | Path,
    data: str | None = None,
    split: str = "test",
    config: EvaluationConfig | None = None,
    calibrated: bool = False,
) -> AnyReport:
    """A fresh report of a finished run or a saved model.

    Args:
        target: a run folder, a model folder or a Hub id (`owner/name`, `owner/name@revision`).
        data: a data source as in `data.path`; the run's own if None.
        split: train, validation or test; a source without splits is scored whole, as `all`.
        config: how to score.
        calibrated: whether the report also tells how calibrated the model is with its temperature.

    Raises:
        RunError: no model there, no such split, classes that are not the model's, or no temperature.
    """
    run = Run(target)
    if run.exists():
        recipe = load_recipe(run.recipe)
        own, config = recipe.data, config or recipe.evaluation
        model, image_processor = load_checkpoint(str(run.model))
    else:
        own = None
        model, image_processor = load_checkpoint(str(target))
    temperature = temperature_of(model.config, str(target)) if calibrated else None
    model = model.to(best_device())
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
    scores = score(model, image_processor, with_labels(images, labels), split, config or EvaluationConfig())
    return (scores.calibrated(temperature) if temperature else scores).report


def best_device() -> torch.device:
    """The accelerator, or else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")
