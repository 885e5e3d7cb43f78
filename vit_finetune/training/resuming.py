"""The Trainer's checkpoints and ends: stopped anywhere and resumed, a run ends as if it had not been."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import ExportableState, TrainerControl

from vit_finetune.files import is_disk_full
from vit_finetune.model.loading import restore_weights
from vit_finetune.model.lora import has_lora, save_adapter
from vit_finetune.run import Diverged, Interrupted, RunError
from vit_finetune.training.callbacks import StopOnSignal
from vit_finetune.training.checkpoints import (
    STATE,
    aside,
    find_damage,
    finish_checkpoint,
    remove_checkpoint,
    rotate_checkpoints,
)
from vit_finetune.training.ema import AVERAGED, WeightAverage


class EvaluationStopped(Interrupted):
    """A signal broke an evaluation off; before the first step, it ends the run."""


class ResumableTrainer(Trainer):
    """transformers' Trainer, with checkpoints that are whole or not there, of models that have not diverged.

    A resumed run makes up for what its checkpoint had not come to: an evaluation, a log, the end of an epoch.
    """

    control: TrainerControl
    stop: StopOnSignal | None
    """What listens for signals."""
    diverged: torch.Tensor
    """Whether a loss was not finite; on the device, so that no step waits for it."""
    average: WeightAverage | None
    """Of the weights; what is evaluated and left in the model at the end, where there is one."""

    # -- steps and ends

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
        if self.average:  # of the last step; where validation chose another, it is loaded now
            self.average.end()
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
            raise Diverged(
                f"training diverged: at step {self.state.global_step} the loss or a weight is NaN or inf. "
                f"Lower training.learning_rate or raise training.warmup_steps, and start another run"
            )

    # -- checkpoints

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Writes weights, optimizer, schedule, random states and progress: all of them, or nothing."""
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
            "average": {"updates": self.average.updates if self.average else 0},
        }
        if saves:
            shutil.rmtree(written, ignore_errors=True)
            written.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            self.save_model(str(written), _internal_call=True)
            if self.average:
                with self.average.swapped_in():
                    self.save_model(str(written / AVERAGED), _internal_call=True)
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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """The Trainer's; of a model with LoRA only what has learnt."""
        if not has_lora(self.model):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            save_adapter(self.model, Path(output_dir or self.args.output_dir))

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

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """The Trainer's; the average begins with the weights, or goes on with the checkpoint's."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.average:
            self.average.begin(self.model)
            if resume_from_checkpoint is not None:
                self.average.updates = self.left_over["average"]["updates"]
                with self.average.swapped_in():
                    restore_weights(self.model, Path(resume_from_checkpoint) / AVERAGED)
        return prepared

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
        restore_weights(self.model, best / AVERAGED if self.average else best)
