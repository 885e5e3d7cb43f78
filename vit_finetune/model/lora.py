"""LoRA: small matrices that learn beside frozen weights, in PEFT's layers and its form on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from vit_finetune.files import sha256_of
from vit_finetune.hub_repos import commit_of, parse_hub_id
from vit_finetune.model.head import head_of
from vit_finetune.recipe import ModelConfig
from vit_finetune.run import RunError

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
"""PEFT's names of an adapter's two files."""
BASE = "base_sha256"
"""In the header of an adapter's weights: the hash of the checkpoint's that they belong beside."""
OTHER_KINDS = ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern", "layers_to_transform")
"""PEFT's settings of LoRAs that are computed otherwise."""
PREFIX = "base_model.model."
"""What PEFT has before the name of each weight of an adapter."""


def add_lora(model: PreTrainedModel, config: ModelConfig) -> None:
    """Freezes a model but for its head, and puts matrices that learn beside those of some layers.

    A layer of weights W then gives x Wᵀ + alpha / r · (x Aᵀ) Bᵀ, with A (r, in) drawn and B (out, r) zero, so
    that at first nothing changes (Hu et al., 2022). The head, new where the classes are, learns whole.

    Args:
        model: pretrained, changed in place; once.
        config: the recipe's section.

    Raises:
        RunError: peft is not installed, a target matches no layer or the head, or the model has running
            statistics.
    """
    peft = import_peft()
    head = _head_name(model)
    check_targets(model, config.lora_targets)
    settings = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules=list(config.lora_targets),
        base_model_name_or_path=(parse_hub_id(config.path) or [config.path])[0] if config.path else None,
        revision=commit_of(model.name_or_path),
    )
    peft.inject_adapter_in_model(settings, model)
    for module in model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # to float32 and, under autocast, back again
    model.get_submodule(head).requires_grad_(True)
    settings.modules_to_save = [head]  # for who loads it; set before, PEFT would wrap the head
    settings.base = _sum_base(model)  # now, since its folder may change while the model trains; not saved


def import_peft() -> Any:
    """The library.

    Raises:
        RunError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise RunError(
            "model.method: lora needs the library peft: pip install 'vit-finetune[lora]'"
        ) from None
    return peft


def has_lora(model: nn.Module) -> bool:
    """Whether a model has LoRA's matrices that are not merged."""
    return hasattr(model, "peft_config")


def check_targets(model: PreTrainedModel, targets: Sequence[str]) -> None:
    """Makes sure that each target names layers that LoRA can stand beside.

    Args:
        model: a classifier, perhaps without weights in memory.
        targets: ends of the names of linear layers and convolutions, such as `q_proj`.

    Raises:
        RunError: a target matches none, the head or a convolution of groups; or the model has running
            statistics, which would change beside what is frozen.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise RunError(
            f"model.method: lora keeps all but its own matrices as it is, and {type(model).__name__} has "
            f"running statistics. Write model.method: full, or head"
        )
    head = _head_name(model)
    layers = {n: module for n, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    grouped = {name for name, module in layers.items() if getattr(module, "groups", 1) > 1}
    for target in targets:
        matched = [name for name in layers if name == target or name.endswith(f".{target}")]
        if not matched:
            useful = [name for name in layers if name not in grouped and not _is_below(name, head)]
            ends = dict.fromkeys(name.rpartition(".")[2] for name in useful)
            raise RunError(
                f"model.lora_targets: {target!r} matches no layer of {type(model).__name__}; expected some "
                f"of {', '.join(ends)}"
            )
        if any(_is_below(name, head) for name in matched):
            raise RunError(f"model.lora_targets: {target!r} is the head, which learns whole: leave it out")
        if grouped.intersection(matched):  # PEFT trains beside them, and has no product to add
            raise RunError(
                f"model.lora_targets: {target!r} is a convolution of groups, which LoRA's matrices cannot be "
                f"merged into: leave it out"
            )


def _head_name(model: PreTrainedModel) -> str:
    """The name of the module, directly below the model, that the head is in."""
    head = head_of(model)
    children: dict[str, nn.Module] = dict(model.named_children())
    return next(name for name in children if any(module is head for module in children[name].modules()))


def _is_below(name: str, head: str) -> bool:
    return name == head or name.startswith(f"{head}.")


# --------------------------------------------------------------------------- on disk


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Writes what has learnt, LoRA's matrices and the head, as `peft.PeftModel.from_pretrained` reads it.

    Args:
        model: as `add_lora` made it.
        folder: is made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (settings,) = model.peft_config.values()
    settings.save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in _learnt(model)}
    # A second entry would come before or after it by chance, and equal weights would be other bytes.
    save_file(tensors, folder / WEIGHTS, metadata={BASE: settings.base})


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Puts what `save_adapter` wrote back into a model that `add_lora` made: every tensor, and nothing else.

    Raises:
        RunError: a tensor is missing, left over or of another shape, or the frozen weights are not those
            that it was trained beside.
    """
    own = dict(_learnt(model))
    (settings,) = model.peft_config.values()
    base, found = _read_weights(folder)
    if base != settings.base:
        raise RunError(
            f"{folder}: it was trained beside other weights than {model.name_or_path} has now. Bring "
            f"those back, or start another run"
        )
    differing = sorted(own.keys() ^ found.keys())
    differing += [name for name in own.keys() & found.keys() if own[name].shape != found[name].shape]
    if differing:
        raise RunError(
            f"{folder}: the adapter's weights do not fit {type(model).__name__}: {', '.join(differing[:5])}"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[name])


