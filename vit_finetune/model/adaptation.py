"""What training changes in a model, and the published one never has: what of it learns, stochastic depth."""

from __future__ import annotations

from typing import cast

from torch import nn
from torchvision.ops import StochasticDepth
from transformers import PreTrainedModel

from vit_finetune.model.head import freeze_encoder, is_in_head
from vit_finetune.model.lora import add_lora
from vit_finetune.recipe import DROP_PATH_MODELS, ModelConfig
from vit_finetune.run import RunError


def adapt(model: PreTrainedModel, config: ModelConfig) -> None:
    """Makes a model ready for training as its section says; what is saved of it is stock.

    Args:
        model: as it was loaded; once.
        config: the recipe's section.

    Raises:
        RunError: it cannot be trained so.
    """
    add_drop_path(model, config.drop_path_rate)
    match config.method:
        case "lora":
            add_lora(model, config)
        case "head" | "linear_probe":
            freeze_encoder(model)


def find_encoder(model: PreTrainedModel, key: str) -> tuple[str, nn.ModuleList]:
    """The stack of a model's encoder layers, from the first to the last, and the name that it has there.

    Args:
        model: a classifier.
        key: of the recipe, that needs such a stack; for the message.

    Raises:
        RunError: the model has no stack of layers of one kind, as CNNs have none.
    """
    stacks = {
        name: module
        for name, module in model.named_modules()
        # The stages of CNNs are stacks, too, but each of another size.
        if isinstance(module, nn.ModuleList) and len({_size(layer) for layer in module}) == 1
    }
    encoder = max(stacks, key=lambda name: _size(stacks[name]), default=None)
    body = sum(p.numel() for name, p in model.named_parameters() if not is_in_head(name))
    if encoder is None or _size(stacks[encoder]) < body / 2:
        raise RunError(f"{key} needs a stack of encoder layers, which {type(model).__name__} lacks")
    return encoder, stacks[encoder]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def add_drop_path(model: PreTrainedModel, rate: float | None) -> None:
    """Lets a model drop the residual branches of its layers, image by image, while it is in training mode.

    Stochastic depth (Huang et al., 2016): layer i of n drops each branch of an image with the probability
    `rate × i / (n − 1)`, counted from 0, and divides it by the probability of keeping it where it is kept; as
    timm's `DropPath`, drawn from torch's global generator of the device. In evaluation mode nothing changes;
    config and state dict have no trace of it, so a model that is saved and loaded does not drop.

    Where the architecture has a place for it, as Swin has, that is taken, whatever its config says. In ViT
    and its like, dropout stands at the end of both branches, and this behind it.

    Args:
        model: a classifier, changed in place; once.
        rate: of the last layer, in [0, 1); None leaves the model as its config has it, 0 drops nothing.

    Raises:
        RunError: the architecture is none of `DROP_PATH_MODELS`.
    """
    if rate is None or (rate == 0 and model.config.model_type not in DROP_PATH_MODELS):
        return
    if model.config.model_type not in DROP_PATH_MODELS:
        raise RunError(
            f"model.drop_path_rate cannot drop layers of {model.config.model_type} models; it goes with "
            f"{', '.join(DROP_PATH_MODELS)}. Leave it out"
        )
    layers = [one for one in model.modules() if isinstance(getattr(one, "drop_path", None), nn.Module)]
    for layer, drop in zip(layers, _build_drops(rate, len(layers))):
        layer.drop_path = drop
    if not layers and rate:
        _, encoder = find_encoder(model, "model.drop_path_rate")
        for layer, drop in zip(encoder, _build_drops(rate, len(encoder))):
            layer.dropout = nn.Sequential(cast(nn.Module, layer.dropout), drop)


def _build_drops(rate: float, layers: int) -> list[StochasticDepth]:
    return [StochasticDepth(rate * number / max(1, layers - 1), "row") for number in range(layers)]
