"""A finished run, drawn: every file that the papers read, with numbers that agree with each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn import metrics

from vit_finetune.files import write_json, write_text
from vit_finetune.recipe import build_recipe
from vit_finetune.run import CalibrationBin, ClassScore, Finding, Findings, FoundImage, Mistake, Report, Run

ANIMALS = ("ant", "bee", "cat", "dog", "eel")


def write_finished_run(
    path: str | Path,
    class_names: Sequence[str] = ANIMALS,
    with_test: bool = True,
    *,
    images_per_class: int = 40,
    hub: dict[str, Any] | None = None,
    data_path: str = "photos/",
    command: str = "vit-finetune train recipes/photos.yaml",
    findings: Sequence[Finding] = (),
    mistake_ids: Sequence[str] = (),
) -> Run:
    """A run folder as a training leaves it, drawn from a fixed seed: the same arguments give the same bytes.

    Args:
        path: a folder, new or empty.
        class_names: in id order.
        with_test: whether a test split was scored.
        images_per_class: in each scored split; the first class has a quarter of it.
        hub: section `hub:` of the recipe.
        data_path: `data.path` of the recipe.
        command: what provenance says was typed.
        findings: what the checkup saw in the data.
        mistake_ids: what the first of the worst mistakes are called.
    """
    run, names = Run(path), list(class_names)
    own: dict[str, Any] = {
        "data": {"path": data_path},
        "model": {"config": {"hidden_size": 64, "patch_size": 2}, "image_size": [8, 8]},
        "training": {"num_train_epochs": 20, "learning_rate": 1e-3},
    }
    if hub is not None:
        own["hub"] = hub
    write_text(run.recipe, build_recipe(own, name="photos").to_yaml())
    history, best_step = _history(epochs=20, steps_per_epoch=30)
    write_json(run.history, history)
    splits = ["validation", "test"] if with_test else ["validation"]
    for number, split in enumerate(splits):
        report = draw_report(names, split, images_per_class, seed=number, mistake_ids=mistake_ids)
        write_text(run.report(split), report.to_json())
        _draw_mistakes(run, report)
    _draw_augmented(run)
    write_json(run.model / "config.json", {"id2label": dict(enumerate(names))})
    write_text(
        run.findings,
        Findings(path=data_path, num_images={"all": 1200}, findings=list(findings)).shortened().to_json(),
    )
    counts = {"train": 960, **{split: Report.load(run.report(split)).num_images for split in splits}}
    write_json(
        run.provenance,
        _provenance(names, own, command, counts) | {"steps": 600, "best_step": best_step},
    )
    return run


def truncated(*images: tuple[str, str]) -> Finding:
    """A finding about images, (id, detail) each, that were left out."""
    return Finding(
        kind="truncated",
        severity="warning",
        message=f"{len(images)} of 1,200 images cannot be read, and left out",
        advice="Repair or remove them",
        count=len(images),
        images=[FoundImage(split="all", id=name, detail=detail) for name, detail in images],
    )


def draw_report(
    names: Sequence[str],
    split: str = "test",
    images_per_class: int = 40,
    seed: int = 0,
    mistake_ids: Sequence[str] = (),
) -> Report:
    """A report of invented predictions, its numbers computed by scikit-learn."""
    generator = np.random.default_rng(seed)
    supports = [max(1, images_per_class // 4), *[images_per_class] * (len(names) - 1)]
    labels = np.repeat(np.arange(len(names)), supports)
    logits = generator.normal(0, 1, (len(labels), len(names)))
    logits[np.arange(len(labels)), labels] += 2.6 + 0.3 * math.log(len(names))
    logits[np.arange(len(labels)), (labels + 1) % len(names)] += (
        1.0  # each class is mistaken for the next one
    )
    probabilities = np.exp(1.5 * logits)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    predicted, top = probabilities.argmax(axis=1), probabilities.max(axis=1)
    classes = list(range(len(names)))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=0
    )
    right = labels == predicted
    wrong = sorted(np.flatnonzero(~right), key=lambda index: -top[index])[:12]
    ids = [*mistake_ids, *(f"{names[labels[i]]}/{i:05d}.jpg" for i in wrong[len(mistake_ids) :])]
    bins = _calibration(top, right)
    return Report(
        split=split,
        num_images=len(labels),
        accuracy=float(right.mean()),
        accuracy_interval=_wilson(int(right.sum()), len(labels)),
        top_5_accuracy=(
            float(metrics.top_k_accuracy_score(labels, probabilities, k=5)) if len(names) > 5 else None
        ),
        macro_f1=float(f1.mean()),
        balanced_accuracy=float(metrics.balanced_accuracy_score(labels, predicted)),
        log_loss=float(metrics.log_loss(labels, probabilities, labels=classes)),
        ece=sum(part.count * abs(part.accuracy - part.confidence) for part in bins) / len(labels),
        per_class={
            name: ClassScore(precision=p, recall=r, f1=f, support=int(s))
            for name, p, r, f, s in zip(names, precision, recall, f1, support)
        },
        confusion_matrix=metrics.confusion_matrix(labels, predicted, labels=classes).tolist(),
        labels=list(names),
        calibration=bins,
        worst_mistakes=[
            Mistake(
                id=image_id,
                label=names[labels[i]],
                predicted=names[predicted[i]],
                probability=float(top[i]),
                picture=f"{split}-mistake-{place:02d}.png",
            )
            for place, (image_id, i) in enumerate(zip(ids, wrong))
        ],
    )


def _calibration(top: np.ndarray, right: np.ndarray) -> list[CalibrationBin]:
    edges = np.linspace(0, 1, 16)
    bins = []
    for low, high in itertools.pairwise(edges):
        inside = (top > low) & (top <= high)
        if not inside.any():
            continue  # as scoring does
        bins.append(
            CalibrationBin(
                low=float(low),
                high=float(high),
                count=int(inside.sum()),
                confidence=float(top[inside].mean()),
                accuracy=float(right[inside].mean()),
            )
        )
    return bins


def _wilson(correct: int, total: int) -> tuple[float, float]:
    z, share = 1.959963984540054, correct / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return centre - half, centre + half


def _history(epochs: int, steps_per_epoch: int) -> tuple[list[dict[str, float]], int]:
    """The Trainer's log, and the step of its best validation accuracy."""
    generator, total, log = np.random.default_rng(7), epochs * steps_per_epoch, []
    for step in range(10, total + 1, 10):
        epoch = step / steps_per_epoch
        rate = 1e-3 * min(step / (0.05 * total), 0.5 * (1 + math.cos(math.pi * step / total)))
        loss = 0.15 + 1.5 * math.exp(-epoch / 4) + float(generator.normal(0, 0.04))
        log.append({"loss": loss, "grad_norm": 1.2, "learning_rate": rate, "epoch": epoch, "step": step})
        if step % steps_per_epoch == 0:
            accuracy = 0.9 - 0.7 * math.exp(-epoch / 3) + float(generator.normal(0, 0.006))
            eval_loss = 0.4 + 1.2 * math.exp(-epoch / 3) + float(generator.normal(0, 0.01))
            log.append({"eval_loss": eval_loss, "eval_accuracy": accuracy, "epoch": epoch, "step": step})
    best = max((entry for entry in log if "eval_accuracy" in entry), key=lambda entry: entry["eval_accuracy"])
    log.append({"train_runtime": 31.2, "train_loss": 0.4, "epoch": float(epochs), "step": total})
    return log, int(best["step"])


