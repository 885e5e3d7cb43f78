"""Parameter groups: what is decayed, and how the learning rate falls towards the first layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vit_finetune.model.adaptation import find_encoder
from vit_finetune.model.head import is_in_head
from vit_finetune.model.processing import side_lengths
from vit_finetune.run import RunError

UNDECAYED = (
    "cls_token",
    "distillation_token",
    "mask_token",
    "register_tokens",
    "position_embeddings",
    "position_bias",
)
"""Parts of the names of matrices that weight decay is not meant for (as timm's `no_weight_decay`)."""


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to biases, norms, class token and positions."""
    return parameter.ndim > 1 and not any(part in name for part in UNDECAYED)


def layer_numbers(model: PreTrainedModel) -> dict[str, int]:
    """Depth by parameter name: 0 for the embeddings, 1 … n for the encoder's layers, n + 1 for all above.

    Raises:
        RunError: the model has no stack of layers of one kind, as CNNs have none.
    """
    encoder, layers = find_encoder(model, "training.layer_decay")
    numbers, passed = {}, False
    for name, _ in model.named_parameters():
        if name.startswith(f"{encoder}."):
            numbers[name] = int(name.removeprefix(f"{encoder}.").split(".")[0]) + 1
            passed = True
        else:
            numbers[name] = len(layers) + 1 if passed else 0
    return numbers


def build_parameter_groups(
    model: PreTrainedModel,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    head_lr_multiplier: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: `params`, `lr` and `weight_decay`, one for each pair of the two.

    A parameter at depth d of n + 1 learns at `learning_rate × layer_decay^(n + 1 − d)`, what lies above the
    encoder's layers at `learning_rate` (Bao et al., 2021, BEiT, appendix; He et al., 2022, MAE), the head at
    `learning_rate × head_lr_multiplier`.

    Args:
        model: of which the parameters that require a gradient are grouped.
        learning_rate: of what lies above the encoder's layers.
        weight_decay: of the parameters that are decayed.
        layer_decay: factor in (0, 1] from each layer to the one below it; 1 is off.
        head_lr_multiplier: factor above 0; 1 is off.

    Raises:
        RunError: a factor is not 1, and the model has no stack of layers, or no head.
    """
    numbers = layer_numbers(model) if layer_decay != 1.0 else {}
    top = max(numbers.values(), default=0)
    if head_lr_multiplier != 1.0 and not any(is_in_head(name) for name, _ in model.named_parameters()):
        raise RunError(
            f"training.head_lr_multiplier needs a head apart from the encoder, which {type(model).__name__} "
            f"lacks"
        )
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr = learning_rate * layer_decay ** (top - numbers.get(name, top))
        if is_in_head(name):
            lr *= head_lr_multiplier
        decay = weight_decay if is_decayed(name, parameter) else 0.0
        group = groups.setdefault((lr, decay), {"params": [], "lr": lr, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def leaves_weights_unused(model: PreTrainedModel) -> bool:
    """Whether there are weights that the logits do not depend on; True where that cannot be told.

    DINOv2 has such a mask token, SigLIP and CLIP have such layers; processes that exchange gradients would
    wait for theirs. Looked at in a copy without memory, which computes nothing.
    """
    size = side_lengths(getattr(model.config, "image_size", None) or 224)
    try:
        with torch.device("meta"):
            copy = type(model)(model.config).train()
            copy(pixel_values=torch.zeros(2, 3, *size)).logits.sum().backward()
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return True
    return any(parameter.grad is None for parameter in copy.parameters())
