"""A search over a few recipe keys: trials that are trained, and judged on the validation split."""

from __future__ import annotations

import importlib.util
import os
import shlex
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor, PreTrainedModel, set_seed
from transformers.trainer_utils import HPSearchBackend

from vit_finetune.console import say, show_table, warn, warn_of_findings
from vit_finetune.data.batches import naming_loader_errors
from vit_finetune.data.mixing import build_mixing
from vit_finetune.data.sources.columns import column_values
from vit_finetune.data.splits.prepared import PreparedData
from vit_finetune.data.streaming.prepared import prepare_data
from vit_finetune.data.transforms import EvaluationImages, check_image_processor
from vit_finetune.files import write_json, write_text
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
    validation_metrics,
)
from vit_finetune.publishing.tuning_page import write_tuning_page
from vit_finetune.recipe import Recipe, RecipeError
from vit_finetune.run import Diverged, RunError
from vit_finetune.search_space import Dimension, with_settings
from vit_finetune.training.arguments import build_arguments
from vit_finetune.training.callbacks import ProgressDisplay, StopOnSignal
from vit_finetune.training.distillation import Teacher, load_teacher
from vit_finetune.training.images import first_images
from vit_finetune.training.trainer import ViTTrainer
from vit_finetune.training.trials import (
    JOURNAL,
    LOCK,
    ask,
    asked,
    check_same,
    finished,
    forget_killed,
    held,
    open_study,
)
from vit_finetune.training.world import World

MOST_SHOWN = 5
"""Trials in the table that is printed at the end."""


@dataclass(frozen=True)
class _Search:
    """What all trials share."""

    recipe: Recipe
    """With what was chosen for the machine written out."""
    dimensions: list[Dimension]
    data: PreparedData
    """Without a test split: what is not there is not looked at."""
    world: World
    study: Any
    folder: Path

    @property
    def metric(self) -> str:
        return self.recipe.training.metric_for_best_model


def tune(recipe: Recipe, dimensions: list[Dimension], trials: int = 20, resume: bool = False) -> Path:
    """The folder `<output_dir>-tune` of a search, with `best.yaml`, `trials.json` and `tune.html`.

    Args:
        recipe: what every trial carries out, but for the keys that are searched.
        dimensions: these keys, as `build_search` checked them.
        trials: how many to make in all, pruned ones too.
        resume: go on with the search that is there.

    Raises:
        RunError: optuna is missing, a launcher started this, the folder cannot be used, or no score came.
        Interrupted: a signal stopped it; what was finished is kept.
    """
    folder = Path(f"{recipe.output_dir}-tune")
    _check_start(folder, resume)
    with quiet_libraries(), form_world(recipe) as world, StopOnSignal(world).listening():
        check_method(recipe, world)
        data = prepare_data(recipe.data)
        data.splits.pop("test", None)
        begun_with = asked(recipe, dimensions, data.describe(recipe.data.path)["splits"])
        if not resume:
            _check_values(recipe, dimensions, data, world)
            pins = _plan(recipe, data, world, trials)
            folder.mkdir(parents=True, exist_ok=True)
        with held(folder):
            study = open_study(recipe, folder)
            if resume:
                check_same(study, begun_with, folder)
            else:
                study.set_user_attr("asked", begun_with)
                study.set_user_attr("pinned", pins)
            pinned = with_settings(recipe, study.user_attrs["pinned"])
            search = _Search(pinned, dimensions, data, world, study, folder)
            forget_killed(study)
            while (done := len(finished(study))) < trials:
                _try(search, done)
                _write(search)
                _say_last(search, trials)
        document = _write(search)
    if document["best"] is None:
        raise RunError(
            f"{folder}: no trial was scored: all of them diverged, or had values that do not go together. "
            f"Search other ranges"
        )
    _show(document, folder)
    return folder


# --------------------------------------------------------------------------- beginning and going on


def _check_start(folder: Path, resume: bool) -> None:
    if importlib.util.find_spec("optuna") is None:
        raise RunError("tune needs optuna, which is not installed here: pip install 'vit-finetune[tune]'")
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise RunError(
            f"tune makes its trials in one process, and a launcher started {processes}: say `vit-finetune "
            f"tune` without a launcher, and train its best.yaml with one"
        )
    there = (folder / JOURNAL).is_file()
    if resume and not there:
        raise RunError(f"{folder}: there is no search to go on with; leave out --resume to start one")
    if (
        not resume
        and folder.exists()
        and (not folder.is_dir() or any(p.name != LOCK for p in folder.iterdir()))
    ):
        instead = "go on with it with --resume, or " if there else ""
        raise RunError(f"{folder} is there already: {instead}set another training.output_dir=…")


