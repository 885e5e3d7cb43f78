"""Runs on several labels from end to end: processes, kills, papers, command line, pipeline."""

from __future__ import annotations

import json
import shutil
import signal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
import worlds
from conftest import TINY_VIT, draw_folder
from exactness import same, weights_of
from fork_server import QUICK, ForkServer
from harmed_runs import at, check_same_end, ended, send
from labelled_shapes import NAMES, SHAPES, flag_rows, recipe_of, write_jsonl, write_recipe, write_rows
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

from vit_finetune.comparing import compare
from vit_finetune.evaluation.scoring import evaluate
from vit_finetune.finetuning import finetune
from vit_finetune.model.loading import load_model
from vit_finetune.recipe import ModelConfig
from vit_finetune.reports import MultiLabelReport, load_report
from vit_finetune.robustness import evaluate_robustness
from vit_finetune.run import Run

MODERN = {"ema_decay": 0.9, "layer_decay": 0.7, "head_lr_multiplier": 2.0}
DROPPING = {"config": {**TINY_VIT, "hidden_dropout_prob": 0.2}, "drop_path_rate": 0.3}


# --------------------------------------------------------------------------- whole runs


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_as_one(forks: ForkServer, tmp_path: Path) -> None:
    """28 training images in steps of 8: of the last step the second process has none."""
    table = write_jsonl(tmp_path / "shapes", 60)
    runs = []
    for processes in (1, 2):
        run = Run(tmp_path / f"run-{processes}")
        recipe = recipe_of(
            table,
            run.path,
            data={"validation_fraction": 0.25, "test_fraction": 0.25},
            training={
                "per_device_train_batch_size": 8 // processes, "dataloader_num_workers": 0, "ema_decay": 0.9,
                "metric_for_best_model": "loss", "logging_steps": 1, "num_train_epochs": 3,
            },
            evaluation={"batch_size": 3},
        )  # fmt: skip
        words = ("train", write_recipe(tmp_path / f"{processes}.yaml", recipe))
        folder = tmp_path / f"session-{processes}"
        if processes == 1:
            children = [forks.start(folder, *words, before=QUICK)]
        else:
            children = forks.start_world(folder, 2, *words, before=QUICK)
        worlds.finish(children)
        runs.append(run)
    one, two = runs
    train = one.read_provenance()["data"]["splits"]["train"]["num_images"]
    assert 0 < train % 8 <= 4, train
    ours, theirs = worlds.weights(two), worlds.weights(one)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=0)
    for split in ("validation", "test"):
        worlds.check_close(*(json.loads(run.report(split).read_text()) for run in (two, one)), 1e-4)
    thresholds = [json.loads((run.model / "config.json").read_text())["thresholds"] for run in runs]
    assert thresholds[0] == pytest.approx(thresholds[1], abs=1e-5)


@pytest.mark.slow
def test_stopped_and_resumed_on_the_command_line(forks: ForkServer, tmp_path: Path) -> None:
    table = write_jsonl(tmp_path / "shapes", 40)
    runs = []
    for name, stop in (("whole", None), ("stopped", signal.SIGTERM), ("killed", signal.SIGKILL)):
        run = Run(tmp_path / name)
        training = {
            **{f"{what}_{how}": value for what in ("save", "eval") for how, value in (("strategy", "steps"), ("steps", 2))},
            **MODERN, "dataloader_num_workers": 0, "save_total_limit": 3,
        }  # fmt: skip
        recipe = recipe_of(table, run.path, model=DROPPING, training=training)
        words = ["train", write_recipe(tmp_path / f"{name}.yaml", recipe)]
        if stop:
            before = QUICK + at(send(stop), step=5)
            child = forks.start(tmp_path / f"{name}-1", *words, before=before)
            ended([child], [75 if stop == signal.SIGTERM else -stop], errors=0)
            words.append("--resume")
        worlds.finish([forks.start(tmp_path / f"{name}-2", *words, before=QUICK)])
        runs.append(run)
    for run in runs[1:]:
        check_same_end(run, runs[0])


