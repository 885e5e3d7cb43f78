"""Metrics and reports against scikit-learn and formulas; evaluate and predict as functions."""

from __future__ import annotations

from pathlib import Path

import evaluate as hf_evaluate
import numpy as np
import pytest
import torch
from conftest import TINY_VIT, draw_folder, draw_image, draw_lopsided
from sklearn import metrics as sk

from vit_finetune.data.splits.carving import load_splits
from vit_finetune.data.transforms import EvaluationImages
from vit_finetune.evaluation.metrics import (
    Accuracy,
    BalancedAccuracy,
    MacroF1,
    calibration_bins,
    expected_calibration_error,
    log_loss,
)
from vit_finetune.evaluation.prediction import predict
from vit_finetune.evaluation.scoring import build_report, evaluate, predict_logits
from vit_finetune.model.loading import load_model
from vit_finetune.recipe import DataConfig, ModelConfig
from vit_finetune.run import RunError, wilson_interval


@pytest.fixture
def outcome() -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities of 200 images and 7 classes, of which class 6 never occurs."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 6, 200)
    logits = generator.normal(0, 1, (200, 7)) + 1.5 * np.eye(7)[labels]
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return labels, (exponents / exponents.sum(axis=1, keepdims=True)).astype(np.float32)


def test_the_report_equals_scikit_learn(outcome: tuple[np.ndarray, np.ndarray]) -> None:
    labels, probabilities = outcome
    predicted = probabilities.argmax(axis=1)
    names = [f"class {n}" for n in range(7)]
    report = build_report("test", [str(n) for n in range(200)], labels, probabilities, names, num_mistakes=5)
    assert report.num_images == 200
    assert report.accuracy == sk.accuracy_score(labels, predicted)
    assert report.macro_f1 == pytest.approx(sk.f1_score(labels, predicted, average="macro", zero_division=0))
    assert report.balanced_accuracy == pytest.approx(
        np.mean([(predicted[labels == n] == n).mean() for n in range(6)])
    )
    ranks = (-probabilities).argsort(axis=1)[:, :5]
    assert report.top_5_accuracy == pytest.approx(
        np.mean([label in row for label, row in zip(labels, ranks)])
    )
    expected = -np.log(probabilities[np.arange(200), labels].astype(np.float64)).mean()
    assert report.log_loss == pytest.approx(expected, abs=1e-6)
    assert np.array_equal(report.confusion_matrix, sk.confusion_matrix(labels, predicted, labels=range(7)))
    for number, name in enumerate(names):
        score = report.per_class[name]
        right = ((labels == number) & (predicted == number)).sum()
        assert score.support == (labels == number).sum()
        assert score.recall == pytest.approx(right / max(1, score.support))
        assert score.precision == pytest.approx(right / max(1, (predicted == number).sum()))
    # The worst mistakes: wrong, and surest first.
    wrong = np.flatnonzero(predicted != labels)
    surest = wrong[np.argsort(-probabilities[wrong].max(axis=1))][:5]
    assert [mistake.id for mistake in report.worst_mistakes] == [str(row) for row in surest]


def test_top_5_needs_more_than_5_classes() -> None:
    report = build_report(
        "test", ["a", "b"], np.array([0, 1]), np.eye(5, dtype=np.float32)[:2], list("abcde")
    )
    assert report.top_5_accuracy is None and "top_5_accuracy" not in report.to_json()
    assert report.accuracy == 1.0 and report.worst_mistakes == []


def test_wilson_interval_solves_its_equation() -> None:
    """The bounds are the shares from which the observed one lies exactly z standard errors away."""
    for right, total in ((0, 10), (7, 10), (970, 1000), (10, 10)):
        low, high = wilson_interval(right, total)
        for bound in (low, high):
            error = np.sqrt(bound * (1 - bound) / total)
            distance = abs(right / total - bound)
            assert distance == pytest.approx(1.959964 * error, rel=1e-6, abs=1e-7)
        assert 0 <= low <= right / total <= high <= 1
    assert wilson_interval(7, 10) == pytest.approx(
        (0.3968, 0.8922), abs=1e-4
    )  # R: prop.test(7, 10, correct=F)


