"""predict_onnx.py: photographs of every kind, other people's models, and processors that it does not know."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY_VIT, draw_image
from exported import check_against_predict, save
from PIL import Image
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from vit_finetune import exporting
from vit_finetune.exporting import export
from vit_finetune.run import RunError


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times each file a few times only."""
    monkeypatch.setattr("vit_finetune.evaluation.speed.SECONDS", 0.0)


def test_photographs_are_prepared_as_predict_does(tmp_path: Path) -> None:
    """Turned, transparent, grey, 16 bits, palette, of any shape; squashed or cropped, by both interpolations."""
    files = []
    for number, (mode, suffix) in enumerate(
        [("RGB", "jpg"), ("RGBA", "png"), ("L", "png"), ("P", "png"), ("CMYK", "jpg")]
    ):
        image = draw_image((200, 120 + 20 * number, 60), number, (61 + 13 * number, 97 - 7 * number))
        image.paste((10, 200, 30), (5, 5, 30, 20))
        exif = Image.Exif()
        exif[0x0112] = 6
        image.convert(mode).save(tmp_path / f"{mode}.{suffix}", exif=exif)
        files.append(tmp_path / f"{mode}.{suffix}")
    deep = np.random.default_rng(0).integers(0, 65536, (40, 50), np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    files.append(tmp_path / "deep.png")
    Image.fromarray(deep.astype(np.int32)).save(tmp_path / "deep.tif")  # another mode of Pillow's
    files.append(tmp_path / "deep.tif")
    for number, settings in enumerate(
        [
            {"resize": "squash"},
            {"resize": "crop", "config": TINY_VIT | {"image_size": [16, 24]}, "crop_fraction": 0.9},
        ]
    ):
        for resample in (2, 3):
            model = save(tmp_path / f"model-{number}-{resample}", **settings)
            written = json.loads((model / "preprocessor_config.json").read_text()) | {"resample": resample}
            (model / "preprocessor_config.json").write_text(json.dumps(written))
            folder = tmp_path / f"onnx-{number}-{resample}"
            assert export(model, output=folder)["script"]["pixel_levels"] <= 1.01
            check_against_predict(model, folder, files, tolerance=1e-3)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_model_that_others_trained(classes: int, tmp_path: Path) -> None:
    """Its config has no `problem_type`, and of two classes without names no `id2label`."""
    model = ViTForImageClassification(ViTConfig(**TINY_VIT, num_labels=classes))
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "problem_type" not in config and ("id2label" in config) == (classes > 2)
    export(tmp_path / "model", output=tmp_path / "onnx")
    draw_image((200, 10, 10), 0, (16, 16)).save(tmp_path / "a.png")
    check_against_predict(tmp_path / "model", tmp_path / "onnx", [tmp_path / "a.png"])


def test_pixels_are_compared_on_the_scale_of_their_channel(tmp_path: Path) -> None:
    """One level of 255 is five times as much where the deviation is a fifth."""
    model = save(tmp_path / "model")
    written = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps(written | {"image_std": [0.1, 0.5, 0.5]}))
    assert export(model, output=tmp_path / "onnx")["script"]["pixel_levels"] == 1.0


def test_an_image_processor_that_the_script_does_not_know(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    written = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps(written | {"do_normalize": False}))
    with pytest.raises(RunError, match=r"predict_onnx\.py cannot prepare images as"):
        export(model, output=tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_script_that_computes_otherwise_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = runpy.run_path

    def run_another(path: str) -> dict[str, Any]:
        script = right(path)
        return script | {"classify": lambda *given: script["classify"](*given)[:, ::-1]}

    model = save(tmp_path / "model")
    monkeypatch.setattr(exporting.runpy, "run_path", run_another)
    with pytest.raises(RunError, match=r"on predict_onnx\.py's images a probability of the file is off by"):
        export(model, output=tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
