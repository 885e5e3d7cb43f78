"""The story: recipe → data → model → hardware → training → best checkpoint → test → run folder → push."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
from contextlib import ExitStack
from typing import Any

import datasets
import numpy as np
import torch
from torchvision.utils import make_grid, save_image
from transformers import BaseImageProcessor, EvalPrediction, PreTrainedModel, set_seed

from vit_finetune.console import say, show_table, warn, warn_of_findings
from vit_finetune.data.batches import naming_loader_errors
from vit_finetune.data.mixing import build_mixing
from vit_finetune.data.sources.columns import column_values
from vit_finetune.data.splits.files import save_splits
from vit_finetune.data.splits.prepared import PreparedData, pinned
from vit_finetune.data.streaming.prepared import prepare_data
from vit_finetune.data.transforms import (
    EvaluationImages,
    TrainingImages,
    TrainingIndex,
    check_image_processor,
)
from vit_finetune.evaluation.scoring import compute_label_metrics, save_mistakes, score
from vit_finetune.files import folder_written_whole, sync, write_json, write_text, written_whole
from vit_finetune.model.loading import load_checkpoint, load_model
from vit_finetune.planning import (
    form_world,
    plan_classes,
    plan_hardware,
    plan_loading,
    quiet_libraries,
    show_plan,
)
from vit_finetune.publishing.card import write_card
from vit_finetune.publishing.report import write_report
from vit_finetune.pushing import check_destination, push_to_hub
from vit_finetune.recipe import Recipe, load_recipe
from vit_finetune.run import Interrupted, Report, Run, RunError
from vit_finetune.training.arguments import build_arguments
from vit_finetune.training.callbacks import ProgressDisplay, StopOnSignal
from vit_finetune.training.checkpoints import newest_intact, remove_leftovers
from vit_finetune.training.images import add_unreadable, build_batches, first_images
from vit_finetune.training.provenance import describe_start, describe_training
from vit_finetune.training.trainer import ViTTrainer
from vit_finetune.training.world import World, check_machines_agree, check_same_division


def finetune(recipe: Recipe, resume: bool = False, command: str | None = None) -> Run:
    """A recipe, carried out: data → model → training → best checkpoint → test, scored once → run → push.

    Args:
        recipe: what to do.
        resume: continue the newest checkpoint of the run that is there.
        command: how the user said it, for the provenance.

    Raises:
        RunError: the data, the model or the folder cannot be used, or pushing is not permitted; or pushing
            failed, which leaves a finished run.
        Interrupted: a signal (Ctrl-C, SIGTERM, SIGUSR1) stopped it; while training with a checkpoint.
    """
    run = Run(recipe.output_dir)
    run.check_free(resume)
    before = _same_as_before(recipe, run) if resume else None
    if before and run.report_html.is_file():
        say(f"{run.path} is finished already: {run.report_html}")
        _push(run, recipe, None)
        return run
    if before:
        check_same_division(os.environ, before["hardware"])
    with (
        quiet_libraries(),
        form_world(recipe) as world,
        StopOnSignal(world).listening() as stop,
        ExitStack() as held,
    ):
        if recipe.hub.push and world.is_main:
            check_destination(recipe.hub)
        with world.one_per_machine_first():
            data = prepare_data(pinned(recipe.data, before))
        if recipe.hub.push and "test" not in data.splits:
            raise RunError(
                "hub.push publishes tested models, and there is no test split: set data.test_fraction"
            )
        classes = plan_classes(recipe, data)
        set_seed(recipe.training.seed)
        model, image_processor = load_model(recipe.model, data.labels)
        check_image_processor(image_processor)
        hardware = plan_hardware(recipe, model, world, before)
        hardware.choices += classes
        train = first_images(
            data,
            image_processor,
            recipe.augmentation,
            recipe.training.seed,
            recipe.data.balanced_sampling,
        )
        loading = plan_loading(recipe, data, train, model, hardware, world, before)
        show_plan(recipe, data, model, hardware, world)
        warn_of_findings(data.findings.findings)
        if loading.cache:
            with world.one_per_machine_first():
                train.read_from_cache(loading.cache, column_values(data.splits["train"], "digest"))
        arguments = build_arguments(
            recipe.training, hardware, loading, run.checkpoints, recipe.evaluation.batch_size
        )
        batches = build_batches(
            data, image_processor, recipe.augmentation, recipe.training, hardware, loading, world, before
        )
        provenance = describe_start(recipe, data, model, hardware, world.size, command, before)
        if world.is_main:
            _open(run, recipe, data, train, provenance, held, new=not resume)
        check_machines_agree(world, run, provenance)
        trainer = ViTTrainer(
            model,
            image_processor,
            arguments,
            batches or train,
            EvaluationImages(data.splits["validation"], image_processor),
            compute_metrics=_validation_metrics,
            mixing=build_mixing(recipe.augmentation, len(data.labels)),
            stop=stop,
            callbacks=[display := ProgressDisplay(provenance["images_per_step"])],
        )
        try:
            with naming_loader_errors():
                result = trainer.train(
                    resume_from_checkpoint=_checkpoint(run, recipe, world) if resume else None
                )
        finally:
            display.bar.stop()  # also where training failed, or the bar would be drawn below the error
        provenance |= describe_training(trainer, result.metrics, hardware, loading, before)
        add_unreadable(provenance, batches, world, before)
        if stop.is_stopping:
            if world.is_main:
                write_json(run.provenance, provenance)
            raise Interrupted(
                f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, checkpoint kept. "
                f"Go on with: {_resuming(command, world)}",
                stop.number or signal.SIGTERM,
            )
        weights = trainer.whole_weights()
        if world.is_main:
            _save_model(run, model, weights, image_processor)
            write_json(run.history, trainer.state.log_history)
            write_json(run.provenance, provenance)
        world.wait()
        reports = _score(run, recipe, data.splits, model.device, world.is_main)
        if world.is_main:
            write_json(run.provenance, provenance | {"scored": run.sum_scored()})
            write_card(run)
            write_report(run)  # last: a run with a report is finished
            _show_reports(reports, run)
            say(provenance["verdict"])
        world.wait()
    _push(run, recipe, data.splits.get("test"))  # the other processes need not wait for it
    return run


# --------------------------------------------------------------------------- before training


def _same_as_before(recipe: Recipe, run: Run) -> dict[str, Any] | None:
    """The provenance of the run to resume; None where it was stopped while its folder was being made.

    Raises:
        RunError: the recipe says something else than the run's in a way that would train another model.
    """
    old, new = load_recipe(run.recipe).model_dump(mode="json"), recipe.model_dump(mode="json")
    # The images per step are kept whatever the recipe now says of batches: `training.hardware.divide_step`.
    free = ("training.output_dir", "training.dataloader_", "training.ddp_", "training.logging_",
            "training.report_to", "training.save_total_limit", "training.per_device_train_batch_size",
            "training.gradient_accumulation_steps", "evaluation.", "hub.")  # fmt: skip
    changed = [
        f"{key} was {old[section].get(name)!r}, is {new[section].get(name)!r}"
        for section in new
        for name in new[section]
        if old[section].get(name) != new[section].get(name)
        and not (key := f"{section}.{name}").startswith(free)
    ]
    if changed:
        raise RunError(
            f"{run.path}: cannot be resumed with another recipe: {'; '.join(changed)}. Resume it with the "
            f"same words, "
            f"or start another run with training.output_dir=…"
        )
    return run.read_provenance() if run.provenance.is_file() else None


def _checkpoint(run: Run, recipe: Recipe, world: World) -> str | None:
    """The checkpoint to resume from; None, said aloud, where there is none that can be used."""
    found = None
    if world.is_main:
        remove_leftovers(run.checkpoints)
        checkpoint = newest_intact(run.checkpoints, recipe.training.load_best_model_at_end)
        found = str(checkpoint) if checkpoint else None
        say(
            f"resuming from {found}"
            if found
            else "there is no checkpoint to use: starting from the beginning"
        )
    return world.from_main(found)  # type: ignore[no-any-return]


def _resuming(command: str | None, world: World) -> str:
    """What to say to continue a run: the same words, and --resume."""
    if command is None:
        return "finetune(recipe, resume=True)"
    if world.size > 1:
        return "the same words to the launcher, and --resume"
    return command if "--resume" in command.split() else f"{command} --resume"


def _open(
    run: Run,
    recipe: Recipe,
    data: PreparedData,
    train: TrainingImages,
    provenance: dict[str, Any],
    held: ExitStack,
    new: bool,
) -> None:
    """Writes what is known before the first step; leaves no half-made run where it cannot.

    From then on no other process may write there, until `held` is closed.
    """
    if new:
        run.claim()
    else:
        held.enter_context(run.held())
    run.remove_leftovers()
    try:
        write_text(run.recipe, recipe.to_yaml())  # first: a folder with a recipe can be resumed
        if new:
            held.enter_context(run.held())  # not before: killed without a recipe, it leaves the folder free
        save_splits(data.splits, run)
        write_text(run.findings, data.findings.shortened().to_json())
        _save_augmented(run, train)
        write_json(run.provenance, provenance)  # last: without it, a resumed run begins anew
    except Exception as error:  # stopped by a signal, it can be resumed
        if new and not isinstance(error, RunError):  # else another process resumes it already
            shutil.rmtree(run.path, ignore_errors=True)
        raise


def _save_augmented(run: Run, train: TrainingImages, images: int = 6, epochs: int = 7) -> None:
    """Writes a sheet of training images: each row one image, as evaluation sees it and as seven epochs do."""
    tiles = []
    for row in [number * len(train) // images for number in range(min(images, len(train)))]:
        tiles += [
            train.unaugmented(row),
            *(train[TrainingIndex(epoch, row)]["pixel_values"] for epoch in range(epochs)),
        ]
    sheet = torch.stack(tiles).float() / 255  # (B, 3, H, W)
    # Small images keep their pixels visible.
    scale = max(1, 96 // sheet.shape[-1])
    sheet = torch.nn.functional.interpolate(sheet, scale_factor=scale, mode="nearest")
    with written_whole(run.pictures / "augmented.jpg") as temporary:
        save_image(make_grid(sheet, nrow=epochs + 1, padding=4, pad_value=1), temporary, format="jpeg")


# --------------------------------------------------------------------------- after training


def _validation_metrics(prediction: EvalPrediction) -> dict[str, float]:
    if not np.isfinite(prediction.predictions).all():
        raise RunError(
            "training diverged: the model answers with NaN or infinity. Lower training.learning_rate, or "
            "raise training.warmup_steps"
        )
    return compute_label_metrics(prediction.predictions.argmax(axis=-1), prediction.label_ids)


def _save_model(
    run: Run, model: PreTrainedModel, weights: dict[str, torch.Tensor], image_processor: BaseImageProcessor
) -> None:
    """Writes `model/`, whole or not at all."""
    with folder_written_whole(run.model) as aside:
        model.save_pretrained(aside, state_dict=weights)
        image_processor.save_pretrained(aside)
        for file in aside.iterdir():
            sync(file)
        shutil.rmtree(run.model, ignore_errors=True)


def _score(
    run: Run, recipe: Recipe, splits: datasets.DatasetDict, device: torch.device, writes: bool
) -> dict[str, Report]:
    """Scores validation and then test, once, with the weights that were saved; writes the reports."""
    model, image_processor = load_checkpoint(str(run.model))
    model = model.to(device)
    reports = {}
    for name in [name for name in ("validation", "test") if name in splits]:
        scores = score(model, image_processor, splits[name], name, recipe.evaluation)
        reports[name] = scores.report
        if writes:
            if name == "test" or "test" not in splits:
                reports[name] = save_mistakes(scores, splits[name], run)
                scores.save_predictions(run.predictions(name))
            write_text(run.report(name), reports[name].to_json())
    return reports


def _push(run: Run, recipe: Recipe, test_split: datasets.Dataset | None) -> None:
    """Publishes a finished run where the recipe asks for it.

    Raises:
        RunError: it could not be; the run is kept.
    """
    if not recipe.hub.push or os.environ.get("RANK", "0") != "0":
        return
    kept = f"The run is kept; push it with: vit-finetune push {shlex.quote(str(run.path))}"
    try:
        push_to_hub(run.path, recipe.hub, test_split=test_split)
    except Interrupted as stop:
        raise Interrupted(f"{stop}. {kept}", stop.number) from None
    except RunError as error:
        raise RunError(f"{error}. {kept}") from error
    except Exception:  # such as a disk that is full
        say(kept)
        raise


def _show_reports(reports: dict[str, Report], run: Run) -> None:
    show_table(
        "scores",
        ["split", "images", "accuracy", "95% interval", "macro F1", "log loss", "ECE"],
        [
            [
                name,
                f"{report.num_images:,}",
                f"{report.accuracy:.4f}",
                f"{report.accuracy_interval[0]:.3f}–{report.accuracy_interval[1]:.3f}",
                f"{report.macro_f1:.4f}",
                f"{report.log_loss:.4f}",
                f"{report.ece:.4f}",
            ]
            for name, report in reports.items()
        ],
    )
    if "test" not in reports:
        warn("there was no test split: the validation score also chose the weights, so it flatters them")
    say(f"report: {run.report_html}")
    say(f"model:  {run.model}")
