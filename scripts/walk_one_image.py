"""One image's way through a ViT, from the file to the logits: the shapes as a table, and figures.

    python scripts/walk_one_image.py RUN [--image FILE] [--output DIR]

Without --image it is the first image of the run's test split. Writes image.png, patches.png, positions.png,
attention.png and logits.png into DIR, and prints the table that docs/walkthrough.md shows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import BaseImageProcessor, PreTrainedModel

from vit_finetune.data.images import decode_image
from vit_finetune.data.transforms import ImageFiles, normalize, resize
from vit_finetune.evaluation.attention import attentions_of
from vit_finetune.evaluation.images import own_split
from vit_finetune.model.loading import load_checkpoint
from vit_finetune.run import Run

Step = tuple[str, str, str]
"""What happens, the shape of what comes out, and its range or meaning."""


def main() -> None:
    """Reads the words, walks, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a finished run of a ViT")
    parser.add_argument("--image", help="an image file; the first of the run's test split if left out")
    parser.add_argument("--output", default="walk", help="folder for the figures")
    words = parser.parse_args()
    run, folder = Run(words.run), Path(words.output)
    model, processor = load_checkpoint(str(run.model))
    if words.image:
        picture = decode_image(Path(words.image).read_bytes())
    else:
        picture = ImageFiles(own_split(run, "test"))[0]
    folder.mkdir(parents=True, exist_ok=True)
    print("| step | shape | values |\n|---|---|---|")
    for what, shape, values in walk(model, processor, picture, folder):
        print(f"| {what} | {shape} | {values} |")


