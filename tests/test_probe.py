"""A linear probe: its features, its head, its choice, and the stock model that comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import TINY_VIT, draw_folder, tiny_recipe
from scipy.optimize import minimize
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ResNetConfig,
    ResNetForImageClassification,
    ViTForImageClassification,
    pipeline,
)

from vit_finetune import probing
from vit_finetune.checking import check
from vit_finetune.data.streaming.prepared import prepare_data
from vit_finetune.data.transforms import EvaluationImages, normalize
from vit_finetune.evaluation.scoring import compute_label_metrics
from vit_finetune.finetuning import finetune
from vit_finetune.model.head import freeze_encoder, head_of
from vit_finetune.model.loading import load_model
from vit_finetune.recipe import ModelConfig, RecipeError, build_recipe
from vit_finetune.run import Report, RunError
from vit_finetune.training import features as features_module
from vit_finetune.training.features import FeatureStore, compute_features, feature_folder
from vit_finetune.training.hardware import Hardware
from vit_finetune.training.probe import fit_probe

CPU = Hardware(True, False, False, "sdpa", 4)


def clusters(
    classes: int, images: int, width: int = 7, spread: float = 1.5, seed: int = 0
) -> tuple[Any, Any]:
    """Features around a centre for each class, of unequal scales, and their labels."""
    chance = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    labels = np.arange(images) % classes
    values = centres[labels] + spread * chance.normal(size=(images, width))
    return (values * np.logspace(-2, 2, width) + 3).astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_head_is_the_minimum_of_its_loss(classes: int) -> None:
    """Against scipy's minimiser of the loss as it stands in the docstring, in float64."""
    train, labels = clusters(classes, 120)
    validation, validation_labels = clusters(classes, 60, seed=1)
    probe = fit_probe(train, labels, validation, validation_labels, classes, "loss", compute_label_metrics)
    standard = torch.from_numpy((train - train.mean(0, dtype=np.float64)) / train.std(0, dtype=np.float64))
    targets = torch.from_numpy(labels)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        values = torch.from_numpy(flat).requires_grad_()
        weight, bias = values[: classes * 7].view(classes, 7), values[classes * 7 :]
        total = torch.nn.functional.cross_entropy(standard @ weight.T + bias, targets)
        total = total + probe.penalty / 2 * weight.square().sum()
        total.backward()
        return float(total.detach()), values.grad.numpy()

    found = minimize(loss, np.zeros(classes * 8), jac=True, options={"gtol": 1e-9, "maxiter": 5000}).x
    theirs = standard @ torch.from_numpy(found[: classes * 7]).view(classes, 7).T + torch.from_numpy(
        found[classes * 7 :]
    )
    ours = torch.from_numpy(train).double() @ torch.from_numpy(probe.weight).double().T + torch.from_numpy(
        probe.bias
    )
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), atol=2e-4, rtol=0)


def test_the_penalty_is_the_one_that_validation_likes_best() -> None:
    train, labels = clusters(3, 40, spread=4.0)
    validation, validation_labels = clusters(3, 300, spread=4.0, seed=1)
    for metric in ("loss", "accuracy"):
        probe = fit_probe(train, labels, validation, validation_labels, 3, metric, compute_label_metrics)
        by_penalty = {entry["penalty"]: entry for entry in probe.history}
        assert 5 <= len(by_penalty) <= 10 and list(by_penalty) == sorted(by_penalty)
        chosen = by_penalty[probe.penalty]
        if metric == "loss":
            assert chosen["eval_loss"] == min(entry["eval_loss"] for entry in probe.history)
            assert 1e-6 < probe.penalty < 10  # something between the ends is best, of noise like this
        else:
            best = max(entry["eval_accuracy"] for entry in probe.history)
            assert chosen["eval_accuracy"] == best
        # The scores are those of the head that is given, on the features as they are.
        logits = torch.from_numpy(validation @ probe.weight.T + probe.bias)
        assert chosen["eval_accuracy"] == float((logits.argmax(-1).numpy() == validation_labels).mean())


def test_classes_without_training_images_are_never_probable() -> None:
    train, labels = clusters(3, 60)
    for kept in ([0, 2], [1]):
        rows = np.isin(labels, kept)
        probe = fit_probe(train[rows], labels[rows], train, labels, 3, "accuracy", compute_label_metrics)
        probabilities = torch.from_numpy(train @ probe.weight.T + probe.bias).softmax(-1)
        assert set(probabilities.argmax(-1).tolist()) == set(kept)
        others = [number for number in range(3) if number not in kept]
        assert float(probabilities[:, others].max()) < 1e-4


