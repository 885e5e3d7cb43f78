"""What tests of exported files share: models large enough to tell apart, and the script where nothing else is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import TINY_VIT

from vit_finetune.evaluation.prediction import predict
from vit_finetune.model.loading import load_model
from vit_finetune.publishing.export import INPUT, OUTPUT
from vit_finetune.recipe import ModelConfig, load_recipe
from vit_finetune.run import Run

LABELS = ["ant", "bee", "cat"]
ALONE = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "transformers", "vit_finetune", "simplejpeg", "scipy"):
            raise ImportError(f"{name} is not on this machine")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script where neither this package nor those that it is made of can be imported."""


def run_onnx(path: Path, pixel_values: np.ndarray) -> np.ndarray:
    """Logits, by onnxruntime and nothing of ours."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run([OUTPUT], {INPUT: pixel_values})[0]


def save(folder: Path, labels: list[str] = LABELS, **config: Any) -> Path:
    """A model folder with random weights, large enough that answers differ."""
    torch.manual_seed(0)
    model, processor = load_model(ModelConfig(**({"config": TINY_VIT} | config)), labels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run_alone(folder: Path, *images: Path, model: str = "model.onnx") -> list[dict[str, Any]]:
    """What the script of a folder says, with onnxruntime, Pillow and numpy alone."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            ALONE,
            str(folder / "predict_onnx.py"),
            str(folder / model),
            *map(str, images),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_against_predict(model: Path, folder: Path, images: list[Path], tolerance: float = 1e-4) -> None:
    """The script's answers are those of `vit-finetune predict`."""
    expected, found = predict(model, images), run_alone(folder, *images)
    assert [answer["path"] for answer in found] == [answer["path"] for answer in expected]
    for ours, theirs in zip(found, expected):
        values = {row["label"]: row["probability"] for row in theirs["predictions"]}
        assert {row["label"] for row in ours["predictions"]} == values.keys()
        for row in ours["predictions"]:
            assert row["probability"] == pytest.approx(values[row["label"]], abs=tolerance)
        assert ours.get("labels") == theirs.get("labels")


def images_of(run: Run, count: int = 4) -> list[Path]:
    """Image files of a run's data."""
    root = Path(load_recipe(run.recipe).data.path)
    return sorted(root.glob("*/*.png"))[:: max(1, 36 // count)]
