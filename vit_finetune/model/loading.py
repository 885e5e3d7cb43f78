"""A model and its image processor: pretrained or from a config, at any resolution, with only the head new."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import (
    AutoConfig,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
from transformers.utils import logging

from vit_finetune.hub_repos import commit_of, download_model, parse_hub_id, quiet_client
from vit_finetune.model.lora import (
    add_lora,
    has_lora,
    is_adapter,
    load_adapter,
    merge_lora,
    read_adapter,
)
from vit_finetune.model.processing import (
    build_processor,
    compact_size,
    processor_size,
    read_processor,
    set_image_size,
    side_lengths,
)
from vit_finetune.model.resolution import check_divides, resize_model
from vit_finetune.recipe import ModelConfig
from vit_finetune.run import CALIBRATION_KEY, Run, RunError

HEADS = re.compile(r"(^|\.)(classifier|cls_classifier|distillation_classifier|head|fc|pooler)\.")
"""Weights that only a checkpoint may have: its old head, and the pooler that classifiers lack."""


def load_model(
    config: ModelConfig,
    labels: Sequence[str],
    attn_implementation: str | None = None,
    multi_label: bool = False,
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A classifier of these classes, in float32, and the image processor that goes with it.

    A pretrained model gets a new head (drawn from torch's global generator) unless its own has exactly these
    classes in this order. Another `image_size` interpolates the position embeddings here, once: the saved
    model needs no flag.

    Args:
        config: the recipe's section.
        labels: class names in id order.
        attn_implementation: transformers' name of the attention kernel; its own choice if None.
        multi_label: whether an image may have several of them; the config says so, which makes pipelines
            give each label a probability of its own.

    Raises:
        RunError: no such checkpoint, no safetensors weights, weights that do not fit, an unknown
            key of `config`, or an image size that the patches do not divide.
    """
    if config.config is not None:
        model_config = _build_config(config, labels, multi_label)
        model = _class_of(model_config)._from_config(model_config, attn_implementation=attn_implementation)
        return model, build_processor(config, side_lengths(model_config.image_size), None)
    assert config.path is not None
    path = _at_hand(config.path, config.revision)
    with quiet_transformers():
        pretrained = _read_config(path)
        _check_weights(path)
        target = copy.deepcopy(pretrained)
        _set_labels(target, labels, multi_label)
        own_head = dict(pretrained.id2label) == dict(target.id2label)
        model, info = _from_pretrained(_class_of(pretrained), path, target, attn_implementation)
        _check_fit(path, model, info, head_may_be_new=not own_head)
        if not own_head:
            _renew_head(model)
        processor = read_processor(path)
    old_size = side_lengths(getattr(pretrained, "image_size", None) or processor_size(processor))
    new_size = side_lengths(config.image_size) if config.image_size else old_size
    check_divides(pretrained, new_size)
    if new_size != old_size:
        model = resize_model(model, old_size, new_size)
    set_image_size(model.config, new_size)  # which a ResNet's does not say
    return model, build_processor(config, new_size, processor)


def load_skeleton(config: ModelConfig) -> PreTrainedModel:
    """The pretrained classifier of a section, with the head that it has and without weights in memory.

    Raises:
        RunError: no such checkpoint, or none of a classifier.
    """
    assert config.path is not None
    with quiet_transformers():
        pretrained = _read_config(_at_hand(config.path, config.revision))
        with torch.device("meta"):
            return _class_of(pretrained)(pretrained)