def _build(recipe: Recipe, data: PreparedData) -> tuple[PreTrainedModel, BaseImageProcessor, Teacher | None]:
    """A model as training begins with it, its image processor, and its teacher.

    Raises:
        RunError: they cannot be had.
    """
    set_seed(recipe.training.seed)
    model, image_processor = load_model(recipe.model, data.labels, multi_label=recipe.data.multi_label)
    check_image_processor(image_processor)
    adapt(model, recipe.model)
    return model, image_processor, load_teacher(recipe.training, data.labels)


def _check_values(recipe: Recipe, dimensions: list[Dimension], data: PreparedData, world: World) -> None:
    """Makes sure that a model can be built with each value that is searched, the others as in the recipe.

    Raises:
        RunError: with one of them it cannot, which would end the search in the middle.
    """
    for dimension in dimensions:
        for value in dimension.values if dimension.key.startswith("model.") else ():
            tried = with_settings(recipe, {dimension.key: value})
            try:
                check_method(tried, world)
                _build(tried, data)
            except RunError as error:
                raise RunError(f"--search {dimension}: with {value}: {error}") from error


def _plan(recipe: Recipe, data: PreparedData, world: World, trials: int) -> dict[str, Any]:
    """Says what every trial does; answers what was chosen for the machine, by recipe key, for all of them."""
    training = recipe.training
    epochs = training.num_train_epochs * trials  # what a cache is read for
    shown = recipe.model_copy(update={"training": training.model_copy(update={"num_train_epochs": epochs})})
    model, image_processor, teacher = _build(recipe, data)
    hardware = plan_hardware(recipe, model, world, teacher=teacher)
    hardware.choices += plan_classes(recipe, data)
    train = first_images(data, image_processor, recipe.augmentation, training.seed)
    loading = plan_loading(shown, data, train, model, hardware, world)
    show_plan(recipe, data, model, hardware, world, teacher)
    warn_of_findings(data.findings.findings)
    revision = {"data.revision": data.revision} if data.revision else {}
    return revision | {
        "data.cache": str(loading.cache) if loading.cache else "off",
        "training.bf16": hardware.bf16,
        "training.fp16": hardware.fp16,
        "training.per_device_train_batch_size": hardware.batch_size,
    }


# --------------------------------------------------------------------------- trials


def _try(search: _Search, number: int) -> None:
    """Makes one trial, and notes what came of it."""
    import optuna

    start = time.perf_counter()
    trial, settings = ask(search.study, search.recipe.training.seed, number, search.dimensions)
    say(f"trial {number + 1}: {', '.join(f'{key}={_short(value)}' for key, value in settings.items())}")
    outcome, score = "scored", None
    try:
        score = _train(search, with_settings(search.recipe, settings), trial)
    except optuna.TrialPruned:
        outcome = "pruned"
    except Diverged:
        outcome = "diverged"
    except RecipeError as error:  # each value can be, but not together
        say(str(error))
        outcome = "impossible"
    trial.set_user_attr("outcome", outcome)
    trial.set_user_attr("seconds", round(time.perf_counter() - start, 2))
    search.study.tell(trial, score, state=None if score is not None else optuna.trial.TrialState.PRUNED)


