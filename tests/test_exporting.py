"""ONNX files: against torch and against the reports of runs, alone with onnxruntime, written whole or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow.parquet
import pytest
import torch
from conftest import TINY_VIT, Say, draw_folder, tiny_recipe
from exported import check_against_predict, images_of, run_alone, run_onnx, save
from labelled_shapes import NAMES, flag_rows, recipe_of, write_rows
from transformers import (
    AutoModelForImageClassification,
)

from vit_finetune import exporting
from vit_finetune.data.transforms import EvaluationImages, normalize
from vit_finetune.evaluation.images import own_split
from vit_finetune.evaluation.prediction import predict
from vit_finetune.exporting import export
from vit_finetune.finetuning import finetune
from vit_finetune.model.loading import load_checkpoint
from vit_finetune.publishing import export as writing
from vit_finetune.publishing.export import write_int8, write_onnx
from vit_finetune.recipe import load_recipe
from vit_finetune.reports import load_report
from vit_finetune.run import Report, Run, RunError

FILES = {"model.onnx", "config.json", "preprocessor_config.json", "predict_onnx.py", "export.json"}


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times each file a few times only."""
    monkeypatch.setattr("vit_finetune.evaluation.speed.SECONDS", 0.0)


# --------------------------------------------------------------------------- the same model


