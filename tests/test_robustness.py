"""`evaluate --image-size` and `--corruptions`: scores equal to what is scored in the plain way."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_image
from PIL import Image
from scipy import ndimage
from test_report import Page
from typer.testing import CliRunner

from vit_finetune.cli import app
from vit_finetune.data.transforms import EvaluationImages, normalize
from vit_finetune.evaluation.corruptions import CORRUPTIONS, STRENGTHS, CorruptedImages, corrupt
from vit_finetune.evaluation.scoring import evaluate
from vit_finetune.evaluation.target import open_target
from vit_finetune.model.loading import load_checkpoint, load_model
from vit_finetune.recipe import ModelConfig
from vit_finetune.robustness import evaluate_robustness
from vit_finetune.run import Run, RunError


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


GREY = torch.full((3, 96, 64), 128, dtype=torch.uint8)
PHOTO = pixels(draw_image((90, 140, 60), 3, (64, 96)))


def test_noise_has_the_deviation_that_it_should() -> None:
    for strength, share in zip(STRENGTHS, (0.08, 0.12, 0.18)):
        noise = corrupt(GREY, "noise", strength, 0).float() - 128
        assert noise.std().item() / 255 == pytest.approx(share, rel=0.02) and abs(noise.mean()) < 2
    assert torch.equal(corrupt(GREY, "noise", 1, 5), corrupt(GREY, "noise", 1, 5))
    assert not torch.equal(corrupt(GREY, "noise", 1, 5), corrupt(GREY, "noise", 1, 6))


def test_blur_is_the_gaussian_in_proportion_to_the_image() -> None:
    """Against scipy's, on a smooth image: Pillow's is made of box filters, which are near it."""
    smooth = ndimage.gaussian_filter(PHOTO.numpy().astype(float), (0, 3, 3))
    image = torch.from_numpy(smooth.round().astype(np.uint8)).repeat(1, 4, 4)  # (3, 384, 256)
    blurred = corrupt(image, "blur", 4, 0).float().numpy()
    expected = ndimage.gaussian_filter(
        image.numpy().astype(float), (0, 4 * 256 / 224, 4 * 256 / 224), mode="nearest"
    )
    assert np.abs(blurred - expected).mean() < 0.5
    assert np.abs(blurred - image.numpy()).mean() > 1.2 * np.abs(blurred - expected).mean()


def test_brightness_adds_to_the_value_and_keeps_the_hue() -> None:
    lighter = corrupt(GREY, "brightness", 2, 0)
    assert lighter.unique().tolist() == [128 + 51]
    colour = torch.tensor([100, 50, 25], dtype=torch.uint8).reshape(3, 1, 1).expand(3, 8, 8)
    red, green, blue = corrupt(colour, "brightness", 1, 0)[:, 0, 0].tolist()
    assert (
        red == 126
        and green / red == pytest.approx(0.5, abs=0.02)
        and blue / red == pytest.approx(0.25, abs=0.02)
    )


def test_jpeg_is_pillows() -> None:
    buffer = io.BytesIO()
    Image.fromarray(PHOTO.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=10)
    assert torch.equal(corrupt(PHOTO, "jpeg", 4, 0), pixels(Image.open(buffer)))


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (80, 80)])
def test_a_turned_image_has_no_empty_corners(size: tuple[int, int]) -> None:
    white = torch.full((3, *size), 255, dtype=torch.uint8)
    for strength in STRENGTHS:
        for seed in (0, 1):
            turned = corrupt(white, "rotation", strength, seed)
            assert turned.shape == white.shape and turned.min() > 240, (strength, seed)
    # To either side, by the seed; and no more is cut off than must be: the middle stays where it is.
    left, right = (corrupt(PHOTO, "rotation", 5, seed).float() for seed in (0, 1))
    assert not torch.equal(left, right)


def test_all_kinds_change_more_the_stronger_they_are() -> None:
    for kind in CORRUPTIONS:
        changes = [(corrupt(PHOTO, kind, strength, 1).float() - PHOTO).abs().mean() for strength in STRENGTHS]
        assert min(changes) > 0 and changes[-1] > changes[0], kind
        assert corrupt(PHOTO, kind, 3, 1).dtype == torch.uint8


def test_what_is_drawn_depends_on_the_id_alone(trained: Run) -> None:
    opened = open_target(trained.path, None, "test")
    rows = len(opened.images)
    order = list(range(rows))[::-1]
    straight = CorruptedImages(opened.images, opened.image_processor, "noise", 3)
    turned = CorruptedImages(opened.images.select(order), opened.image_processor, "noise", 3)
    for row in range(rows):
        assert torch.equal(straight[row]["pixel_values"], turned[rows - 1 - row]["pixel_values"])


def accuracy_of(model: torch.nn.Module, images, processor) -> float:
    """A plain loop, one image at a time."""
    right = 0
    with torch.no_grad():
        for row in range(len(images)):
            item = images[row]
            logits = model(pixel_values=normalize(item["pixel_values"][None], processor)).logits
            right += int(logits.argmax() == item["labels"])
    return right / len(images)


def test_scores_are_those_of_a_plain_loop(trained: Run, tmp_path: Path) -> None:
    document = evaluate_robustness(
        trained.path, image_sizes=[32], corruptions=True, output=tmp_path / "page.html"
    )
    plain = evaluate(trained.path)
    small, large = document["image_sizes"]
    assert (small["image_size"], small["trained"], large["image_size"], large["trained"]) == (
        [16, 16],
        True,
        [32, 32],
        False,
    )
    assert small["score"] == plain.accuracy and small["interval"] == plain.accuracy_interval
    assert large["flops"] > 3.5 * small["flops"] and large["images_per_second"] > 0
    # The larger one: the same checkpoint loaded at 32 pixels, as training at that size would begin.
    opened = open_target(trained.path, None, "test")
    names = [opened.model.config.id2label[number] for number in range(opened.model.config.num_labels)]
    model, processor = load_model(ModelConfig(path=str(trained.model), image_size=32), names)
    model.eval()
    assert large["score"] == pytest.approx(
        accuracy_of(model, EvaluationImages(opened.images, processor), processor)
    )
    first, *worse = document["corruptions"]
    assert first == {
        "kind": "none",
        "strength": 0,
        "metric": "accuracy",
        "score": plain.accuracy,
        "interval": plain.accuracy_interval,
    }
    assert [(row["kind"], row["strength"]) for row in worse] == [
        (kind, s) for kind in CORRUPTIONS for s in STRENGTHS
    ]
    model, processor = load_checkpoint(str(trained.model))
    for kind, strength in (("noise", 5), ("brightness", 4)):
        (row,) = [row for row in worse if (row["kind"], row["strength"]) == (kind, strength)]
        images = CorruptedImages(opened.images, processor, kind, strength)
        assert row["score"] == pytest.approx(accuracy_of(model, images, processor))
    text = (tmp_path / "page.html").read_text()
    assert f"Robustness of {trained.path.name}<" in text and str(trained.path.parent) not in text
    page = Page(text)
    assert any(row[0] == "32 × 32 pixels" for row in page.rows) and any(
        row[0] == "rotation" for row in page.rows
    )
    assert page.tags.count("svg") == 3 and page.tags.count("img") == 1 and "script" not in page.tags


def test_the_command(trained: Run, tmp_path: Path) -> None:
    page = str(tmp_path / "page.html")
    result = CliRunner().invoke(
        app, ["evaluate", str(trained.path), "--image-size", "24", "--json", "--output", page]
    )
    assert result.exit_code == 0, result.stderr
    assert [row["image_size"] for row in json.loads(result.stdout)["image_sizes"]] == [[16, 16], [24, 24]]
    assert "16×16 (trained)" in result.stderr and Path(page).is_file()
    Path(page).unlink()

    def refused(code: int, message: str, *words: str) -> None:
        result = CliRunner().invoke(app, ["evaluate", str(trained.path), "--output", page, *words])
        assert result.exit_code == code and message in result.stderr, result.stderr
        assert not Path(page).exists()

    refused(
        1, "a height of 30 pixels is not a multiple of the patch size 4; write 28 or 32", "--image-size", "30"
    )
    refused(2, "--calibrated goes with neither", "--calibrated", "--corruptions")
    refused(1, "there is no split 'dev'", "--split", "dev", "--corruptions")
    with pytest.raises(RunError, match="is a folder; expected the name of a page"):
        evaluate_robustness(trained.path, corruptions=True, output=tmp_path)


def test_a_model_on_other_images_and_one_that_cannot_change_its_size(trained: Run, tmp_path: Path) -> None:
    shutil.copytree(trained.path.parent / "photos", tmp_path / "<b>photos")
    document = evaluate_robustness(
        trained.model, str(tmp_path / "<b>photos"), image_sizes=[8], output=tmp_path / "page.html"
    )
    assert document["split"] == "all" and document["num_images"] == 36
    assert "<b>photos" not in (tmp_path / "page.html").read_text()
    swin = {
        "model_type": "swin",
        "embed_dim": 12,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 4,
        "patch_size": 2,
    }
    model, processor = load_model(ModelConfig(config=swin, image_size=16), ["blue", "green", "red"])
    model.save_pretrained(tmp_path / "swin")
    processor.save_pretrained(tmp_path / "swin")
    photos = str(trained.path.parent / "photos")
    try:
        found = evaluate_robustness(
            tmp_path / "swin", photos, image_sizes=[32], output=tmp_path / "swin.html"
        )
    except RunError as error:
        assert "cannot change their image size" in str(error)
    else:
        assert len(found["image_sizes"]) == 2