def walk(
    model: PreTrainedModel, processor: BaseImageProcessor, picture: torch.Tensor, folder: Path
) -> list[Step]:
    """The steps of an image, uint8 `(3, height, width)`, through a ViT; draws the figures on the way."""
    seen: dict[str, torch.Tensor] = {}
    parts = dict(model.named_modules())
    layers = [name for name in parts if name.startswith("vit.layers.") and name.count(".") == 2]
    watched = {
        "patches": "vit.embeddings.patch_embeddings",
        "embedded": "vit.embeddings",
        "first": layers[0],
        "last": layers[-1],
        "normed": "vit.layernorm",
        "logits": "classifier",
    }
    hooks = [parts[path].register_forward_hook(_keep(seen, name)) for name, path in watched.items()]
    fitted = resize(picture, processor)  # (3, H, W)
    pixel_values = normalize(fitted[None], processor)  # (1, 3, H, W)
    with torch.no_grad():
        logits = model(pixel_values=pixel_values).logits
    for hook in hooks:
        hook.remove()
    assert torch.equal(seen["logits"], logits)
    attentions = attentions_of(model, pixel_values)  # of each layer (1, heads, tokens, tokens)
    probabilities = logits.softmax(dim=-1)
    config = model.config
    rows, columns = (side // config.patch_size for side in fitted.shape[1:])
    side, width = config.patch_size, config.hidden_size
    names = [config.id2label[number] for number in range(config.num_labels)]
    draw_images(picture, fitted, folder / "image.png")
    draw_patches(fitted, config.patch_size, folder / "patches.png")
    draw_positions(model.vit.embeddings.position_embeddings[0, 1:].detach(), rows, folder / "positions.png")
    draw_attention(attentions, fitted, rows, columns, folder / "attention.png")
    draw_logits(logits[0], probabilities[0], names, folder / "logits.png")
    top = int(probabilities.argmax())
    return [
        ("the decoded image", _shape(picture), f"uint8, {_range(picture)}"),
        ("fitted by the image processor", _shape(fitted), f"uint8, {_range(fitted)}"),
        ("normalised, in a batch of one", _shape(pixel_values), f"float32, {_range(pixel_values)}"),
        (
            f"cut into {rows} × {columns} patches: {side} × {side} × 3 numbers each, to a vector of {width}",
            _shape(seen["patches"]),
            _spread(seen["patches"]),
        ),
        (
            "the class token in front, position embeddings added",
            _shape(seen["embedded"]),
            _spread(seen["embedded"]),
        ),
        (
            f"attention of a layer, {config.num_attention_heads} heads: weights of each token over all",
            _shape(attentions[0]),
            "rows sum to 1",
        ),
        ("after the first layer", _shape(seen["first"]), _spread(seen["first"])),
        (f"after the last of {len(layers)} layers", _shape(seen["last"]), _spread(seen["last"])),
        ("normalised", _shape(seen["normed"]), _spread(seen["normed"])),
        ("the class token's vector", _shape(seen["normed"][:, 0]), _spread(seen["normed"][:, 0])),
        ("through the head: logits", _shape(logits), _range(logits)),
        ("softmax: probabilities", _shape(probabilities), f"{names[top]}: {probabilities[0, top]:.3f}"),
    ]


def _keep(seen: dict[str, torch.Tensor], name: str) -> Any:
    def hook(module: torch.nn.Module, given: Any, answer: Any) -> None:
        seen[name] = answer[0] if isinstance(answer, tuple) else answer

    return hook


def _shape(tensor: torch.Tensor) -> str:
    return f"`({', '.join(map(str, tensor.shape))})`"


def _range(tensor: torch.Tensor) -> str:
    low, high = tensor.min().item(), tensor.max().item()
    return f"{low:.3g} to {high:.3g}".replace("-", "−")


def _spread(tensor: torch.Tensor) -> str:
    return f"standard deviation {tensor.std().item():.2f}"


# --------------------------------------------------------------------------- figures


def draw_images(picture: torch.Tensor, fitted: torch.Tensor, path: Path) -> None:
    """The image as it is stored beside the image as the model sees it."""
    figure = Figure(figsize=(5, 2.7), layout="constrained")
    for axes, image, title in zip(figure.subplots(1, 2), (picture, fitted), ("stored", "fitted")):
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set_title(f"{title}: {image.shape[1]} × {image.shape[2]} pixels", fontsize=9)
        axes.set_axis_off()
    figure.savefig(path, dpi=110)


def draw_patches(fitted: torch.Tensor, patch: int, path: Path) -> None:
    """The image cut into its patches, numbered in the order of the tokens."""
    rows, columns = fitted.shape[1] // patch, fitted.shape[2] // patch
    figure = Figure(figsize=(3.4, 3.4))
    grid = figure.subplots(rows, columns, gridspec_kw={"wspace": 0.12, "hspace": 0.12}, squeeze=False)
    for row in range(rows):
        for column in range(columns):
            axes, top, left = grid[row, column], row * patch, column * patch
            axes.imshow(
                fitted[:, top : top + patch, left : left + patch].permute(1, 2, 0).numpy(), vmin=0, vmax=255
            )
            axes.text(
                0.06,
                0.94,
                str(row * columns + column + 1),
                transform=axes.transAxes,
                color="orange",
                va="top",
            )
            axes.set_axis_off()
    figure.savefig(path, dpi=110)


def draw_positions(positions: torch.Tensor, rows: int, path: Path) -> None:
    """How alike the position embedding of each patch is to that of every other: cosines, a grid of grids."""
    units = torch.nn.functional.normalize(positions, dim=-1)
    cosines = (units @ units.T).numpy()  # (patches, patches)
    columns = len(cosines) // rows
    figure = Figure(figsize=(3.8, 3.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for number, axes in enumerate(grid.flat):
        shown = axes.imshow(cosines[number].reshape(rows, columns), cmap="viridis", vmin=-1, vmax=1)
        axes.set_axis_off()
    figure.colorbar(shown, ax=grid, fraction=0.05, label="cosine")
    figure.savefig(path, dpi=110)


def draw_attention(
    attentions: list[torch.Tensor], fitted: torch.Tensor, rows: int, columns: int, path: Path
) -> None:
    """What the class token attends to: one row of pictures per layer, one per head."""
    heads = attentions[0].shape[1]
    figure = Figure(figsize=(1.15 * (heads + 1), 1.2 * len(attentions)), layout="constrained")
    grid = figure.subplots(len(attentions), heads + 1, squeeze=False)
    for layer, attention in enumerate(attentions):
        grid[layer, 0].imshow(fitted.permute(1, 2, 0).numpy())
        grid[layer, 0].set_title(f"layer {layer + 1}", fontsize=8)
        for head in range(heads):
            weights = attention[0, head, 0, -rows * columns :].reshape(rows, columns).numpy()
            grid[layer, head + 1].imshow(weights, cmap="inferno", vmin=0, vmax=float(np.max(weights)))
            grid[layer, head + 1].set_title(f"head {head + 1}", fontsize=8)
    for axes in grid.flat:
        axes.set_axis_off()
    figure.savefig(path, dpi=110)


def draw_logits(logits: torch.Tensor, probabilities: torch.Tensor, names: list[str], path: Path) -> None:
    """Logits and what softmax makes of them."""
    figure = Figure(figsize=(6, 2.4), layout="constrained")
    for axes, values, title in zip(
        figure.subplots(1, 2), (logits, probabilities), ("logits", "probabilities")
    ):
        axes.bar(names, values.numpy(), color="#3d74ab")
        axes.set_title(title, fontsize=9)
        axes.axhline(0, color="#8a8f98", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