def test_the_file_answers_as_the_run_was_scored(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    facts = export(run.path)
    folder = run.path / "onnx"
    assert {path.name for path in folder.iterdir()} == FILES
    assert json.loads((folder / "export.json").read_text()) == facts
    # The report's numbers, and its probabilities, by way of a plain transformers model and of onnxruntime.
    report = Report.load(run.report("test"))
    assert facts["num_images"] == report.num_images
    for name in ("torch", "model.onnx"):
        assert facts["models"][name]["accuracy"] == report.accuracy
        assert tuple(facts["models"][name]["accuracy_interval"]) == report.accuracy_interval
    assert facts["models"]["model.onnx"]["largest_difference"] < 1e-5
    assert facts["models"]["model.onnx"]["changed_predictions"] == 0
    assert facts["models"]["model.onnx"]["bytes"] == (folder / "model.onnx").stat().st_size
    assert facts["compared_on"] == "the run's test split"
    plain = AutoModelForImageClassification.from_pretrained(run.model).eval()
    for batch in (1, 3, 7):
        pixels = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            expected = plain(pixels).logits.numpy()
        np.testing.assert_allclose(run_onnx(folder / "model.onnx", pixels.numpy()), expected, atol=1e-5)
    assert capsys.readouterr().out == ""  # torch's own progress is printed there
    check_against_predict(
        run.path, folder, sorted((run.path.parent).glob("**/mistake-*.jpg"))[:3] or images_of(run)
    )


@pytest.mark.slow
def test_digits_whole_test_split(tmp_path: Path) -> None:
    """1e-4 of every probability that the run was scored with, on all 359 images; int8 within 1 point."""
    training = [
        f"training.output_dir={tmp_path / 'run'}",
        "training.use_cpu=true",
    ]
    run = finetune(load_recipe("digits", training))
    facts = export(run.path, quantize="int8")
    table = pyarrow.parquet.read_table(run.predictions("test"))
    scored = np.stack(table["probabilities"].to_numpy())
    assert len(scored) == facts["num_images"] == 359
    split = own_split(run, "test")
    assert table["id"].to_pylist() == split["id"]
    _, processor = load_checkpoint(str(run.model))
    items = EvaluationImages(split, processor)
    pixels = normalize(torch.stack([item["pixel_values"] for item in items]), processor).numpy()
    answers = {}
    for name in ("model.onnx", "model_int8.onnx"):
        logits = torch.from_numpy(run_onnx(run.path / "onnx" / name, pixels))
        answers[name] = logits.softmax(-1).numpy()
    assert np.abs(answers["model.onnx"] - scored).max() < 1e-4
    labels = np.asarray(items.labels)
    right = {name: (values.argmax(1) == labels).mean() for name, values in answers.items()}
    report = Report.load(run.report("test"))
    assert report.accuracy > 0.9
    assert right["model.onnx"] == pytest.approx(report.accuracy)
    assert abs(right["model_int8.onnx"] - report.accuracy) <= 0.01
    assert facts["models"]["model_int8.onnx"]["accuracy"] == pytest.approx(right["model_int8.onnx"])
    assert facts["script"]["largest_difference"] < 1e-4


ARCHITECTURES: list[dict[str, Any]] = [
    {"model_type": name, **TINY_VIT, "num_hidden_layers": 2}
    for name in ("vit", "deit", "beit", "data2vec-vision", "vit_msn", "ijepa")
] + [
    {"model_type": name, **{key: value for key, value in TINY_VIT.items() if key != "intermediate_size"}}
    for name in ("dinov2", "dinov2_with_registers")
] + [
    {"model_type": "swin", "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
    {"model_type": "swinv2", "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
    {"model_type": "resnet", "image_size": 32, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    {"model_type": "resnet", "image_size": 32, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    {"model_type": "regnet", "image_size": 32, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4},
    {"model_type": "bit", "image_size": 32, "embedding_size": 32, "hidden_sizes": [128, 128], "depths": [1, 1]},
    {"model_type": "convnext", "image_size": 32, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    {"model_type": "convnextv2", "image_size": 32, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    {"model_type": "focalnet", "image_size": 32, "embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]},
    {"model_type": "pvt_v2", "image_size": 32, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]},
    {"model_type": "hiera", "image_size": [224, 224], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "num_query_pool": 1},
    {"model_type": "mobilenet_v2", "image_size": 32},
    {"model_type": "efficientnet", "image_size": 32},
    {"model_type": "levit", "image_size": 64},
    {"model_type": "poolformer", "image_size": 32, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: str(config["model_type"]))
def test_architectures(config: dict[str, Any], tmp_path: Path) -> None:
    """Each answers as in torch, one image or three; what cannot be written is refused by name."""
    folder = save(tmp_path / "model", config=config)
    try:
        facts = export(folder, output=tmp_path / "onnx")
    except RunError as error:
        assert str(error).startswith(f"{config['model_type']} models cannot be exported")
        assert not (tmp_path / "onnx").exists()
        pytest.fail(str(error))
    assert facts["models"]["model.onnx"]["largest_difference"] < 1e-4
    plain = AutoModelForImageClassification.from_pretrained(folder).eval()
    for batch in (1, 3):
        pixels = torch.randn(batch, 3, *facts["image_size"])
        with torch.no_grad():
            expected = plain(pixels).logits.softmax(-1)
        found = torch.from_numpy(run_onnx(tmp_path / "onnx" / "model.onnx", pixels.numpy())).softmax(-1)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_several_labels(tmp_path: Path) -> None:
    table = write_rows(tmp_path / "shapes" / "shapes.csv", flag_rows(tmp_path / "shapes", 60))
    run = finetune(
        recipe_of(
            table,
            tmp_path / "run",
            data={"label_column": NAMES, "validation_fraction": 0.2, "test_fraction": 0.2},
            model={"config": {**TINY_VIT, "image_size": 24}},
            augmentation={"crop_scale": None},
        )
    )
    facts = export(run.path)
    report = load_report(run.report("test"))
    for name in ("torch", "model.onnx"):
        assert facts["models"][name]["exact_match"] == report.exact_match
        assert facts["models"][name]["exact_match_interval"] == list(report.exact_match_interval)
        assert "accuracy" not in facts["models"][name]
    images = sorted((tmp_path / "shapes").glob("*.png"))[:8]
    assert {len(answer["labels"]) for answer in predict(run.path, images)} != {0}
    check_against_predict(run.path, run.path / "onnx", images)


@pytest.mark.slow
def test_an_adapter_is_merged(folder: Path, tmp_path: Path) -> None:
    base = save(tmp_path / "base", ["x", "y"])
    model = {"path": str(base), "method": "lora", "lora_merge": False, "config": None}
    run = finetune(tiny_recipe(folder, tmp_path / "run", model=model))
    assert (run.model / "adapter_model.safetensors").is_file()
    facts = export(run.path)
    scored = np.stack(pyarrow.parquet.read_table(run.predictions("test"))["probabilities"].to_numpy())
    split, (_, processor) = own_split(run, "test"), load_checkpoint(str(run.model))
    items = EvaluationImages(split, processor)
    pixels = normalize(torch.stack([item["pixel_values"] for item in items]), processor).numpy()
    logits = torch.from_numpy(run_onnx(run.path / "onnx" / "model.onnx", pixels))
    assert np.abs(logits.softmax(-1).numpy() - scored).max() < 1e-5
    assert facts["models"]["model.onnx"]["accuracy"] == Report.load(run.report("test")).accuracy


@pytest.mark.slow
@pytest.mark.hub
def test_a_model_of_the_hub(run: Run, say: Say, tmp_path: Path) -> None:
    assert say("push", run.path, "--repo", "ann/colours", "--verify", "files")[0] == 0
    code, out, told = say("export", "ann/colours", "--output", tmp_path / "onnx", "--json")
    assert code == 0, told
    assert json.loads(out) == json.loads((tmp_path / "onnx" / "export.json").read_text())
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == FILES
    check_against_predict(run.model, tmp_path / "onnx", images_of(run))


# --------------------------------------------------------------------------- int8


def test_int8_is_calibrated_on_validation_images(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []

    def spy(source: Path, path: Path, batches: Any) -> None:
        seen.extend(batches)
        write_int8(source, path, seen)

    monkeypatch.setattr(exporting, "write_int8", spy)
    facts = export(run.path, quantize="int8")
    _, processor = load_checkpoint(str(run.model))
    items = EvaluationImages(own_split(run, "validation"), processor)
    expected = normalize(torch.stack([item["pixel_values"] for item in items]), processor)
    np.testing.assert_array_equal(np.concatenate(seen), expected.numpy())
    assert facts["int8"]["calibration_images"] == len(items)
    assert {path.name for path in (run.path / "onnx").iterdir()} == FILES | {"model_int8.onnx"}
    # Products are of 8-bit weights; what is left in float are softmax, layer norm and the like.
    graph = onnx.load(run.path / "onnx" / "model_int8.onnx").graph
    weights = [
        one for one in graph.initializer if one.data_type == onnx.TensorProto.INT8 and len(one.dims) > 1
    ]
    assert len(weights) >= 2 * 6 + 1  # six matrices a layer, and the head
    produced = {name: node.op_type for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type in ("Softmax", "LayerNormalization"):
            assert produced.get(node.input[0]) != "DequantizeLinear"
    answers = run_alone(run.path / "onnx", *images_of(run), model="model_int8.onnx")
    assert sum(row["probability"] for row in answers[0]["predictions"]) == pytest.approx(1)


def test_int8_needs_images_to_calibrate_on(folder: Path, tmp_path: Path) -> None:
    model = save(tmp_path / "model", ["blue", "green", "red"])
    with pytest.raises(RunError, match="needs validation images"):
        export(model, quantize="int8", output=tmp_path / "onnx")
    with pytest.raises(RunError, match="there are no splits"):
        export(model, data=str(folder), quantize="int8", output=tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
    for split in ("train", "validation", "test"):
        shutil.copytree(folder, tmp_path / "split" / split)
    facts = export(model, data=str(tmp_path / "split"), quantize="int8", output=tmp_path / "onnx")
    assert facts["compared_on"] == "the test images of --data" and facts["num_images"] == 36
    assert "accuracy" in facts["models"]["model_int8.onnx"]


def test_int8_of_what_one_file_does_not_hold(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 1.5 GB torch writes the weights beside, where onnxruntime's quantiser does not find them."""

    def write_beside(model: Any, size: tuple[int, int], path: Path) -> None:
        write_onnx(model, size, path)
        onnx.save(onnx.load(path), path, save_as_external_data=True, location=f"{path.name}.data")

    monkeypatch.setattr(exporting, "write_onnx", write_beside)
    with pytest.raises(RunError, match="too large for --quantize"):
        export(run.path, quantize="int8")
    export(run.path)
    assert {path.name for path in (run.path / "onnx").iterdir()} == FILES | {"model.onnx.data"}


def test_int8_that_costs_much_is_told(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def noise(source: Path, path: Path, batches: Any) -> None:
        spoilt = onnx.load(source)
        head = next(one for one in spoilt.graph.initializer if "classifier.bias" in one.name)
        head.CopyFrom(onnx.numpy_helper.from_array(np.float32([50, 0, 0]), head.name))
        onnx.save(spoilt, path)

    monkeypatch.setattr(exporting, "write_int8", noise)
    facts = export(run.path, quantize="int8")
    assert facts["models"]["model_int8.onnx"]["changed_predictions"] > 0
    assert "int8 costs" in capsys.readouterr().err


# --------------------------------------------------------------------------- images


def test_random_pixels_claim_no_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = export(save(tmp_path / "model"))
    assert (Path.cwd() / "model-onnx" / "model.onnx").is_file()
    assert facts["compared_on"] == "random pixels"
    assert not any("accuracy" in name for scores in facts["models"].values() for name in scores)
    assert facts["models"]["model.onnx"]["largest_difference"] < 1e-5
    told = capsys.readouterr().err
    assert "random pixels" in told and "nothing is said about accuracy" in told


def test_other_images_are_checked(run: Run, tmp_path: Path) -> None:
    other = draw_folder(tmp_path / "other", classes=4, per_class=2)
    with pytest.raises(RunError, match="does not know 'yellow'"):
        export(run.path, data=str(other))
    shutil.rmtree(other / "yellow")
    facts = export(run.path, data=str(other))
    assert facts["compared_on"] == "all images of --data" and facts["num_images"] == 6


# --------------------------------------------------------------------------- refused


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"onnx, onnxscript, onnxruntime.*pip install 'vit-finetune\[onnx\]'"):
        export(tmp_path / "nothing")


def test_a_folder_that_is_there_is_kept(run: Run) -> None:
    (run.path / "onnx").mkdir()
    (run.path / "onnx" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="is there already"):
        export(run.path)
    assert [path.name for path in (run.path / "onnx").iterdir()] == ["mine.txt"]


def test_a_folder_by_another_name_is_filled(run: Run, tmp_path: Path) -> None:
    """A folder cannot be renamed to what is a link, or where somebody is: the files must not vanish."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    export(run.path, output=tmp_path / "link")
    assert {path.name for path in (tmp_path / "real").iterdir()} == FILES and (tmp_path / "link").is_symlink()
    with pytest.raises(RunError, match=r"you are in it\. Write to a new folder, such as --output onnx"):
        export(run.path, output=".")


def test_a_file_that_answers_otherwise_is_not_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_another(model: Any, size: tuple[int, int], path: Path) -> None:
        with torch.no_grad():
            model.classifier.bias[0] += 0.01
            write_onnx(model, size, path)
            model.classifier.bias[0] -= 0.01

    monkeypatch.setattr(exporting, "write_onnx", write_another)
    with pytest.raises(RunError, match="vit models cannot be exported: on 1 of random pixels a probability"):
        export(run.path)
    monkeypatch.setattr(exporting, "_check_batches", lambda *_: None)
    with pytest.raises(RunError, match=r"on 9 images a probability .* is off by"):
        export(run.path)
    assert not [path for path in run.path.iterdir() if "onnx" in path.name]


def test_a_file_for_one_image_at_a_time_is_not_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "answer", lambda *given: writing.answer(*given)[:1])
    with pytest.raises(RunError, match="of 3 images the ONNX file makes 1 answers"):
        export(run.path)
    assert not (run.path / "onnx").exists()


def test_what_torch_cannot_translate_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Branching(torch.nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return values * 2 if values.sum() > 0 else values  # depends on the data: no graph has it

    model, processor = load_checkpoint(str(run.model))
    model.classifier = torch.nn.Sequential(model.classifier, Branching())
    monkeypatch.setattr(exporting, "load_checkpoint", lambda path: (model, processor))
    with pytest.raises(
        RunError, match=r"vit models cannot be exported with torch \d.*: .+\. Nothing was written"
    ):
        export(run.path)
    assert not (run.path / "onnx").exists()


@pytest.mark.slow
def test_a_disk_that_is_full(
    run: Run, say_offline: Callable[..., tuple[int, str]], small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("size=64k")
    code, told = say_offline("export", run.path, "--output", disk / "onnx")
    assert code == 1 and "the disk is full" in told and "Traceback" not in told
    assert list(disk.iterdir()) == []
    code, told = say_offline("export", run.path, "--output", disk)
    assert code == 1 and "a disk is mounted there" in told


@pytest.fixture
def say_offline() -> Callable[..., tuple[int, str]]:
    """Says something on the command line; answers exit code and stderr."""

    def run(*words: object) -> tuple[int, str]:
        command = [sys.executable, "-m", "vit_finetune", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    return run


def test_wrong_words(say_offline: Callable[..., tuple[int, str]]) -> None:
    code, told = say_offline("export", "somewhere", "--quantize", "int4")
    assert code == 2 and "int8" in told
