"""The story as a whole: what it leaves, what it refuses, how it stops and goes on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import draw_folder, draw_image, tiny_recipe
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from vit_finetune import finetuning
from vit_finetune.checking import check
from vit_finetune.evaluation.scoring import evaluate
from vit_finetune.finetuning import finetune
from vit_finetune.run import Findings, Report, Run, RunError
from vit_finetune.training.checkpoints import list_checkpoints


@pytest.mark.slow
def test_a_learnable_folder_is_learned_and_documented(folder: Path, tmp_path: Path) -> None:
    run = finetune(
        tiny_recipe(folder, tmp_path / "run", training={"num_train_epochs": 15}), command="vit-finetune …"
    )
    report = Report.load(run.report("test"))
    assert report.accuracy >= 0.85 and report.num_images == 9 and report.labels == ["blue", "green", "red"]
    facts = run.read_provenance()
    assert facts["command"] == "vit-finetune …" and facts["labels"] == report.labels
    assert facts["train_seconds"] > 0 and facts["images_per_second"] > 0 and facts["peak_memory_bytes"] > 1e8
    assert {name: split["num_images"] for name, split in facts["data"]["splits"].items()} == {
        "train": 18, "validation": 9, "test": 9,
    }  # fmt: skip
    config = AutoModelForImageClassification.from_pretrained(run.model).config
    assert config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert sorted(path.name for path in run.model.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip
    # The published weights are those that validation chose.
    best = run.checkpoints / f"checkpoint-{facts['best_step']}"
    chosen, published = (load_file(path / "model.safetensors") for path in (best, run.model))
    assert all(value.equal(published[name]) for name, value in chosen.items())


@pytest.mark.slow
def test_without_a_test_split_the_report_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finetune(
        tiny_recipe(folder, tmp_path / "run", data={"test_fraction": 0}, training={"max_steps": 2})
    )
    assert not run.report("test").exists() and run.report("validation").exists()
    assert "validation score also chose the weights" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_resume_goes_on(folder: Path, tmp_path: Path) -> None:
    """A real signal to a real process; the resumed run ends as an uninterrupted one does."""
    options = {"num_train_epochs": 60, "logging_steps": 1, "save_total_limit": 1}
    file = tmp_path / "tiny.yaml"
    run = Run(tmp_path / "run")
    file.write_text(tiny_recipe(folder, run.path, training=options).to_yaml(resolved=False))
    words = [sys.executable, "-m", "vit_finetune", "train", str(file)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while (
            not list(run.checkpoints.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "--resume" in errors.splitlines()[-1] and "Traceback" not in errors
    checkpoint = list_checkpoints(run.checkpoints)[-1]
    assert not run.model.exists()
    stopped_at = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert 0 < stopped_at < 300

    resumed = subprocess.run([*words, "--resume"], capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr
    assert f"checkpoint-{stopped_at}" in resumed.stderr
    whole = finetune(tiny_recipe(folder, tmp_path / "whole", training=options))
    one, two = (load_file(path / "model.safetensors") for path in (run.model, whole.model))
    assert all(value.equal(two[name]) for name, value in one.items())


@pytest.mark.slow
def test_a_run_that_died_keeps_account_of_what_it_spent(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"max_steps": 2, "lr_scheduler_type": "constant"}
    recipe = tiny_recipe(folder, tmp_path / "run", training=training)
    run = finetune(recipe)
    then, weights = run.read_provenance(), (run.model / "model.safetensors").read_bytes()
    run.report_html.unlink()  # as if it had died while scoring

    def die(*arguments: Any, **keys: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as dying, pytest.raises(RuntimeError, match="killed"):
        dying.setattr(finetuning.ViTTrainer, "train", die)
        finetune(recipe, resume=True)
    assert run.read_provenance()["train_seconds"] == then["train_seconds"]
    finetune(recipe, resume=True)
    now = run.read_provenance()
    for name in ("train_seconds", "images_per_second", "seconds", "speeds", "verdict", "steps", "best_step"):
        assert now[name] == then[name], name
    assert (run.model / "model.safetensors").read_bytes() == weights, "not one step more"
    assert {choice["reason"] for choice in now["choices"]} >= {"as when the run began"}


@pytest.mark.slow
def test_resuming_is_refused_where_it_would_be_another_run(folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(folder, tmp_path / "run", training={"max_steps": 2})
    with pytest.raises(RunError, match="no run to resume"):
        finetune(recipe, resume=True)
    finetune(recipe)
    with pytest.raises(RunError, match="already holds a run"):
        finetune(recipe)
    with pytest.raises(RunError, match=r"training\.learning_rate was 0\.003, is 0\.1"):
        finetune(
            tiny_recipe(folder, tmp_path / "run", training={"max_steps": 2, "learning_rate": 0.1}),
            resume=True,
        )
    assert finetune(recipe, resume=True).path == tmp_path / "run"  # finished: nothing to do
    (tmp_path / "run" / "report.html").unlink()  # as if it had died while scoring
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    (folder / "red" / "0.png").unlink()
    with pytest.raises(RunError, match="not those that the run was started with"):
        finetune(recipe, resume=True)
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()
    }


@pytest.mark.slow
def test_evaluate_refuses_a_test_split_that_would_be_another(folder: Path, tmp_path: Path) -> None:
    run = finetune(tiny_recipe(folder, tmp_path / "run", training={"max_steps": 2}))
    assert evaluate(run.path) == Report.load(run.report("test")).model_copy(
        update={"worst_mistakes": evaluate(run.path).worst_mistakes}
    )
    with (run.splits / "test.csv").open(newline="", encoding="utf-8") as file:
        one_of_test = next(csv.DictReader(file))["id"]
    draw_image((210, 40, 50), 99).save(folder / one_of_test)
    with pytest.raises(RunError, match="images have changed since it was trained"):
        evaluate(run.path)


@pytest.mark.slow
def test_a_run_of_groups_is_repeated_by_its_splits(folder: Path, tmp_path: Path) -> None:
    options = {"max_steps": 2}
    data = {"group": r"[05]\.png", "per_class": 6, "test_fraction": 0.2}
    run = finetune(tiny_recipe(folder, tmp_path / "run", training=options, data=data))
    with (run.splits / "train.csv").open(newline="", encoding="utf-8") as file:
        assert {row["group"] for row in csv.DictReader(file)} <= {"0.png", "5.png", ""}
    again = finetune(
        tiny_recipe(folder, tmp_path / "again", training=options, data={"splits": str(run.path)})
    )
    one, other = (path.read_provenance()["data"]["splits"] for path in (run, again))
    assert {about.pop("origin") for about in one.values()} == {"carved"}
    assert {about.pop("origin") for about in other.values()} == {"splits file"}
    assert one == other and one["train"]["num_images"] <= 18
    assert evaluate(again.path).accuracy == Report.load(run.report("test")).accuracy
    renamed = draw_folder(tmp_path / "other", per_class=2, suffix=".jpg")
    assert evaluate(run.path, data=str(renamed)).num_images == 6  # no group in any id


@pytest.mark.slow
def test_training_that_diverges_says_so(folder: Path, tmp_path: Path) -> None:
    training = {"learning_rate": 1e30, "max_grad_norm": 0.0, "warmup_steps": 0}
    with pytest.raises(RunError, match=r"diverged.*learning_rate"):
        finetune(tiny_recipe(folder, tmp_path / "run", training=training))
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.slow
def test_a_cnn_stands_beside_the_vit(folder: Path, tmp_path: Path) -> None:
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
              "layer_type": "basic", "image_size": 32}  # fmt: skip
    run = finetune(tiny_recipe(folder, tmp_path / "run", model={"config": resnet}, training={"max_steps": 3}))
    assert json.loads((run.model / "config.json").read_text())["architectures"] == [
        "ResNetForImageClassification"
    ]


def test_check_trains_nothing_and_writes_the_checkup_only(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = check(tiny_recipe(folder, tmp_path / "run"))
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "run-checkup"}
    assert facts["labels"] == ["blue", "green", "red"]
    assert facts["splits"] == {"train": 18, "validation": 9, "test": 9}
    assert facts["batch_shape"] == [4, 3, 16, 16] and facts["tokens"] == 17
    assert facts["steps"] == 10 and facts["images_per_step"] == 4
    assert "1 process × 4 images × 1 accumulation = 4 images per step" in capsys.readouterr().err


@pytest.mark.slow
def test_what_the_checkup_found_stays_with_the_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "red" / "copy.png").write_bytes((folder / "red" / "1.png").read_bytes())
    short = {"num_train_epochs": 1, "max_steps": 2}
    run = finetune(tiny_recipe(folder, tmp_path / "run", training=short))
    warning = "2 images are byte for byte the same as another one of their class and split"
    assert f"warning: {warning}" in capsys.readouterr().err
    (found,) = Findings.load(run.findings).findings
    assert (found.kind, found.message, [image.id for image in found.images]) == (
        "duplicate",
        warning,
        ["red/1.png", "red/copy.png"],
    )
    assert warning in run.report_html.read_text() and warning in (run.model / "README.md").read_text()

    check(tiny_recipe(folder, tmp_path / "run"))
    exclude = {
        "exclude": str(tmp_path / "run-checkup" / "findings.json"),
        "path": str(folder),
        "validation_fraction": 0.25,
        "test_fraction": 0.25,
    }
    without = finetune(tiny_recipe(folder, tmp_path / "without", data=exclude, training=short))
    assert "1 image left out by data.exclude" in capsys.readouterr().err
    counts = without.read_provenance()["data"]["splits"]
    assert sum(split["num_images"] for split in counts.values()) == 36
    assert "1 image left out by data.exclude" in (without.model / "README.md").read_text()
    test = json.loads(without.report("test").read_text())
    assert evaluate(without.path).num_images == test["num_images"] == counts["test"]["num_images"]
    # What the run's recipe excludes is no matter of other images.
    assert evaluate(without.path, str(draw_folder(tmp_path / "other", per_class=2))).num_images == 6


def test_steps_are_those_that_training_takes(tmp_path: Path) -> None:
    """The plan's arithmetic against the Trainer's own, where epochs do not divide evenly."""
    folder = draw_folder(tmp_path / "p")
    for training in (
        {"num_train_epochs": 1.5, "gradient_accumulation_steps": 2},
        {"num_train_epochs": 3, "per_device_train_batch_size": 5},
        {"max_steps": 7},
    ):
        recipe = tiny_recipe(folder, tmp_path / "none", training=training)
        from exactness import build_trainer

        trainer = build_trainer(recipe, tmp_path / "c")
        expected = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
        assert check(recipe)["steps"] == expected


@pytest.mark.skipif(not os.environ.get("VIT_FINETUNE_TEST_DATA"), reason="VIT_FINETUNE_TEST_DATA is not set")
@pytest.mark.slow
def test_real_photographs_from_an_archive(tmp_path: Path) -> None:
    """Sixty real photographs in a tar, two made-up classes by their names: decode, resize, train, score."""
    import tarfile

    photos = Path(os.environ["VIT_FINETUNE_TEST_DATA"]) / "photos.tar"
    with tarfile.open(photos) as archive:
        archive.extractall(tmp_path / "out", filter="data")
    files = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert len(files) == 60
    with tarfile.open(tmp_path / "photos.tar.gz", "w:gz") as archive:
        for number, path in enumerate(files):
            archive.add(path, f"wrapped/{'odd' if number % 2 else 'even'}/{path.name}")
    recipe = tiny_recipe(tmp_path / "photos.tar.gz", tmp_path / "run", model={"image_size": 32, "resize": "crop",
                         "config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                                    "intermediate_size": 32, "patch_size": 8}})  # fmt: skip
    run = finetune(recipe)
    assert Report.load(run.report("test")).num_images == 16
    assert torch.isfinite(torch.tensor(Report.load(run.report("test")).log_loss))
