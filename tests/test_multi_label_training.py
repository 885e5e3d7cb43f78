"""Training on several labels: the loss, what it is divided by, and steps as exact as others'."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY_VIT, tiny_recipe
from exactness import (
    EVERY_SECOND,
    PLAIN,
    build_trainer,
    same,
    train_plainly,
    weights_of,
    with_and_without_a_break,
)
from labelled_shapes import NAMES, recipe_of, write_jsonl
from torch.nn.functional import binary_cross_entropy_with_logits

from vit_finetune.data.splits.carving import load_splits
from vit_finetune.data.transforms import (
    NO_IMAGE,
    TrainingImages,
    TrainingIndex,
    collate,
    normalize,
)
from vit_finetune.model.loading import load_model
from vit_finetune.recipe import ModelConfig
from vit_finetune.run import RunError
from vit_finetune.training.distillation import load_teacher
from vit_finetune.training.loss import binary_cross_entropy, count_images, cross_entropy

MODERN = {"ema_decay": 0.9, "layer_decay": 0.7, "head_lr_multiplier": 2.0}
DROPPING = {"config": {**TINY_VIT, "hidden_dropout_prob": 0.2}, "drop_path_rate": 0.3}


# --------------------------------------------------------------------------- the loss


def draw(images: int = 6, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, generator=generator, dtype=torch.float64) * 3
    return logits.requires_grad_(), (torch.rand(images, classes, generator=generator) < 0.4).double()


@pytest.mark.parametrize("count", [None, 6, 11])
def test_the_loss_is_torchs(count: int | None) -> None:
    logits, labels = draw()
    loss = binary_cross_entropy(logits, labels, count)
    (found,) = torch.autograd.grad(loss, logits)
    expected = binary_cross_entropy_with_logits(logits, labels) * 6 / (count or 6)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(found, *torch.autograd.grad(expected, logits), atol=1e-12, rtol=0)


def test_what_fills_a_place_adds_nothing() -> None:
    logits, labels = draw()
    filled = torch.cat([labels, torch.full((2, 4), -100.0, dtype=torch.float64)])
    more = torch.cat([logits.detach(), torch.full((2, 4), 50.0, dtype=torch.float64)]).requires_grad_()
    assert count_images(filled) == count_images(labels) == 6
    loss = binary_cross_entropy(more, filled)
    torch.testing.assert_close(loss, binary_cross_entropy_with_logits(logits, labels))
    (gradient,) = torch.autograd.grad(loss, more)
    assert not gradient[6:].any()
    assert binary_cross_entropy(more[6:], filled[6:], 3) == 0
    assert count_images(torch.rand(5, 3)) == 5  # target probabilities of mixed images


def test_accumulated_batches_add_up() -> None:
    logits, labels = draw(7)
    parts = [binary_cross_entropy(logits[rows], labels[rows], 7) for rows in (slice(0, 4), slice(4, 7))]
    torch.testing.assert_close(sum(parts), binary_cross_entropy_with_logits(logits, labels))


# --------------------------------------------------------------------------- batches and steps


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """40 images of shapes; 22 of them are for training."""
    return write_jsonl(tmp_path / "shapes", 40)


def test_items_say_which_labels_an_image_has(table: Path) -> None:
    trainer = build_trainer(recipe_of(table, table.parent / "run"), table.parent / "run")
    images = trainer.train_dataset
    for row, ids in enumerate(images.labels):
        target = images[TrainingIndex(0, row)]["labels"]
        assert target.tolist() == [float(number in ids) for number in range(3)]
    filling = images[TrainingIndex(0, NO_IMAGE)]["labels"]
    assert filling.tolist() == [-100.0] * 3
    batch = collate(
        [images[TrainingIndex(0, 0)], images[TrainingIndex(0, NO_IMAGE)], trainer.eval_dataset[0]]
    )
    assert (batch["labels"].dtype, batch["labels"].shape) == (torch.float32, (3, 3))
    assert count_images(batch["labels"]) == 2


def test_what_is_validated_is_what_plain_libraries_give(table: Path, tmp_path: Path) -> None:
    from sklearn import metrics as sk

    trainer = build_trainer(recipe_of(table, tmp_path), tmp_path / "c")
    found = trainer.evaluate()
    batch = collate([trainer.eval_dataset[row] for row in range(len(trainer.eval_dataset))])
    with torch.no_grad():
        logits = trainer.model.eval()(normalize(batch["pixel_values"], trainer.image_processor)).logits
    truth = batch["labels"].numpy()
    expected = {
        "eval_loss": float(binary_cross_entropy_with_logits(logits, batch["labels"])),
        "eval_mean_average_precision": sk.average_precision_score(truth, logits.sigmoid().numpy()),
        "eval_micro_f1": sk.f1_score(truth, logits.numpy() >= 0, average="micro", zero_division=0),
        "eval_macro_f1": sk.f1_score(truth, logits.numpy() >= 0, average="macro", zero_division=0),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_training_equals_the_plain_trainer(table: Path, tmp_path: Path) -> None:
    """transformers' own Trainer with the model's own loss (BCEWithLogitsLoss), dropout included."""
    recipe = recipe_of(
        table,
        tmp_path,
        model={"config": DROPPING["config"]},
        augmentation={"crop_scale": None},
        training=PLAIN,
    )
    ours = build_trainer(recipe, tmp_path / "ours")
    ours.train()
    plain = train_plainly(build_trainer(recipe, tmp_path / "unused"), tmp_path / "plain")
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_batch_of_8_equals_4_times_2_accumulated(table: Path, tmp_path: Path) -> None:
    results = []
    for batch, accumulation in ((8, 1), (4, 2)):
        training = {
            "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "optim": "sgd",
            "learning_rate": 0.1, "max_grad_norm": 0.0,
        }  # fmt: skip
        trainer = build_trainer(recipe_of(table, tmp_path, training=training), tmp_path / f"b{batch}")
        trainer.train()
        results.append(weights_of(trainer.model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [5, 6])
def test_resumed_equals_uninterrupted(table: Path, tmp_path: Path, kill_at: int) -> None:
    """With an average of the weights, layer decay, a faster head, dropout and stochastic depth."""
    recipe = recipe_of(table, tmp_path, model=DROPPING, training={**EVERY_SECOND, **MODERN})
    whole, resumed = with_and_without_a_break(partial(build_trainer, recipe), tmp_path, kill_at)
    assert same(weights_of(resumed.model), weights_of(whole.model))
    assert whole.state.best_metric == resumed.state.best_metric is not None
    assert whole.args.metric_for_best_model == "mean_average_precision"


def test_images_of_one_class_have_nothing_of_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switched off: labels, loss, config and metric are what they were."""
    recipe = tiny_recipe(folder, folder / "run")
    splits = load_splits(recipe.data)
    model, processor = load_model(recipe.model, splits["train"].features["label"].names)
    assert model.config.problem_type == "single_label_classification"
    assert not hasattr(model.config, "thresholds")
    images = TrainingImages(splits["train"], processor, recipe.augmentation, 0)
    item = images[TrainingIndex(0, 0)]
    assert type(item["labels"]) is int
    assert collate([item])["labels"].dtype == torch.int64
    assert recipe.training.metric_for_best_model == "accuracy"
    labels = torch.tensor([1, 0, -100])
    logits = torch.randn(3, 3)
    assert cross_entropy(logits, labels).equal(torch.nn.functional.cross_entropy(logits, labels))


def test_a_teacher_of_several_labels_is_refused(tmp_path: Path) -> None:
    """Its logits are about each label alone: a softmax of them would be nobody's opinion."""
    model, processor = load_model(ModelConfig(config=TINY_VIT), NAMES, multi_label=True)
    model.save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    recipe = tiny_recipe(tmp_path, tmp_path / "run", training={"teacher": str(tmp_path / "teacher")})
    with pytest.raises(RunError, match=r"training\.teacher: .* was trained on images with several labels"):
        load_teacher(recipe.training, NAMES)
