"""Image processors: how a photograph is fitted to the model, recorded so that serving does the same."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    BitImageProcessor,
    PreTrainedConfig,
    ViTImageProcessor,
)

from vit_finetune.recipe import ModelConfig
from vit_finetune.run import RunError


def side_lengths(size: Any) -> tuple[int, int]:
    """Height and width in pixels of a size written as one number, a pair or a mapping."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict):
        return int(size["height"]), int(size["width"])
    height, width = size
    return int(height), int(width)


def compact_size(size: tuple[int, int]) -> int | list[int]:
    """Height and width in pixels as a config writes them: one number where they are equal."""
    return size[0] if size[0] == size[1] else list(size)


def set_image_size(config: PreTrainedConfig, size: tuple[int, int]) -> None:
    """Writes height and width into a config in its own form: Hiera's is always a pair."""
    pair = isinstance(getattr(config, "image_size", None), (list, tuple))
    config.image_size = list(size) if pair else compact_size(size)


def read_processor(path: str) -> BaseImageProcessor:
    """The image processor saved with a checkpoint.

    Raises:
        RunError: there is none.
    """
    try:
        return AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path}: there is no usable preprocessor_config.json, so nobody knows how the model wants its "
            f"images: {str(error).splitlines()[0]}"
        ) from error


def processor_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width in pixels of what a processor gives."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    edge = dict(size).get("shortest_edge")
    return (edge, edge) if edge else side_lengths(dict(size))


def build_processor(
    config: ModelConfig, size: tuple[int, int], checkpoint: BaseImageProcessor | None
) -> BaseImageProcessor:
    """The stock processor that fits images to `size` the way the recipe says, or else the checkpoint's."""
    kept = {
        name: getattr(checkpoint, name)
        for name in ("image_mean", "image_std", "resample", "rescale_factor", "do_rescale", "do_normalize")
        if getattr(checkpoint, name, None) is not None
    }
    crop_fraction, mode = config.crop_fraction, config.resize
    if mode is None and checkpoint is not None:
        edge = dict(checkpoint.size).get("shortest_edge")
        mode = "crop" if edge or getattr(checkpoint, "do_center_crop", False) else "squash"
        if edge and getattr(checkpoint, "do_center_crop", False):
            crop_fraction = min(1.0, max(side_lengths(dict(checkpoint.crop_size))) / edge)
        elif getattr(checkpoint, "crop_pct", None):
            crop_fraction = checkpoint.crop_pct
    height, width = size
    if mode == "crop":
        kept = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} | kept
        return BitImageProcessor(
            size={"shortest_edge": round(max(size) / crop_fraction)},
            crop_size={"height": height, "width": width},
            **kept,
        )
    return ViTImageProcessor(size={"height": height, "width": width}, do_convert_rgb=True, **kept)
