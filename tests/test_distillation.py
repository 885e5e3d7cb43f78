"""Distillation: its loss and gradients, what the teacher is shown, and that runs with it are as exact as others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TINY_VIT, tiny_recipe
from exactness import (
    AUGMENTED,
    DROPOUT,
    EVERY_SECOND,
    build_trainer,
    same,
    weights_of,
    with_and_without_a_break,
)
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
)
from typer.testing import CliRunner

from vit_finetune.cli import app
from vit_finetune.data.splits.carving import load_splits
from vit_finetune.data.transforms import NO_LABEL, TrainingImages, collate, normalize
from vit_finetune.finetuning import finetune
from vit_finetune.model.loading import load_checkpoint, load_model
from vit_finetune.recipe import ModelConfig, RecipeError, build_recipe
from vit_finetune.run import RunError
from vit_finetune.training import distillation
from vit_finetune.training.distillation import describe_teacher, distillation_loss, load_teacher
from vit_finetune.training.hardware import estimate_memory
from vit_finetune.training.trainer import ViTTrainer

COLOURS = ["blue", "green", "red"]
MIXED = {**AUGMENTED, "mixup_alpha": 0.8, "cutmix_alpha": 1.0}
OTHER = {"image_mean": [0.2, 0.4, 0.6], "image_std": [0.3, 0.2, 0.1]}
"""Another normalisation than the student's."""


