"""Distillation: the student learns from what a trained teacher says of the very images that it sees."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BaseImageProcessor, PreTrainedModel

from vit_finetune.data.sources.folders import first_of
from vit_finetune.data.transforms import NO_LABEL, check_image_processor, normalize
from vit_finetune.files import sha256_of
from vit_finetune.hub_repos import parse_hub_id
from vit_finetune.model.loading import describe_model, is_multi_label, load_checkpoint
from vit_finetune.model.processing import processor_size
from vit_finetune.recipe import TrainingConfig
from vit_finetune.run import RunError
from vit_finetune.training.hardware import Choice
from vit_finetune.training.loss import count_images


@dataclass
class Teacher:
    """A classifier that is asked and does not learn: in evaluation mode, no gradients, in no checkpoint."""

    path: str
    """As the recipe names it."""
    model: PreTrainedModel
    image_processor: BaseImageProcessor
    order: list[int]
    """Its id of each of the student's classes, in the order of the student's ids."""

    def answer(self, pixel_values: torch.Tensor, image_processor: BaseImageProcessor) -> torch.Tensor:
        """Its logits for a batch of the student's, float32 `(batch, classes)`, in the student's order.

        The images are the student's, augmented and mixed (Beyer et al., 2022, find that this matters), but
        normalised as the teacher wants them, and at its size.

        Args:
            pixel_values: normalised for the student, float32 `(batch, 3, height, width)`, on the teacher's
                device.
            image_processor: the student's.
        """
        with torch.no_grad():
            images = renormalize(pixel_values, image_processor, self.image_processor)
            size = processor_size(self.image_processor)
            if tuple(images.shape[-2:]) != size:
                images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
            return self.model(pixel_values=images).logits.float()[:, self.order]  # type: ignore[no-any-return]

    def describe(self) -> dict[str, Any]:
        """Facts for the provenance, with the hash of its weights, and of those from the Hub the commit."""
        files = sorted(Path(self.model.name_or_path).glob("*.safetensors"))
        sums = "".join(sha256_of(file) for file in files)
        return {"path": self.path} | describe_model(self.model) | {
            "sha256": sums if len(files) == 1 else hashlib.sha256(sums.encode()).hexdigest()
        }  # fmt: skip


def load_teacher(
    training: TrainingConfig, labels: Sequence[str], before: dict[str, Any] | None = None
) -> Teacher | None:
    """The teacher that the recipe names, with its weights as they were saved; None where it names none.

    Args:
        training: the recipe's section.
        labels: the student's class names in id order.
        before: provenance of the run that is resumed.

    Raises:
        RunError: it cannot be loaded, has other classes or several for one image, or is not the one that the
            run was begun with.
    """
    if not training.teacher:
        return None
    path, known = training.teacher, (before or {}).get("teacher", {})
    if (named := parse_hub_id(path)) and "revision" in known:  # a branch may have gone on
        path = f"{named[0]}@{known['revision']}"
    try:
        model, image_processor = load_checkpoint(path)
        check_image_processor(image_processor)
    except RunError as error:
        raise RunError(f"training.teacher: {error}") from error
    if is_multi_label(model):
        raise RunError(
            f"training.teacher: {path} was trained on images with several labels, so it gives no probability "
            f"of one class against the others, and here images have one class. Expected such a teacher"
        )
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    _check_classes(training.teacher, names, labels)
    teacher = Teacher(
        training.teacher,
        model.requires_grad_(False),
        image_processor,
        [names.index(label) for label in labels],
    )
    if known and known["sha256"] != teacher.describe()["sha256"]:
        raise RunError(
            f"training.teacher: {path} is no longer the teacher that the run was begun with, so it cannot be "
            f"resumed. Bring its weights back, or start another run with training.output_dir=…"
        )
    return teacher


def _check_classes(path: str, names: Sequence[str], labels: Sequence[str]) -> None:
    """Raises RunError unless the teacher's classes are the student's, in whatever order."""
    if sorted(names) == sorted(labels):
        return
    lacks = [label for label in labels if label not in names]
    more = [name for name in names if name not in labels]
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    raise RunError(
        f"training.teacher: {path} knows other classes than the data has."
        + (f" It lacks {first_of(lacks)}." if lacks else "")
        + (f" The data lacks {first_of(more)}." if more else "")
        + (f" It has {first_of(twice)} twice." if twice else "")
        + " Expected a teacher of the same class names, such as one that was fine-tuned on this data"
    )


def describe_teacher(teacher: Teacher | None, training: TrainingConfig) -> list[Choice]:
    """What a run says of its teacher; nothing where it has none.

    Args:
        teacher: of `load_teacher`.
        training: the recipe's section.
    """
    if teacher is None:
        return []
    facts, (height, width) = describe_model(teacher.model), processor_size(teacher.image_processor)
    commit = f", commit {facts['revision'][:7]}" if "revision" in facts else ""
    reason = (
        f"{facts['architecture']}, {facts['parameters']:,} parameters, {height}×{width} pixels{commit}; the "
        f"share {training.distillation_weight:g} of the loss, at temperature "
        f"{training.distillation_temperature:g}"
    )
    return [Choice("teacher", teacher.path, reason)]


def renormalize(
    pixel_values: torch.Tensor, source: BaseImageProcessor, target: BaseImageProcessor
) -> torch.Tensor:
    """Images that were normalised by one image processor as another would have: `(batch, 3, height, width)`.

    Both are linear in the pixels, so mixed images stay mixed in the same shares; alike, nothing is computed.

    Args:
        pixel_values: float32.
        source: that they were normalised by.
        target: that they shall be normalised by.
    """
    (a, b), (c, d) = _line_of(source), _line_of(target)
    if a.equal(c) and b.equal(d):
        return pixel_values
    factor, term = (value.float().to(pixel_values.device) for value in (c / a, d - b * c / a))
    return pixel_values * factor + term


def _line_of(image_processor: BaseImageProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor and term, float64 `(3, 1, 1)`, by which a processor normalises a pixel in [0, 255]."""
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    black, white = normalize(ends, image_processor).double()
    return (white - black) / 255, black


def distillation_loss(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    count: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """T² · KL(teacher_T ‖ student_T) in nats (Hinton et al., 2015), summed over the images, by `count`.

    Of softmax(logits / T); T² keeps the size of the gradients whatever T is.

    Args:
        logits: the student's, `(batch, classes)`.
        teacher_logits: of the same images and classes.
        labels: class ids, int64 `(batch,)`, of which `NO_LABEL` adds nothing, or target probabilities.
        temperature: T, above 0.
        count: number of images to divide by, of which these are a part; their own number if None.
    """
    student, teacher = ((values / temperature).log_softmax(dim=-1) for values in (logits, teacher_logits))
    losses = torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    if not labels.is_floating_point():
        losses = losses * (labels != NO_LABEL)
    return temperature**2 * losses.sum() / (count_images(labels) if count is None else count)
