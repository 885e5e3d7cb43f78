"""The learning-rate range test: steps at growing rates, and the rate that their losses speak for."""

from __future__ import annotations

import copy
import gc
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.transforms import v2
from transformers import BaseImageProcessor, PreTrainedModel

from vit_finetune.data.streaming.batches import StreamBatches
from vit_finetune.data.transforms import TrainingImages
from vit_finetune.recipe import TrainingConfig
from vit_finetune.run import RunError
from vit_finetune.training.arguments import ViTTrainingArguments, build_arguments
from vit_finetune.training.distillation import Teacher
from vit_finetune.training.hardware import Hardware, randomness_kept
from vit_finetune.training.loading import Loading
from vit_finetune.training.trainer import ViTTrainer

STEPS = 100
"""How many rates are tried, one step each."""
LOWEST, HIGHEST = 1e-7, 10.0
"""The first and the last rate; those between grow by the same factor from step to step."""
SMOOTHING = 0.98
"""Share of the moving average of the losses that each step leaves."""
DIVERGED = 4.0
"""The test ends where the smoothed loss is more than so many times its lowest."""
SKIPPED_FIRST, SKIPPED_LAST = STEPS // 10, 5
"""Steps at both ends that the choice does not look at: of the first the average is not smooth yet, at the
last the loss rises."""
NOISE, LEAST = 0.4, 0.002
"""To count as a descent, the smoothed loss has to fall by these shares of the losses' noise and of itself."""
PLAN = f"a range test of {STEPS} steps, at rates from {LOWEST:g} to {HIGHEST:g}, finds it before training"


@dataclass
class Curve:
    """What a range test saw, step by step."""

    rates: list[float] = field(default_factory=list)
    """`learning_rate` of each step; groups with another rate had theirs in proportion."""
    losses: list[float] = field(default_factory=list)
    """Training loss (nats per image) of the images of the step, before it."""
    smoothed: list[float] = field(default_factory=list)
    """Exponential moving average of the losses up to each step, corrected for having begun at 0."""
    average: float = 0.0

    def add(self, rate: float, loss: float) -> bool:
        """Takes in a step; whether the loss has diverged with it. One that is not finite is left out."""
        if not math.isfinite(loss):
            return True
        self.average = SMOOTHING * self.average + (1 - SMOOTHING) * loss
        self.rates.append(rate)
        self.losses.append(loss)
        self.smoothed.append(self.average / (1 - SMOOTHING ** len(self.losses)))
        return self.smoothed[-1] > DIVERGED * min(self.smoothed)

    def facts(self, chosen: float) -> dict[str, Any]:
        """The curve and what came of it, for the provenance."""
        return {"chosen": chosen, "rates": self.rates, "losses": self.losses, "smoothed": self.smoothed}


def choose_rate(curve: Curve) -> float:
    """The learning rate in the middle of the curve's longest descent, to two digits.

    fastai's rule `valley`: without the ends of the curve, the longest subsequence of steps whose smoothed
    losses fall is looked for (of equally long ones, the first to end), and what lies between its length
    before its end and its end is taken for the valley. Half of its length into it is the rate.

    Raises:
        RunError: the loss does not fall, or falls by less than it varies from step to step.
    """
    losses = curve.smoothed[SKIPPED_FIRST:-SKIPPED_LAST]
    lengths = [1] * len(losses)
    for place, loss in enumerate(losses):
        longest = (lengths[before] for before in range(place) if losses[before] > loss)
        lengths[place] = 1 + max(longest, default=0)
    length = max(lengths, default=0)
    if length < 2:
        raise RunError(_no_descent(curve))
    end = lengths.index(length)
    start = end - length
    high, noise = losses[max(0, start)], _noise(curve.losses[: SKIPPED_FIRST + end + 1])
    if high - losses[end] < max(NOISE * noise, LEAST * high):
        raise RunError(_no_descent(curve))
    third = length / 3
    place = max(0, start + int(third) + int(third / 2))
    return float(f"{curve.rates[SKIPPED_FIRST + place]:.2g}")


def _noise(losses: list[float]) -> float:
    """The losses' standard deviation about their course, from their differences (von Neumann, 1941)."""
    return float(np.sqrt(np.mean(np.square(np.diff(losses))) / 2)) if len(losses) > 1 else 0.0