def write_teacher(path: Path, labels: list[str], size: int = 16, **normalisation: Any) -> Path:
    """A checkpoint of a teacher that nobody taught, whose answers are far apart."""
    torch.manual_seed(7)
    model, processor = load_model(ModelConfig(config={**TINY_VIT, "image_size": size}), labels)
    with torch.no_grad():
        model.classifier.weight.normal_(0, 0.7)
    for name, value in normalisation.items():
        setattr(processor, name, value)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has the classes in another order, other pixels and another normalisation."""
    return write_teacher(tmp_path_factory.mktemp("teacher") / "t", ["red", "blue", "green"], 24, **OTHER)


def trainer_of(
    folder: Path, output: Path, teacher: Path, callbacks: Any = None, model: Any = None, **training: Any
) -> ViTTrainer:
    recipe = tiny_recipe(
        folder, output, model=model or DROPOUT, augmentation=MIXED,
        training={
            "teacher": str(teacher), "distillation_temperature": 3.0, "distillation_weight": 0.7,
            "num_train_epochs": 3, "label_smoothing_factor": 0.1, **EVERY_SECOND, **training,
        },
    )  # fmt: skip
    return build_trainer(recipe, output, callbacks)


# --------------------------------------------------------------------------- values


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("count", [None, 11])
def test_the_loss_and_its_gradient_are_the_papers(temperature: float, count: int | None) -> None:
    """Against the sum over images and classes as it is written down; fillers of a batch add nothing."""
    torch.manual_seed(0)
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    told, labels = 3 * torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, NO_LABEL, 3, 2, 2])
    loss = distillation_loss(logits, told, labels, temperature, count)
    (gradient,) = torch.autograd.grad(loss, logits)
    total, expected = 0.0, torch.zeros_like(logits)
    for row in (0, 1, 3, 4, 5):
        p = torch.exp(told[row] / temperature) / torch.exp(told[row] / temperature).sum()
        q = torch.exp(logits[row] / temperature) / torch.exp(logits[row] / temperature).sum()
        total += float((p * (p / q).log()).sum().detach()) * temperature**2
        expected[row] = temperature * (q - p)  # dC/dz of the paper, times T²
    assert float(loss.detach()) == pytest.approx(total / (count or 5), abs=1e-9)
    torch.testing.assert_close(gradient, expected / (count or 5), atol=1e-9, rtol=0)
    soft = distillation_loss(logits, told, torch.rand(6, 4), temperature, count)
    row = distillation_loss(logits[2:3], told[2:3], torch.rand(1, 4), temperature, count or 5)
    torch.testing.assert_close(soft * (count or 6), (loss + row) * (count or 5))


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mixed", [False, True])
def test_what_training_lowers(
    folder: Path, tmp_path: Path, teacher: Path, weight: float, mixed: bool
) -> None:
    """(1 - α) · CE + α · T² · KL, and its gradient at every weight of the student, in plain PyTorch."""
    recipe = tiny_recipe(
        folder, tmp_path, augmentation={"mixup_alpha": 0.8} if mixed else {},
        training={
            "teacher": str(teacher), "distillation_temperature": 3.0, "distillation_weight": weight,
            "label_smoothing_factor": 0.1, "class_weights": {"red": 2.0},
        },
    )  # fmt: skip
    trainer = build_trainer(recipe, tmp_path / "c")
    batch = trainer._prepare_inputs(collate([trainer.train_dataset[(0, row)] for row in range(6)]))
    shown: list[torch.Tensor] = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: shown.append(kwargs["pixel_values"]), with_kwargs=True
    )
    trainer.model.train()
    torch.manual_seed(5)
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=10)
    loss.backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()

    torch.manual_seed(5)
    pixels, targets = batch["pixel_values"], torch.nn.functional.one_hot(batch["labels"], 3).float()
    if mixed:
        pixels, targets = trainer.mixing(pixels, batch["labels"])
    assert shown[0].equal(pixels)
    targets = 0.9 * targets + 0.1 / 3
    asked, _ = load_checkpoint(str(teacher))
    student = trainer.image_processor
    raw = pixels * torch.tensor(student.image_std).view(3, 1, 1) + torch.tensor(student.image_mean).view(
        3, 1, 1
    )
    theirs = (raw - torch.tensor(OTHER["image_mean"]).view(3, 1, 1)) / torch.tensor(OTHER["image_std"]).view(
        3, 1, 1
    )
    theirs = torch.nn.functional.interpolate(theirs, (24, 24), mode="bilinear", antialias=True)
    with torch.no_grad():
        told = asked(pixel_values=theirs).logits[:, [1, 2, 0]]  # red, blue, green → blue, green, red
    logits = trainer.model(pixel_values=pixels).logits
    weights = torch.tensor([1.0, 1.0, 2.0])
    entropy = -(weights * targets * logits.log_softmax(-1)).sum()
    p, q = (told / 3).softmax(-1), (logits / 3).log_softmax(-1)
    expected = ((1 - weight) * entropy + weight * 9 * (p * (p.log() - q)).sum()) / 10
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    expected.backward()
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-4)
    # Validation's loss is that of the labels alone.
    trainer.model.eval()
    plain = torch.nn.functional.cross_entropy(
        trainer.model(pixel_values=batch["pixel_values"]).logits, batch["labels"]
    )
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), plain)


def test_the_teacher_is_shown_the_same_images_as_it_wants_them(folder: Path, tmp_path: Path) -> None:
    """Normalised by its processor: alike to the bit where both are, and to 1e-6 where they are not."""
    recipe = tiny_recipe(folder, tmp_path)
    _, processor = load_model(recipe.model, COLOURS)
    split = load_splits(recipe.data)["train"]
    images = TrainingImages(split, processor, recipe.augmentation, 0)
    pixels = collate([images[(0, row)] for row in range(5)])["pixel_values"]
    for name, normalisation in (("alike", {}), ("other", OTHER)):
        path = write_teacher(tmp_path / name, COLOURS, **normalisation)
        training = tiny_recipe(folder, tmp_path, training={"teacher": str(path)}).training
        asked = load_teacher(training, COLOURS)
        assert asked is not None
        shown: list[torch.Tensor] = []
        asked.model.register_forward_pre_hook(
            lambda module, args, kwargs, shown=shown: shown.append(kwargs["pixel_values"]), with_kwargs=True
        )
        answer = asked.answer(normalize(pixels, processor), processor)
        expected = normalize(pixels, asked.image_processor)
        torch.testing.assert_close(shown[0], expected, atol=2e-6, rtol=0)
        assert name == "other" or shown[0].equal(expected)
        with torch.no_grad():
            torch.testing.assert_close(answer, asked.model(pixel_values=expected).logits, atol=1e-5, rtol=0)
        assert not answer.requires_grad and answer.dtype == torch.float32


def test_classes_are_matched_by_name(teacher: Path, folder: Path, tmp_path: Path) -> None:
    def load(labels: list[str]) -> Any:
        return load_teacher(tiny_recipe(folder, "x", training={"teacher": str(teacher)}).training, labels)

    images = torch.randn(4, 3, 24, 24)
    one, other = load(COLOURS), load(["green", "red", "blue"])
    processor = one.image_processor
    assert one.answer(images, processor)[:, [1, 2, 0]].equal(other.answer(images, processor))
    with pytest.raises(RunError, match=r"It lacks yellow\. The data lacks red\. Expected"):
        load(["blue", "green", "yellow"])
    with pytest.raises(RunError, match=r"The data lacks red\. Expected"):
        load(["blue", "green"])
    config = json.loads((teacher / "config.json").read_text())
    twice = write_teacher(tmp_path / "twice", ["blue", "green", "red"])
    (twice / "config.json").write_text(
        json.dumps(config | {"id2label": {"0": "red", "1": "red", "2": "blue"}, "image_size": 16})
    )
    with pytest.raises(RunError, match=r"It lacks green\. It has red twice"):
        load_teacher(tiny_recipe(folder, "x", training={"teacher": str(twice)}).training, COLOURS)


def test_a_cnn_may_teach(folder: Path, tmp_path: Path) -> None:
    """Of another architecture, with a processor of its own, whose batch norms learn nothing."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    config.id2label = dict(enumerate(COLOURS))
    model = ResNetForImageClassification(config)
    model.save_pretrained(tmp_path / "cnn")
    ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875).save_pretrained(tmp_path / "cnn")
    training = tiny_recipe(folder, "x", training={"teacher": str(tmp_path / "cnn")}).training
    asked = load_teacher(training, COLOURS)
    assert asked is not None and describe_teacher(asked, training)[0].reason.count("32×32 pixels") == 1
    _, processor = load_model(ModelConfig(config=TINY_VIT), COLOURS)
    before = weights_of(asked.model)
    assert asked.answer(torch.randn(2, 3, 16, 16), processor).shape == (2, 3)
    assert same(weights_of(asked.model), before)


