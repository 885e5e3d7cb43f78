"""Any number of processes trains the same at equal images per step, and scores every image once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_recipe
from fork_server import QUICK, ForkServer
from worlds import (
    EPOCHS,
    HELD_OUT,
    IMAGES,
    PER_STEP,
    STEPS,
    Division,
    Place,
    Trained,
    build,
    check_same,
    check_same_results,
    draw_photos,
    finish,
)

from vit_finetune.recipe import bundled_recipes
from vit_finetune.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

ALONE = Division(1, 8, 1)
DIVISIONS = {
    # How evaluation is divided changes too.
    Division(1, 2, 4): 15,
    Division(2, 4, 1): 4,
    Division(2, 2, 2): 7,
    Division(4, 2, 1): 3,
}


@pytest.fixture(scope="module")
def place(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("processes")
    return Place(forks, folder, draw_photos(folder / "photos"))


def train(place: Place, division: Division, dropout: bool, evaluation: int) -> Trained:
    """A run from its beginning to its end."""
    run, children = place.start(f"{division}-{dropout}", division, dropout=dropout, evaluation=evaluation)
    opening = (
        f"{division.processes} process{'es' if division.processes > 1 else ''} × {division.batch} images"
    )
    told = finish(children)
    assert told.count(f"{opening} × {division.accumulation} accumulation = {PER_STEP} images per step") == 1
    return Trained(run, [children])


@pytest.fixture(scope="module")
def alone(place: Place) -> Trained:
    return train(place, ALONE, False, 8)


def check_reading(trained: Trained, dropout: bool = False) -> None:
    """Makes sure that every image was trained on once an epoch, and evaluated once each time."""
    steps = trained.steps()
    sizes = [PER_STEP] * (IMAGES // PER_STEP) + [IMAGES % PER_STEP]
    assert [len(images) for images in steps.values()] == sizes * EPOCHS
    images = [image for found in steps.values() for image in found]
    for epoch in range(EPOCHS):
        assert len(set(images[epoch * IMAGES : (epoch + 1) * IMAGES])) == IMAGES
    if not dropout:  # a step's loss is the mean of its images, also of a smaller last step
        sums = trained.summed_losses()
        means = {step + 1: sums[step] / len(images) for step, images in steps.items()}
        assert trained.losses() == pytest.approx(means, abs=1e-5)
    labels = sorted([0, 1, 2] * (HELD_OUT // 3))
    processes = len(trained.sessions[0])
    assert trained.evaluated() == [labels] * (STEPS // 2 * processes)


def test_one_process_reads_every_image_once(alone: Trained) -> None:
    check_reading(alone)
    assert list(alone.losses()) == list(range(1, STEPS + 1))  # what the others are compared with
    assert list(alone.evaluations()) == list(range(2, STEPS + 1, 2))


@pytest.mark.parametrize("division", DIVISIONS, ids=str)
def test_any_division_of_a_step_trains_the_same(place: Place, alone: Trained, division: Division) -> None:
    trained = train(place, division, False, DIVISIONS[division])
    check_reading(trained)
    assert trained.steps() == alone.steps()
    check_same(trained, alone)


def test_dropout_depends_on_the_place_in_the_step_alone(place: Place, alone: Trained) -> None:
    """Equal batches are given equal random numbers, whichever process they are computed by, and when."""
    equal = [division for division in DIVISIONS if division.batch == 2]
    first, *others = [train(place, division, True, DIVISIONS[division]) for division in equal]
    check_reading(first, dropout=True)
    assert abs(first.losses()[1] - alone.losses()[1]) > 1e-3, "there was no dropout"
    for other in others:
        assert other.steps() == first.steps() == alone.steps()
        check_same(other, first)


@pytest.mark.parametrize(
    "config",
    [
        {
            "model_type": "dinov2",
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "patch_size": 4,
        },
        {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]},
    ],
    ids=lambda config: config["model_type"],
)
def test_other_models_train_and_are_evaluated_as_they_are_saved(
    forks: ForkServer, place: Place, tmp_path: Path, config: dict[str, Any]
) -> None:
    """Models with a weight that nothing depends on, and with statistics that each process has of its own images."""
    sections = {"model": {"config": config, "image_size": 32}, "evaluation": {"batch_size": 4}}
    recipe = tiny_recipe(place.photos, tmp_path / "run", **sections)
    file = tmp_path / "other.yaml"
    file.write_text(recipe.to_yaml(resolved=False), encoding="utf-8")
    finish(forks.start_world(tmp_path / "world", 2, "train", file, before=QUICK))
    run = Run(tmp_path / "run")
    history = json.loads(run.history.read_text())
    evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    published = json.loads(run.report("validation").read_text())["log_loss"]
    assert min(abs(loss - published) for loss in evaluated) < 1e-6


def test_looking_is_answered_once(forks: ForkServer, place: Place, tmp_path: Path) -> None:
    recipe = place.write_recipe(Run(tmp_path / "run"), Division(2, 4, 1), False, 4)
    words = ["check", recipe, "--json", "--output", tmp_path / "checked"]
    children = forks.start_world(tmp_path / "world", 2, *words, before=QUICK)
    finish(children)
    first, second = ((child.folder / "stdout").read_text() for child in children)
    assert json.loads(first)["images_per_step"] == PER_STEP and second == ""


def test_accelerate_launch_trains_the_same(place: Place, alone: Trained, tmp_path: Path) -> None:
    """Really launched, and with loader processes; the rest of this file forks what it starts."""
    config = next(iter(bundled_recipes().values())).parent / "accelerate" / "cpu.yaml"
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(build(place.photos, tmp_path / "run", Division(2, 4, 1)).to_yaml(resolved=False))
    words = [*("-m", "vit_finetune", "train", recipe), "training.dataloader_num_workers=1"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, *words],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TMPDIR": str(tmp_path),  # torch leaves a folder behind
        },
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check_same_results(Run(tmp_path / "run"), alone.run)