class Words(HTMLParser):
    """The texts of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_data(self, data: str) -> None:
        self.found.append(data.strip())


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that learnt the shapes, from a .csv with a column per label."""
    folder = tmp_path_factory.mktemp("several")
    table = write_rows(folder / "shapes" / "shapes.csv", flag_rows(folder / "shapes", 200))
    return finetune(
        recipe_of(
            table,
            folder / "run",
            data={"label_column": list(SHAPES), "validation_fraction": 0.2, "test_fraction": 0.2},
            model={"config": {**TINY_VIT, "hidden_size": 32, "image_size": 24}},
            training={"num_train_epochs": 30, "per_device_train_batch_size": 16, "learning_rate": 5e-3},
            augmentation={"crop_scale": None},
        )
    )


@pytest.mark.slow
def test_shapes_are_learnt_and_published_as_a_stock_model(trained_run: Run) -> None:
    report = load_report(trained_run.report("test"))
    assert isinstance(report, MultiLabelReport)
    assert report.mean_average_precision > 0.9
    assert report.macro_f1 > 0.85
    assert report.labels == list(SHAPES)
    model = AutoModelForImageClassification.from_pretrained(trained_run.model)
    assert type(model).__name__ == "ViTForImageClassification"
    assert model.config.problem_type == "multi_label_classification"
    assert model.config.thresholds == [score.threshold for score in report.per_class.values()]
    validation = load_report(trained_run.report("validation"))
    assert isinstance(validation, MultiLabelReport)
    assert [score.threshold for score in validation.per_class.values()] == model.config.thresholds
    provenance = trained_run.read_provenance()
    assert provenance["best_metric"]["name"] == "mean_average_precision"
    assert "metric_for_best_model" not in provenance["recipe"]["training"]


@pytest.mark.slow
def test_the_pipeline_gives_the_probabilities_of_the_predictions(trained_run: Run) -> None:
    rows = pyarrow.parquet.read_table(trained_run.predictions("test")).to_pylist()
    photos = trained_run.path.parent / "shapes"
    classify = pipeline("image-classification", model=str(trained_run.model), device="cpu")
    report = load_report(trained_run.report("test"))
    names, thresholds = report.labels, classify.model.config.thresholds
    for row in rows:
        answer = {
            found["label"]: found["score"] for found in classify(Image.open(photos / row["id"]), top_k=None)
        }
        assert [answer[name] for name in names] == pytest.approx(row["probabilities"], abs=1e-6)
        above = [name for name, least in zip(names, thresholds) if answer[name] >= least]
        assert row["predicted"] == above
    exact = np.mean([row["label"] == row["predicted"] for row in rows])
    assert report.exact_match == pytest.approx(exact)  # type: ignore[union-attr]


@pytest.mark.slow
def test_evaluated_again_it_has_the_same_report(trained_run: Run) -> None:
    again = evaluate(trained_run.path)
    report = load_report(trained_run.report("test"))
    kept = {"worst_mistakes"}  # which have pictures in the run
    assert again.model_dump(exclude=kept) == report.model_dump(exclude=kept)
    table = trained_run.path.parent / "shapes" / "shapes.csv"
    other = evaluate(trained_run.path, str(table))
    assert (other.split, other.num_images) == ("all", 200)


@pytest.mark.slow
def test_the_papers_speak_of_labels(trained_run: Run) -> None:
    report = load_report(trained_run.report("test"))
    assert isinstance(report, MultiLabelReport)
    card = (trained_run.model / "README.md").read_text()
    page = " ".join(Words(trained_run.report_html.read_text()).found)
    for paper in (card, page):
        for word in ("accuracy", "Accuracy", "onfusion", "alibration", "Balanced"):
            assert word not in paper.replace("interval of the accuracy", ""), word
        for word in ("ean average precision", "Micro F1", "Exact match", "Hamming loss", "Threshold"):
            assert word in paper, word
        for score in report.per_class.values():
            assert f"{score.threshold:.3f}" in paper
    assert "says which of 3 labels an image has" in card
    assert "config.thresholds" in card
    assert "| Label | Images | Precision |" in card and "Per-label table" in page
    assert "- type: mean_average_precision\n" in card
    assert "Mean average precision on the validation split" in page  # the curve
    # The usage in the card, carried out.
    usage = card.partition("```python\n")[2].partition("```")[0]
    photo = trained_run.path.parent / "shapes" / "000.png"
    usage = usage.replace("path/to/this/folder", str(trained_run.model)).replace("photo.jpg", str(photo))
    said: list[list[dict[str, Any]]] = []
    exec(usage, {"print": said.append})
    row = pyarrow.parquet.read_table(trained_run.predictions("test")).to_pylist()[0]
    assert {found["label"] for found in said[0]} <= set(NAMES)
    assert row["id"].endswith(".png")