@pytest.fixture
def images(tmp_path: Path) -> Any:
    """Drawn images, and a classifier with its processor."""
    torch.manual_seed(0)
    split = prepare_data(tiny_recipe(draw_folder(tmp_path / "photos"), "unused").data).splits["train"]
    model, processor = load_model(ModelConfig(config=TINY_VIT), ["blue", "green", "red"])
    return split, model, processor


def test_features_are_what_the_head_is_given_and_are_computed_once(
    images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, model, processor = images
    monkeypatch.setattr(features_module, "PACK", 5)
    store = FeatureStore(feature_folder(tmp_path, model, processor, CPU))
    seen: list[int] = []
    model.vit.register_forward_hook(lambda _, __, output: seen.append(len(output[0])))
    found = compute_features(model, processor, split, "train", CPU, 4, store)
    assert sum(seen) == len(split) == 18 and model.training
    rows = EvaluationImages(split, processor)
    model.eval()
    pixels = normalize(torch.stack([rows[row]["pixel_values"] for row in range(18)]), processor)
    with torch.no_grad():
        expected = model.vit(pixel_values=pixels).last_hidden_state[:, 0]
        logits = model(pixel_values=pixels).logits
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.classifier(torch.from_numpy(found)), logits, atol=1e-5, rtol=0)
    seen.clear()
    store = FeatureStore(store.folder)
    again = compute_features(model, processor, split.select(range(17, -1, -1)), "train", CPU, 4, store)
    assert not seen and np.array_equal(again[::-1], found)
    # A file that is damaged, and one that is gone: what was in them is computed again.
    files = sorted(store.folder.iterdir())
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].unlink()
    store = FeatureStore(store.folder)
    assert np.allclose(compute_features(model, processor, split, "train", CPU, 4, store), found, atol=1e-6)
    assert 0 < sum(seen) < 18


def test_features_of_another_encoder_transform_or_precision_are_others(images: Any, tmp_path: Path) -> None:
    _, model, processor = images
    folder = feature_folder(tmp_path, model, processor, CPU)
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    assert feature_folder(tmp_path, model, processor, CPU) == folder  # the head is not of it
    assert feature_folder(tmp_path, model, processor, Hardware(True, True, False, "sdpa", 4)) != folder
    processor.image_mean = [0.4, 0.5, 0.6]
    assert feature_folder(tmp_path, model, processor, CPU) != folder
    processor.image_mean = [0.5, 0.5, 0.5]
    assert feature_folder(tmp_path, model, processor, CPU) == folder
    with torch.no_grad():
        model.vit.embeddings.cls_token.add_(1e-3)
    assert feature_folder(tmp_path, model, processor, CPU) != folder


def resnet() -> ResNetForImageClassification:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    )


@pytest.mark.parametrize(
    "build", [resnet, lambda: load_model(ModelConfig(config=TINY_VIT), ["a", "b", "c"])[0]]
)
def test_a_frozen_encoder_stays_as_it_is(build: Callable[[], Any]) -> None:
    """With its running statistics and without dropout, whatever the Trainer says; the head learns."""
    model = build()
    freeze_encoder(model)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in model.named_parameters() if name.startswith("classifier")}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    assert model.training and head_of(model).training
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    size = 32 if "resnet" in model.config.model_type else 16
    model(pixel_values=torch.randn(4, 3, size, size)).logits.square().sum().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == learning


def test_a_model_with_two_heads_is_refused() -> None:
    config = DeiTConfig(**TINY_VIT, num_labels=3)
    with pytest.raises(RunError, match="has 2 linear layers of 3 logits"):
        head_of(DeiTForImageClassificationWithTeacher(config))


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"augmentation": {"mixup_alpha": 0.2}}, "augmentation.mixup_alpha is about training step by step"),
        ({"augmentation": {"cutmix_alpha": 1}}, "augmentation.cutmix_alpha is about training step by step"),
        ({"training": {"ema_decay": 0.9}}, "training.ema_decay is about training step by step"),
        ({"training": {"class_weights": "auto"}}, "training.class_weights is about training step by step"),
        ({"training": {"focal_gamma": 2}}, "training.focal_gamma is about training step by step"),
        ({"data": {"path": "x", "balanced_sampling": True}}, "data.balanced_sampling is about training step"),
        ({"data": {"path": "x", "streaming": True}}, "data.streaming is about training step by step"),
        ({"model": {"path": "x/y", "method": "head", "drop_path_rate": 0.1}}, "drops layers that learn"),
    ],
)
def test_what_does_not_go_with_a_probe_is_refused_by_name(section: dict[str, Any], expected: str) -> None:
    values = {"data": {"path": "photos"}, "model": {"path": "x/y", "method": "linear_probe"}} | section
    with pytest.raises(RecipeError, match=expected):
        build_recipe(values, name="probe")