def _no_descent(curve: Curve) -> str:
    tried = f"{len(curve.rates)} steps at rates from {LOWEST:.0e}" + (
        f" to {curve.rates[-1]:.1e}" if curve.rates else ""
    )
    seen = ""
    if curve.smoothed:
        seen = (
            f": smoothed, it began at {curve.smoothed[0]:.3g}, and {min(curve.smoothed):.3g} was its lowest"
        )
    return (
        f"training.learning_rate=auto: in {tried} the training loss did not fall by more than it varies from "
        f"step to step{seen}. Expected a descent; write a number, such as "
        f"training.learning_rate=1e-4, or more images per step (training.per_device_train_batch_size)"
    )


class RangeTest(ViTTrainer):
    """The Trainer for steps whose rates grow; it logs, evaluates and saves nothing.

    Args:
        model: is trained, and of no use afterwards.
        image_processor: the model's.
        args: with `learning_rate` the lowest rate, and `max_steps`.
        images: to train on.
        mixing: as in training.
        teacher: likewise.
        advance: called after each step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        image_processor: BaseImageProcessor,
        args: ViTTrainingArguments,
        images: TrainingImages | StreamBatches,
        mixing: v2.Transform | None,
        teacher: Teacher | None,
        advance: Callable[[], None],
    ) -> None:
        super().__init__(model, image_processor, args, images, None, mixing=mixing, teacher=teacher)
        self.curve, self.advance = Curve(), advance
        self.growth = (HIGHEST / LOWEST) ** (1 / (STEPS - 1))
        self.rate = args.learning_rate

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Every group's rate grows by the same factor from step to step."""
        grown = self.optimizer if optimizer is None else optimizer
        assert grown is not None
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(grown, lambda step: self.growth**step)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The step of training; notes its rate, which stays where fp16's scaling passes a step over."""
        self.rate = self.args.learning_rate * self.growth**self.lr_scheduler.last_epoch
        return super().training_step(*args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Notes the loss of the step, of all processes; ends the test where it has diverged."""
        if self.reached["step"] == self.state.global_step:  # called once more at the end of the epoch
            return
        self.reached["step"] = self.state.global_step
        diverged = self.curve.add(self.rate, self._mean_over_processes(tr_loss))
        tr_loss.zero_()
        self.control.should_training_stop |= diverged
        self.advance()

    def _check_finite(self, weights: bool = False) -> None:
        """To diverge is what the test is for."""


@contextmanager
def _all_randomness_kept(device: torch.device) -> Iterator[None]:
    """A block after which Python's, NumPy's and torch's random numbers go on as if it had not been."""
    python, array = random.getstate(), np.random.get_state()
    with randomness_kept(device):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


def run_range_test(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    training: TrainingConfig,
    hardware: Hardware,
    loading: Loading,
    images: TrainingImages | StreamBatches,
    mixing: v2.Transform | None,
    teacher: Teacher | None,
    advance: Callable[[], None],
) -> Curve:
    """The training losses of a copy of the model over growing learning rates (Smith, 2017).

    The steps are those of training: its loss, mixing, augmentation, groups, precision, accumulation and
    processes, from the first image of the first epoch on; a small data set is gone round again. Neither the
    model nor any random state is changed. Every process sees the same curve.

    Args:
        model: as training begins with it.
        image_processor: the model's.
        training: the recipe's section.
        hardware: what was chosen for the machine.
        loading: likewise.
        images: to train on; those of a stream for `STEPS` steps.
        mixing: as in training.
        teacher: likewise.
        advance: called after each step.
    """
    with tempfile.TemporaryDirectory() as folder, _all_randomness_kept(hardware.device):
        arguments = build_arguments(shortened(training), hardware, loading, Path(folder), 1)
        test = RangeTest(copy.deepcopy(model), image_processor, arguments, images, mixing, teacher, advance)
        test.train()
        curve = test.curve
        del test
        gc.collect()  # the Trainer refers to itself, and would keep the copy and its moments
    if hardware.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # `peak_memory` is that of training
    return curve


def shortened(training: TrainingConfig) -> TrainingConfig:
    """The section for a range test: its steps and no more of what comes beside them."""
    beside = {
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "early_stopping_patience": None,
        "logging_nan_inf_filter": False,  # would have a loss of 0 where it is NaN
        "ema_decay": 0.0,
        "report_to": "none",
        "lr_scheduler_type": "constant",
        "lr_scheduler_kwargs": None,
        "warmup_steps": 0,
    }
    return training.model_copy(update={**beside, "learning_rate": LOWEST, "max_steps": STEPS})
