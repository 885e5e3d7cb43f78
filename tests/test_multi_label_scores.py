"""Scores of images with several labels, with scikit-learn as the oracle; thresholds, with trying all of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import TINY_VIT
from finished_run import draw_report
from labelled_shapes import NAMES, SHAPES, flag_rows, several, write_jsonl, write_rows
from PIL import Image
from sklearn import metrics as sk
from transformers import AutoModelForImageClassification, pipeline

from vit_finetune.data.sources.labels import multi_hot
from vit_finetune.data.splits.carving import load_splits
from vit_finetune.evaluation.images import other_data
from vit_finetune.evaluation.multi_label import (
    build_multi_label_report,
    compute_multi_label_metrics,
    read_thresholds,
    tune_thresholds,
)
from vit_finetune.evaluation.prediction import predict
from vit_finetune.evaluation.scoring import at_best_thresholds, evaluate, score
from vit_finetune.evaluation.verification import verify_scores
from vit_finetune.files import write_json, write_text
from vit_finetune.model.loading import load_checkpoint, load_model
from vit_finetune.publishing.limits import find_limits
from vit_finetune.recipe import DataConfig, EvaluationConfig, ModelConfig
from vit_finetune.reports import MultiLabelReport, load_report
from vit_finetune.run import CALIBRATION_KEY, Report, Run, RunError, wilson_interval


def draw(seed: int, images: int = 60, classes: int = 5, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Targets and probabilities that agree more often than not; the last label has no image."""
    random = np.random.default_rng(seed)
    targets = (random.random((images, classes)) < np.linspace(0.6, 0.1, classes)).astype(np.float32)
    targets[:, -1] = 0
    probabilities = 1 / (1 + np.exp(-(2 * targets - 1 + random.normal(0, 1.5, targets.shape))))
    probabilities = np.round(probabilities, 1) if ties else probabilities
    return targets, probabilities.astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_scikit_learns(seed: int) -> None:
    targets, probabilities = draw(seed, ties=seed % 2 == 1)
    thresholds = np.array([0.3, 0.5, 0.6, 0.4, 0.5])
    found = compute_multi_label_metrics(targets, probabilities, thresholds)
    predicted = (probabilities >= thresholds).astype(int)
    truth = targets.astype(int)
    known = targets.any(axis=0)
    average = sk.average_precision_score(truth[:, known], probabilities[:, known], average="macro")
    assert found == pytest.approx(
        {
            "mean_average_precision": average,
            "micro_f1": sk.f1_score(truth, predicted, average="micro"),
            "macro_f1": sk.f1_score(truth, predicted, average="macro", zero_division=np.nan),
            "exact_match": sk.accuracy_score(truth, predicted),
            "hamming_loss": sk.hamming_loss(truth, predicted),
        },
        abs=1e-12,
    )
    assert (
        compute_multi_label_metrics(np.zeros((3, 2)), np.full((3, 2), 0.2))["mean_average_precision"] == 0.0
    )


def test_labels_that_are_nowhere_do_not_lower_the_mean() -> None:
    """As of classes, whose mean is over those that there are: a model without a mistake has 1."""
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
    assert compute_multi_label_metrics(targets, targets * 0.9)["macro_f1"] == 1
    assert compute_multi_label_metrics(targets, targets * 0.9 + [0, 0, 0.9])["macro_f1"] == pytest.approx(
        2 / 3
    )
    assert compute_multi_label_metrics(targets * 0, targets * 0.1)["macro_f1"] == 0


def test_limits_name_what_was_given_to_no_image_rightly() -> None:
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
    ids, names, half = ["1", "2", "3"], ["a", "b", "c"], np.full(3, 0.5)
    wrong = targets * 0.9 + [[0, 0, 0.9], [0, 0, 0], [0, 0, 0.9]]
    report = build_multi_label_report("test", ids, targets, wrong, names, half)
    assert [score.given for score in report.per_class.values()] == [2, 2, 2]
    (sentence,) = [said for said in find_limits(report) if "precision" in said]
    assert sentence == "Lowest precision: c: 0.0% (0 of 2 images that were given it)."
    assert not any("No label" in said for said in find_limits(report))
    # Of labels that are missed alike, that with more images, which says more.
    more = np.array([[1, 1], [0, 1]])
    missed = find_limits(build_multi_label_report("test", ids[:2], more, more * 0.1, names[:2], half[:2]))
    assert missed[0].startswith("Lowest recall: b: 0.0% (0 of 2,")
    assert missed[1].startswith("2 of 2 labels have fewer than 30 images")
    right = find_limits(build_multi_label_report("test", ids, targets, targets * 0.9, names, half))
    assert right[0].startswith("No label of the test split was missed or wrongly given")