def _read_weights(folder: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The hash of what an adapter belongs beside, and its tensors by name.

    Raises:
        RunError: they are not there, damaged, or not of ours.
    """
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            base = (file.metadata() or {}).get(BASE)
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder / WEIGHTS}: the adapter's weights cannot be read: {error}") from error
    if base is None:
        raise RunError(
            f"{folder}: its {WEIGHTS} does not say which weights it was trained beside, as those of "
            f"vit-finetune do. Load it with the library that wrote it, merge it, and save the whole model"
        )
    return base, found


def _learnt(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The live tensors of the matrices and the head, by PEFT's names of them."""
    head = _head_name(model)
    for name, tensor in model.state_dict().items():
        if ".lora_" in name or _is_below(name, head):
            yield PREFIX + name.replace(".default.", "."), tensor


def _sum_base(model: PreTrainedModel) -> str:
    """SHA-256 in hex of the weights' files of the checkpoint that a model was loaded from."""
    files = sorted(Path(model.name_or_path).glob("model*.safetensors"))
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no weights of a whole model."""
    return (folder / SETTINGS).is_file() and not any(folder.glob("model*.safetensors"))


def read_adapter(folder: Path) -> ModelConfig:
    """How the model is loaded that an adapter belongs to, from its settings.

    Args:
        folder: as `save_adapter` wrote it.

    Raises:
        RunError: they are not LoRA's, not those of its weights, or do not say which checkpoint it was
            trained beside; or the weights are not ours.
    """
    file = folder / SETTINGS
    _, weights = _read_weights(folder)
    try:
        values = json.loads(file.read_bytes())
        ranks = {len(tensor) for name, tensor in weights.items() if ".lora_A." in name}
        if others := [name for name in OTHER_KINDS if values.get(name)]:
            raise ValueError(f"{others[0]} is {values[others[0]]!r}, which is not read here")
        if values["peft_type"] != "LORA" or ranks != {values["r"]}:  # before as much memory is asked for
            raise ValueError(f"{values['peft_type']} of rank {values['r']!r}, which its weights are not")
        return ModelConfig(
            path=values["base_model_name_or_path"],
            revision=values["revision"],
            method="lora",
            lora_r=values["r"],
            lora_alpha=values["lora_alpha"],
            lora_targets=sorted(values["target_modules"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file}: not the settings of a LoRA adapter of a checkpoint: {error}") from None


# --------------------------------------------------------------------------- merging


def merge_lora(model: PreTrainedModel) -> None:
    """Adds LoRA's products to the weights that they stand beside; the model is a stock one again.

    Raises:
        RunError: the sums are not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            try:
                module.merge(safe_merge=True)
            except ValueError as error:
                raise RunError(f"{name}: merging LoRA's matrices gives NaN or infinity") from error
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config
