"""The temperature: its value against scikit-learn's and scipy's, where it is written, what it changes and what not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import Say, draw_folder, tiny_recipe
from fork_server import QUICK, ForkServer
from loopback_hub import LoopbackHub
from PIL import ExifTags, Image
from scipy.optimize import minimize
from sklearn import metrics as sk
from test_report import Page
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
from typer.testing import CliRunner

from vit_finetune.cli import app
from vit_finetune.data.sources.columns import column_values
from vit_finetune.evaluation.calibration import (
    HIGHEST,
    LOWEST,
    fit_temperature,
    measure_calibrated,
    temper,
)
from vit_finetune.evaluation.images import own_split
from vit_finetune.evaluation.prediction import predict
from vit_finetune.evaluation.scoring import evaluate
from vit_finetune.finetuning import finetune
from vit_finetune.model.loading import load_checkpoint, load_model
from vit_finetune.publishing.card import build_card
from vit_finetune.publishing.report import build_report
from vit_finetune.recipe import ModelConfig
from vit_finetune.run import CALIBRATION_KEY, Report, Run, RunError

CALIBRATED = {"calibrate": True}
TRAINING = {"num_train_epochs": 6}


def answers(factor: float, images: int = 400, classes: int = 5, seed: int = 0) -> tuple[Any, Any]:
    """Labels drawn from the probabilities that logits give, and these logits times a factor, float32."""
    chance = np.random.default_rng(seed)
    logits = chance.normal(0, 1.5, (images, classes))
    labels = np.array([chance.choice(classes, p=row) for row in temper(logits, 1.0)])
    return labels, (factor * logits).astype(np.float32)


def check_is_least(labels: np.ndarray, logits: np.ndarray, found: float) -> None:
    """Log loss by scikit-learn: at no temperature nearby or far is it lower."""

    def loss(temperature: float) -> float:
        rows = torch.from_numpy(logits).double().div(temperature).softmax(-1).numpy()
        return float(sk.log_loss(labels, rows, labels=np.arange(logits.shape[1])))

    least = loss(found)
    for factor in (1.001, 1.1, 2.0):
        for other in (found * factor, found / factor):
            assert not LOWEST <= other <= HIGHEST or loss(other) > least


# --------------------------------------------------------------------------- values


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_it_is_the_minimum_of_the_log_loss(factor: float, classes: int) -> None:
    """Against scipy's minimiser of torch's cross-entropy; and T is the factor that the logits are too large by."""
    labels, logits = answers(factor, classes=classes)
    found = fit_temperature(labels, logits)
    z, y = torch.from_numpy(logits).double(), torch.from_numpy(labels)

    def loss(beta: np.ndarray) -> tuple[float, np.ndarray]:
        values = torch.from_numpy(beta).requires_grad_()
        value = torch.nn.functional.cross_entropy(z * values, y)
        value.backward()
        return float(value.detach()), values.grad.numpy()

    theirs = minimize(loss, np.ones(1), jac=True, method="BFGS", options={"gtol": 1e-12}).x[0]
    assert found == pytest.approx(1 / theirs, rel=1e-6)
    assert found == pytest.approx(factor, rel=0.25)
    check_is_least(labels, logits, found)


def test_logits_that_are_calibrated_already_stay_so() -> None:
    """Fitted to what it has made, it is 1; and only differences of logits count."""
    labels, logits = answers(2.5)
    found = fit_temperature(labels, logits)
    assert fit_temperature(labels, logits.astype(np.float64) / found) == pytest.approx(1, abs=1e-9)
    shift = np.random.default_rng(1).normal(0, 100, (len(labels), 1))
    assert fit_temperature(labels, logits.astype(np.float64) + shift) == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize(("size", "found"), [(1e-3, LOWEST), (1.0, LOWEST), (300, LOWEST), (1e5, 1.0)])
def test_images_that_are_all_predicted_rightly_end_at_the_bound(size: float, found: float) -> None:
    """The log loss falls with the temperature, without an end; of huge logits it is 0 at any."""
    labels = np.arange(30) % 3
    logits = (size * np.eye(3)[labels]).astype(np.float32)
    assert fit_temperature(labels, logits) == found
    assert np.isfinite(measure_calibrated(labels, logits, found).log_loss)


def test_a_model_that_is_wrong_when_it_is_sure_ends_at_the_other_bound() -> None:
    labels = np.arange(30) % 3
    assert fit_temperature(labels, np.eye(3, dtype=np.float32)[(labels + 1) % 3]) == HIGHEST
    assert fit_temperature(labels, np.zeros((30, 3), np.float32)) == 1.0


def test_what_is_measured_equals_scikit_learn_and_torch() -> None:
    labels, logits = answers(3.0)
    measured = measure_calibrated(labels, logits, 2.0)
    rows = torch.from_numpy(logits).double().div(2.0).softmax(-1).numpy()
    np.testing.assert_allclose(temper(logits, 2.0), rows, atol=1e-12)
    assert measured.temperature == 2.0
    assert measured.log_loss == pytest.approx(sk.log_loss(labels, rows), abs=1e-9)
    error, sureness, right = 0.0, rows.max(axis=1), rows.argmax(axis=1) == labels
    for low in np.arange(15) / 15:
        inside = (sureness > low) & (sureness <= low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - sureness[inside].mean())
    assert measured.ece == pytest.approx(error, abs=1e-9)
    assert sum(part.count for part in measured.calibration) == len(labels)
    # Which classes are the most probable, and in which order, stays.
    assert (temper(logits, 2.0).argsort(axis=1) == logits.argsort(axis=1)).all()


# --------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on images of which a fifth are in a wrong folder."""
    folder = tmp_path_factory.mktemp("calibrated")
    draw_folder(folder / "photos", per_class=20)
    for name, other in (("blue", "green"), ("green", "red"), ("red", "blue")):
        for number in range(0, 20, 5):
            photo = folder / "photos" / name / f"{number}.png"
            photo.rename(folder / "photos" / other / f"{name}-{number}.png")
    recipe = tiny_recipe(folder / "photos", folder / "run", evaluation=CALIBRATED, training=TRAINING)
    return finetune(recipe)


