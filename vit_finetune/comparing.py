"""Several runs side by side on one page: scores, paired tests, costs, and images that only one gets right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from vit_finetune.console import say, show_table, warn
from vit_finetune.data.checkup.pictures import draw_picture, open_image
from vit_finetune.data.images import UnreadableImage
from vit_finetune.data.sources.columns import column_values
from vit_finetune.evaluation.comparison import (
    Answers,
    check_comparable,
    compare_pairs,
    load_answers,
    right_alone,
)
from vit_finetune.evaluation.images import own_split, spread_rows
from vit_finetune.evaluation.speed import count_flops, measure_serving
from vit_finetune.evaluation.target import best_device
from vit_finetune.model.loading import load_checkpoint
from vit_finetune.model.processing import processor_size
from vit_finetune.publishing.comparison_page import describe_pair, rounded, score_of, write_comparison
from vit_finetune.publishing.record import Record, interval, load_record, memory, percent
from vit_finetune.run import Run, RunError

BATCH_SIZES = (1, 32)
"""Images at a time when serving is timed."""
MOST_PICTURES = 6
"""Of the images that only one run gets right, so many are shown for each."""


def compare(runs: Sequence[str | Path], output: str | Path = "comparison.html") -> dict[str, Any]:
    """What the page at `output` shows, as a document.

    The runs are held against each other image by image, on the split that they end with: the test split, or
    the validation split where no test split was scored.

    Args:
        runs: two or more folders of finished runs that were scored on the same images.
        output: the page to write.

    Returns:
        `split`, `num_images`, `runs` (name, path, scores, costs), `pairs` (`Pair`), `right_alone` (ids by
        run), `labels` and `recalls` (by run, in label order).

    Raises:
        RunError: fewer than two, no finished run, or other images.
    """
    if len({Path(run).expanduser().resolve() for run in runs}) < max(2, len(runs)):
        raise RunError("expected at least two runs to compare, each named once")
    if Path(output).is_dir():
        raise RunError(f"{output} is a folder; expected the name of a page, such as {output}/comparison.html")
    opened = [_open(Run(run)) for run in runs]
    names = _name([run for run, _ in opened])
    records = {name: record for name, (_, record) in zip(names, opened)}
    split = _split_of(records)
    answers = [load_answers(run, name, split) for name, (run, _) in zip(names, opened)]
    check_comparable(answers)
    alone = right_alone(answers)
    reports = {name: record.headline for name, record in records.items() if record.headline}
    labels = reports[names[0]].labels
    document = {
        "split": split,
        "num_images": len(answers[0].ids),
        "runs": _describe_runs(names, opened),
        "pairs": [pair.model_dump() for pair in compare_pairs(answers)],
        "right_alone": {name: [str(answers[0].ids[row]) for row in rows] for name, rows in alone.items()},
        "labels": labels,
        "recalls": {
            name: [report.per_class[label].recall for label in labels] for name, report in reports.items()
        },
    }
    pictures = _draw(opened[0][0], split, answers, alone)
    page = write_comparison(Path(output), document, records, pictures)
    _show(document)
    say(f"comparison: {page}")
    return document


def _open(run: Run) -> tuple[Run, Record]:
    if not run.exists():
        raise RunError(f"{run.path}: there is no run. Expected the folder of a finished run")
    record = load_record(run)
    if record.headline is None:
        raise RunError(f"{run.path}: the run was not scored yet. Continue it with `train … --resume`")
    return run, record


def _name(runs: Sequence[Run]) -> list[str]:
    """The folders' names where they tell the runs apart, else their paths."""
    names = [run.path.resolve().name for run in runs]
    return names if len({*names}) == len(names) else [str(run.path) for run in runs]


def _split_of(records: dict[str, Record]) -> str:
    """The split that all runs end with."""
    splits = {name: record.headline.split for name, record in records.items() if record.headline}
    if len({*splits.values()}) > 1:
        told = ", ".join(f"{name} on {split}" for name, split in splits.items())
        raise RunError(f"the runs were not scored on the same split: {told}. Expected one")
    labels = {name: record.headline.labels for name, record in records.items() if record.headline}
    first, *others = labels.items()
    for name, found in others:
        if sorted(found) != sorted(first[1]):
            raise RunError(f"{first[0]} and {name} know other classes. Expected runs on the same data")
    return next(iter(splits.values()))


