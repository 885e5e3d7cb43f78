"""A page that classifies the image dropped on it, and shows where the model looked.

It stands alone: published as a Space, this file is its `app.py`, with `gate.py`, `data/images.py` and
`evaluation/attention.py` beside it, and nothing else of this package.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
import numpy as np
import torch
from gradio.components import Component
from gradio.utils import get_upload_folder
from PIL import Image
from starlette.middleware import Middleware
from transformers import BaseImageProcessor, PreTrainedModel

from vit_finetune.data.images import EncodedImage, UnreadableImage
from vit_finetune.evaluation.attention import NoMap, explain_pixels, overlay, seen_images
from vit_finetune.gate import LARGEST_FILE, LOCAL, NO_UPLOAD, Gate, find_upload

MOST_PIXELS = 100_000_000
"""Pixels of an image at most: decoded they take three bytes each."""
LONGEST_QUEUE = 16
"""Images that wait at most; who drops another one is told to try again."""
SWEEP = (60, 900)
"""Seconds between two looks at what was uploaded, and seconds after which it is deleted."""
SHOWN = 5
"""Classes shown: the most probable ones."""
OVERLAY_PIXELS = 448
"""Shorter side, at least, of the picture of where the model looked."""

STYLE = """
footer { display: none !important }
#examples { min-height: 0 !important }
#examples .grid-wrap { min-height: 0 !important; padding-top: 2.2rem }
#examples .grid-container {
    grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)) !important;
    grid-auto-rows: auto !important;
    height: auto !important;
}
#photo img {
    width: 100%;
    min-height: 12rem;
    object-fit: contain;
}
"""
"""Pictures of a class are small ones side by side, however few there are and however narrow the page is; what
was dropped is seen, however few pixels it has."""

Pictures = Callable[[int], Sequence[Image.Image]]
"""Small pictures of a class, by its id."""


def build_page(
    title: str,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    examples: Pictures | None = None,
) -> gr.Blocks:
    """The page of one model; `open_page` serves it.

    Args:
        title: its name, shown as it is.
        model: in evaluation mode, on the device to compute on.
        image_processor: the model's.
        examples: of the most probable class, shown below the answer; no such place if None.
    """
    method = method_of(model, image_processor)

    def answer(upload: dict[str, Any] | None) -> list[Any]:
        if upload is None:  # taken away
            return [None] * len(outputs)
        pixel_values = image_processor(read_upload(upload), return_tensors="pt")["pixel_values"]
        pixel_values = pixel_values.to(model.device)  # (1, 3, H, W)
        probabilities = classify(pixel_values, model)
        best = int(probabilities.argmax())
        told: list[Any] = [bars(probabilities, model)]
        if _is_multi_label(model):
            told.append(", ".join(reached(probabilities, model)) or "no label")
        if method is not None:
            told.append(draw_attention(pixel_values, best, model, image_processor))
        if examples is not None:
            name = model.config.id2label[best]
            told.append([(picture, name) for picture in examples(best)])
        return told

    page = gr.Blocks(title=title, analytics_enabled=False, delete_cache=SWEEP)
    with page:
        gr.HTML(f"<h1>{html.escape(title)}</h1><p>Drop an image, and see what the model takes it for.</p>")
        with gr.Row():
            photo = gr.Image(
                label="Image",
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                buttons=[],
                elem_id="photo",
            )
            outputs = _place_answer(_is_multi_label(model), method)
        if examples is not None:
            outputs.append(_place_examples())
        # Without gradio's preprocessing, which opens what was dropped before anything is known of it.
        photo.change(answer, photo, outputs, preprocess=False, api_name="predict", show_progress="minimal")
    page.queue(max_size=LONGEST_QUEUE, default_concurrency_limit=1)
    return page


def _place_answer(several: bool, method: str | None) -> list[Component]:
    """What shows the probabilities, of several labels those that are reached, and where the model looked."""
    placed: list[Component] = []
    with gr.Column():
        placed.append(gr.Label(label="Probabilities", show_heading=not several, elem_id="answer"))
        if several:
            placed.append(gr.Textbox(label="Labels that reach their thresholds", elem_id="labels"))
    if method is not None:
        placed.append(
            gr.Image(
                label=f"Where the model looked ({method})",
                format="png",
                buttons=[],
                elem_id="attention",
                alt_text="The image as the model sees it, bright where it looked",
            )
        )
    return placed


def _place_examples() -> Component:
    return gr.Gallery(
        label="Images that have this label",
        height="auto",
        object_fit="contain",
        format="png",
        interactive=False,
        buttons=[],
        elem_id="examples",
    )


def open_page(page: gr.Blocks, host: str | None = None, port: int | None = None) -> str:
    """Serves a page from a thread of its own; answers its address.

    Args:
        page: the page.
        host: address to bind to; gradio's own choice if None, which on a Space is the Space's.
        port: to bind to; the first free one from 7860 on if None.

    Raises:
        OSError: the port is taken.
    """
    # Without max_file_size, which `Gate` knows: where gradio knows it too, its script puts the names of
    # larger files into the page as markup.
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        inline=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        num_workers=0,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        allowed_paths=[get_upload_folder()],  # or GRADIO_ALLOWED_PATHS would add others
        app_kwargs={"middleware": [Middleware(Gate, is_local=bool(host and LOCAL.fullmatch(host)))]},
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=STYLE,
    )
    return address


# --------------------------------------------------------------------------- an image


def read_upload(upload: Any) -> torch.Tensor:
    """The pixels of an uploaded image, uint8 `(3, height, width)`, upright.

    Args:
        upload: what gradio's client says of it: `path`, in the folder of uploads, and `orig_name`.

    Raises:
        gr.Error: no upload, no image, a damaged one, or one of too many bytes or pixels.
    """
    path = find_upload(upload.get("path")) if isinstance(upload, dict) else None
    if path is None:
        raise _refusal(NO_UPLOAD)
    name = str(upload.get("orig_name") or path.name)
    if path.stat().st_size > LARGEST_FILE:
        raise _refusal(f"{name} is larger than {LARGEST_FILE // 1024**2} MB")
    try:
        encoded = EncodedImage(path.read_bytes())
        height, width = encoded.size
        if height * width > MOST_PIXELS:
            raise _refusal(
                f"{name} has {width:,} × {height:,} pixels; this page takes up to {MOST_PIXELS:,} in all"
            )
        return encoded.decode()
    except UnreadableImage as error:
        raise _refusal(f"{name} cannot be read: {error}") from None


def _refusal(reason: str) -> gr.Error:
    """What the page says to an image that it does not take; it shows messages as HTML, and names are not."""
    return gr.Error(html.escape(reason), print_exception=False)


def classify(pixel_values: torch.Tensor, model: PreTrainedModel) -> np.ndarray:
    """The probabilities of the classes, float32 `(classes,)` in id order, as a pipeline gives them.

    Args:
        pixel_values: float32 `(1, 3, height, width)`, by the model's image processor, on its device.
        model: in evaluation mode.

    Raises:
        gr.Error: the model's answer is NaN or infinite.
    """
    with torch.inference_mode():
        logits = model(pixel_values=pixel_values).logits[0].float().cpu()  # (classes,)
    if not logits.isfinite().all():
        raise _refusal("the model answers with NaN or infinity: its weights are broken")
    probabilities = logits.sigmoid() if _is_multi_label(model) else logits.softmax(dim=-1)
    return np.asarray(probabilities)


def bars(probabilities: np.ndarray, model: PreTrainedModel) -> dict[str, float]:
    """The most probable classes, the best first; of several labels each with its threshold in its name."""
    names, thresholds = model.config.id2label, thresholds_of(model)
    return {
        f"{names[number]} (threshold {thresholds[number]:.2f})" if thresholds else names[number]: float(
            probabilities[number]
        )
        for number in np.argsort(-probabilities, kind="stable")[:SHOWN].tolist()
    }


def reached(probabilities: np.ndarray, model: PreTrainedModel) -> list[str]:
    """The labels that reach their thresholds, in id order."""
    pairs = enumerate(zip(probabilities.tolist(), thresholds_of(model)))
    return [model.config.id2label[number] for number, (value, least) in pairs if value >= least]


def thresholds_of(model: PreTrainedModel) -> list[float]:
    """The threshold of each of several labels, 0.5 where the config has none; empty with one class each."""
    if not _is_multi_label(model):
        return []
    return list(getattr(model.config, "thresholds", None) or [0.5] * model.config.num_labels)


def _is_multi_label(model: PreTrainedModel) -> bool:
    return bool(model.config.problem_type == "multi_label_classification")


def method_of(model: PreTrainedModel, image_processor: BaseImageProcessor) -> str | None:
    """The name of how it is found where a model looks; None of a model that no method fits."""
    black = image_processor(torch.zeros(3, 64, 64, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    try:
        return explain_pixels(model, black.to(model.device))[1]
    except NoMap:
        return None


def draw_attention(
    pixel_values: torch.Tensor, best: int, model: PreTrainedModel, image_processor: BaseImageProcessor
) -> Image.Image:
    """The image as the model sees it, and over it where the model looked.

    Args:
        pixel_values: float32 `(1, 3, height, width)`, by the model's image processor, on its device.
        best: id of the class that the image is taken for.
        model: in evaluation mode.
        image_processor: the model's.
    """
    classes = torch.tensor([best], device=pixel_values.device)
    maps, _ = explain_pixels(model, pixel_values, classes)  # (1, rows, columns)
    seen = seen_images(pixel_values, image_processor)[0]
    scale = -(-OVERLAY_PIXELS // min(seen.size))
    if scale > 1:  # small images keep their pixels visible
        seen = seen.resize((seen.width * scale, seen.height * scale), Image.Resampling.NEAREST)
    return overlay(seen, maps[0])