def test_calibration_error_equals_a_loop(outcome: tuple[np.ndarray, np.ndarray]) -> None:
    labels, probabilities = outcome
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    bins = calibration_bins(labels, probabilities)
    assert expected_calibration_error(bins) == pytest.approx(expected, abs=1e-6)
    assert sum(b.count for b in bins) == 200


def test_log_loss_of_a_sure_mistake_is_finite() -> None:
    assert 30 < log_loss(np.array([1]), np.array([[1.0, 0.0]], np.float32)) < 40


def test_the_modules_are_evaluates(outcome: tuple[np.ndarray, np.ndarray]) -> None:
    labels, probabilities = outcome
    predicted = probabilities.argmax(axis=1)
    for metric in (Accuracy, MacroF1, BalancedAccuracy):
        module = metric(keep_in_memory=True)
        assert isinstance(module, hf_evaluate.Metric)
        for half in (slice(0, 120), slice(120, 200)):
            module.add_batch(predictions=predicted[half], references=labels[half])
        whole = metric(keep_in_memory=True).compute(predictions=predicted, references=labels)
        assert module.compute() == whole


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A saved model of the drawn classes, in another order than the folder's."""
    torch.manual_seed(3)
    built, processor = load_model(ModelConfig(config=TINY_VIT), ["red", "blue", "green"])
    built.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_evaluate_matches_classes_by_name_not_by_number(tmp_path: Path, model: str) -> None:
    folder = draw_lopsided(tmp_path / "photos", {"red": 9, "green": 12, "blue": 6})
    report = evaluate(model, data=str(folder))
    assert (report.split, report.num_images, report.labels) == ("all", 27, ["red", "blue", "green"])
    answers = predict(model, [folder])
    right = sum(a["predictions"][0]["label"] == Path(a["path"]).parent.name for a in answers)
    assert report.accuracy == pytest.approx(right / 27)
    assert np.sum(report.confusion_matrix, axis=1).tolist() == [9, 6, 12]


def test_evaluate_refuses_other_classes_by_name(tmp_path: Path, model: str) -> None:
    draw_folder(tmp_path / "more", classes=4)
    with pytest.raises(RunError, match=r"does not know 'yellow'"):
        evaluate(model, data=str(tmp_path / "more"))
    draw_folder(tmp_path / "less", classes=2)
    with pytest.raises(RunError, match=r"lacks 'red'"):
        evaluate(model, data=str(tmp_path / "less"))
    with pytest.raises(RunError, match="--data"):
        evaluate(model)


def test_predict_takes_files_and_folders_and_names_what_it_cannot_read(tmp_path: Path, model: str) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    draw_image((200, 0, 0), 1).save(tmp_path / "in" / "deep" / "a.PNG")
    draw_image((0, 200, 0), 2).convert("L").save(tmp_path / "in" / "b.jpg")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    answers = predict(model, [tmp_path / "in", tmp_path / "in" / "b.jpg"], top=2)
    assert [Path(answer["path"]).name for answer in answers] == ["b.jpg", "a.PNG", "b.jpg"]
    for answer in answers:
        first, second = answer["predictions"]
        assert 1 >= first["probability"] >= second["probability"] >= 0
    everything = predict(model, [tmp_path / "in" / "b.jpg"], top=99)[0]["predictions"]
    assert sum(item["probability"] for item in everything) == pytest.approx(1)
    (tmp_path / "in" / "empty.png").touch()
    with pytest.raises(RunError, match=r"empty\.png: cannot be read: 0 bytes"):
        predict(model, [tmp_path / "in"])
    with pytest.raises(RunError, match="no such file"):
        predict(model, [tmp_path / "gone.jpg"])


@pytest.mark.slow
def test_loader_processes_change_nothing(folder: Path) -> None:
    config = DataConfig(path=str(folder), test_fraction=0, validation_fraction=0.4)
    model, processor = load_model(ModelConfig(config=TINY_VIT), ["blue", "green", "red"])
    images = EvaluationImages(load_splits(config)["validation"], processor)
    rows = [predict_logits(model, processor, images, 4, "scoring", workers) for workers in (0, 2)]
    np.testing.assert_array_equal(*rows)
