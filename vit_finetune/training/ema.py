"""The exponential moving average of the weights: kept beside them, evaluated and published in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

AVERAGED = "ema"
"""Folder of a checkpoint with the averaged model, as transformers saves one; beside it lie the weights that
training goes on with."""


class WeightAverage(TrainerCallback):
    """Averages a model's weights and running statistics after each step of the optimizer.

    Step t of a run, counted from 1, leaves `d × average + (1 − d) × weights` with d = min(decay, (1 + t) /
    (10 + t)), so that the first steps are soon forgotten (tf.train.ExponentialMovingAverage with
    `num_updates`; Polyak and Juditsky, 1992). It begins with the weights that training begins with.

    It takes once more the memory of the weights that learn, on their device: 4 bytes for each.

    Args:
        decay: in (0, 1), what remains of the average at each step once it is warmed up.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        """Steps of the optimizer that are in the average."""
        self.weights: dict[str, torch.Tensor] = {}
        """The model's own, by name: what is saved with it, is of floating-point numbers and changes."""
        self.averages: dict[str, torch.Tensor] = {}
        """Of the same names and shapes."""

    @property
    def last_decay(self) -> float:
        """What the last step left of the average before it."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    def begin(self, model: PreTrainedModel) -> None:
        """Lets the average be what the weights of a model are now, on the device that it is on."""
        saved = model.state_dict().keys()
        learning = ((name, one) for name, one in model.named_parameters() if one.requires_grad)
        tensors = chain(learning, model.named_buffers())
        self.weights = {name: one for name, one in tensors if one.is_floating_point() and name in saved}
        self.averages = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.updates = 0

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Updates the average, unless fp16's loss scaling passed the step over."""
        if not optimizer.step_was_skipped:
            self.update()

    def update(self) -> None:
        """Takes the weights as they are now into the average."""
        self.updates += 1
        average = get_ema_multi_avg_fn(self.last_decay)  # type: ignore[no-untyped-call]
        average(list(self.averages.values()), [weight.detach() for weight in self.weights.values()], None)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """A block in which the model has the averages, and the average what the model had."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """In place, one weight at a time: the optimizer and what wraps the model keep what they refer to."""
        for name, weight in self.weights.items():
            kept = weight.clone()
            weight.copy_(self.averages[name])
            self.averages[name].copy_(kept)

    def end(self) -> None:
        """Leaves the averages in the model for good, and frees what they were kept in."""
        self._swap()
        self.weights, self.averages = {}, {}
