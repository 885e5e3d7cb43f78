"""The head of a classifier: which layer it is, and a model of which nothing else learns."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from vit_finetune.run import RunError

HEAD = re.compile(r"^(?:_orig_mod\.)?(?:classifier|head|dist_head|fc|score)\.")
"""What transformers' image classifiers call the module that turns the encoder's features into logits.

Compiled, a model stands below `_orig_mod`.
"""


def is_in_head(name: str) -> bool:
    """Whether a parameter of this name belongs to the head of a classifier, and not to its encoder."""
    return HEAD.match(name) is not None


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The linear layer whose output is the logits.

    Raises:
        RunError: there is none, or more than one.
    """
    found = [
        module
        for child in list(model.children())[1:]  # the first is the encoder
        for module in child.modules()
        if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
    ]
    if len(found) != 1:
        raise RunError(
            f"{type(model).__name__} has {len(found)} linear layers of {model.config.num_labels} logits "
            f"after its encoder, so it is not known which is its head; expected one. Write model.method: full"
        )
    return found[0]


def freeze_encoder(model: PreTrainedModel) -> None:
    """Lets only the head learn: all else keeps its weights, without dropout and with running statistics.

    Raises:
        RunError: the model has no head of its own.
    """
    head = head_of(model)
    for child in model.children():
        if any(module is head for module in child.modules()):
            continue
        child.requires_grad_(False)
        child.eval()
        # `model.train()`, which the Trainer says before each step, goes through all children.
        child.train = _stays_as_it_is.__get__(child)


def _stays_as_it_is(module: nn.Module, mode: bool = True) -> Any:
    return module