def logits_of(run: Run, split: str) -> tuple[np.ndarray, np.ndarray]:
    """True classes and logits as anybody computes them, who has transformers and the images."""
    model = AutoModelForImageClassification.from_pretrained(run.model)
    processor = AutoImageProcessor.from_pretrained(run.model)
    rows = own_split(run, split)
    root = Path(run.read_provenance()["data"]["path"])
    images = [Image.open(root / name).convert("RGB") for name in column_values(rows, "id")]
    with torch.no_grad():
        logits = model(**processor(images, return_tensors="pt")).logits
    return np.asarray(column_values(rows, "label")), logits.numpy()


@pytest.mark.slow
def test_it_is_fitted_to_validation_and_measured_on_both(calibrated: Run) -> None:
    config = json.loads((calibrated.model / "config.json").read_text())
    labels, logits = logits_of(calibrated, "validation")
    assert config[CALIBRATION_KEY] == pytest.approx(fit_temperature(labels, logits), rel=1e-4)
    assert LOWEST < config[CALIBRATION_KEY] < HIGHEST
    check_is_least(labels, logits, config[CALIBRATION_KEY])
    for split in ("validation", "test"):
        report, (labels, logits) = Report.load(calibrated.report(split)), logits_of(calibrated, split)
        assert report.calibrated and report.calibrated.temperature == config[CALIBRATION_KEY]
        rows = torch.from_numpy(logits).double().div(config[CALIBRATION_KEY]).softmax(-1).numpy()
        assert report.calibrated.log_loss == pytest.approx(sk.log_loss(labels, rows), abs=1e-6)
        # All else is without, and right is what was right.
        plain = torch.from_numpy(logits).double().softmax(-1).numpy()
        assert report.log_loss == pytest.approx(sk.log_loss(labels, plain), abs=1e-6)
        right = sum(part.accuracy * part.count for part in report.calibrated.calibration)
        assert right == pytest.approx(report.accuracy * report.num_images)
        assert report.accuracy == (rows.argmax(axis=1) == labels).mean()
        if split == "validation":
            assert report.calibrated.log_loss < report.log_loss


@pytest.mark.slow
def test_all_but_the_key_is_as_without(calibrated: Run, tmp_path: Path) -> None:
    """Weights, config, reports and predictions, byte for byte; the model is stock, and pipeline's answers stay."""
    data = calibrated.read_provenance()["data"]["path"]
    plain = finetune(tiny_recipe(data, tmp_path / "plain", training=TRAINING))
    for name in ("model/model.safetensors", "model/preprocessor_config.json", "predictions/test.parquet"):
        assert (plain.path / name).read_bytes() == (calibrated.path / name).read_bytes()
    text, other = ((run.model / "config.json").read_text() for run in (calibrated, plain))
    assert [line for line in text.splitlines() if CALIBRATION_KEY not in line] == other.splitlines()
    for split in ("validation", "test"):
        report = Report.load(calibrated.report(split)).model_copy(update={"calibrated": None})
        assert plain.report(split).read_text() == report.to_json()
    for paper in (build_card(plain), build_report(plain)):
        assert "the temperature" not in paper and "Log loss, calibrated" not in paper
    classify = pipeline("image-classification", model=str(calibrated.model), device="cpu")
    for row in pyarrow.parquet.read_table(calibrated.predictions("test")).to_pylist():
        answer = {item["label"]: item["score"] for item in classify(str(Path(data) / row["id"]), top_k=3)}
        names = [classify.model.config.id2label[number] for number in range(3)]
        assert [answer[name] for name in names] == pytest.approx(row["probabilities"], abs=1e-6)
    classify.model.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again[CALIBRATION_KEY] == json.loads(text)[CALIBRATION_KEY]