def _describe_runs(names: Sequence[str], opened: Sequence[tuple[Run, Record]]) -> list[dict[str, Any]]:
    """Scores and costs of each run; serving is timed here, so that all are timed on one machine."""
    models: dict[str, tuple[PreTrainedModel, tuple[int, int]]] = {}
    for name, (run, _) in zip(names, opened):
        model, processor = load_checkpoint(str(run.model))
        models[name] = model.to(best_device()), processor_size(processor)
    serving = {size: measure_serving(models, size) for size in BATCH_SIZES}
    return [
        {
            "name": name,
            "path": str(run.path),
            "report": record.headline.model_dump(
                exclude={"worst_mistakes", "calibration", "confusion_matrix", "per_class", "labels"}
            ),
            "architecture": record.model.get("architecture"),
            "parameters": models[name][0].num_parameters(),
            "image_size": list(models[name][1]),
            "flops": count_flops(*models[name]),
            "serving_images_per_second": {str(size): rates[name] for size, rates in serving.items()},
            "train_images_per_second": record.provenance.get("images_per_second"),
            "train_seconds": record.provenance.get("train_seconds"),
            "peak_memory_bytes": record.provenance.get("peak_memory_bytes"),
            "hardware": (record.provenance.get("hardware") or {}).get("device"),
            "precision": next(
                (one["value"] for one in record.provenance.get("choices", []) if one["name"] == "precision"),
                None,
            ),
        }
        for name, (run, record) in zip(names, opened)
        if record.headline
    ]


def _draw(
    run: Run, split: str, answers: Sequence[Answers], alone: dict[str, list[int]]
) -> dict[str, list[dict[str, Any]]]:
    """By run, some of the images that it alone gets right, and what each said; pictures where the data is."""
    wanted = {
        name: [rows[row] for row in spread_rows(len(rows), MOST_PICTURES)] for name, rows in alone.items()
    }
    row_of: dict[str, int] = {}
    images = None
    try:
        images = own_split(run, split)
        row_of = {identity: row for row, identity in enumerate(column_values(images, "id"))}
    except (RunError, OSError) as error:
        warn(f"no pictures of the images that only one run gets right: {error}")

    def picture(identity: str) -> bytes | None:
        if images is None or identity not in row_of:
            return None
        try:
            return draw_picture(open_image(images, row_of[identity]))
        except (UnreadableImage, OSError) as error:
            warn(f"{identity}: no picture: {error}")
            return None

    return {
        name: [
            {
                "id": str(answers[0].ids[row]),
                "label": answers[0].labels[row],
                "said": {one.name: one.predicted[row] for one in answers if one.name != name},
                "picture": picture(str(answers[0].ids[row])),
            }
            for row in rows
        ]
        for name, rows in wanted.items()
    }


def _show(document: dict[str, Any]) -> None:
    runs = document["runs"]
    score = score_of(runs[0]["report"])[0]
    scores = [score_of(run["report"]) for run in runs]
    rows = [
        [score, *(f"{percent(value)}  [{interval(bounds)}]" for _, value, bounds in scores)],
        ["parameters", *(f"{run['parameters']:,}" for run in runs)],
        ["GFLOP per image", *(f"{run['flops'] / 1e9:.3g}" for run in runs)],
        ["trained images/s", *(rounded(run["train_images_per_second"]) for run in runs)],
        *(
            [f"served images/s, {size} at a time"]
            + [rounded(run["serving_images_per_second"][str(size)]) for run in runs]
            for size in BATCH_SIZES
        ),
        ["peak memory", *(memory(size) if (size := run["peak_memory_bytes"]) else "–" for run in runs)],
    ]
    title = f"{document['split']} split, {document['num_images']:,} images"
    show_table(title, ["", *(run["name"] for run in runs)], rows)
    for pair in document["pairs"]:
        say(describe_pair(pair))