# --------------------------------------------------------------------------- whole runs


def probe_recipe(
    photos: Path, pretrained: Path, run: Path, method: str = "linear_probe", **training: Any
) -> Any:
    model = {"path": str(pretrained), "method": method}
    values = tiny_recipe(photos, run, training=training).model_dump(exclude_unset=True) | {"model": model}
    values["data"]["cache"] = "auto"
    return build_recipe(values, name="tiny")


@pytest.mark.slow
def test_a_probe_is_a_run_like_any_other(
    folder: Path,
    pretrained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reports, card, a stock model that `pipeline` loads with the report's probabilities; only its head is new."""
    run = finetune(probe_recipe(folder, pretrained, tmp_path / "run"))
    said = capsys.readouterr().err
    assert (
        "not used by a linear probe: training.learning_rate, training.num_train_epochs, training.per" in said
    )
    assert "of which 51 learn" in said and said.count("penalty ") >= 5 and said.count("chosen") == 1
    before = ViTForImageClassification.from_pretrained(pretrained).state_dict()
    after = ViTForImageClassification.from_pretrained(run.model).state_dict()
    assert {name for name in after if not after[name].equal(before[name])} == {
        "classifier.weight",
        "classifier.bias",
    }
    classify = pipeline("image-classification", model=str(run.model), device="cpu")
    for row in pyarrow.parquet.read_table(run.predictions("test")).to_pylist():
        answer = {item["label"]: item["score"] for item in classify(str(folder / row["id"]), top_k=3)}
        names = [classify.model.config.id2label[number] for number in range(3)]
        assert [answer[name] for name in names] == pytest.approx(row["probabilities"], abs=1e-6)
    history = json.loads(run.history.read_text())
    chosen = max(history, key=lambda entry: (entry["eval_accuracy"], -entry["eval_loss"]))
    assert Report.load(run.report("validation")).accuracy == chosen["eval_accuracy"]
    assert Report.load(run.report("validation")).log_loss == pytest.approx(chosen["eval_loss"], abs=1e-5)
    card = (run.model / "README.md").read_text()
    assert "a linear probe on the frozen encoder of" in card and "Penalty of the head's weights" in card
    assert run.report_html.is_file() and "by a linear probe" in run.report_html.read_text()
    # The features are there: another run on them computes none, and is the same.
    monkeypatch.setattr(features_module, "normalize", None)
    again = finetune(probe_recipe(folder, pretrained, tmp_path / "again"))
    assert (again.model / "model.safetensors").read_bytes() == (run.model / "model.safetensors").read_bytes()
    with pytest.raises(RunError, match="already holds a run"):
        finetune(probe_recipe(folder, pretrained, tmp_path / "again"))
    assert finetune(probe_recipe(folder, pretrained, tmp_path / "again"), resume=True).path == again.path


@pytest.mark.slow
def test_a_probe_that_was_stopped_is_completed(
    folder: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = probe_recipe(folder, pretrained, tmp_path / "run")

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(probing, "fit_probe", stopped)
        with pytest.raises(KeyboardInterrupt):
            finetune(recipe)
    run = finetune(recipe, resume=True)
    whole = finetune(probe_recipe(folder, pretrained, tmp_path / "whole"))
    assert (run.model / "model.safetensors").read_bytes() == (whole.model / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_head_alone_is_trained(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    run = finetune(probe_recipe(folder, pretrained, tmp_path / "run", method="head"))
    before = ViTForImageClassification.from_pretrained(pretrained).state_dict()
    after = ViTForImageClassification.from_pretrained(run.model).state_dict()
    assert {name for name in after if not after[name].equal(before[name])} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert "a head trained on the frozen encoder of" in (run.model / "README.md").read_text()


@pytest.mark.parametrize("method", ["linear_probe", "head", "full"])
def test_check_says_what_would_be_done(
    folder: Path, pretrained: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = check(probe_recipe(folder, pretrained, tmp_path / "run", method=method))
    said = capsys.readouterr().err
    assert ("of which 51 learn" in said) == (method != "full")
    assert ("linear probe: the features of 18 training images" in said) == (method == "linear_probe")
    assert ("steps" in facts) == (method != "linear_probe") and facts["splits"]["train"] == 18


def test_a_random_encoder_is_not_probed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="it would be random"):
        tiny_recipe(folder, tmp_path / "run", model={"method": "linear_probe"})
