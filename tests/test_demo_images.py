"""What the page makes of an upload: the same pixels and probabilities as `predict`, or a reason why not."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from conftest import TINY_VIT
from PIL import Image

from vit_finetune import demo
from vit_finetune.evaluation.prediction import predict
from vit_finetune.model.loading import MULTI_LABEL, load_checkpoint, load_model
from vit_finetune.recipe import ModelConfig
from vit_finetune.run import Run


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of uploads."""
    folder = tmp_path / "uploads"
    folder.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    return folder


def upload_of(path: Path) -> dict[str, Any]:
    """What gradio's client says of an upload."""
    return {"path": str(path), "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}


def scene(mode: str = "RGB") -> Image.Image:
    """37 × 23 pixels that differ from corner to corner, so that a turned image is another one."""
    x, y = np.meshgrid(np.linspace(0, 255, 37), np.linspace(0, 255, 23))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8)).convert(mode)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


FORMATS: dict[str, Any] = {
    "plain.jpg": lambda path: scene().save(path, quality=95),
    "turned.jpg": lambda path: scene().save(path, exif=turned()),
    "grey.jpg": lambda path: scene("L").save(path),
    "cmyk.jpg": lambda path: scene("CMYK").save(path),
    "alpha.png": lambda path: scene("RGBA").save(path),
    "turned.png": lambda path: scene().save(path, exif=turned()),
    "palette.gif": lambda path: scene("P").save(path, transparency=3),
    "deep.png": lambda path: Image.fromarray(np.arange(37 * 23, dtype=np.uint16).reshape(23, 37) * 70).save(path),
    "page.tiff": lambda path: scene().save(path),
    "small.webp": lambda path: scene().save(path, lossless=True),
    "plain.bmp": lambda path: scene().save(path),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_the_page_says_what_predict_says(name: str, trained: Run, uploads: Path) -> None:
    path = uploads / name
    FORMATS[name](path)
    model, processor = load_checkpoint(str(trained.model))
    pixel_values = processor(demo.read_upload(upload_of(path)), return_tensors="pt")["pixel_values"]
    shown = demo.bars(demo.classify(pixel_values, model), model)
    (expected,) = predict(trained.path, [path], top=3)
    assert list(shown) == [found["label"] for found in expected["predictions"]]
    for found in expected["predictions"]:
        assert shown[found["label"]] == pytest.approx(found["probability"], abs=1e-6)


def test_several_labels_are_shown_with_their_thresholds(tmp_path: Path, uploads: Path) -> None:
    torch.manual_seed(0)
    names = ["red", "round", "large", "shiny", "old", "new", "flat"]
    model, processor = load_model(ModelConfig(config=TINY_VIT), names, multi_label=True)
    assert model.config.problem_type == MULTI_LABEL
    model.config.thresholds = [0.0, 1.0, 0.25, 0.5, 0.5, 0.5, 0.5]
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    scene().save(uploads / "scene.png")
    (expected,) = predict(tmp_path / "model", [uploads / "scene.png"], top=5)
    image = demo.read_upload(upload_of(uploads / "scene.png"))
    probabilities = demo.classify(processor(image, return_tensors="pt")["pixel_values"], model.eval())
    assert demo.reached(probabilities, model) == expected["labels"]
    assert "red" in expected["labels"] and "round" not in expected["labels"]
    assert demo.bars(probabilities, model) == {
        f"{found['label']} (threshold {found['threshold']:.2f})": pytest.approx(
            found["probability"], abs=1e-6
        )
        for found in expected["predictions"]
    }
    del model.config.thresholds
    assert demo.thresholds_of(model) == [0.5] * 7


# --------------------------------------------------------------------------- what is refused


def bomb(side: int, said: int | None = None) -> bytes:
    """A PNG of side × side black pixels, in a few kilobytes; its header may say that it has more."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    packer = zlib.compressobj(9)
    lines = b"".join(packer.compress(bytes(1 + (side + 7) // 8)) for _ in range(side)) + packer.flush()
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", said or side, said or side, 1, 0, 0, 0, 0)),
        (b"IDAT", lines),
        (b"IEND", b""),
    ):
        parts.append(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    return b"".join(parts)


def refusal(path: Path) -> str:
    """What the page says of a file."""
    with pytest.raises(gr.Error) as refused:
        demo.read_upload(upload_of(path))
    assert not refused.value.print_exception  # on the server's console there is nothing to be seen of it
    return str(refused.value.message)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as in the product
def test_more_pixels_than_memory_should_hold_are_refused_unread(
    uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.EncodedImage, "decode", lambda self: pytest.fail("was decoded"))
    (uploads / "bomb.png").write_bytes(bomb(12_000))  # 144 megapixels in 25 kB: Pillow would only warn
    assert (uploads / "bomb.png").stat().st_size < 100_000
    assert refusal(uploads / "bomb.png") == (
        "bomb.png has 12,000 × 12,000 pixels; this page takes up to 100,000,000 in all"
    )
    (uploads / "huge.png").write_bytes(bomb(8, said=30_000))
    assert "huge.png cannot be read: decompression bomb" in refusal(uploads / "huge.png")


def test_no_images_are_refused_by_name(uploads: Path) -> None:
    (uploads / "notes.png").write_text("no image at all")
    assert refusal(uploads / "notes.png") == "notes.png cannot be read: not an image"
    (uploads / "empty.png").touch()
    assert refusal(uploads / "empty.png") == "empty.png cannot be read: 0 bytes"
    buffer = io.BytesIO()
    scene().resize((500, 500)).save(buffer, "JPEG")
    (uploads / "half.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    assert refusal(uploads / "half.jpg") == "half.jpg cannot be read: truncated JPEG"
    (uploads / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>')
    assert refusal(uploads / "drawing.svg") == "drawing.svg cannot be read: not an image"


def test_a_name_that_is_markup_becomes_text(uploads: Path) -> None:
    path = uploads / "<img src=x onerror=alert(1)>.png"
    path.write_text("no image")
    assert refusal(path) == "&lt;img src=x onerror=alert(1)&gt;.png cannot be read: not an image"


def test_large_files_are_refused_unread(uploads: Path) -> None:
    with (uploads / "large.png").open("wb") as file:
        file.truncate(demo.LARGEST_FILE + 1)
    assert refusal(uploads / "large.png") == "large.png is larger than 20 MB"


def test_only_what_was_uploaded_is_read(uploads: Path, tmp_path: Path) -> None:
    scene().save(tmp_path / "own.png")
    (uploads / "link.png").symlink_to(tmp_path / "own.png")
    scene().save(tmp_path / "uploads-of-others.png")
    for said in (
        *(
            tmp_path / "own.png",
            uploads / ".." / "own.png",
            uploads / "link.png",
            uploads,
            uploads / "gone.png",
        ),
        *(
            tmp_path / "uploads-of-others.png",
            "https://example.com/x.png",
            "data:image/png;base64,AA",
            "",
            "\0",
        ),
    ):
        with pytest.raises(gr.Error, match="there is no such upload"):
            demo.read_upload({"path": str(said)})
    for upload in ({"path": None}, {}, "x", 3, {"path": ["x"]}):
        with pytest.raises(gr.Error, match="there is no such upload"):
            demo.read_upload(upload)


def test_a_broken_model_is_not_shown_as_sure(trained: Run) -> None:
    model, processor = load_checkpoint(str(trained.model))
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    pixel_values = processor(torch.zeros(3, 9, 9, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    with pytest.raises(gr.Error, match="NaN"):
        demo.classify(pixel_values, model)


# --------------------------------------------------------------------------- where it looked


def test_the_overlay_is_large_enough_to_be_seen(trained: Run) -> None:
    model, processor = load_checkpoint(str(trained.model))
    assert demo.method_of(model, processor) == "attention rollout"
    image = torch.from_numpy(np.array(scene())).permute(2, 0, 1)
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    drawn = demo.draw_attention(pixel_values, 0, model, processor)
    assert drawn.size == (448, 448) and drawn.mode == "RGB"
    assert np.asarray(drawn).std() > 1


def test_a_model_that_no_method_fits_has_no_overlay(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*values: Any) -> Any:
        raise demo.NoMap("none of its layers answers with a map")

    model, processor = load_checkpoint(str(trained.model))
    monkeypatch.setattr(demo, "explain_pixels", fail)
    assert demo.method_of(model, processor) is None
