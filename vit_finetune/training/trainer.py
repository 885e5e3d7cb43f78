"""The Trainer for images: exact restores, losses that take soft targets, groups that spare the positions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import BaseImageProcessor, PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback, TrainerControl
from transformers.trainer_utils import EvalLoopOutput

from vit_finetune.data.augmentation import generator_of
from vit_finetune.data.batches import outlive_signals
from vit_finetune.data.mixing import mix
from vit_finetune.data.streaming.batches import StreamBatches
from vit_finetune.data.transforms import EvaluationImages, TrainingImages, collate, normalize
from vit_finetune.model.loading import is_multi_label
from vit_finetune.run import RunError
from vit_finetune.training.arguments import ViTTrainingArguments
from vit_finetune.training.callbacks import StopEarly, StopOnSignal
from vit_finetune.training.distillation import Teacher, distillation_loss
from vit_finetune.training.ema import WeightAverage
from vit_finetune.training.hardware import share_casts
from vit_finetune.training.images import build_loader
from vit_finetune.training.imbalance import count_classes, weigh_classes
from vit_finetune.training.loss import binary_cross_entropy, count_images, cross_entropy
from vit_finetune.training.optim import build_parameter_groups, leaves_weights_unused
from vit_finetune.training.resuming import ResumableTrainer


class ViTTrainer(ResumableTrainer):
    """transformers' Trainer over `TrainingImages` or `StreamBatches`, and `EvaluationImages`.

    What a step does depends on the seed, the step's number and its images alone: not on how many processes,
    batches and loader processes they are divided over, nor on where the run was resumed.

    Args:
        model: a classifier, in float32.
        image_processor: the model's; normalises batches on the device, and is saved with every checkpoint.
        args: what to do.
        train_dataset: training images.
        eval_dataset: validation images; None where nothing is evaluated.
        compute_metrics: from the Trainer's `EvalPrediction` of the validation images to their scores by name.
        mixing: mixes the images and targets of each training batch, as `build_mixing` makes it.
        teacher: to distil from, as `load_teacher` has it.
        stop: what listens for signals; joins the callbacks.
        callbacks: more of the Trainer's callbacks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        image_processor: BaseImageProcessor,
        args: ViTTrainingArguments,
        train_dataset: TrainingImages | StreamBatches,
        eval_dataset: EvaluationImages | None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        mixing: v2.Transform | None = None,
        teacher: Teacher | None = None,
        stop: StopOnSignal | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.optimizer: torch.optim.Optimizer | None
        self.control: TrainerControl
        if args.world_size > 1 and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = leaves_weights_unused(model)
        self.has_several_labels = is_multi_label(model)
        self.average = WeightAverage(args.ema_decay) if args.ema_decay else None
        early = StopEarly(args.early_stopping_patience) if args.early_stopping_patience else None
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=image_processor,
            data_collator=collate,
            compute_metrics=compute_metrics,
            callbacks=[*filter(None, [self.average, early, stop]), *(callbacks or [])],
        )
        self.remove_callback(PrinterCallback)
        if args.bf16 and args.device.type == "cpu":
            for one in [model, *([teacher.model] if teacher else [])]:
                share_casts(one)
        self.image_processor, self.mixing, self.stop = image_processor, mixing, stop
        names = [model.config.id2label[number] for number in range(model.config.num_labels)]
        held = train_dataset.labels if isinstance(train_dataset, TrainingImages) else None
        counts = count_classes(held, len(names)) if held and args.class_weights else None
        weights = weigh_classes(args.class_weights, names, counts)
        self.class_weights = None if weights is None else torch.tensor(weights, device=args.device)
        self.teacher = teacher
        if teacher:
            teacher.model.to(args.device)
        self.seen_images = 0
        self.seconds = {"images": 0.0, "evaluation": 0.0, "checkpoints": 0.0}
        self.batch_number = 0
        self.diverged = torch.zeros((), dtype=torch.bool, device=args.device)
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
        self.batch_number = 0
        return batches, count

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's, clocked, of the average of the weights where one is kept.

        Running statistics (batch norm) are those that are saved: of process 0.
        """
        average = self.average
        averaged = average.swapped_in() if average and average.averages else nullcontext()
        with self._clocked("evaluation"), averaged:
            for buffer in self.model.buffers() if self.args.world_size > 1 else ():
                torch.distributed.broadcast(buffer, 0)
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
            return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The Trainer's, with the mean loss of the images.

        Its own is of batches' means, cut to the number of images: with several processes and a smaller last
        batch it depends on who evaluated what, and the choice of the best checkpoint depends on it.
        """
        output = super().evaluation_loop(*args, **kwargs)
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if output.metrics and name in output.metrics and isinstance(output.predictions, np.ndarray):
            logits, labels = torch.from_numpy(output.predictions), torch.from_numpy(output.label_ids)
            loss = binary_cross_entropy if self.has_several_labels else cross_entropy
            output.metrics[name] = float(loss(logits.double(), labels))
        return output

    # -- data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This process's batches of the training images."""
        return build_loader(self.train_dataset, self.args)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        """The Trainer's."""
        loader: DataLoader[Any] = super().get_eval_dataloader(*args, **kwargs)
        getattr(loader, "base_dataloader", loader).worker_init_fn = outlive_signals
        return loader

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Images in an epoch of all processes; of a stream that does not tell, as many as fit."""
        batches = dataloader.dataset
        if isinstance(batches, StreamBatches):
            return batches.num_images or len(batches) * batches.batch_size * self.args.world_size
        return int(super().num_examples(dataloader))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Batches on the device, normalised there: a quarter of the bytes travel."""
        copied = self.args.dataloader_pin_memory  # from pinned memory, beside the computing
        inputs = {name: value.to(self.args.device, non_blocking=copied) for name, value in inputs.items()}
        if inputs["pixel_values"].dtype == torch.uint8:
            inputs = {**inputs, "pixel_values": normalize(inputs["pixel_values"], self.image_processor)}
        return inputs

    # -- steps

    batch_number: int
    """Of the next batch among those of this process that make up the step."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The Trainer's; random numbers of mixing and dropout depend on seed, step and the batch's place."""
        place = self.batch_number * self.args.world_size + self.args.process_index
        numbers = generator_of(self.args.seed, self.state.global_step, f"batch {place}")
        torch.manual_seed(numbers.getrandbits(63))
        self.batch_number += 1
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.diverged |= ~loss.isfinite()
        return loss

    # -- loss

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> torch.Tensor | None:
        """Images in the accumulated batch of all processes; the Trainer counts soft targets as tokens."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        if isinstance(self.train_dataset, TrainingImages):  # known without asking the others
            size, args = len(self.train_dataset), self.args
            most = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            first = self.state.global_step % -(-size // most) * most
            return torch.tensor(min(most, size - first), device=device)
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
        """Cross-entropy of the batch, or of each label; mixed, weighted, distilled … only while training.

        With the outputs where asked for.
        """
        if self.mixing is not None and model.training:
            pixel_values, labels = mix(self.mixing, inputs["pixel_values"], inputs["labels"])
            inputs = {**inputs, "pixel_values": pixel_values, "labels": labels}
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        args, several = self.args, self.has_several_labels
        if not model.training:
            loss = (binary_cross_entropy if several else cross_entropy)(outputs.logits, inputs["labels"])
            return (loss, outputs) if return_outputs else loss
        count = num_items_in_batch
        if several:
            loss = binary_cross_entropy(outputs.logits, inputs["labels"], count)
        else:
            loss = cross_entropy(
                outputs.logits,
                inputs["labels"],
                args.label_smoothing_factor,
                count,
                self.class_weights,
                args.focal_gamma,
            )
        if self.teacher is not None:
            with self.accelerator.autocast():
                told = self.teacher.answer(inputs["pixel_values"], self.image_processor)
            distilled = distillation_loss(
                outputs.logits, told, inputs["labels"], args.distillation_temperature, count
            )
            loss = (1 - args.distillation_weight) * loss + args.distillation_weight * distilled
        if count is not None:  # DDP averages the gradients of what was divided by the sum already
            loss = loss * args.world_size
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
                model,
                self.args.learning_rate,
                self.args.weight_decay,
                self.args.layer_decay,
                self.args.head_lr_multiplier,
            )
            self.optimizer = optimizer = cls(groups, **kwargs)
        return optimizer

    # -- checkpoints

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._clocked("checkpoints"):
            super()._save_checkpoint(*args, **kwargs)

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """Every weight by name, on the main process; all call it, since each may hold a part (FSDP)."""
        weights: dict[str, torch.Tensor] = self.accelerator.get_state_dict(self.model)
        return weights
