"""Runs with a teacher: of several processes, of streams, of FSDP; what they tell, and what they are resumed with."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import Say, draw_folder, tiny_recipe
from fork_server import ForkServer
from invariants.test_streams import STREAMED, split_shards
from loopback_hub import LoopbackHub
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_distillation import MIXED, OTHER, write_teacher
from test_launching import CONFIGS, launch, path_of_package, write_recipe
from worlds import Division, Place, Trained, check_same, draw_photos, finish

from vit_finetune.checking import check
from vit_finetune.data.streaming.prepared import prepare_data
from vit_finetune.files import sha256_of
from vit_finetune.finetuning import finetune
from vit_finetune.model.loading import load_model
from vit_finetune.model.lora import WEIGHTS
from vit_finetune.publishing.card import build_card
from vit_finetune.publishing.report import build_report
from vit_finetune.recipe import TrainingConfig, build_recipe
from vit_finetune.run import Run, RunError
from vit_finetune.training.distillation import load_teacher
from vit_finetune.training.hardware import choose_hardware


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has the classes in another order, other pixels and another normalisation."""
    return write_teacher(tmp_path_factory.mktemp("teacher") / "t", ["red", "blue", "green"], 24, **OTHER)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_the_same(
    forks: ForkServer, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("processes")
    place = Place(forks, folder, draw_photos(folder / "photos"))
    results = []
    for division in (Division(1, 8, 1), Division(2, 2, 2)):
        run, children = place.start(str(division), division, f"training.teacher={teacher}")
        told = finish(children)
        assert told.count("teacher: ") == 1
        results.append(Trained(run, [children]))
    check_same(results[1], results[0])
    losses = results[0].losses()
    plain = results[0].summed_losses()
    assert abs(losses[1] - plain[0] / 8) > 1e-3, "the teacher said nothing"


@pytest.mark.slow
@pytest.mark.distributed
def test_streamed_batches_of_none_add_nothing(forks: ForkServer, tmp_path: Path) -> None:
    """Three shards over two processes, 16 images and 1: the second process fills up."""
    folder = split_shards(tmp_path / "shards", [9, 1, 7])
    results = []
    for processes, accumulation in ((1, 3), (2, 2)):
        output = tmp_path / f"run{processes}"
        training = {
            "per_device_train_batch_size": 8, "gradient_accumulation_steps": accumulation, "optim": "sgd",
            "learning_rate": 0.1, "dataloader_num_workers": processes - 1,
        }  # fmt: skip
        recipe = tiny_recipe(folder, output, data=STREAMED, training=training, evaluation={"batch_size": 4})
        file = tmp_path / f"p{processes}.yaml"
        file.write_text(recipe.to_yaml(resolved=False), encoding="utf-8")
        if not results:
            labels = prepare_data(recipe.data).labels
            asked = write_teacher(tmp_path / "teacher", labels[::-1], 24, **OTHER)
        words = ("train", file, f"training.teacher={asked}")
        finish(forks.start_world(tmp_path / f"p{processes}", processes, *words))
        results.append(load_file(output / "model" / "model.safetensors"))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_student_that_is_divided_has_a_whole_teacher(folder: Path, tmp_path: Path, teacher: Path) -> None:
    """FSDP over two processes trains what one process does, and resumes."""
    file = write_recipe(tmp_path / "tiny.yaml", folder, tmp_path / "run")
    values = yaml.safe_load(file.read_text())
    values["training"]["teacher"] = str(teacher)
    file.write_text(yaml.safe_dump(values))
    values["training"] |= {
        "output_dir": str(tmp_path / "alone"), "use_cpu": True, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }  # fmt: skip
    alone = finetune(build_recipe(values, name="tiny"))
    config = next(path for path in CONFIGS if path.stem == "fsdp")
    script = Path(__file__).with_name("launched_fsdp.py")
    words = ("--config_file", config, "--num_processes", 2, script, file, tmp_path / "first")
    done = launch(*words, PYTHONPATH=path_of_package())
    assert done.returncode == 0, done.stderr[-3000:]
    whole = load_file(tmp_path / "first" / "model" / "model.safetensors")
    resumed = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for name, value in load_file(alone.model / "model.safetensors").items():
        assert resumed[name].equal(whole[name])
        torch.testing.assert_close(whole[name], value, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------- runs


@pytest.mark.slow
def test_a_run_names_its_teacher_and_publishes_a_stock_model(
    folder: Path, tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "mine"
    moved.mkdir()
    for file in teacher.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    training = {"teacher": str(moved), "num_train_epochs": 1}
    recipe = tiny_recipe(folder, tmp_path / "run", augmentation=MIXED, training=training)
    run = finetune(recipe)
    said = " ".join(capsys.readouterr().err.split())
    facts = run.read_provenance()["teacher"]
    assert facts["path"] == str(moved) and facts["image_size"] == [24, 24] and len(facts["sha256"]) == 64
    told = f"ViTForImageClassification, {facts['parameters']:,} parameters, 24×24 pixels; the share 0.5 of the loss"
    assert f"teacher: {moved} ({told}, at temperature 2)" in said
    assert told in build_report(run)
    card = build_card(run)
    assert "| Teacher | mine (ViTForImageClassification" in card and str(tmp_path) not in card
    plain = json.loads((run.model / "config.json").read_text())
    assert not [key for key in plain if "teach" in key or "distil" in key]
    names = [load_file(folder / "model.safetensors").keys() for folder in (run.model, teacher)]
    assert names[0] == names[1]  # of one architecture

    # Another teacher in its place: the run is not gone on with.
    run.report_html.unlink()
    weights = load_file(moved / "model.safetensors")
    changed = copy.deepcopy(weights)
    changed["classifier.bias"] += 1
    save_file(changed, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="no longer the teacher that the run was begun with"):
        finetune(recipe, resume=True)
    (moved / "model.safetensors").write_bytes((teacher / "model.safetensors").read_bytes())
    before = (run.model / "model.safetensors").read_bytes()
    finetune(recipe, resume=True)
    assert (run.model / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_the_plan_counts_its_weights(folder: Path, tmp_path: Path, teacher: Path) -> None:
    """In the memory that is told, and in what an automatic batch size goes by."""
    plain = tiny_recipe(folder, tmp_path / "run", training={"per_device_train_batch_size": "auto"})
    taught = build_recipe(yaml.safe_load(plain.to_yaml()) | {
        "training": {**plain.model_dump(exclude_unset=True)["training"], "teacher": str(teacher)}
    })  # fmt: skip
    facts = [check(recipe, tmp_path / "checked") for recipe in (plain, taught)]
    weights = 4 * sum(value.numel() for value in load_file(teacher / "model.safetensors").values())
    assert facts[1]["memory_bytes"] == facts[0]["memory_bytes"] + weights
    assert [choice["value"] for choice in facts[1]["choices"] if choice["name"] == "teacher"] == [
        str(teacher)
    ]
    assert not [choice for choice in facts[0]["choices"] if choice["name"] == "teacher"]
    model, _ = load_model(plain.model, ["a", "b"])
    huge = SimpleNamespace(parameters=lambda: [torch.empty(10**13, device="meta")])  # 40 TB
    chosen = [choose_hardware(plain.training, plain.model, model, teacher=one) for one in (None, huge)]
    assert chosen[0].batch_size > 1 == chosen[1].batch_size


@pytest.mark.slow
@pytest.mark.hub
def test_a_teacher_from_the_hub_is_named_with_its_commit(
    hub: LoopbackHub, say: Say, run: Run, tmp_path: Path
) -> None:
    """Resumed, the run goes on with that commit, though the branch has gone on."""
    assert say("push", run.path, "--repo", "ann/colours", "--verify", "files")[0] == 0
    photos = draw_folder(tmp_path / "photos")
    file = tmp_path / "student.yaml"
    recipe = tiny_recipe(photos, tmp_path / "student", training={"teacher": "ann/colours"})
    file.write_text(recipe.to_yaml(resolved=False), encoding="utf-8")
    code, _, said = say("train", file)
    assert code == 0, said
    commit = hub.repo("ann/colours").commits()[0].id
    student = Run(tmp_path / "student")
    facts = student.read_provenance()["teacher"]
    assert (facts["path"], facts["revision"]) == ("ann/colours", commit)
    assert "| Teacher | ann/colours (ViTForImageClassification" in build_card(student)
    assert f"commit {commit[:7]}" in build_card(student)
    weights = load_file(run.model / "model.safetensors")
    weights["classifier.bias"] += 1
    save_file(weights, run.model / "model.safetensors", metadata={"format": "pt"})
    assert say("push", run.path, "--repo", "ann/colours", "--verify", "files", "--force")[0] == 0
    assert hub.repo("ann/colours").commits()[0].id != commit
    student.report_html.unlink()
    code, _, said = say("train", file, "--resume")
    assert code == 0 and student.read_provenance()["teacher"]["revision"] == commit, said


@pytest.mark.slow
def test_an_adapter_can_be_a_teacher(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    """Known by its own weights, not by those that it stands beside."""
    model = {"path": str(pretrained), "method": "lora", "lora_merge": False}
    values = tiny_recipe(folder, tmp_path / "teacher").model_dump(exclude_unset=True)
    asked = finetune(build_recipe(values | {"model": model}, name="tiny"))
    recipe = tiny_recipe(
        folder, tmp_path / "run", training={"teacher": str(asked.model), "num_train_epochs": 1}
    )
    run = finetune(recipe)
    assert run.read_provenance()["teacher"]["sha256"] == sha256_of(asked.model / WEIGHTS)
    run.report_html.unlink()
    with safe_open(asked.model / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    weights = load_file(asked.model / WEIGHTS)
    weights = {name: value + 0.1 for name, value in weights.items()}
    save_file(weights, asked.model / WEIGHTS, metadata=metadata)
    with pytest.raises(RunError, match="no longer the teacher that the run was begun with"):
        finetune(recipe, resume=True)


def test_a_run_in_the_place_of_its_model_is_refused(run: Run) -> None:
    with pytest.raises(RunError, match=f"run is a run, and no model folder: write {run.model}"):
        load_teacher(TrainingConfig(teacher=str(run.path)), ["blue", "green", "red"])
