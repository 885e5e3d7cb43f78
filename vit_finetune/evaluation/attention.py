"""Where a model looks: attention rollout for ViTs, gradients for other networks, and heat over an image.

Stands alone, without the rest of the package, so that a Space can carry this very file beside its app. A map
is float32 `(batch, rows, columns)`, one number ≥ 0 per patch or cell of the feature map: compare them within
an image, not between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

ROLLOUT = "attention rollout"
GRADIENTS = "gradient × activation"
"""The methods, by the names that `explain_pixels` answers with."""

COLOURS = "inferno"
"""Evenly rising lightness: what looks twice as bright is, and prints and colour-blind eyes keep the order."""
LEAST_CELLS = 4
"""A feature map with fewer rows or columns says too little about where; the one before is taken."""
MEANS_OF_PATCHES = {"clip", "metaclip_2", "siglip"}
"""Model types whose head reads the mean of the patches' tokens, whether or not there is a class token."""


class NoGlobalAttention(ValueError):
    """There are no attention weights from every patch to every patch: there is nothing to roll out."""


class NoMap(ValueError):
    """No layer answers with as many rows and columns as would say where."""


# --------------------------------------------------------------------------- attention


def attention_rollout(attentions: Sequence[torch.Tensor]) -> torch.Tensor:
    """How much of each input token flows into each output token, `(batch, tokens, tokens)`; rows sum to 1.

    Attention rollout of Abnar and Zuidema, 2020 (https://arxiv.org/abs/2005.00928): each layer's heads are
    averaged, half of the identity stands for the residual connection, and the layers are multiplied.

    Args:
        attentions: of each layer, the first one first, `(batch, heads, tokens, tokens)`, rows that sum to 1.

    Raises:
        ValueError: there are no layers.
    """
    if not attentions:
        raise ValueError("attention_rollout needs the attentions of at least one layer")
    identity = torch.eye(attentions[0].shape[-1], dtype=attentions[0].dtype, device=attentions[0].device)
    rollout = identity.expand(attentions[0].shape[0], -1, -1)
    for attention in attentions:
        mixed = (attention.mean(dim=1) + identity) / 2  # (B, T, T)
        rollout = mixed / mixed.sum(dim=-1, keepdim=True) @ rollout
    return rollout


