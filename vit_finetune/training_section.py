"""The recipe's section `training:`: TrainingArguments' own fields, with defaults for images, and ours."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, create_model, field_validator, model_validator

from vit_finetune.sections import Fraction, Positive, Probability, Section
from vit_finetune.trainer_fields import read_trainer_fields


class TrainingConfig(Section):
    """Section `training:`: TrainingArguments' fields, with defaults that suit images, and ours.

    The fields below are those whose defaults differ from the Trainer's or that it lacks; `training_section()`
    adds the others. `auto` is decided for the machine by `training.hardware`.
    """

    output_dir: str | None = None
    """The run folder; `runs/<recipe name>` if unset."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 5.0
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = 1e-4
    """The highest of the schedule. `auto` finds it by a range test before training (Smith, 2017): steps at
    rates that grow from 1e-7 to 10, and of the rates at which the loss falls the one in the middle."""
    lr_scheduler_type: str = "cosine"
    warmup_steps: Annotated[float, Field(ge=0)] = 0.05
    """Steps, or below 1 a share of all steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of each layer by that of the layer above it (Bao et al., 2021, BEiT); 1 is off."""
    head_lr_multiplier: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of the head by `learning_rate`, with and without `layer_decay`: above 1 it learns faster
    than the pretrained layers; 1 is off."""
    ema_decay: Fraction = 0.0
    """Share of the exponential moving average of the weights that each step of the optimizer leaves, such as
    0.999, less in the first steps: at most (1 + t) / (10 + t) in step t (Polyak and Juditsky, 1992; warmed up
    as TensorFlow's). The average is validated, chosen and published in place of the weights; it takes once
    more their memory. 0 is off."""
    label_smoothing_factor: Fraction = 0.0
    class_weights: Literal["auto"] | dict[str, float] | None = None
    """Weight of each class in the training loss, above 0, by its name; classes that are not named have 1.
    `auto` is training images / (classes × images of the class), scikit-learn's `balanced`: 1 on average over
    the images. The weighted losses are divided by the number of images, not by the sum of the weights."""
    focal_gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """γ of the focal loss (Lin et al., 2017): what is right already counts less, by (1 - p)^γ, p being the
    probability that the model gives to the class; 0 is off, 2 is the paper's."""
    teacher: str | None = None
    """A checkpoint of the same classes, a folder or a Hub id (`owner/name@revision`), that the model learns
    from beside the labels (distillation; Hinton et al., 2015); `null` is off."""
    distillation_temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    """T: the logits of both are divided by it before they are compared; higher shows more of what the teacher
    thinks of the other classes."""
    distillation_weight: Probability = 0.5
    """α, share of the teacher in the loss: (1 - α) · cross-entropy + α · T² · KL(teacher ‖ student)."""
    per_device_train_batch_size: Positive | Literal["auto"] = 32
    gradient_accumulation_steps: Positive = 1
    bf16: bool | Literal["auto"] = "auto"
    fp16: bool | Literal["auto"] = "auto"
    dataloader_num_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    dataloader_persistent_workers: bool = True
    """Loader processes live through all epochs."""
    dataloader_drop_last: Literal[False] = False
    """Every image counts, in training and in evaluation."""
    use_cpu: bool = False
    ddp_timeout: Positive = 600
    """Seconds that a process waits for another that does not answer."""
    ddp_find_unused_parameters: bool | None = None
    """Whether to look in every step for weights without a gradient; `null`: where the model has any."""
    logging_nan_inf_filter: bool = False
    """Whether to leave losses that are not finite out of the log; they end training in any case."""
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: Positive | None = 2
    load_best_model_at_end: bool = True
    metric_for_best_model: Literal[
        "accuracy", "macro_f1", "balanced_accuracy", "loss", "mean_average_precision", "micro_f1"
    ] = "accuracy"
    """Of the validation images; chooses the published weights. With `data.multi_label`:
    `mean_average_precision`, which is then the default, `macro_f1`, `micro_f1` or `loss`."""
    early_stopping_patience: Positive | None = None
    """Evaluations in a row without a better score than before that end training; `null` trains to the end."""
    optim: str = "adamw_torch_fused"
    logging_steps: Annotated[float, Field(gt=0)] = 10
    report_to: str | list[str] | None = "none"
    seed: int = 42

    @field_validator("class_weights", mode="before")
    @classmethod
    def _weighs_by_name(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name, weight in value.items():
            if not isinstance(name, str | int) or isinstance(name, bool):
                raise ValueError(f"a class is named by text, found {name!r}: write the name in quotes")
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not 0 < weight < float("inf"):
                raise ValueError(f"the weight of {name} is {weight!r}: expected a number above 0")
        return {str(name): weight for name, weight in value.items()}  # YAML reads the class 7 as a number

    @model_validator(mode="after")
    def _saves_where_it_evaluates(self) -> TrainingConfig:
        if self.load_best_model_at_end and self.save_strategy not in ("best", self.eval_strategy):
            raise ValueError(
                f"the best checkpoint can only be chosen where checkpoints are saved when they are "
                f"evaluated, but eval_strategy is {self.eval_strategy} and save_strategy is "
                f"{self.save_strategy}. Write the same for both, or load_best_model_at_end: false"
            )
        return self

    @model_validator(mode="after")
    def _stops_at_evaluations(self) -> TrainingConfig:
        if self.early_stopping_patience and (self.eval_strategy == "no" or not self.load_best_model_at_end):
            raise ValueError(
                "early_stopping_patience ends training some evaluations after the best one, whose weights "
                "are then published: it needs eval_strategy (epoch or steps) and load_best_model_at_end: true"
            )
        return self

    @model_validator(mode="after")
    def _distils_from_a_teacher(self) -> TrainingConfig:
        for name in ("distillation_temperature", "distillation_weight"):
            if not self.teacher and getattr(self, name) != TrainingConfig.model_fields[name].default:
                raise ValueError(
                    f"{name} is about a teacher, and there is none: write teacher (a checkpoint of the same "
                    f"classes), or leave it out"
                )
        return self

    @model_validator(mode="after")
    def _copies_whole_weights(self) -> TrainingConfig:
        if self.ema_decay and self.optim.startswith("schedule_free"):
            raise ValueError(
                f"optim={self.optim} averages the weights itself: leave out ema_decay, or write another optim"
            )
        for name in ("fsdp", "deepspeed"):
            if self.ema_decay and getattr(self, name, None):
                raise ValueError(f"ema_decay needs the whole model in each process: leave it out, or {name}")
            if self.learning_rate == "auto" and getattr(self, name, None):
                raise ValueError(
                    f"learning_rate=auto tests a copy of the model that is whole in each process: write a "
                    f"number, or leave out {name}"
                )
        return self


REFUSED_TRAINING_KEYS = {
    "push_to_hub": "pushing is configured in `hub:`",
    "per_device_eval_batch_size": "write evaluation.batch_size",
    "resume_from_checkpoint": "use `vit-finetune train --resume`",
    "remove_unused_columns": "the image columns are always kept",
    "label_names": "the label column is data.label_column",
    "disable_tqdm": "progress goes to the terminal where there is one",
    "activation_checkpointing": "write gradient_checkpointing",
    "activation_checkpointing_kwargs": "write gradient_checkpointing_kwargs",
    "auto_find_batch_size": "write per_device_train_batch_size: auto",
    "do_train": "use the verbs `train` and `evaluate`",
    "do_eval": "use the verbs `train` and `evaluate`",
    "do_predict": "use the verbs `train` and `predict`",
    "local_rank": "the launcher sets it",
}
"""Fields of TrainingArguments that a recipe says elsewhere or not at all; and what to write."""


METRICS = ("accuracy", "macro_f1", "balanced_accuracy", "loss")
"""Words of `metric_for_best_model` where images have one class."""
MULTI_LABEL_METRICS = ("mean_average_precision", "macro_f1", "micro_f1", "loss")
"""Likewise with `data.multi_label`; the first is the default."""


@functools.cache
def training_section(multi_label: bool = False) -> type[TrainingConfig]:
    """`TrainingConfig` with the other fields of the installed `transformers.TrainingArguments`.

    Args:
        multi_label: whether the recipe's images may have several labels, which have a metric of their own.
    """
    fields: dict[str, Any] = {}
    for name, (kind, default) in read_trainer_fields().items():
        if name.startswith(("hub_", "trackio_")) or name in REFUSED_TRAINING_KEYS:
            continue
        ours = TrainingConfig.model_fields.get(name)
        if ours is None:
            fields[name] = (kind, default)
        elif get_args(kind):  # one of a few words: the Trainer's words, our default
            fields[name] = (kind, ours.default)
    if multi_label:
        words = TrainingConfig.model_fields["metric_for_best_model"].annotation
        fields["metric_for_best_model"] = (words, MULTI_LABEL_METRICS[0])
    return create_model("TrainingConfig", __base__=TrainingConfig, __module__=__name__, **fields)
