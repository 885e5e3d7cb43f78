"""A finished model at other image sizes, and on images made worse: what `evaluate` shows beside one score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from vit_finetune.console import say, show_table
from vit_finetune.data.transforms import EvaluationImages
from vit_finetune.evaluation.corruptions import CORRUPTIONS, STRENGTHS, CorruptedImages, corrupt
from vit_finetune.evaluation.scoring import score
from vit_finetune.evaluation.speed import count_flops, measure_serving
from vit_finetune.evaluation.target import Target, open_target
from vit_finetune.model.processing import build_processor, processor_size
from vit_finetune.model.resolution import check_divides, resize_model
from vit_finetune.publishing.robustness_page import write_robustness
from vit_finetune.recipe import ModelConfig
from vit_finetune.reports import MultiLabelReport
from vit_finetune.run import RunError

BATCH_SIZE = 32
"""Images at a time when sizes are timed."""


def evaluate_robustness(
    target: str | Path,
    data: str | None = None,
    split: str = "test",
    image_sizes: Sequence[int] = (),
    corruptions: bool = False,
    output: str | Path = "robustness.html",
) -> dict[str, Any]:
    """What the page at `output` shows, as a document.

    Args:
        target: a run folder, a model folder or a Hub id.
        data: images as in `data.path`; the run's own if None.
        split: train, validation or test.
        image_sizes: heights and widths in pixels to score at, beside the model's own.
        corruptions: whether to score also on images made worse.
        output: the page to write.

    Returns:
        `target`, `data`, `split`, `num_images`, `metric`; `image_sizes` (image_size, trained, score,
        interval, images_per_second, flops) and `corruptions` (kind, strength, score, interval), the first
        of which, of strength 0, is of the images as they are. An interval is None where there is none.

    Raises:
        RunError: no model or images there, or a size at which the model cannot be.
    """
    if Path(output).is_dir():
        raise RunError(f"{output} is a folder; expected the name of a page, such as {output}/robustness.html")
    opened = open_target(target, data, split)
    models = _resize(opened, image_sizes) if image_sizes else {}
    document: dict[str, Any] = {
        "target": str(target),
        "data": data,
        "split": opened.split,
        "num_images": len(opened.images),
        "image_sizes": _score_sizes(opened, models),
        "corruptions": _score_corruptions(opened) if corruptions else [],
    }
    document["metric"] = (document["image_sizes"] + document["corruptions"])[0]["metric"]
    _show(document)
    page = write_robustness(Path(output), document, _draw_sheet(opened) if corruptions else None)
    say(f"robustness: {page}")
    return document


def _score(
    opened: Target, model: PreTrainedModel, processor: BaseImageProcessor, name: str, shown: Any = None
) -> dict[str, Any]:
    report = score(model, processor, opened.images, name, opened.config, shown).report
    if isinstance(report, MultiLabelReport):
        return {"metric": "mean average precision", "score": report.mean_average_precision, "interval": None}
    return {"metric": "accuracy", "score": report.accuracy, "interval": report.accuracy_interval}


# --------------------------------------------------------------------------- sizes


def _resize(
    opened: Target, sizes: Sequence[int]
) -> dict[tuple[int, int], tuple[PreTrainedModel, BaseImageProcessor]]:
    """The model at its own size and at others, smallest first; its own stays as it is.

    Raises:
        RunError: the patches do not divide a size, or the architecture cannot change it.
    """
    own = processor_size(opened.image_processor)
    models = {own: (opened.model, opened.image_processor)}
    for size in sizes:
        wanted = (size, size)
        if wanted not in models:
            check_divides(opened.model.config, wanted)
            resized = resize_model(opened.model, own, wanted).to(opened.model.device).eval()
            models[wanted] = resized, build_processor(ModelConfig(path="."), wanted, opened.image_processor)
    return dict(sorted(models.items()))


def _score_sizes(
    opened: Target, models: dict[tuple[int, int], tuple[PreTrainedModel, BaseImageProcessor]]
) -> list[dict[str, Any]]:
    timed = {f"{size[0]}×{size[1]}": (model, size) for size, (model, _) in models.items()}
    rates = measure_serving(timed, BATCH_SIZE) if timed else {}
    return [
        {
            "image_size": list(size),
            "trained": processor is opened.image_processor,
            **_score(opened, model, processor, f"{opened.split} at {name}"),
            "images_per_second": rates[name],
            "flops": count_flops(model, size),
        }
        for name, (size, (model, processor)) in zip(timed, models.items())
    ]


# --------------------------------------------------------------------------- corruptions


def _score_corruptions(opened: Target) -> list[dict[str, Any]]:
    model, processor = opened.model, opened.image_processor
    plain = _score(opened, model, processor, f"{opened.split} as it is")
    rows = [{"kind": "none", "strength": 0, **plain}]
    for kind in CORRUPTIONS:
        for strength in STRENGTHS:
            worse = CorruptedImages(opened.images, processor, kind, strength)
            scored = _score(opened, model, processor, f"{opened.split}, {kind} {strength}", worse)
            rows.append({"kind": kind, "strength": strength, **scored})
    return rows


def _draw_sheet(opened: Target) -> Image.Image:
    """One image under every corruption, a row for each kind: as it is, then the five strengths."""
    image = EvaluationImages(opened.images, opened.image_processor)[0]["pixel_values"]  # (3, H, W)
    rows = [[image, *(corrupt(image, kind, strength, 1) for strength in STRENGTHS)] for kind in CORRUPTIONS]
    return Image.fromarray(np.vstack([np.hstack([one.permute(1, 2, 0) for one in row]) for row in rows]))


# --------------------------------------------------------------------------- what is shown


def _show(document: dict[str, Any]) -> None:
    title = f"{document['target']}: {document['split']}, {document['num_images']:,} images"
    metric = document["metric"]
    if document["image_sizes"]:
        rows = [
            [
                "×".join(map(str, row["image_size"])) + (" (trained)" if row["trained"] else ""),
                _words(row),
                f"{row['flops'] / 1e9:.3g}",
                f"{row['images_per_second']:,.0f}",
            ]
            for row in document["image_sizes"]
        ]
        show_table(title, ["image size", metric, "GFLOP", "images/s"], rows)
    if document["corruptions"]:
        plain, *worse = document["corruptions"]
        score_of = {(row["kind"], row["strength"]): f"{row['score']:.3f}" for row in worse}
        table = [[kind, *(score_of[kind, strength] for strength in STRENGTHS)] for kind in CORRUPTIONS]
        columns = ["strength", *map(str, STRENGTHS)]
        show_table(f"{title}; {metric} as they are: {_words(plain)}", columns, table)


def _words(row: dict[str, Any]) -> str:
    bounds = f"  [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]" if row["interval"] else ""
    return f"{row['score']:.3f}{bounds}"