@pytest.mark.slow
def test_the_command_line_knows_thresholds(trained_run: Run, forks: ForkServer, tmp_path: Path) -> None:
    photos = sorted((trained_run.path.parent / "shapes").glob("*.png"))[:8]
    child = forks.start(tmp_path / "json", "predict", trained_run.path, *photos, "--json")
    assert child.wait() == 0, child.stderr
    answers = json.loads((tmp_path / "json" / "stdout").read_text())
    thresholds = dict(zip(SHAPES, json.loads((trained_run.model / "config.json").read_text())["thresholds"]))
    for answer in answers:
        found = {entry["label"]: entry for entry in answer["predictions"]}
        assert {name: entry["threshold"] for name, entry in found.items()} == thresholds
        assert answer["labels"] == [n for n in SHAPES if found[n]["probability"] >= thresholds[n]]
    assert len({tuple(answer["labels"]) for answer in answers}) > 1
    child = forks.start(tmp_path / "plain", "predict", trained_run.path, *photos)
    assert child.wait() == 0, child.stderr
    lines = (tmp_path / "plain" / "stdout").read_text().splitlines()
    for line, answer in zip(lines, answers, strict=True):
        assert line.startswith(f"{answer['path']}: {', '.join(answer['labels']) or 'no label'} (")
    child = forks.start(tmp_path / "evaluate", "evaluate", trained_run.path)
    assert child.wait() == 0, child.stderr
    assert "mean average precision" in child.stderr
    child = forks.start(tmp_path / "check", "check", trained_run.recipe, "training.output_dir=elsewhere")
    assert child.wait() == 0, child.stderr
    assert "images by class" in child.stderr


def test_mixing_is_refused_before_data_is_touched(forks: ForkServer, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", recipe_of(tmp_path / "nowhere.jsonl", tmp_path / "run"))
    child = forks.start(tmp_path / "s", "train", recipe, "augmentation.mixup_alpha=0.2")
    assert child.wait() == 2
    assert "leave out augmentation.mixup_alpha" in child.stderr


def test_a_folder_of_classes_is_refused(forks: ForkServer, tmp_path: Path) -> None:
    recipe = recipe_of(draw_folder(tmp_path / "photos"), tmp_path / "run")
    child = forks.start(tmp_path / "s", "train", write_recipe(tmp_path / "r.yaml", recipe))
    assert child.wait() == 1
    assert "metadata.jsonl with file_name and a list of labels" in child.stderr
    assert not (tmp_path / "run").exists()


def test_pretrained_heads_are_kept_where_the_labels_are_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, processor = load_model(ModelConfig(config=TINY_VIT), NAMES, multi_label=True)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, _ = load_model(ModelConfig(path=str(tmp_path / "saved")), NAMES, multi_label=True)
    assert same(weights_of(again), weights_of(model))
    other, _ = load_model(ModelConfig(path=str(tmp_path / "saved")), NAMES)
    assert other.config.problem_type == "single_label_classification"


@pytest.mark.slow
def test_runs_of_several_labels_are_compared_and_made_worse(trained_run: Run, tmp_path: Path) -> None:
    """An image is right where all its labels are; at other sizes and on worse images it is the average precision."""
    shutil.copytree(trained_run.path, tmp_path / "again")
    document = compare([trained_run.path, tmp_path / "again"], tmp_path / "comparison.html")
    (pair,) = document["pairs"]
    report = load_report(trained_run.report("test"))
    assert pair["both_right"] / pair["num_images"] == pytest.approx(report.exact_match)
    assert "Exact match" in (tmp_path / "comparison.html").read_text()
    found = evaluate_robustness(
        trained_run.path, image_sizes=[16], corruptions=True, output=tmp_path / "robustness.html"
    )
    own = next(row for row in found["image_sizes"] if row["trained"])
    assert own["score"] == found["corruptions"][0]["score"] == pytest.approx(report.mean_average_precision)
    assert own["interval"] is None and found["metric"] == "mean average precision"