@pytest.mark.slow
def test_it_is_applied_where_asked_for(calibrated: Run) -> None:
    root = Path(calibrated.read_provenance()["data"]["path"])
    names = column_values(own_split(calibrated, "test"), "id")
    _, logits = logits_of(calibrated, "test")
    config = json.loads((calibrated.model / "config.json").read_text())
    rows = torch.from_numpy(logits).double().div(config[CALIBRATION_KEY]).softmax(-1).numpy()
    plain = predict(calibrated.path, [root / name for name in names], top=3)
    for target in (calibrated.path, calibrated.model):
        found = predict(target, [root / name for name in names], top=3, calibrated=True)
        for row, before, after in zip(rows, plain, found):
            order = [answer["label"] for answer in after["predictions"]]
            assert order == [answer["label"] for answer in before["predictions"]]
            sorted_row = sorted(row, reverse=True)
            assert [a["probability"] for a in after["predictions"]] == pytest.approx(sorted_row, abs=1e-6)
            assert after != before
    runner, words = CliRunner(), ["--calibrated", "--json"]
    done = runner.invoke(app, ["predict", str(calibrated.path), str(root / names[0]), "--top", "3", *words])
    first = [answer["probability"] for answer in json.loads(done.stdout)[0]["predictions"]]
    assert first == pytest.approx([a["probability"] for a in found[0]["predictions"]], abs=1e-6)
    done = runner.invoke(app, ["evaluate", str(calibrated.path), *words])
    report = Report.model_validate_json(done.stdout)
    expected = Report.load(calibrated.report("test"))
    assert report.calibrated == expected.calibrated and report.log_loss == expected.log_loss
    assert evaluate(calibrated.path).calibrated is None
    shown = runner.invoke(app, ["evaluate", str(calibrated.path), "--calibrated"])
    assert f"log loss at temperature {config[CALIBRATION_KEY]:.3f}" in shown.stderr


@pytest.mark.slow
def test_a_model_without_one_is_named(run: Run, calibrated: Run, tmp_path: Path) -> None:
    photo = Path(calibrated.read_provenance()["data"]["path"]) / "red" / "1.png"
    for words in (["predict", str(run.path), str(photo)], ["evaluate", str(run.path)]):
        done = CliRunner().invoke(app, [*words, "--calibrated"])
        assert done.exit_code == 1
        assert f"{run.path}: the model was not calibrated" in done.stderr
        assert "evaluation.calibrate=true" in done.stderr
    file = run.model / "config.json"
    for value in (0, -1, "hot", True, float("nan")):
        file.write_text(json.dumps(json.loads(file.read_text()) | {CALIBRATION_KEY: value}))
        with pytest.raises(RunError, match="expected a number above 0"):
            predict(run.path, [photo], calibrated=True)


@pytest.mark.slow
def test_what_is_trained_from_a_calibrated_model_has_no_temperature(calibrated: Run, folder: Path) -> None:
    """It was that of other weights, and perhaps of other classes."""
    assert hasattr(load_checkpoint(str(calibrated.model))[0].config, CALIBRATION_KEY)
    for labels in (["blue", "green", "red"], ["cat", "dog"]):
        model, _ = load_model(ModelConfig(path=str(calibrated.model)), labels)
        assert CALIBRATION_KEY not in model.config.to_dict()


