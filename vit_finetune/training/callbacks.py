"""What happens beside the training loop: a progress bar, and stopping when asked."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vit_finetune.console import build_progress, say, terminal

PLAIN_LINE_SECONDS = 30
"""Between two lines of progress where there is no terminal to draw a bar in."""


class ProgressDisplay(TrainerCallback):
    """A bar with loss, images per second and time left; plain lines where stderr is no terminal.

    Args:
        images_per_step: of all processes together.
    """

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self.bar = build_progress("images")
        self.status = ""
        self.last_line = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Starts the bar, at the step that a resumed run continues from."""
        self.start, self.first_step = time.monotonic(), state.global_step
        self.task = self.bar.add_task(
            "training", total=state.max_steps, completed=state.global_step, status=""
        )
        if terminal().is_terminal:
            self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Advances the bar."""
        seconds = time.monotonic() - self.start
        rate = (state.global_step - self.first_step) * self.images_per_step / max(seconds, 1e-9)
        self.bar.update(self.task, completed=state.global_step, status=self.status, rate=rate)
        if not terminal().is_terminal and time.monotonic() - self.last_line > PLAIN_LINE_SECONDS:
            self.last_line = time.monotonic()
            steps = state.global_step - self.first_step
            left = seconds / steps * (state.max_steps - state.global_step)
            say(
                f"step {state.global_step}/{state.max_steps}  {self.status}  {rate:,.0f} images/s  "
                f"{left:,.0f} s left"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: Any,
    ) -> None:
        """Shows the loss, and a line for each evaluation."""
        if "loss" in logs:
            self.status = f"loss {logs['loss']:.3f}"
        if "eval_accuracy" in logs:
            say(
                f"epoch {state.epoch or 0:.4g}/{args.num_train_epochs:.4g}  {self.status}  "
                f"validation: accuracy {logs['eval_accuracy']:.4f}, loss {logs['eval_loss']:.4f}"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Takes the bar away."""
        self.bar.stop()


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends training after the current step, with a checkpoint; the second at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self.previous: Any = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        say("stopping after this step with a checkpoint; Ctrl-C again stops at once")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Listens for Ctrl-C."""
        try:
            self.previous = signal.signal(signal.SIGINT, self._on_signal)
        except ValueError:  # not the main thread: then Ctrl-C is its caller's affair
            self.previous = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Asks for a checkpoint and the end."""
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True
            # With a limit of 1 the Trainer ends by deleting all checkpoints but the best, the newest too.
            args.save_total_limit = None

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Undoes what the Trainer does at the end of an epoch where the epoch was only broken off.

        It would evaluate and save once more, in the middle of an epoch, and perhaps choose those weights as
        the best: the resumed run would end with others than an uninterrupted one.
        """
        if self.interrupted and (state.epoch or 0.0) % 1:
            control.should_evaluate = control.should_save = False

    def stop_listening(self) -> None:
        """Gives Ctrl-C back its usual meaning."""
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
            self.previous = None
