"""How a run's folder is begun, and gone on with: nothing half-made, and nobody else in it."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from typing import Any

import torch
from torchvision.utils import make_grid, save_image

from vit_finetune.console import say
from vit_finetune.data.splits.files import save_splits
from vit_finetune.data.splits.prepared import PreparedData
from vit_finetune.data.transforms import TrainingImages, TrainingIndex
from vit_finetune.files import write_json, write_text, written_whole
from vit_finetune.hub_repos import parse_hub_id
from vit_finetune.recipe import ModelConfig, Recipe, find_changes, load_recipe
from vit_finetune.run import Run, RunError
from vit_finetune.training.checkpoints import newest_intact, remove_leftovers
from vit_finetune.training.world import World


def same_as_before(recipe: Recipe, run: Run) -> dict[str, Any] | None:
    """The provenance of the run to resume; None where it was stopped while its folder was being made.

    Raises:
        RunError: the recipe says something else than the run's in a way that would train another model.
    """
    old, new = load_recipe(run.recipe).model_dump(mode="json"), recipe.model_dump(mode="json")
    # The images per step are kept whatever the recipe now says of batches: `training.hardware.divide_step`.
    free = ("training.output_dir", "training.dataloader_", "training.ddp_", "training.logging_",
            "training.report_to", "training.save_total_limit", "training.per_device_train_batch_size",
            "training.gradient_accumulation_steps", "evaluation.", "hub.")  # fmt: skip
    # A finished run is left as it is, and must not seem to have been calibrated.
    late = ("evaluation.calibrate",) if run.report_html.is_file() else ()
    changes = find_changes(old, new)
    changed = [text for key, text in changes.items() if key in late or not key.startswith(free)]
    if changed:
        raise RunError(
            f"{run.path}: cannot be resumed with another recipe: {'; '.join(changed)}. Resume it with the "
            f"same words, "
            f"or start another run with training.output_dir=…"
        )
    return run.read_provenance() if run.provenance.is_file() else None


def pinned_base(config: ModelConfig, before: dict[str, Any] | None) -> ModelConfig:
    """The section with the commit of the checkpoint that a run began with, where that is the Hub's.

    LoRA's checkpoints hold nothing of the weights that they stand beside.

    Args:
        config: the run's.
        before: provenance of the run that is resumed; None of a new one.
    """
    revision = ((before or {}).get("model") or {}).get("revision")
    if revision is None or parse_hub_id(str(config.path)) is None:
        return config
    return config.model_copy(update={"revision": revision})


def checkpoint_to_resume(run: Run, recipe: Recipe, world: World) -> str | None:
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


def how_to_resume(command: str | None, world: World) -> str:
    """What to say to continue a run: the same words, and --resume."""
    if command is None:
        return "finetune(recipe, resume=True)"
    if world.size > 1:
        return "the same words to the launcher, and --resume"
    return command if "--resume" in command.split() else f"{command} --resume"


def open_run(
    run: Run,
    recipe: Recipe,
    data: PreparedData,
    train: TrainingImages | None,
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
        if train is not None:
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
