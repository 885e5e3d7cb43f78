"""`vit-finetune check`: what is wrong with the data, and what training would do; trains nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vit_finetune.console import say, show_findings, show_table, warn_of_findings
from vit_finetune.data.checkup.checkup import Checkup, check_up, explain_errors
from vit_finetune.data.checkup.pictures import load_pictures
from vit_finetune.data.sources.columns import Source
from vit_finetune.data.sources.labels import count_labels
from vit_finetune.data.sources.source import load_source
from vit_finetune.data.splits.prepared import PreparedData, prepare_splits
from vit_finetune.data.streaming.prepared import prepare_stream
from vit_finetune.data.transforms import TrainingImages, TrainingIndex, check_image_processor, collate
from vit_finetune.model.adaptation import adapt
from vit_finetune.model.loading import load_model
from vit_finetune.planning import (
    check_method,
    form_world,
    plan_classes,
    plan_hardware,
    plan_loading,
    quiet_libraries,
    show_plan,
)
from vit_finetune.probing import check_probe
from vit_finetune.publishing.checkup_page import shown_images, write_checkup
from vit_finetune.pushing import check_destination
from vit_finetune.recipe import Recipe
from vit_finetune.run import Run
from vit_finetune.training.distillation import load_teacher
from vit_finetune.training.hardware import Choice, Hardware
from vit_finetune.training.images import first_images
from vit_finetune.training.range_test import PLAN


def check(recipe: Recipe, output: str | Path | None = None) -> dict[str, Any]:
    """What is wrong with the data, and what `finetune` would do: model, batch, steps, memory. Trains nothing.

    Where findings would stop `finetune`, the answer has `stops`, the reason, and nothing about training.

    Args:
        recipe: what to look at.
        output: where `findings.json` and `checkup.html` go; `<output_dir>-checkup` if None.

    Raises:
        RunError: what else would stop `finetune`.
    """
    folder = Path(output or f"{recipe.output_dir}-checkup").expanduser()
    Run(recipe.output_dir).check_free(resume=Run(recipe.output_dir).exists())
    with quiet_libraries(), form_world(recipe) as world:
        if recipe.hub.push and world.is_main:
            check_destination(recipe.hub, recipe.model)
        check_method(recipe, world)
        if recipe.data.streaming:
            with world.one_per_machine_first():
                data: PreparedData = prepare_stream(recipe.data)
            found: dict[str, Any] = {"findings": data.findings.model_dump(exclude_none=True)["findings"]}
            warn_of_findings(data.findings.findings)
        else:
            with world.one_per_machine_first():
                source = load_source(recipe.data)
                checkup = check_up(source, recipe.data)
            found = world.from_main(_show_checkup(recipe, source, checkup, folder) if world.is_main else {})
            if "stops" in found:
                return found
            data = prepare_splits(recipe.data, checkup)
            warn_of_findings(data.findings.findings[len(checkup.findings) :])  # what carving had to say
        classes = plan_classes(recipe, data)
        teacher = load_teacher(recipe.training, data.labels)
        model, image_processor = load_model(recipe.model, data.labels, multi_label=recipe.data.multi_label)
        check_image_processor(image_processor)
        adapt(model, recipe.model)
        hardware = plan_hardware(recipe, model, world, teacher=teacher)
        hardware.choices += classes
        if recipe.model.method == "linear_probe":
            check_probe(recipe, model, world.size)
            facts = found | show_plan(recipe, data, model, hardware, world)
        else:
            train = first_images(data, image_processor, recipe.augmentation, recipe.training.seed)
            plan_loading(recipe, data, train, model, hardware, world)
            if recipe.training.learning_rate == "auto":
                hardware.choices.append(Choice("learning rate", "auto", PLAN))
            plan = show_plan(recipe, data, model, hardware, world, teacher)
            facts = found | plan | _show_batch(train, hardware)
        _show_classes(data)
    return facts


def _show_batch(train: TrainingImages, hardware: Hardware) -> dict[str, Any]:
    """Says what a batch looks like; answers it as a fact."""
    batch = collate([train[TrainingIndex(0, row)] for row in range(min(hardware.batch_size, len(train)))])
    shape = batch["pixel_values"].shape
    say(f"one batch: pixel_values {tuple(shape)} uint8, normalised on the device")
    return {"batch_shape": list(shape)}


def _show_checkup(recipe: Recipe, source: Source, checkup: Checkup, folder: Path) -> dict[str, Any]:
    """Shows what is wrong with the data, writes it down, and answers it as facts by name."""
    document = checkup.document(recipe.data)
    show_findings(document.findings)
    page = write_checkup(document, load_pictures(source, shown_images(document)), folder)
    say(f"with pictures: {page}")
    stops = explain_errors(document.findings, recipe.data)
    facts = {"findings": document.model_dump(exclude_none=True)["findings"], "checkup": str(page)}
    return facts | ({"stops": stops} if stops else {})


def _show_classes(data: PreparedData) -> None:
    columns = {name: count_labels(split) for name, split in data.splits.items()}
    rows: list[list[Any]] = [
        [label, *(counts[number] for counts in columns.values())] for number, label in enumerate(data.labels)
    ]
    shown = rows if len(rows) <= 40 else [*rows[:40], [f"… {len(rows) - 40} more", *([""] * len(columns))]]
    show_table("images by class", ["class", *columns], shown)