def _train(search: _Search, recipe: Recipe, trial: Any) -> float:
    """The validation score of a trial: of the weights that `train` would publish. It leaves nothing on disk.

    The Trainer is `finetune`'s, told of the trial as its `hyperparameter_search` would tell it, so that it
    reports each evaluation and prunes. That method itself keeps one Trainer for all trials, and sets its
    arguments only: not the model, the images, their mixing, or what is built from the arguments at the start.

    Raises:
        RecipeError: there is no such model.
        optuna.TrialPruned: at an evaluation, worse than the median of the trials before.
        Diverged: so it did.
    """
    training, data = recipe.training, search.data
    try:
        model, image_processor, teacher = _build(recipe, data)
    except RunError as error:
        raise RecipeError(str(error)) from error
    hardware = plan_hardware(recipe, model, search.world, teacher=teacher)
    train = first_images(
        data, image_processor, recipe.augmentation, training.seed, recipe.data.balanced_sampling
    )
    loading = plan_loading(recipe, data, train, model, hardware, search.world)
    if loading.cache:
        train.read_from_cache(loading.cache, column_values(data.splits["train"], "digest"))
    unsaved = {"save_strategy": "no", "load_best_model_at_end": False, "report_to": "none"}
    with tempfile.TemporaryDirectory() as folder, naming_loader_errors():
        arguments = build_arguments(
            training.model_copy(update=unsaved), hardware, loading, Path(folder), recipe.evaluation.batch_size
        )
        trainer = ViTTrainer(
            model,
            image_processor,
            arguments,
            train,
            EvaluationImages(data.splits["validation"], image_processor),
            compute_metrics=validation_metrics,
            mixing=build_mixing(recipe.augmentation, len(data.labels)),
            teacher=teacher,
            callbacks=[display := ProgressDisplay(hardware.batch_size * hardware.accumulation)],
        )
        name = f"eval_{search.metric}"
        trainer.hp_search_backend = HPSearchBackend.OPTUNA
        trainer.hp_space = lambda trial: {}  # the recipe has them already
        trainer.compute_objective = lambda metrics: metrics[name]
        try:
            trainer.train(trial=trial)
        finally:
            display.bar.stop()
    scores = [entry[name] for entry in trainer.state.log_history if name in entry]
    if not scores:
        raise RunError(
            "a trial ended without an evaluation: set training.eval_steps to fewer steps than it has"
        )
    if not training.load_best_model_at_end:
        return float(scores[-1])
    return float(min(scores) if search.metric == "loss" else max(scores))


# --------------------------------------------------------------------------- what comes of them


def _write(search: _Search) -> dict[str, Any]:
    """What is known so far; writes it to `trials.json`, `tune.html` and, with a score, `best.yaml`."""
    trials = [
        {
            "number": number,
            "outcome": trial.user_attrs["outcome"],
            "score": trial.value if trial.user_attrs["outcome"] == "scored" else None,
            "evaluations": {str(step): value for step, value in sorted(trial.intermediate_values.items())},
            "settings": trial.user_attrs["settings"],
            "seconds": trial.user_attrs["seconds"],
        }
        for number, trial in enumerate(finished(search.study), 1)
    ]
    scored = [trial for trial in trials if trial["score"] is not None]
    sign = 1 if search.metric == "loss" else -1
    best = min(scored, key=lambda trial: sign * trial["score"], default=None)
    document = {
        "recipe_name": search.recipe.name,
        "metric": search.metric,
        "search": [str(dimension) for dimension in search.dimensions],
        "logarithmic": [dimension.key for dimension in search.dimensions if dimension.is_logarithmic],
        "best": best and best["number"],
        "trials": trials,
    }
    write_json(search.folder / "trials.json", document)
    write_tuning_page(document, search.folder)
    if best:
        output = {"training.output_dir": str(search.recipe.output_dir)}
        found = with_settings(search.recipe, best["settings"] | output)
        head = (
            f"# {search.recipe.name}, with the settings of trial {best['number']} of {len(trials)}: "
            f"validation {search.metric.replace('_', ' ')} {best['score']:.4f}\n"
        )
        write_text(search.folder / "best.yaml", head + found.to_yaml(resolved=False))
    return document


def _say_last(search: _Search, trials: int) -> None:
    made = finished(search.study)
    last, metric = made[-1], search.metric.replace("_", " ")
    outcome = last.user_attrs["outcome"]
    said = f"validation {metric} {last.value:.4f}" if outcome == "scored" else outcome
    scores = [trial.value for trial in made if trial.user_attrs["outcome"] == "scored"]
    best = min(scores, default=None) if search.metric == "loss" else max(scores, default=None)
    tail = f"; the best so far {best:.4f}" if best is not None else ""
    say(f"trial {len(made)} of {trials}: {said}{tail}")


def _show(document: dict[str, Any], folder: Path) -> None:
    scored = [trial for trial in document["trials"] if trial["score"] is not None]
    scored.sort(key=lambda trial: trial["score"], reverse=document["metric"] != "loss")
    keys = list(scored[0]["settings"])
    show_table(
        f"the best of {len(document['trials'])} trials",
        ["trial", *(key.removeprefix("training.") for key in keys), f"validation {document['metric']}"],
        [
            [t["number"], *(_short(t["settings"][key]) for key in keys), f"{t['score']:.4f}"]
            for t in scored[:MOST_SHOWN]
        ],
    )
    warn(
        f"the validation score of the best of {len(document['trials'])} trials flatters it: some of it is "
        f"luck. The test split, which was not looked at, will say"
    )
    say(f"all trials: {folder / 'tune.html'}")
    say(f"next: vit-finetune train {shlex.quote(str(folder / 'best.yaml'))}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