def test_its_memory_is_planned(teacher: Path) -> None:
    model, _ = load_model(ModelConfig(config=TINY_VIT), COLOURS)
    asked, _ = load_checkpoint(str(teacher))
    weights = 4 * sum(parameter.numel() for parameter in asked.parameters())
    assert estimate_memory(model, teacher=asked)[0] == estimate_memory(model)[0] + weights


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"training": {"distillation_weight": 0.9}}, "distillation_weight is about a teacher"),
        ({"training": {"distillation_temperature": 4}}, "distillation_temperature is about a teacher"),
        ({"training": {"teacher": "a/b", "distillation_weight": 1.1}}, "less than or equal to 1"),
        ({"training": {"teacher": "a/b", "distillation_temperature": 0}}, "greater than 0"),
        ({"training": {"teacher": "a/b"}, "model": {"path": "x/y", "method": "linear_probe"}}, "method=head"),
        ({"training": {"teechar": "a/b"}}, "did you mean training.teacher"),
    ],
)
def test_what_cannot_go_together_is_refused_by_name(section: dict[str, Any], said: str) -> None:
    values = {"data": {"path": "photos"}, "model": {"path": "x/y"}} | section
    with pytest.raises(RecipeError, match=said):
        build_recipe(values)


def test_a_recipe_without_a_teacher_can_be_written_out_and_read_again() -> None:
    recipe = build_recipe({"data": {"path": "p"}, "model": {"path": "x/y"}})
    assert build_recipe(yaml.safe_load(recipe.to_yaml())).training.teacher is None


