"""The Trainer's arguments of a recipe, on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from vit_finetune.recipe import TrainingConfig
from vit_finetune.run import RunError
from vit_finetune.training.hardware import Hardware
from vit_finetune.training.loading import Loading


@dataclass
class ViTTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments`, and what the Trainer lacks for Vision Transformers."""

    layer_decay: float = field(
        default=1.0, metadata={"help": "Learning rate of each layer by that of the layer above it; 1 is off."}
    )
    head_lr_multiplier: float = field(
        default=1.0, metadata={"help": "Learning rate of the head by that of all else; 1 is off."}
    )
    ema_decay: float = field(
        default=0.0, metadata={"help": "What a step leaves of the average of the weights; 0 keeps none."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without a better score that end training; None is off."}
    )
    class_weights: str | dict[str, float] | None = field(
        default=None, metadata={"help": "Weights of classes in the loss by name, or `auto`; None is off."}
    )
    focal_gamma: float = field(default=0.0, metadata={"help": "γ of the focal loss; 0 is off."})

    teacher: str | None = field(
        default=None, metadata={"help": "Checkpoint of a teacher to distil from; None is off."}
    )
    distillation_temperature: float = field(
        default=2.0, metadata={"help": "What the logits are divided by before they are compared."}
    )
    distillation_weight: float = field(default=0.5, metadata={"help": "Share of the teacher in the loss."})

    @property
    def n_gpu(self) -> int:
        """One GPU for each process; the Trainer would spread a lone process over all, with DataParallel."""
        return min(1, int(super().n_gpu))


def build_arguments(
    training: TrainingConfig, hardware: Hardware, loading: Loading, output_dir: Path, eval_batch_size: int
) -> ViTTrainingArguments:
    """The Trainer's arguments of a recipe, on this machine.

    Args:
        training: the recipe's section.
        hardware: what was chosen for what the section leaves `auto`.
        loading: likewise, for the loader.
        output_dir: where checkpoints go.
        eval_batch_size: images per device and step of evaluation.

    Raises:
        RunError: values that do not go together.
    """
    names = set(TrainingConfig.model_fields) | training.model_fields_set
    values = {name: getattr(training, name) for name in names} | {
        "output_dir": str(output_dir),
        "use_cpu": hardware.use_cpu,
        "bf16": hardware.bf16,
        "fp16": hardware.fp16,
        "dataloader_num_workers": loading.num_workers,
        "dataloader_prefetch_factor": loading.prefetch_factor,
        "dataloader_pin_memory": loading.pin_memory,
        "dataloader_persistent_workers": training.dataloader_persistent_workers and loading.num_workers > 0,
        "per_device_train_batch_size": hardware.batch_size,
        "gradient_accumulation_steps": hardware.accumulation,
        "per_device_eval_batch_size": eval_batch_size,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "disable_tqdm": True,  # our own bar shows loss and images/s
    }
    if "log_level_replica" not in training.model_fields_set:
        values["log_level_replica"] = "error"  # the other processes are as quiet as the main one
    if not loading.num_workers:  # torch refuses it where no process is started
        values["dataloader_multiprocessing_context"] = None
    # The Trainer's new name for it; the old one warns.
    for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        if name in values:
            values[name.replace("gradient", "activation")] = values.pop(name)
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # the launcher's would be taken where ours is fp32
        os.environ["ACCELERATE_MIXED_PRECISION"] = (
            "bf16" if hardware.bf16 else "fp16" if hardware.fp16 else "no"
        )
    try:
        arguments = ViTTrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise RunError(f"training: {error}") from error
    for name in arguments.report_to:
        if name not in get_available_reporting_integrations():
            raise RunError(f"training.report_to: {name} is not installed here; install it, or write `none`")
    return arguments
