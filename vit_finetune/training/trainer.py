"""The Trainer for images: exact restores, losses that take soft targets, groups that spare the positions."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback

from vit_finetune.data.streaming.batches import NO_LABEL, StreamBatches, StreamLoader
from vit_finetune.data.transforms import EpochSampler, EvaluationImages, TrainingImages, collate, normalize
from vit_finetune.model.loading import restore_weights
from vit_finetune.recipe import TrainingConfig
from vit_finetune.run import RunError
from vit_finetune.training.hardware import Hardware, share_casts
from vit_finetune.training.loading import Loading
from vit_finetune.training.optim import build_parameter_groups


@dataclass
class ViTTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments`, and what the Trainer lacks for Vision Transformers."""

    layer_decay: float = field(
        default=1.0, metadata={"help": "Learning rate of each layer by that of the layer above it; 1 is off."}
    )


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
        "per_device_eval_batch_size": eval_batch_size,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "disable_tqdm": True,  # our own bar shows loss and images/s
    }
    if not loading.num_workers:  # torch refuses it where no process is started
        values["dataloader_multiprocessing_context"] = None
    # The Trainer's new name for it; the old one warns.
    for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        if name in values:
            values[name.replace("gradient", "activation")] = values.pop(name)
    try:
        arguments = ViTTrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise RunError(f"training: {error}") from error
    for name in arguments.report_to:
        if name not in get_available_reporting_integrations():
            raise RunError(f"training.report_to: {name} is not installed here; install it, or write `none`")
    return arguments


class ViTTrainer(Trainer):
    """transformers' Trainer over `TrainingImages` or `StreamBatches`, and `EvaluationImages`.

    Args:
        model: a classifier, in float32.
        image_processor: the model's; normalises batches on the device, and is saved with every checkpoint.
        args: what to do.
        train_dataset: training images.
        eval_dataset: validation images.
        compute_metrics: from the Trainer's `EvalPrediction` of the validation images to their scores by name.
        callbacks: more of the Trainer's callbacks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        image_processor: BaseImageProcessor,
        args: ViTTrainingArguments,
        train_dataset: TrainingImages | StreamBatches,
        eval_dataset: EvaluationImages,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.optimizer: torch.optim.Optimizer | None
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=image_processor,
            data_collator=collate,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        if args.bf16 and args.device.type == "cpu":
            share_casts(model)
        self.image_processor = image_processor
        self.seen_images = 0
        self.seconds = {"images": 0.0, "evaluation": 0.0, "checkpoints": 0.0}
        # The loss below is a sum over the accumulated batch's images by their number.
        self.loss_is_scaled_for_ga = True

    # -- where the time goes

    seconds: dict[str, float]
    """Seconds that this process spent waiting for `images`, in `evaluation` and writing `checkpoints`."""

    seen_images: int
    """Images that this process trained on, each epoch's counted again."""

    @contextmanager
    def _clocked(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, clocked: the next batches of a step."""
        with self._clocked("images"):
            batches, count = super().get_batch_samples(*args, **kwargs)
        self.seen_images += sum(count_images(batch["labels"]) for batch in batches)
        return batches, count

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's, clocked.

        Its loader draws from torch's generator, which dropout shares, and in a resumed run not at the same
        times: what it draws is put back.
        """
        with self._clocked("evaluation"), torch.random.fork_rng(devices=[]):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
            return metrics

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's; of a run resumed at its end none, where the Trainer would make a step too many."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    # -- data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of the training images; those of a stream are divided over the processes already.

        Starting loader processes takes a random number, which a resumed run does at another epoch: not from
        the generator that dropout uses.
        """
        if isinstance(self.train_dataset, StreamBatches):
            return StreamLoader(self.train_dataset)
        loader: DataLoader[Any] = super().get_train_dataloader()
        getattr(loader, "base_dataloader", loader).generator = torch.Generator()
        return loader

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Images in an epoch of all processes; of a stream that does not tell, as many as fit."""
        batches = dataloader.dataset
        if isinstance(batches, StreamBatches):
            return batches.num_images or len(batches) * batches.batch_size * self.args.world_size
        return int(super().num_examples(dataloader))

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return EpochSampler(len(self.train_dataset), seed)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Batches on the device, normalised there: a quarter of the bytes travel."""
        inputs = super()._prepare_inputs(inputs)
        if inputs["pixel_values"].dtype == torch.uint8:
            inputs = {**inputs, "pixel_values": normalize(inputs["pixel_values"], self.image_processor)}
        return inputs

    # -- loss

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> torch.Tensor | None:
        """Images in the accumulated batch of all processes; the Trainer counts soft targets as tokens."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        count = torch.tensor(sum(count_images(batch["labels"]) for batch in batch_samples), device=device)
        count = self.accelerator.gather(count).sum() if self.args.world_size > 1 else count
        return count.clamp(min=1)  # where all that was streamed could not be read, the loss is 0, not 0 / 0

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy of the batch, smoothed while training; with the outputs where they are asked for."""
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        training = model.training
        loss = cross_entropy(
            outputs.logits,
            inputs["labels"],
            self.args.label_smoothing_factor if training else 0.0,
            num_items_in_batch if training else None,
        )
        if training and num_items_in_batch is not None:
            loss = (
                loss * self.args.world_size
            )  # DDP averages the gradients of what was divided by the sum already
        return (loss, outputs) if return_outputs else loss

    # -- optimizer

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer over groups that spare positions, class token, norms and biases; built once."""
        optimizer: torch.optim.Optimizer | None = self.optimizer
        if optimizer is None:
            model = self.model if model is None else model
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            if not isinstance(cls, type) or {"params", "model", "optimizer_dict"} & set(kwargs):
                raise RunError(
                    f"training.optim={self.args.optim.value} makes parameter groups of its own; expected an "
                    f"optimizer that takes groups, such as adamw_torch_fused"
                )
            groups = build_parameter_groups(
                model, self.args.learning_rate, self.args.weight_decay, self.args.layer_decay
            )
            self.optimizer = optimizer = cls(groups, **kwargs)
        return optimizer

    # -- checkpoints

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with self._clocked("checkpoints"):
                super()._save_checkpoint(model, trial)
        except BaseException:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # half a checkpoint is worse than none
            raise

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: PreTrainedModel | None = None
    ) -> None:
        restore_weights(model or self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        restore_weights(self.model, Path(self.state.best_model_checkpoint))

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """Every weight by name, on the main process; all processes call it, since each may hold a part (FSDP)."""
        weights: dict[str, torch.Tensor] = self.accelerator.get_state_dict(self.model)
        return weights


def count_images(labels: torch.Tensor) -> int:
    """How many of a batch are images, and do not only fill a place (`NO_LABEL`).

    Args:
        labels: class ids, int64 `(batch,)`, or target probabilities, float `(batch, classes)`.
    """
    return len(labels) if labels.is_floating_point() else int((labels != NO_LABEL).sum())


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    count: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross-entropy in nats: the mean over the batch, or the sum divided by `count`.

    Args:
        logits: `(batch, classes)`.
        labels: class ids, int64 `(batch,)`, of which `NO_LABEL` adds nothing, or target probabilities, float
            `(batch, classes)`.
        label_smoothing: share of every target spread over all classes, in [0, 1).
        count: number of images to divide by, of which these are a part.
    """
    if count is None:
        return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    total = torch.nn.functional.cross_entropy(
        logits, labels, label_smoothing=label_smoothing, reduction="sum"
    )
    return total / count