@pytest.mark.slow
def test_a_finished_run_is_not_calibrated_by_resuming_it(run: Run, folder: Path) -> None:
    recipe = tiny_recipe(
        run.read_provenance()["data"]["path"],
        run.path,
        evaluation=CALIBRATED,
        hub={"license": "apache-2.0"},
    )
    with pytest.raises(RunError, match=r"evaluation\.calibrate was False, is True"):
        finetune(recipe, resume=True)
    run.report_html.unlink()  # of a run that was killed before its end, it is still to come
    finetune(recipe, resume=True)
    report = Report.load(run.report("test"))
    assert report.calibrated
    assert (
        json.loads((run.model / "config.json").read_text())[CALIBRATION_KEY] == report.calibrated.temperature
    )
    assert run.read_provenance()["scored"] == run.sum_scored()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [{"training": {"ema_decay": 0.5}}, {"model": {"method": "linear_probe", "config": None}}],
    ids=["ema", "probe"],
)
def test_it_is_of_the_weights_that_are_published(
    folder: Path, calibrated: Run, tmp_path: Path, sections: dict[str, Any]
) -> None:
    if "model" in sections:
        sections = {"model": {**sections["model"], "path": str(calibrated.model)}}
    run = finetune(tiny_recipe(folder, tmp_path / "run", evaluation=CALIBRATED, **sections))
    labels, logits = logits_of(run, "validation")
    report = Report.load(run.report("validation"))
    assert report.calibrated
    expected = fit_temperature(labels, logits)
    assert report.calibrated.temperature == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_validation_images_without_a_mistake_are_told_of(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where there is no test split: the temperature is bounded, and said to rest on too little."""
    recipe = tiny_recipe(
        folder, tmp_path / "run", data={"test_fraction": 0}, evaluation=CALIBRATED,
        training={"num_train_epochs": 12},
    )  # fmt: skip
    run = finetune(recipe)
    report = Report.load(run.report("validation"))
    assert report.accuracy == 1 and report.calibrated and report.calibrated.temperature == LOWEST
    told = " ".join(capsys.readouterr().err.split())
    assert "temperature beyond 0.1, where the search ends; all are predicted rightly" in told
    assert "validation, which the temperature was fitted to: log loss" in told
    assert "These are the images that it was fitted to" in Page(build_report(run)).text


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_fit_the_same(forks: ForkServer, calibrated: Run, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        calibrated.read_provenance()["data"]["path"], tmp_path / "run", evaluation=CALIBRATED,
        training={**TRAINING, "per_device_train_batch_size": 2},
    )  # fmt: skip
    file = tmp_path / "tiny.yaml"
    file.write_text(recipe.to_yaml(resolved=False), encoding="utf-8")
    children = forks.start_world(tmp_path / "world", 2, "train", file, before=QUICK)
    assert [child.wait() for child in children] == [0, 0], children[0].stderr
    run = Run(tmp_path / "run")
    for split in ("validation", "test"):
        ours, theirs = Report.load(run.report(split)), Report.load(calibrated.report(split))
        assert ours.calibrated and theirs.calibrated
        assert ours.calibrated.temperature == pytest.approx(theirs.calibrated.temperature, rel=1e-3)
        assert ours.calibrated.log_loss == pytest.approx(theirs.calibrated.log_loss, abs=1e-4)


@pytest.mark.slow
@pytest.mark.hub
def test_what_is_pushed_is_verified_and_can_be_asked_for_it(
    calibrated: Run, hub: LoopbackHub, say: Say
) -> None:
    """Downloaded, pipeline gives what was reported; strangers find the temperature in the config."""
    code, _, said = say("push", calibrated.path, "--repo", "ann/colours", "--verify", "full")
    assert code == 0 and "15 of 15 test images" in said, said
    files = hub.repo("ann/colours").files()
    assert files["config.json"] == (calibrated.model / "config.json").read_bytes()
    card = files["README.md"].decode()
    assert 'name = "ann/colours"' in card and "path/to/this/folder" not in card
    photo = Path(calibrated.read_provenance()["data"]["path"]) / "red" / "1.png"
    code, told, said = say("predict", "ann/colours", photo, "--calibrated", "--top", "3", "--json")
    assert code == 0, said
    found = [answer["probability"] for answer in json.loads(told)[0]["predictions"]]
    expected = predict(calibrated.path, [photo], top=3, calibrated=True)[0]["predictions"]
    assert found == pytest.approx([answer["probability"] for answer in expected], abs=1e-6)


@pytest.mark.slow
def test_the_code_in_the_card_gives_the_calibrated_probabilities(calibrated: Run, tmp_path: Path) -> None:
    """Of a photo that its EXIF turns, as phones write them."""
    photo, exif = tmp_path / "turned.png", Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    with Image.open(Path(calibrated.read_provenance()["data"]["path"]) / "red" / "1.png") as upright:
        upright.save(photo, exif=exif)
    card = (calibrated.model / "README.md").read_text()
    block = next(part for part in card.split("```") if CALIBRATION_KEY in part and "import" in part)
    code = block.removeprefix("python").replace("path/to/this/folder", str(calibrated.model))
    code = code.replace("photo.jpg", str(photo))
    names: dict[str, Any] = {}
    exec(code, names)
    answer = predict(calibrated.path, [photo], top=3, calibrated=True)[0]["predictions"]
    found = sorted(names["probabilities"][0].tolist(), reverse=True)
    assert [item["probability"] for item in answer] == pytest.approx(found, abs=1e-6)
