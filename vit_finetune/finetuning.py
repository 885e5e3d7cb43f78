"""The story: recipe → data → model → hardware → training → best checkpoint → test → run folder → push."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import BaseImageProcessor, PreTrainedModel, set_seed

from vit_finetune.console import say, warn_of_findings
from vit_finetune.data.batches import naming_loader_errors
from vit_finetune.data.mixing import build_mixing
from vit_finetune.data.sources.columns import column_values
from vit_finetune.data.splits.prepared import PreparedData, pinned
from vit_finetune.data.streaming.prepared import prepare_data
from vit_finetune.data.transforms import (
    EvaluationImages,
    check_image_processor,
)
from vit_finetune.evaluation.scoring import compute_label_metrics
from vit_finetune.files import folder_written_whole, sync, write_json
from vit_finetune.final_scores import score_splits, show_scores
from vit_finetune.model.adaptation import adapt
from vit_finetune.model.loading import load_model
from vit_finetune.model.lora import has_lora, merge_lora, save_adapter
from vit_finetune.opening import (
    checkpoint_to_resume,
    how_to_resume,
    open_run,
    pinned_base,
    same_as_before,
)
from vit_finetune.planning import (
    check_method,
    form_world,
    plan_classes,
    plan_hardware,
    plan_learning_rate,
    plan_loading,
    quiet_libraries,
    show_plan,
    validation_metrics,
)
from vit_finetune.probing import check_probe, probe
from vit_finetune.publishing.card import write_card
from vit_finetune.publishing.report import write_report
from vit_finetune.pushing import check_destination, push_to_hub
from vit_finetune.recipe import ModelConfig, Recipe
from vit_finetune.run import Interrupted, Run, RunError
from vit_finetune.training.arguments import build_arguments
from vit_finetune.training.callbacks import ProgressDisplay, StopOnSignal
from vit_finetune.training.distillation import Teacher, load_teacher
from vit_finetune.training.hardware import Hardware
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
    before = same_as_before(recipe, run) if resume else None
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
            check_destination(recipe.hub, recipe.model)
        check_method(recipe, world)
        with world.one_per_machine_first():
            data = prepare_data(pinned(recipe.data, before))
        if recipe.hub.push and "test" not in data.splits:
            raise RunError(
                "hub.push publishes tested models, and there is no test split: set data.test_fraction"
            )
        classes = plan_classes(recipe, data)
        teacher = load_teacher(recipe.training, data.labels, before)
        set_seed(recipe.training.seed)
        base = pinned_base(recipe.model, before)
        model, image_processor = load_model(base, data.labels, multi_label=recipe.data.multi_label)
        check_image_processor(image_processor)
        adapt(model, recipe.model)
        hardware = plan_hardware(recipe, model, world, before, teacher)
        hardware.choices += classes
        start = _Start(
            recipe, run, data, model, image_processor, teacher, hardware, world, stop, held, command, before,
            resume,
        )  # fmt: skip
        ended = _fit_head(start) if recipe.model.method == "linear_probe" else _train(start)
        if world.is_main:
            _save_model(recipe.model, run, model, ended.weights, image_processor)
            write_json(run.history, ended.history)
            write_json(run.provenance, ended.provenance)
        world.wait()
        reports = score_splits(run, recipe, data.splits, model.device, world.is_main)
        if world.is_main:
            write_json(run.provenance, ended.provenance | {"scored": run.sum_scored()})
            write_card(run)
            write_report(run)  # last: a run with a report is finished
            show_scores(reports, run)
            say(ended.provenance["verdict"])
        world.wait()
    _push(run, recipe, data.splits.get("test"))  # the other processes need not wait for it
    return run


# --------------------------------------------------------------------------- training


@dataclass(frozen=True)
class _Start:
    """What training begins with."""

    recipe: Recipe
    run: Run
    data: PreparedData
    model: PreTrainedModel
    image_processor: BaseImageProcessor
    teacher: Teacher | None
    hardware: Hardware
    world: World
    stop: StopOnSignal
    held: ExitStack
    """Keeps other processes out of the run's folder until it is closed."""
    command: str | None
    before: dict[str, Any] | None
    resume: bool


@dataclass(frozen=True)
class _End:
    """What training ends with: every weight by name (on the main process), its log, and what is known.

    A model with LoRA still has its matrices apart.
    """

    weights: dict[str, torch.Tensor]
    history: list[dict[str, Any]]
    provenance: dict[str, Any]