def try_all(target: np.ndarray, probabilities: np.ndarray) -> float:
    """The threshold by trying every middle, with scikit-learn's F1."""
    values = sorted({0.0, *probabilities.astype(float).tolist()})
    middles = [(low + high) / 2 for low, high in itertools.pairwise(values)]
    scores = {middle: sk.f1_score(target, probabilities >= middle, zero_division=0) for middle in middles}
    best = [middle for middle in middles if scores[middle] == pytest.approx(max(scores.values()), abs=1e-12)]
    return min(best, key=lambda middle: (abs(middle - 0.5), -middle))


@pytest.mark.parametrize("seed", range(8))
def test_thresholds_equal_trying_all(seed: int) -> None:
    targets, probabilities = draw(seed, images=40, ties=seed % 2 == 1)
    found = tune_thresholds(targets, probabilities)
    for target, column, threshold in zip(targets.T[:-1], probabilities.T, found):
        assert threshold == pytest.approx(try_all(target, column), abs=1e-12)
    assert found[-1] == 0.5  # no image has the label


@pytest.mark.parametrize(
    ("target", "probabilities", "threshold"),
    [
        ([0, 0, 0], [0.1, 0.7, 0.9], 0.5),  # no positives
        ([1, 1, 1], [0.2, 0.7, 0.9], 0.1),  # all are: the middle to 0
        ([0, 1], [0.2, 0.8], 0.5),
        ([1, 0, 1, 0], [0.5, 0.5, 0.5, 0.5], 0.25),  # all tied: only all together
        ([1, 0, 0, 1], [0.9, 0.6, 0.4, 0.3], 0.75),  # 2/3 at 0.75 and at 0.15: the nearer to 0.5
        ([1, 0, 0, 1], [0.99, 0.95, 0.9, 0.8], 0.4),  # 2/3 at 0.97 and at 0.4
        ([1, 1], [0.0, 0.0], 0.0),
    ],
)
def test_thresholds_of_ties(target: list[int], probabilities: list[float], threshold: float) -> None:
    column = np.array(probabilities, np.float64)[:, None]
    assert tune_thresholds(np.array(target)[:, None], column) == pytest.approx([threshold], abs=1e-12)


def test_of_equally_near_thresholds_the_higher_is_taken() -> None:
    """F1 is 2/3 at 0.75, where one of two is found, and at 0.25, where all four are taken."""
    column = np.array([0.9, 0.6, 0.55, 0.5])[:, None]
    assert tune_thresholds(np.array([1, 0, 0, 1])[:, None], column) == [0.75]


def test_the_report_is_computed_by_scikit_learn() -> None:
    targets, probabilities = draw(3)
    names, ids = ["a", "b", "c", "d", "e"], [f"{number}.png" for number in range(len(targets))]
    thresholds = np.asarray(tune_thresholds(targets, probabilities))
    report = build_multi_label_report("test", ids, targets, probabilities, names, thresholds, 7)
    predicted, truth = (probabilities >= thresholds).astype(int), targets.astype(int)
    table = sk.precision_recall_fscore_support(truth, predicted, average=None, zero_division=0)
    for number, name in enumerate(names):
        found = report.per_class[name]
        expected = [column[number] for column in table]
        assert [found.precision, found.recall, found.f1, found.support] == pytest.approx(expected)
        assert found.threshold == thresholds[number]
        if name == "e":
            assert found.average_precision is None
        else:
            average = sk.average_precision_score(truth[:, number], probabilities[:, number])
            assert found.average_precision == pytest.approx(average)
    right = int((truth == predicted).all(axis=1).sum())
    assert report.exact_match_interval == wilson_interval(right, len(truth))
    assert (report.num_images, report.labels) == (60, names)
    # The surest wrong decision of each image, the surest first.
    sureness = {
        identity: max(abs(p - t) for p, t, said in zip(*rows) if t != said)
        for identity, *rows in zip(ids, probabilities.tolist(), truth.tolist(), predicted.tolist())
        if rows[1] != rows[2]
    }
    worst = sorted(sureness, key=lambda identity: (-sureness[identity], identity))[:7]
    assert [mistake.id for mistake in report.worst_mistakes] == worst
    first = report.worst_mistakes[0]
    assert first.probability == pytest.approx(sureness[first.id])
    row = ids.index(first.id)
    assert first.label == (", ".join(n for n, t in zip(names, truth[row]) if t) or "no label")