@pytest.mark.slow
def test_refusals_leave_nothing_behind(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(tiny_recipe(folder, tmp_path / "run").to_yaml(resolved=False), encoding="utf-8")
    runner = CliRunner()
    done = runner.invoke(app, ["train", str(file), "training.distillation_weight=0.9"])
    assert done.exit_code == 2
    done = runner.invoke(app, ["train", str(file), f"training.teacher={tmp_path / 'none'}"])
    assert done.exit_code == 1 and "error: training.teacher: " in done.stderr
    assert "no such model folder" in done.stderr
    other = write_teacher(tmp_path / "other", ["blue", "green", "pink"])
    for verb in ("train", "check"):
        done = runner.invoke(app, [verb, str(file), f"training.teacher={other}"])
        assert done.exit_code == 1 and "It lacks red. The data lacks pink." in done.stderr
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------- training


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_the_teacher_stays_what_it_is_and_nowhere_else(
    folder: Path, tmp_path: Path, teacher: Path, bf16: bool
) -> None:
    trainer = trainer_of(folder, tmp_path / "c", teacher, bf16=bf16, num_train_epochs=1)
    asked = trainer.teacher
    assert asked is not None
    modes, types = [], []
    asked.model.register_forward_hook(lambda module, args, output: modes.append(module.training))
    asked.model.classifier.register_forward_hook(lambda module, args, output: types.append(output.dtype))
    trainer.train()
    assert len(modes) == 5 and not any(modes)  # of validation images it is not asked
    assert set(types) == {torch.bfloat16 if bf16 else torch.float32}
    stock = AutoModelForImageClassification.from_pretrained(teacher).state_dict()
    assert same(asked.model.state_dict(), stock)
    assert not any(p.requires_grad or p.grad is not None for p in asked.model.parameters())
    own = {id(p) for p in trainer.model.parameters()}
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == own and not own & {id(p) for p in asked.model.parameters()}
    assert (
        load_file(tmp_path / "c" / "checkpoint-5" / "model.safetensors").keys()
        == load_file(teacher / "model.safetensors").keys()
    )


@pytest.mark.slow
def test_off_is_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded, asked or told of; with a share of 0 the student is the one without a teacher."""
    asked: list[Any] = []
    monkeypatch.setattr(distillation, "load_checkpoint", lambda path: asked.append(path))
    recipe = tiny_recipe(folder, tmp_path / "c", training={"max_steps": 3})
    trainer = build_trainer(recipe, tmp_path / "c")
    assert trainer.teacher is None and not asked
    trainer.train()
    monkeypatch.undo()
    path = write_teacher(tmp_path / "t", COLOURS)
    training = {"max_steps": 3, "teacher": str(path), "distillation_weight": 0.0}
    none = build_trainer(tiny_recipe(folder, tmp_path / "n", training=training), tmp_path / "n")
    none.train()
    assert same(weights_of(none.model), weights_of(trainer.model))


@pytest.mark.slow
def test_with_the_whole_share_labels_do_not_matter(folder: Path, tmp_path: Path, teacher: Path) -> None:
    trainer = trainer_of(folder, tmp_path / "c", teacher, distillation_weight=1.0)
    trainer.mixing = None
    trainer.model.train()
    batch = trainer._prepare_inputs(collate([trainer.train_dataset[(0, row)] for row in range(6)]))
    torch.manual_seed(1)
    one = trainer.compute_loss(trainer.model, batch)
    torch.manual_seed(1)
    other = trainer.compute_loss(trainer.model, {**batch, "labels": (batch["labels"] + 1) % 3})
    assert one.equal(other)


@pytest.mark.slow
def test_a_student_comes_to_say_what_its_teacher_says(folder: Path, tmp_path: Path) -> None:
    """Though the labels say something else: the teacher has them the wrong way round."""
    wrong = ["green", "red", "blue"]
    trained = finetune(tiny_recipe(folder, tmp_path / "teacher", training={"num_train_epochs": 12}))
    config = json.loads((trained.model / "config.json").read_text())
    config |= {"id2label": dict(enumerate(wrong)), "label2id": {name: n for n, name in enumerate(wrong)}}
    (trained.model / "config.json").write_text(json.dumps(config))
    training = {
        "teacher": str(trained.model), "distillation_weight": 1.0, "num_train_epochs": 12,
        "load_best_model_at_end": False,
    }  # fmt: skip
    student = finetune(tiny_recipe(folder, tmp_path / "student", training=training))
    matrix = json.loads(student.report("test").read_text())["confusion_matrix"]
    assert matrix == [[0, 3, 0], [0, 0, 3], [3, 0, 0]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill_at", "options"),
    [
        (5, {}),
        (8, {"bf16": True}),
        (5, {"ema_decay": 0.9, "layer_decay": 0.75, "class_weights": "auto", "focal_gamma": 1.0}),
    ],
    ids=["plain", "bf16", "all-together"],
)
def test_resumed_equals_uninterrupted(
    folder: Path, tmp_path: Path, teacher: Path, kill_at: int, options: dict[str, Any]
) -> None:
    """Also with an average, stochastic depth, weights and mixed images."""
    model = {**DROPOUT, "drop_path_rate": 0.3 if "ema_decay" in options else None}
    whole, resumed = with_and_without_a_break(
        lambda output_dir, callbacks=None: trainer_of(
            folder, output_dir, teacher, callbacks, model=model, **options
        ),
        tmp_path,
        kill_at,
    )
    assert same(weights_of(resumed.model), weights_of(whole.model))
    logs = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (whole, resumed)]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_a_batch_of_8_equals_4_times_2_accumulated(folder: Path, tmp_path: Path, teacher: Path) -> None:
    """18 training images: the last accumulated batch is smaller."""
    results = []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        training = {
            "teacher": str(teacher), "per_device_train_batch_size": batch, "learning_rate": 0.1,
            "gradient_accumulation_steps": accumulation, "optim": "sgd", "max_grad_norm": 0.0,
        }  # fmt: skip
        recipe = tiny_recipe(folder, tmp_path, training=training)
        trainer = build_trainer(recipe, tmp_path / f"b{batch}")
        trainer.train()
        results.append(weights_of(trainer.model))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, atol=1e-6, rtol=0)