def _draw_mistakes(run: Run, report: Report) -> None:
    generator = np.random.default_rng(3)
    run.pictures.mkdir(parents=True, exist_ok=True)
    for mistake in report.worst_mistakes:
        assert mistake.picture
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
            run.pictures / mistake.picture
        )


def _draw_augmented(run: Run) -> None:
    sheet = Image.new("RGB", (5 * 64, 4 * 64), "white")
    for row in range(4):
        for column in range(5):
            colour = (60 + 40 * row, 200 - 30 * column, 90 + 30 * column)
            sheet.paste(Image.new("RGB", (60, 60), colour), (64 * column + 2, 64 * row + 2))
    sheet.save(run.pictures / "augmented.jpg")


def _provenance(
    names: Sequence[str],
    own: dict[str, Any],
    command: str,
    counts: dict[str, int],
) -> dict[str, Any]:
    return {
        "created": "2026-11-23T12:00:00+00:00",
        "command": command,
        "verdict": "time: 91% training steps, 6% waiting for images, 3% evaluation: nothing to change",
        "recipe_name": "photos",
        "recipe": own,
        "versions": {
            "vit-finetune": "0.1.0",
            "python": "3.11.7",
            "torch": "2.15.0",
            "transformers": "5.23.0",
        },
        "hardware": {"device": "CPU: Intel Xeon, 2 cores", "memory_bytes": 25_000_000_000, "processes": 1},
        "choices": [
            {
                "name": "precision",
                "value": "fp32",
                "reason": "a width of 64 gains nothing from bf16 on a CPU",
            },
            {
                "name": "workers",
                "value": 0,
                "reason": "2 cores: loader processes would take those that compute",
            },
        ],
        "seed": 42,
        "data": {
            "path": own["data"]["path"],
            "source": "folder",
            "splits": {
                split: {"num_images": count, "fingerprint": f"sha256:{number:064x}"}
                for number, (split, count) in enumerate(counts.items())
            },
        },
        "labels": list(names),
        "model": {
            "architecture": "ViTForImageClassification",
            "parameters": 203_402,
            "image_size": [8, 8],
            "base_model": None,
        },
        "train_seconds": 31.2,
        "images_per_second": 615.4,
        "peak_memory_bytes": 812_000_000,
        "best_metric": {"name": "accuracy", "value": 0.9},
    }