def attentions_of(model: PreTrainedModel, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """The attention weights of each layer, `(batch, heads, tokens, tokens)`, at least float32; rows sum to 1.

    The fast kernels keep no weights, so this one forward pass uses the eager kernel, without dropout and
    gradients; kernel and mode are as they were afterwards, also when it fails.

    Args:
        model: an image classifier with global attention over one grid: ViT, DeiT, DINOv2 (with registers
            too), BEiT, ViT-MSN, I-JEPA, CLIP, SigLIP, …
        pixel_values: `(batch, channels, height, width)`, normalised, on the model's device.

    Raises:
        NoGlobalAttention: the model has no attention (ResNet, ConvNeXt), or in windows or of several scales
            (Swin, PVT), or gives none away (Data2Vec, timm's).
    """
    kind = type(model).__name__
    rows, columns = grid_of(model, pixel_values)
    if not model._can_set_attn_implementation():
        raise NoGlobalAttention(f"{kind} has no attention kernel that can be exchanged for another")
    with _eager(model):
        found = getattr(model(pixel_values=pixel_values, output_attentions=True), "attentions", None)
    layers = [layer for layer in found or () if layer is not None]
    for layer in layers:
        alike = layer.shape == layers[0].shape and layer.ndim == 4 and layer.shape[0] == len(pixel_values)
        if not alike or layer.shape[-2] != layer.shape[-1] or layer.shape[-1] < rows * columns:
            raise NoGlobalAttention(f"{kind} attends within windows or on several scales, not over one grid")
    if not layers:
        raise NoGlobalAttention(f"{kind} answers without attention weights")
    return [layer if layer.dtype == torch.float64 else layer.float() for layer in layers]


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    # Parts of a model (CLIP's text and vision) have configs, and perhaps kernels, of their own.
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    model.eval()
    try:
        for config, _ in before:
            config._attn_implementation_internal = "eager"
        with torch.no_grad():
            yield
    finally:
        for config, kernel in before:
            config._attn_implementation_internal = kernel
        model.train(was_training)


def grid_of(model: PreTrainedModel, pixel_values: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of the patches that a model cuts images of this size into.

    Raises:
        NoGlobalAttention: its config names no patch size.
    """
    height, width = patch_size_of(model)
    return pixel_values.shape[-2] // height, pixel_values.shape[-1] // width


def patch_size_of(model: PreTrainedModel) -> tuple[int, int]:
    """Height and width of a model's patches in pixels.

    Raises:
        NoGlobalAttention: its config names none.
    """
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "patch_size", None)
    if not size:
        raise NoGlobalAttention(f"{type(model).__name__} does not cut images into patches")
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def reads_class_token(model: PreTrainedModel, tokens: int, grid: tuple[int, int]) -> bool:
    """Whether the head reads the first token; else it reads the mean of the patches.

    DINOv2's head reads both: its class token counts.
    """
    if tokens == grid[0] * grid[1]:
        return False
    averages = getattr(model.config, "use_mean_pooling", model.config.model_type in MEANS_OF_PATCHES)  # BEiT
    return not averages


def over_patches(weights: torch.Tensor, grid: tuple[int, int], from_class_token: bool) -> torch.Tensor:
    """What the head's token takes from each patch, `(…, rows, columns)`; tokens that are no patches left out.

    Args:
        weights: attention or rollout, `(…, tokens, tokens)`, query before key; the patches are the last
            tokens.
        grid: rows and columns of the patches.
        from_class_token: whether the head reads the first token; else the mean of the patches' rows is taken.
    """
    patches = grid[0] * grid[1]
    row = weights[..., 0, :] if from_class_token else weights[..., -patches:, :].mean(dim=-2)  # (…, T)
    return row[..., -patches:].unflatten(-1, grid)


def attention_maps(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """How much of each patch flows into what the head reads, by rollout: `(batch, rows, columns)` ≥ 0.

    Not of any one class: attention does not know for which class it is used.

    Args:
        model: as for `attentions_of`.
        pixel_values: `(batch, channels, height, width)`, normalised, on the model's device.

    Raises:
        NoGlobalAttention: as for `attentions_of`.
    """
    rollout = attention_rollout(attentions_of(model, pixel_values))
    grid = grid_of(model, pixel_values)
    return over_patches(rollout, grid, reads_class_token(model, rollout.shape[-1], grid))


def mean_attention_distance(
    attentions: Sequence[torch.Tensor], grid: tuple[int, int], patch_size: tuple[int, int]
) -> torch.Tensor:
    """How far each head looks: pixels between a patch and what it attends to, `(layers, heads)`.

    As in figure 7 of Dosovitskiy et al., 2021 (https://arxiv.org/abs/2010.11929): distances between the
    centres of query and key patch, weighted by attention, averaged over query patches and images. What goes
    to tokens that are no patches is left out, and the rest weighs 1 again. A receptive field's size, for
    networks that have none.

    Args:
        attentions: of each layer, `(batch, heads, tokens, tokens)`; the patches are the last tokens.
        grid: rows and columns of the patches.
        patch_size: height and width in pixels.
    """
    rows, columns = grid
    like = attentions[0]
    down = torch.arange(rows, dtype=like.dtype, device=like.device) * patch_size[0]
    right = torch.arange(columns, dtype=like.dtype, device=like.device) * patch_size[1]
    centres = torch.cartesian_prod(down, right)  # (P, 2)
    distances = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")  # (P, P)
    patches = rows * columns
    means = []
    for attention in attentions:
        weights = attention[..., -patches:, -patches:]  # (B, H, P, P)
        whole = weights.sum(dim=-1).clamp_min(torch.finfo(weights.dtype).tiny)
        means.append(((weights * distances).sum(dim=-1) / whole).mean(dim=(0, 2)))
    return torch.stack(means)


# --------------------------------------------------------------------------- gradients


def gradient_maps(model: PreTrainedModel, pixel_values: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """What speaks for a class in each cell of the last feature map: `(batch, rows, columns)` ≥ 0.

    Gradient of the class's logit times activation, summed over channels, negative sums as 0 (HiResCAM,
    Draelos and Carin, 2020, https://arxiv.org/abs/2011.08891). Where the map's mean feeds the head, as in
    ResNet, ConvNeXt and Swin, that is Grad-CAM (Selvaraju et al., 2017, https://arxiv.org/abs/1610.02391).

    Args:
        model: any image classifier.
        pixel_values: `(batch, channels, height, width)`, normalised, on the model's device.
        classes: int64 `(batch,)`.

    Raises:
        NoMap: no layer answers with a map of the image of at least LEAST_CELLS cells a side.
    """
    from captum.attr import LayerGradientXActivation

    was_training = model.training
    model.eval()
    product: torch.Tensor | None = None
    try:
        with torch.inference_mode(False), torch.enable_grad():
            # Copies: tensors that were made in inference mode have no gradients.
            inputs, target = pixel_values.detach().clone().requires_grad_(), classes.clone()
            for layer in _layers_with_maps(model, inputs):
                method = LayerGradientXActivation(lambda images: model(pixel_values=images).logits, layer)
                product = _as_map(method.attribute(inputs, target=target), inputs)
                # Behind the last attention a head that reads the class token has no gradient at the patches.
                if product is not None and product.abs().max() > 0:
                    break
    finally:
        model.train(was_training)
    if product is None:
        raise NoMap(
            f"{type(model).__name__} makes no map of at least {LEAST_CELLS} x {LEAST_CELLS} cells of images "
            f"of {inputs.shape[-1]} x {inputs.shape[-2]} pixels"
        )
    return product.detach().clamp_min(0).float()


def _layers_with_maps(model: PreTrainedModel, pixel_values: torch.Tensor) -> list[torch.nn.Module]:
    """The modules that answer once with a map of at least LEAST_CELLS cells a side, the last first."""
    called: dict[torch.nn.Module, bool] = {}

    def look(module: torch.nn.Module, _: Any, output: Any) -> None:
        # A module that is called again (one activation for a whole block) has no one map.
        fits = isinstance(output, torch.Tensor) and _as_map(output, pixel_values) is not None
        called[module] = fits and module not in called

    handles = [module.register_forward_hook(look) for module in model.modules() if module is not model]
    try:
        with torch.no_grad():
            model(pixel_values=pixel_values)
    finally:
        for handle in handles:
            handle.remove()
    return [module for module, fits in reversed(called.items()) if fits]


def _as_map(values: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor | None:
    """Features summed over channels, `(batch, rows, columns)`, of any layout; None where they are no map."""
    # Windows count as images; what is pooled has a side of 1.
    if len(values) != len(pixel_values) or values.ndim not in (3, 4) or 1 in values.shape[1:]:
        return None
    height, width = pixel_values.shape[-2:]
    strides = range(2, min(height, width) // LEAST_CELLS + 1)
    down = [(height // stride, width // stride) for stride in strides]
    up = [(-(-height // stride), -(-width // stride)) for stride in strides]
    grids = {*down, *up}  # rows and columns that a stride makes of the image, rounded down or up
    if values.ndim == 4:
        if tuple(values.shape[2:]) in grids:  # (B, C, rows, columns)
            return values.sum(dim=1)
        return values.sum(dim=3) if tuple(values.shape[1:3]) in grids else None  # (B, rows, columns, C)
    for prefix in range(3):  # (B, prefix + patches, C): none, a class token, a distillation token too
        for rows, columns in grids:
            if prefix + rows * columns == values.shape[1]:
                return values[:, prefix:].sum(dim=2).unflatten(1, (rows, columns))
    return None


# --------------------------------------------------------------------------- both, and pictures


def explain_pixels(
    model: PreTrainedModel, pixel_values: torch.Tensor, classes: torch.Tensor | None = None
) -> tuple[torch.Tensor, str]:
    """Where a model looks, `(batch, rows, columns)` ≥ 0, and the method: ROLLOUT if it can be, or GRADIENTS.

    Args:
        model: any image classifier.
        pixel_values: `(batch, channels, height, width)`, normalised, on the model's device.
        classes: which class gradients are of, int64 `(batch,)`; the most probable one if None.

    Raises:
        NoMap: as for `gradient_maps`.
    """
    try:
        return attention_maps(model, pixel_values), ROLLOUT
    except NoGlobalAttention:
        pass
    if classes is None:
        was_training = model.training
        model.eval()
        with torch.no_grad():
            classes = model(pixel_values=pixel_values).logits.argmax(dim=-1)
        model.train(was_training)
    return gradient_maps(model, pixel_values, classes), GRADIENTS


def seen_images(pixel_values: torch.Tensor, image_processor: BaseImageProcessor) -> list[Image.Image]:
    """Images as a model sees them, cropped and resized, in RGB: what was done to the colours is undone.

    Args:
        pixel_values: `(batch, channels, height, width)`, normalised.
        image_processor: which did that.
    """
    values = pixel_values.detach().float().cpu()
    if getattr(image_processor, "do_normalize", False):
        mean = torch.tensor(image_processor.image_mean).view(-1, 1, 1)
        std = torch.tensor(image_processor.image_std).view(-1, 1, 1)
        values = values * std + mean
    if getattr(image_processor, "do_rescale", True):
        values = values / (image_processor.rescale_factor or 1 / 255)
    pixels = values.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)  # grey ones too
    return [Image.fromarray(image) for image in pixels.movedim(1, -1).contiguous().numpy()]


def overlay(image: Image.Image, heat: torch.Tensor | np.ndarray, opacity: float = 0.6) -> Image.Image:
    """Heat over an image, RGB of its size: dark where the map is least, bright yellow where it is most.

    The image is turned grey beneath, so that every colour is the map's. A map without differences adds
    nothing.

    Args:
        image: as the model saw it; see `seen_images`.
        heat: `(rows, columns)`, of any range.
        opacity: of the heat, in [0, 1].
    """
    values = np.asarray(heat.detach().cpu() if isinstance(heat, torch.Tensor) else heat, dtype=np.float32)
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32)
    low, high = float(values.min()), float(values.max())
    if not high > low:
        return Image.fromarray(grey.astype(np.uint8))
    smooth = Image.fromarray((values - low) / (high - low)).resize(image.size, Image.Resampling.BICUBIC)
    colours = colormaps[COLOURS](np.clip(np.asarray(smooth), 0, 1))[..., :3] * 255
    return Image.fromarray(((1 - opacity) * grey + opacity * colours).round().astype(np.uint8))
