"""The Trainer for images: exact restores, losses that take soft targets, groups that spare the positions."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState, PrinterCallback, TrainerControl
from transformers.trainer_utils import EvalLoopOutput

from vit_finetune.data.augmentation import generator_of
from vit_finetune.data.streaming.batches import StreamBatches
from vit_finetune.data.transforms import (
    EvaluationImages,
    TrainingImages,
    collate,
    normalize,
    outlive_signals,
)
from vit_finetune.model.loading import restore_weights
from vit_finetune.run import Interrupted, RunError, is_disk_full
from vit_finetune.training.arguments import ViTTrainingArguments
from vit_finetune.training.callbacks import StopOnSignal
from vit_finetune.training.checkpoints import (
    STATE,
    aside,
    find_damage,
    finish_checkpoint,
    remove_checkpoint,
    rotate_checkpoints,
)
from vit_finetune.training.hardware import share_casts
from vit_finetune.training.images import build_loader
from vit_finetune.training.loss import count_images, cross_entropy
from vit_finetune.training.optim import build_parameter_groups, leaves_weights_unused


class EvaluationStopped(Interrupted):
    """A signal broke an evaluation off; before the first step, it ends the run."""


class ViTTrainer(Trainer):
    """transformers' Trainer over `TrainingImages` or `StreamBatches`, and `EvaluationImages`.

    What a step does depends on the seed, the step's number and its images alone: not on how many processes,
    batches and loader processes they are divided over, nor on where the run was resumed.

    Args:
        model: a classifier, in float32.
        image_processor: the model's; normalises batches on the device, and is saved with every checkpoint.
        args: what to do.
        train_dataset: training images.
        eval_dataset: validation images.
        compute_metrics: from the Trainer's `EvalPrediction` of the validation images to their scores by name.
        stop: what listens for signals; joins the callbacks.
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
        stop: StopOnSignal | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.optimizer: torch.optim.Optimizer | None
        self.control: TrainerControl
        if args.world_size > 1 and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = leaves_weights_unused(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=image_processor,
            data_collator=collate,
            compute_metrics=compute_metrics,
            callbacks=[*([stop] if stop else []), *(callbacks or [])],
        )
        self.remove_callback(PrinterCallback)
        if args.bf16 and args.device.type == "cpu":
            share_casts(model)
        self.image_processor, self.stop = image_processor, stop
        self.seen_images = 0
        self.seconds = {"images": 0.0, "evaluation": 0.0, "checkpoints": 0.0}
        self.batch_number = 0
        self.diverged = torch.zeros((), dtype=torch.bool, device=args.device)
        # The loss below is a sum over the accumulated batch's images by their number.
        self.loss_is_scaled_for_ga = True

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """The Trainer's; gradients are views of what processes exchange, where they would be copied."""
        args: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        for handler in args["kwargs_handlers"]:
            handler.gradient_as_bucket_view = True
        # Of the class token's (1, 1, width), whose strides are others only where the size is 1.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        return args

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
        """The Trainer's, clocked; with the running statistics (batch norm) that are saved: of process 0."""
        with self._clocked("evaluation"):
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
            output.metrics[name] = float(cross_entropy(logits.double(), labels))
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

    diverged: torch.Tensor
    """Whether a loss was not finite; on the device, so that no step waits for it."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The Trainer's; dropout's random numbers depend on seed, step and the batch's place alone."""
        place = self.batch_number * self.args.world_size + self.args.process_index
        numbers = generator_of(self.args.seed, self.state.global_step, f"batch {place}")
        torch.manual_seed(numbers.getrandbits(63))
        self.batch_number += 1
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.diverged |= ~loss.isfinite()
        return loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's; of a run resumed at its end none, where the Trainer would make a step too many."""
        self._catch_up()
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        elif not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, which with a limit of 1 would delete the newest checkpoint while it is needed."""
        self._catch_up()
        self._check_finite(weights=True)
        self.args.save_total_limit = None
        self._tr_loss.fill_(self._mean_over_processes(self._tr_loss))
        return super()._finalize_training(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's; the mean loss of all steps is of those before resuming, too."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        super().log(logs, *args, **kwargs)

    reached: dict[str, Any]
    """The last `step` whose end was come to, whether `epoch_ended` after it, and what is logged of it."""

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, learning_rate: Any = None, **kwargs: Any
    ) -> None:
        """The Trainer's, of a model that has not diverged; a signal breaks an evaluation off."""
        control, step = self.control, self.state.global_step
        # It is called after each step, and once more at the end of the epoch.
        ended = self.reached["step"] == step
        self.reached = {
            "step": step,
            "epoch_ended": ended,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
        }
        if control.should_log or control.should_evaluate:
            self._check_finite()
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate, **kwargs)
        except EvaluationStopped:
            assert self.stop is not None
            self.stop.stop(self.control)
            self._save_checkpoint(self.model, None)  # while `should_evaluate` is still set
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self.control.should_evaluate = False

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, of one batch.

        Raises:
            EvaluationStopped: a process got a signal; all of them raise it at the same batch.
        """
        if self.stop and self.stop.is_training and self.stop.is_asked():
            raise EvaluationStopped(
                "stopped before the first step. Say the same again, with --resume",
                self.stop.number or signal.SIGTERM,
            )
        return super().prediction_step(*args, **kwargs)

    def _check_finite(self, weights: bool = False) -> None:
        """Raises RunError where a loss was not finite, or where asked, a weight is not."""
        if self.args.fp16:  # its steps with infinite gradients are passed over, and the weights stay finite
            self.diverged.zero_()
        bad = bool(self.diverged)
        if weights:  # where they are divided (FSDP), all processes look at them together, and none goes first
            finite = [p.isfinite().all() for p in self.model.parameters() if p.is_floating_point()]
            bad |= not torch.stack(finite).all()
        if bad:
            raise RunError(
                f"training diverged: at step {self.state.global_step} the loss or a weight is NaN or inf. "
                f"Lower training.learning_rate or raise training.warmup_steps, and start another run"
            )

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
        """Cross-entropy of the batch, smoothed while training; with the outputs where they are asked for."""
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        count = num_items_in_batch if model.training else None
        loss = cross_entropy(outputs.logits, inputs["labels"], smoothing, count)
        if count is not None:  # DDP averages the gradients of what was divided by the sum already
            loss = loss * self.args.world_size
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
        """Writes weights, optimizer, schedule, random states and progress: all of them, or nothing."""
        with self._clocked("checkpoints"):
            self._check_finite(weights=True)
            root, state, saves = Path(self.args.output_dir), self.state, self.args.should_save
            checkpoint = root / f"checkpoint-{state.global_step}"
            written = aside(checkpoint)
            self.store_flos()
            state.best_model_checkpoint = self._best_checkpoint()
            # Logged is the mean since the last log: what there is of it goes on in a resumed run.
            norm = self.reached["grad_norm"]
            state.stateful_callbacks |= {
                type(kept).__name__: kept.state()
                for kept in [*self.callback_handler.callbacks, self.control]
                if isinstance(kept, ExportableState)
            } | {
                "loss": {
                    "sum": self._mean_over_processes(self._tr_loss),
                    "since": self._globalstep_last_logged,
                    "total": self._total_loss_scalar,
                },
                "reached": self.reached | {"grad_norm": None if norm is None else float(norm)},
            }
            if saves:
                shutil.rmtree(written, ignore_errors=True)
                written.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            try:
                self.save_model(str(written), _internal_call=True)
                if not self.args.save_only_model:
                    self._save_optimizer_and_scheduler(str(written))
                    self._save_scaler(str(written))
                    self._save_rng_state(str(written))
                self.accelerator.wait_for_everyone()
                if saves:
                    state.save_to_json(str(written / STATE))
                    finish_checkpoint(checkpoint)
            except BaseException as error:
                if saves:
                    with suppress(OSError):  # away at once: other processes may still be writing there
                        remove_checkpoint(written)
                if is_disk_full(error):  # most libraries do not say which disk
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(root)) from error
                raise
            self.accelerator.wait_for_everyone()
            if saves:
                rotate_checkpoints(root, self.args.save_total_limit, state.best_global_step)

    def _best_checkpoint(self) -> str | None:
        """The folder of the best checkpoint so far, in this run's folder wherever that was moved to."""
        best = self.state.best_global_step
        return str(Path(self.args.output_dir) / f"checkpoint-{best}") if best else None

    def _mean_over_processes(self, value: torch.Tensor) -> float:
        return float(self.accelerator.gather(value.reshape(1)).mean() if self.args.world_size > 1 else value)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        progress = super()._init_training_state(*args, **kwargs)
        self.state.best_model_checkpoint = self._best_checkpoint()
        self.state.compute_steps(self.args, self.state.max_steps)  # as the recipe now says
        self.args.eval_on_start &= not self.state.global_step  # resumed is not started
        self.left_over = dict(self.state.stateful_callbacks)
        self.reached = {"step": self.state.global_step, "epoch_ended": True}
        return progress

    left_over: dict[str, Any]
    """What the checkpoint that the run was resumed from had not come to."""

    def _catch_up(self) -> None:
        """Goes on with the loss that was to be logged; evaluates and ends the epoch where that is due."""
        left, self.left_over = self.left_over, {}
        if "loss" not in left:
            return
        self._tr_loss += left["loss"]["sum"]
        self._globalstep_last_logged = left["loss"]["since"]
        self._total_loss_scalar = left["loss"]["total"]
        reached, state = left["reached"], self.state
        self.reached = reached | {"step": state.global_step if reached["epoch_ended"] else None}
        if left["TrainerControl"]["args"]["should_evaluate"]:
            self.control.should_evaluate = True
            self.control.should_save = self.args.save_strategy in ("steps", "epoch")
            self._end(reached)
        ends = not (state.epoch or 0.0) % 1 or state.global_step >= state.max_steps
        if ends and not reached["epoch_ended"] and not self.control.should_training_stop:
            self.reached["step"] = state.global_step
            self.control = self.callback_handler.on_epoch_end(self.args, state, self.control)
            self._end(reached)

    def _end(self, reached: dict[str, Any]) -> None:
        """Does what is asked for at the end of the step, or the epoch, that was resumed from."""
        norm, rate = reached["grad_norm"], reached["learning_rate"]
        self._maybe_log_save_evaluate(
            self._tr_loss, norm, self.model, None, None, None, time.time(), learning_rate=rate
        )

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: PreTrainedModel | None = None
    ) -> None:
        restore_weights(model or self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if self.args.should_save and (damage := find_damage(best)):
            raise RunError(
                f"{best}, the best checkpoint, cannot be used: {damage}. With --resume the run goes on from "
                f"the last checkpoint that can"
            )
        restore_weights(self.model, best)

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """Every weight by name, on the main process; all call it, since each may hold a part (FSDP)."""
        weights: dict[str, torch.Tensor] = self.accelerator.get_state_dict(self.model)
        return weights
