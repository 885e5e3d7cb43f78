"""The same weights at another image size: position embeddings interpolated, once and for all."""

from __future__ import annotations

import copy
import re

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from vit_finetune.model.processing import compact_size, set_image_size, side_lengths
from vit_finetune.run import RunError


def check_divides(config: PreTrainedConfig, size: tuple[int, int]) -> None:
    """Raises RunError where the patches do not tile the image: transformers drops the rest in silence."""
    patch = getattr(config, "patch_size", None)
    if patch is None:
        return
    for side, length, step in zip(("height", "width"), size, side_lengths(patch)):
        if length % step:
            below, above = length // step * step, (length // step + 1) * step
            nearest = f"{below} or {above}" if below else str(above)
            raise RunError(
                f"model.image_size: a {side} of {length} pixels is not a multiple of the patch size {step}; "
                f"write {nearest}"
            )


def resize_model(model: PreTrainedModel, old: tuple[int, int], new: tuple[int, int]) -> PreTrainedModel:
    """The same weights in a model of another image size."""
    config = copy.deepcopy(model.config)
    set_image_size(config, new)
    patch = getattr(config, "patch_size", None)
    state = model.state_dict()
    if patch is not None:
        (ph, pw) = side_lengths(patch)
        for name in [name for name in state if name.endswith("position_embeddings")]:
            state[name] = interpolate_positions(
                state[name], (old[0] // ph, old[1] // pw), (new[0] // ph, new[1] // pw)
            )
    resized = type(model)._from_config(config, attn_implementation=model.config._attn_implementation)
    resized.name_or_path = model.name_or_path
    try:
        resized.load_state_dict(state, strict=True)
    except RuntimeError as error:
        names = re.findall(r"size mismatch for (\S+):", str(error))
        raise RunError(
            f"{config.model_type} models cannot change their image size here: "
            f"{', '.join(names[:5]) or error} "
            f"would not fit. Keep model.image_size at {compact_size(old)}"
        ) from None
    return resized


def interpolate_positions(
    positions: torch.Tensor, old: tuple[int, int], new: tuple[int, int]
) -> torch.Tensor:
    """Position embeddings for another grid of patches; those of the class token and the like stay.

    Bicubic: where the grid grows exactly as transformers' `interpolate_pos_encoding`, where it shrinks
    antialiased (as timm's `resample_abs_pos_embed`), which that is not.

    Args:
        positions: `(1, prefix + old height × old width, width)`, float.
        old: rows and columns of the grid they were trained on.
        new: rows and columns wanted.
    """
    prefix = positions.shape[1] - old[0] * old[1]
    if prefix < 0:
        raise RunError(
            f"position embeddings for {positions.shape[1]} tokens do not fit a grid of {old[0]}×{old[1]}"
        )
    grid = positions[:, prefix:].reshape(1, *old, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    shrinks = new[0] < old[0] or new[1] < old[1]
    grid = torch.nn.functional.interpolate(
        grid, size=new, mode="bicubic", align_corners=False, antialias=shrinks
    )
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2)  # (1, rows × columns, D)
    return torch.cat([positions[:, :prefix], grid], dim=1)
