"""What of a model trains: everything, or its head alone."""

from __future__ import annotations

from transformers import PreTrainedModel

from vit_finetune.model.head import freeze_encoder
from vit_finetune.recipe import ModelConfig


def adapt(model: PreTrainedModel, config: ModelConfig) -> None:
    """Makes a model ready for training as its section says; what is saved of it is stock.

    Args:
        model: as it was loaded.
        config: the recipe's section.

    Raises:
        RunError: it cannot be trained so.
    """
    if config.method != "full":
        freeze_encoder(model)