def load_checkpoint(path: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A fine-tuned model as it was saved, in float32 and evaluation mode, and its image processor.

    Args:
        path: a model folder or a Hub id; `owner/name@revision` names a branch, tag or commit.

    Raises:
        RunError: not a model folder, not to be had from the Hub, no safetensors weights, or weights that are
            not exactly the model's.
    """
    path = _at_hand(path)
    if is_adapter(Path(path)):
        return _load_beside_base(Path(path))
    with quiet_transformers():
        config = _read_config(path)
        _check_weights(path)
        model, info = _from_pretrained(_class_of(config), path, config, None)
        _check_fit(path, model, info, head_may_be_new=False)
        return model.eval(), read_processor(path)


def _load_beside_base(folder: Path) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A model of which the folder holds what LoRA has learnt, merged into the checkpoint that it names."""
    settings = read_adapter(folder)
    with quiet_transformers():
        config = _read_config(str(folder))
        processor = read_processor(str(folder))
    labels = [config.id2label[number] for number in range(config.num_labels)]
    settings = settings.model_copy(update={"image_size": processor_size(processor)})
    try:
        model, _ = load_model(settings, labels, multi_label=config.problem_type == MULTI_LABEL)
    except RunError as error:
        raise RunError(f"{folder} is an adapter to {settings.path}: {error}") from error
    add_lora(model, settings)
    load_adapter(model, folder)
    merge_lora(model)
    model.name_or_path = str(folder)  # what it is, and not what it was trained beside
    for key in FOUND:
        if hasattr(config, key):
            setattr(model.config, key, getattr(config, key))
    return model.eval(), processor


def restore_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Puts a checkpoint's weights into a live model: every tensor, and nothing else.

    The Trainer's own way ignores tensors whose names changed between live module and file, which for ViT is
    nearly all of them (transformers issue 48805); `from_pretrained` knows the conversion.

    Raises:
        RunError: a tensor is missing, left over or of another shape.
    """
    if has_lora(model):
        load_adapter(model, checkpoint)
        return
    with quiet_transformers():
        _check_weights(str(checkpoint))
        saved, info = _from_pretrained(type(model), str(checkpoint), copy.deepcopy(model.config), None)
        _check_fit(str(checkpoint), saved, info, head_may_be_new=False)
    # Not load_state_dict: where the weights are divided over the processes (FSDP), each takes its part.
    options = StateDictOptions(full_state_dict=True, strict=True)
    set_model_state_dict(model, saved.state_dict(), options=options)


# --------------------------------------------------------------------------- from scratch


def _build_config(config: ModelConfig, labels: Sequence[str], multi_label: bool) -> PreTrainedConfig:
    values = dict(config.config or {})
    model_type = str(values.pop("model_type", "vit"))
    if config.image_size is not None:
        if values.get("image_size") not in (None, config.image_size):
            raise RunError("model.image_size and model.config.image_size differ; write one of them")
        values["image_size"] = compact_size(side_lengths(config.image_size))
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError:
        raise RunError(
            f"model.config.model_type: transformers knows no {model_type!r}; expected vit, deit, resnet …"
        ) from None
    _class_of(default)
    known = {field.name for field in dataclasses.fields(default)} | {"image_size"}
    for key in values:
        if key in ("num_labels", "id2label", "label2id", "problem_type"):
            raise RunError(f"model.config.{key}: the classes come from the data; leave it out")
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise RunError(f"model.config.{key} is not a key of {type(default).__name__}{hint}")
    try:
        built = type(default)(**values)
    except (ValueError, TypeError, StrictDataclassFieldValidationError) as error:
        raise RunError(f"model.config: {str(error.__cause__ or error).strip()}") from None
    width, heads = getattr(built, "hidden_size", 0), getattr(built, "num_attention_heads", 1)
    # Builds today, but other versions of transformers refuse to load it.
    if isinstance(heads, int) and width % heads:
        raise RunError(f"model.config: hidden_size={width} is not a multiple of the {heads} attention heads")
    size = side_lengths(getattr(built, "image_size", None) or 224)
    check_divides(built, size)
    set_image_size(built, size)
    _set_labels(built, labels, multi_label)
    return built


MULTI_LABEL = "multi_label_classification"
"""transformers' `problem_type` of a model whose images may have several labels."""
FOUND = (CALIBRATION_KEY, "thresholds")
"""Keys of a config that hold what was found on the validation images, with these weights."""


def is_multi_label(model: PreTrainedModel) -> bool:
    """Whether a model gives each label a probability of its own."""
    return bool(model.config.problem_type == MULTI_LABEL)


def _set_labels(config: PreTrainedConfig, labels: Sequence[str], multi_label: bool) -> None:
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    # Written down, because the first loss computed would otherwise decide it by the labels' type.
    config.problem_type = MULTI_LABEL if multi_label else "single_label_classification"
    for key in FOUND:
        config.__dict__.pop(key, None)  # a checkpoint's


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """transformers' image classifier of an architecture."""
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise RunError(
            f"{config.model_type} models have no image classifier in transformers; expected vit, deit, "
            f"dinov2, swin, resnet, convnext …"
        )
    found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


# --------------------------------------------------------------------------- pretrained


def _at_hand(path: str, revision: str | None = None) -> str:
    """A model folder on this machine: the one that is named, or the Hub's in the cache.

    Raises:
        RunError: there is no such folder, and no such model on the Hub.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if (run := Run(folder)).exists() and not (folder / "config.json").is_file():
            raise RunError(f"{path} is a run, and no model folder: write {run.model}")
        return str(folder)
    if (run := Run(folder.parent)).exists() and folder == run.model:  # and no "photos/model" of the Hub
        raise RunError(f"{run.path}: the run has no model yet. Continue it with `train … --resume`")
    named = parse_hub_id(path)
    if named is None:
        raise RunError(f"{path}: no such model folder. Expected one, or a Hub id (owner/name[@revision])")
    try:
        with quiet_client():
            folder = download_model(named[0], revision or named[1])
    except RunError as error:
        raise RunError(f"{error}. No folder of that name is on this machine either") from error
    if not is_adapter(folder) and not any(folder.glob("model*.safetensors")):
        raise RunError(
            f"{path}: there are no safetensors weights in this repository. Weights in pickles can run code "
            f"when they are loaded, and are not downloaded"
        )
    return str(folder)


def _read_config(path: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{path}: not a model folder that transformers can read: {error}") from error


def _check_weights(path: str) -> None:
    """Refuses folders without weights, and weights in pickles, which can run code when they are loaded."""
    folder = Path(path)
    if any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return
    pickles = sorted(
        file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    )
    if pickles:
        raise RunError(
            f"{path}: the weights are pickles ({', '.join(pickles)}), which can run code when loaded: "
            f"refused. Expected model.safetensors; convert them where you trust their origin"
        )
    raise RunError(f"{path}: there are no weights; expected model.safetensors beside config.json")


def _from_pretrained(
    cls: type[PreTrainedModel], path: str, config: PreTrainedConfig, attn: str | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        model, info = cls.from_pretrained(
            path,
            config=config,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation=attn,
            ignore_mismatched_sizes=True,  # so that all of them are known, and `_check_fit` can name them
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(f"{path}: the weights cannot be loaded: {error}") from error
    except Exception as error:  # safetensors' own class, raised for a damaged file
        if type(error).__name__ != "SafetensorError":
            raise
        raise RunError(f"{path}: the weights file is damaged: {error}") from error
    return model, info


def _renew_head(model: PreTrainedModel) -> None:
    """Draws the weights outside the encoder anew: a head of as many other classes would load in silence."""
    base = model.base_model_prefix
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own and name != base and not name.startswith(f"{base}."):
            for parameter in own:
                parameter.__dict__.pop("_is_hf_initialized", None)  # or it would be taken for loaded
            model._init_weights(module)


def _check_fit(path: str, model: PreTrainedModel, info: dict[str, Any], head_may_be_new: bool) -> None:
    """Raises RunError unless the weights outside the head are the checkpoint's, each and only."""
    base = f"{model.base_model_prefix}."
    mismatched = {item[0] if isinstance(item, tuple) else item: item for item in info["mismatched_keys"]}

    def outside_head(names: Any) -> list[str]:
        return sorted(name for name in names if not head_may_be_new or name.startswith(base))

    problems = {
        "missing": outside_head(info["missing_keys"]),
        "of another shape": outside_head(mismatched),
        "unexpected": sorted(
            name for name in info["unexpected_keys"] if not (head_may_be_new and HEADS.search(name))
        ),
    }
    found = [
        f"{len(names)} {what} ({', '.join(names[:5])}{' …' if len(names) > 5 else ''})"
        for what, names in problems.items()
        if names
    ]
    if found:
        raise RunError(
            f"{path}: the weights do not fit {type(model).__name__}: {'; '.join(found)}. "
            + ("Only the head may be new" if head_may_be_new else "Expected exactly the model's weights")
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own log lines, load reports and bars; what matters of them is said by us."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """Architecture, parameters, image size in pixels; where there are patches, tokens per image.

    LoRA's matrices are not counted, since they are merged. Of a model from the Hub also `revision`, the
    commit that it was loaded from.
    """
    size = side_lengths(model.config.image_size) if getattr(model.config, "image_size", None) else None
    facts: dict[str, Any] = {
        "architecture": type(model).__name__,
        "parameters": sum(one.numel() for name, one in model.named_parameters() if ".lora_" not in name),
        "image_size": list(size) if size else None,
    }
    patch = getattr(model.config, "patch_size", None)
    positions = next(
        (p for name, p in model.named_parameters() if name.endswith("position_embeddings")), None
    )
    if positions is not None:
        facts["tokens"] = positions.shape[1]
    elif patch is not None and size:
        ph, pw = side_lengths(patch)
        facts["tokens"] = (size[0] // ph) * (size[1] // pw)
    if commit := commit_of(model.name_or_path):
        facts["revision"] = commit
    return facts