def test_a_report_is_read_back_as_what_it_is(tmp_path: Path) -> None:
    targets, probabilities = draw(1)
    names, ids = list("abcde"), [str(number) for number in range(60)]
    report = build_multi_label_report("test", ids, targets, probabilities, names, np.full(5, 0.5), 3)
    write_text(tmp_path / "several.json", report.to_json())
    assert load_report(tmp_path / "several.json") == report
    plain = draw_report(["a", "b"])
    write_text(tmp_path / "one.json", plain.to_json())
    assert load_report(tmp_path / "one.json") == plain
    assert isinstance(plain, Report)


# --------------------------------------------------------------------------- a model


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "photos", 40)


def config_of(table: Path) -> DataConfig:
    return DataConfig(path=str(table), multi_label=True, validation_fraction=0.3, test_fraction=0.3)


@pytest.fixture
def saved(photos: Path, tmp_path: Path) -> Path:
    """An untrained model of the three shapes, saved with thresholds."""
    torch.manual_seed(3)
    model, processor = load_model(ModelConfig(config=TINY_VIT), NAMES, multi_label=True)
    split = load_splits(config_of(photos))["validation"]
    at_best_thresholds(
        score(model, processor, split, "validation", EvaluationConfig()), model, EvaluationConfig()
    )
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_thresholds_are_tuned_on_these_images_and_saved(photos: Path, saved: Path) -> None:
    model, processor = load_checkpoint(str(saved))
    split = load_splits(config_of(photos))["validation"]
    found = score(model, processor, split, "validation", EvaluationConfig())
    assert model.config.thresholds == tune_thresholds(found.label_ids, found.probabilities)
    assert model.config.thresholds != [0.5] * 3
    assert isinstance(found.report, MultiLabelReport)
    assert [value.threshold for value in found.report.per_class.values()] == model.config.thresholds
    stock = AutoModelForImageClassification.from_pretrained(saved)
    assert stock.config.thresholds == model.config.thresholds
    assert stock.config.problem_type == "multi_label_classification"


def test_tuned_f1_is_no_lower_than_at_half(photos: Path) -> None:
    torch.manual_seed(3)
    model, processor = load_model(ModelConfig(config=TINY_VIT), NAMES, multi_label=True)
    split = load_splits(config_of(photos))["validation"]
    plain = score(model, processor, split, "validation", EvaluationConfig())
    tuned = at_best_thresholds(plain, model, EvaluationConfig())
    assert [value.threshold for value in plain.report.per_class.values()] == [0.5] * 3
    for name in NAMES:
        assert tuned.report.per_class[name].f1 >= plain.report.per_class[name].f1
    assert tuned.report.mean_average_precision == plain.report.mean_average_precision


@pytest.mark.parametrize("bad", [[0.5], [0.5, 0.5, 2.0], [0.5, "x", 0.5], 0.5, [True, 0.5, 0.5]])
def test_broken_thresholds_are_an_error(bad: Any) -> None:
    model, _ = load_model(ModelConfig(config=TINY_VIT), NAMES, multi_label=True)
    assert read_thresholds(model.config).tolist() == [0.5] * 3
    model.config.thresholds = bad
    with pytest.raises(RunError, match=r"expected a number in .* for each of the 3 labels"):
        read_thresholds(model.config)


def test_a_new_head_has_no_thresholds_of_an_old_one(saved: Path) -> None:
    model, _ = load_model(ModelConfig(path=str(saved)), ["x", "y"], multi_label=True)
    assert read_thresholds(model.config).tolist() == [0.5] * 2


def test_predictions_equal_those_of_the_pipeline(photos: Path, saved: Path) -> None:
    classify = pipeline("image-classification", model=str(saved), device="cpu")
    paths = sorted(photos.parent.glob("*.png"))[:6]
    thresholds = dict(zip(NAMES, load_checkpoint(str(saved))[0].config.thresholds))
    for answer in predict(saved, paths, top=2):
        scores = {
            found["label"]: found["score"] for found in classify(Image.open(answer["path"]), top_k=None)
        }
        assert answer["labels"] == [name for name in NAMES if scores[name] >= thresholds[name]]
        assert len(answer["predictions"]) == 2
        for found in answer["predictions"]:
            assert found["probability"] == pytest.approx(scores[found["label"]], abs=1e-6)
            assert found["threshold"] == thresholds[found["label"]]
    assert abs(sum(scores.values()) - 1) > 1e-3, "probabilities are each label's own"