def _train(start: _Start) -> _End:
    """Trains with the Trainer; ends with the best checkpoint.

    Raises:
        Interrupted: stopped by a signal, with a checkpoint.
    """
    recipe, run, data, model, world = start.recipe, start.run, start.data, start.model, start.world
    before, hardware, image_processor = start.before, start.hardware, start.image_processor
    train = first_images(
        data, image_processor, recipe.augmentation, recipe.training.seed, recipe.data.balanced_sampling
    )
    loading = plan_loading(recipe, data, train, model, hardware, world, before)
    show_plan(recipe, data, model, hardware, world, start.teacher)
    warn_of_findings(data.findings.findings)
    if loading.cache:
        with world.one_per_machine_first():
            train.read_from_cache(loading.cache, column_values(data.splits["train"], "digest"))
    training, found = plan_learning_rate(
        recipe, data, train, model, image_processor, hardware, loading, world, before, start.teacher
    )
    arguments = build_arguments(training, hardware, loading, run.checkpoints, recipe.evaluation.batch_size)
    batches = build_batches(
        data, image_processor, recipe.augmentation, training, hardware, loading, world, before
    )
    provenance = describe_start(recipe, data, model, hardware, world.size, start.command, before) | found
    if start.teacher:
        provenance["teacher"] = start.teacher.describe()
    if world.is_main:
        open_run(run, recipe, data, train, provenance, start.held, new=not start.resume)
    check_machines_agree(world, run, provenance)
    trainer = ViTTrainer(
        model,
        image_processor,
        arguments,
        batches or train,
        EvaluationImages(data.splits["validation"], image_processor),
        compute_metrics=validation_metrics,
        mixing=build_mixing(recipe.augmentation, len(data.labels)),
        teacher=start.teacher,
        stop=start.stop,
        callbacks=[display := ProgressDisplay(provenance["images_per_step"])],
    )
    try:
        with naming_loader_errors():
            result = trainer.train(
                resume_from_checkpoint=checkpoint_to_resume(run, recipe, world) if start.resume else None
            )
    finally:
        display.bar.stop()  # also where training failed, or the bar would be drawn below the error
    provenance |= describe_training(trainer, result.metrics, hardware, loading, before)
    add_unreadable(provenance, batches, world, before)
    if start.stop.is_stopping:
        raise _interrupted(start, trainer, provenance)
    return _End(trainer.whole_weights(), trainer.state.log_history, provenance)


def _interrupted(start: _Start, trainer: ViTTrainer, provenance: dict[str, Any]) -> Interrupted:
    """What to raise where a signal ended training; what is known by now is written down."""
    if start.world.is_main:
        write_json(start.run.provenance, provenance)
    return Interrupted(
        f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, checkpoint kept. "
        f"Go on with: {how_to_resume(start.command, start.world)}",
        start.stop.number or signal.SIGTERM,
    )


def _fit_head(start: _Start) -> _End:
    """Fits the head of a linear probe."""
    recipe, run, data, model = start.recipe, start.run, start.data, start.model
    hardware, world = start.hardware, start.world
    check_probe(recipe, model, world.size)
    show_plan(recipe, data, model, hardware, world)
    warn_of_findings(data.findings.findings)
    provenance = describe_start(recipe, data, model, hardware, world.size, start.command, start.before)
    open_run(run, recipe, data, None, provenance, start.held, new=not start.resume)
    history, facts = probe(recipe, data, model, start.image_processor, hardware, compute_label_metrics)
    return _End(model.state_dict(), history, provenance | facts)


# --------------------------------------------------------------------------- after training


def _save_model(
    config: ModelConfig,
    run: Run,
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    image_processor: BaseImageProcessor,
) -> None:
    """Writes `model/`, and of LoRA that was merged into it `adapter/`, each whole or not at all."""
    if has_lora(model) and config.lora_merge:
        with _replaced(run.adapter) as aside:
            save_adapter(model, aside)
        merge_lora(model)
        weights = model.state_dict()
    with _replaced(run.model) as aside:
        if has_lora(model):
            save_adapter(model, aside)
            model.config.save_pretrained(aside)
        else:
            model.save_pretrained(aside, state_dict=weights)
        image_processor.save_pretrained(aside)


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A folder to write to that takes another's place once it is whole."""
    with folder_written_whole(folder) as aside:
        yield aside
        for file in aside.iterdir():
            sync(file)
        shutil.rmtree(folder, ignore_errors=True)


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
