"""Pictures of a report's worst mistakes, and of where the model looked."""

from __future__ import annotations

import datasets
import numpy as np
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from vit_finetune.console import progress, warn
from vit_finetune.data.checkup.pictures import scaled
from vit_finetune.data.transforms import EvaluationImages
from vit_finetune.evaluation.attention import NoMap, overlay
from vit_finetune.evaluation.scoring import Scores
from vit_finetune.evaluation.seeing import as_seen, look_at
from vit_finetune.files import written_whole
from vit_finetune.reports import AnyReport, MultiLabelReport
from vit_finetune.run import Run

PICTURE_PIXELS = 224
"""Longest side of the pictures of mistakes in a report."""


def save_mistakes(
    scores: Scores,
    split: datasets.Dataset,
    run: Run,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
) -> AnyReport:
    """Writes two pictures of each of the worst mistakes into the run; answers the report that names them.

    The image, and where the model looked in it; by gradients, what spoke for the class that it is wrong
    about.

    Args:
        scores: of the split.
        split: columns id, image and label.
        run: whose `pictures/` they go to.
        model: which made the mistakes, on the device to compute on.
        image_processor: the model's.
    """
    images = EvaluationImages(split, image_processor)
    row_of = {identity: row for row, identity in enumerate(scores.ids)}
    worst, shown, without = scores.report.worst_mistakes, [], ""
    with progress("explaining mistakes", len(worst), "images") as advance:
        for number, mistake in enumerate(worst):
            row = row_of[mistake.id]
            picture, heat = f"mistake-{number:02}.jpg", f"mistake-{number:02}-map.jpg"
            _save(Image.fromarray(images.files[row].permute(1, 2, 0).numpy()), run, picture)
            named = {"picture": picture}
            seen = images[row]["pixel_values"]
            try:
                look = look_at(model, image_processor, seen, _wrong_class(scores, row))
            except NoMap as error:
                without = str(error)
            else:
                _save(overlay(as_seen(seen), look.map), run, heat)
                named["map"] = heat
            shown.append(mistake.model_copy(update=named))
            advance()
    if without:
        warn(f"the report shows no maps of where the model looked: {without}")
    return scores.report.model_copy(update={"worst_mistakes": shown})


def _wrong_class(scores: Scores, row: int) -> int:
    """The class that an image was taken for; of several labels the wrong one that was surest."""
    probabilities = scores.probabilities[row]
    if not isinstance(scores.report, MultiLabelReport):
        return int(probabilities.argmax())
    thresholds = np.array([score.threshold for score in scores.report.per_class.values()])
    wrong = (probabilities >= thresholds) != (scores.label_ids[row] == 1)
    return int(np.where(wrong, np.abs(probabilities - scores.label_ids[row]), -1).argmax())


def _save(image: Image.Image, run: Run, name: str) -> None:
    with written_whole(run.pictures / name) as temporary:
        scaled(image, PICTURE_PIXELS).save(temporary, "JPEG", quality=90)