def test_a_model_is_evaluated_on_tables_of_either_kind(photos: Path, saved: Path, tmp_path: Path) -> None:
    whole = evaluate(saved, str(photos))
    rows = [json.loads(line) for line in photos.read_text().splitlines()]
    flags = [
        {"file_name": row["file_name"]} | {name: int(name in row["labels"]) for name in reversed(NAMES)}
        for row in rows
    ]
    assert evaluate(saved, str(write_rows(photos.parent / "table.csv", flags))) == whole
    assert isinstance(whole, MultiLabelReport)
    assert (whole.split, whole.num_images) == ("all", 40)


def test_other_tables_say_it_in_their_own_way(photos: Path, saved: Path, tmp_path: Path) -> None:
    """Whether the run's own had lists or columns; a folder's table, too."""
    flags = tmp_path / "flags"
    table = write_rows(flags / "metadata.csv", flag_rows(flags, 20))
    for source in (table, flags):
        assert other_data(config_of(photos), str(source), NAMES).label_column == NAMES
        assert evaluate(saved, str(source)).num_images == 20
    by_column = several(table, label_column=list(SHAPES))
    for source in (photos, photos.parent):
        assert other_data(by_column, str(source), NAMES).label_column is None
    rows = write_rows(flags / "rows.parquet", flag_rows(flags, 20))
    assert other_data(None, str(rows), NAMES).label_column == NAMES


def test_lists_need_not_name_every_label_of_the_model(photos: Path, saved: Path) -> None:
    rows = [json.loads(line) for line in photos.read_text().splitlines()]
    report = evaluate(saved, str(write_rows(photos, [row for row in rows if "bar" not in row["labels"]])))
    assert isinstance(report, MultiLabelReport)
    assert report.labels == NAMES
    assert (report.per_class["bar"].support, report.per_class["bar"].average_precision) == (0, None)
    with pytest.raises(RunError, match=r"The model does not know 'star'\. Expected"):
        evaluate(saved, str(write_rows(photos, [*rows[1:], rows[0] | {"labels": ["star"]}])))


def test_a_temperature_is_not_of_several_labels(photos: Path, saved: Path) -> None:
    """Not even where the config has one, as that of a model which this one was trained from."""
    file = saved / "config.json"
    for more in ({}, {CALIBRATION_KEY: 2.0}):
        write_json(file, json.loads(file.read_text()) | more)
        with pytest.raises(RunError, match=r"Leave out --calibrated$"):
            predict(saved, [photos.parent / "000.png"], calibrated=True)
        with pytest.raises(RunError, match=r"Leave out --calibrated$"):
            evaluate(saved, str(photos), calibrated=True)


def test_a_model_of_one_class_is_none_of_several(photos: Path, tmp_path: Path) -> None:
    model, processor = load_model(ModelConfig(config=TINY_VIT), NAMES)
    model.save_pretrained(tmp_path / "one")
    processor.save_pretrained(tmp_path / "one")
    with pytest.raises(RunError, match=r"write data\.multi_label=true|expected one class per image"):
        evaluate(tmp_path / "one", str(photos))


def test_what_was_downloaded_is_compared_with_the_report(photos: Path, saved: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    model, processor = load_checkpoint(str(saved))
    split = load_splits(config_of(photos))["test"]
    scores = score(model, processor, split, "test", EvaluationConfig())
    scores.save_predictions(run.predictions("test"))
    write_text(run.report("test"), scores.report.to_json())
    rows = pyarrow.parquet.read_table(run.predictions("test")).to_pylist()
    targets = multi_hot([[NAMES.index(name) for name in row["label"]] for row in rows], 3)
    assert (targets == scores.label_ids).all()
    for row in rows:
        above = zip(NAMES, row["probabilities"], model.config.thresholds)
        assert row["predicted"] == [name for name, value, threshold in above if value >= threshold]
    verified = verify_scores(saved, split, run, whole=True)
    assert verified.num_images == len(split)
    assert verified.largest_difference < 1e-6
    for name, change in (("exact_match", 0.01), ("micro_f1", -0.2)):
        other = scores.report.model_copy(update={name: getattr(scores.report, name) + change})
        write_text(run.report("test"), other.to_json())
        with pytest.raises(RunError, match=f"the report's {name.replace('_', ' ')} is"):
            verify_scores(saved, split, run, whole=False)
    write_text(run.report("test"), scores.report.to_json())
    config = json.loads((saved / "config.json").read_text()) | {"problem_type": "single_label_classification"}
    write_json(saved / "config.json", config)
    with pytest.raises(RunError, match="does not score as reported"):
        verify_scores(saved, split, run, whole=False)
