"""What happens beside the training loop: a progress bar, and stopping when asked."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vit_finetune.console import build_progress, say, terminal
from vit_finetune.run import STOPPING, Interrupted
from vit_finetune.training.world import World

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
        for name in ("accuracy", "mean_average_precision"):
            if f"eval_{name}" in logs:
                say(
                    f"epoch {state.epoch or 0:.4g}/{args.num_train_epochs:.4g}  {self.status}  validation: "
                    f"{name.replace('_', ' ')} {logs[f'eval_{name}']:.4f}, loss {logs['eval_loss']:.4f}"
                )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Takes the bar away."""
        self.bar.stop()


class StopEarly(TrainerCallback):
    """Ends training when so many evaluations in a row have not been better than the best before them.

    Counted from the log, which a checkpoint keeps: transformers' own callback forgets its count where a run
    is resumed, unless it is told not to.

    Args:
        patience: how many.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ends a resumed run that had come to its end."""
        self.on_evaluate(args, state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Looks at what has been logged."""
        name = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
        found = [entry[name] for entry in state.log_history if name in entry]
        scores = found if args.greater_is_better else [-score for score in found]
        if scores and len(scores) - 1 - scores.index(max(scores)) >= self.patience:
            control.should_training_stop = True


AGAIN_SECONDS = 1.0
"""A Ctrl-C sooner than this after the first is the launcher handing on the same one."""


class StopOnSignal(TrainerCallback):
    """Ctrl-C, SIGTERM and SIGUSR1 end training after the current step, with a checkpoint; elsewhere at once.

    A second Ctrl-C ends it at once too. All processes stop at the same step, whichever got the signal. An
    evaluation is broken off; the checkpoint remembers that it is still to be made.

    Args:
        world: the processes of the run.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.number = 0
        """Of the signal that this process got; 0 before."""
        self.is_training = False
        self.is_stopping = False
        """Whether training was ended by a signal, to this process or another."""
        self.saved_step: int | None = None
        """Step of the last checkpoint, so that the end of the epoch has none to add."""
        self.asked_at = 0.0
        self.previous: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[StopOnSignal]:
        """A block in which signals are this callback's."""
        try:
            self.previous = {number: signal.signal(number, self._on_signal) for number in STOPPING}
        except ValueError:  # not the main thread: then signals are its caller's affair
            self.previous = {}
        try:
            yield self
        finally:
            for number, handler in self.previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        known = self.number
        self.number = known or number  # kept also where a destructor swallows what is raised here
        again = number == signal.SIGINT and known and time.monotonic() - self.asked_at > AGAIN_SECONDS
        if not self.is_training or again:
            raise Interrupted(
                f"stopped by {signal.Signals(number).name}. What was finished is kept: say the same again, "
                f"with --resume where the run had begun",
                number,
            )
        if not known:
            self.asked_at = time.monotonic()
            name = "Ctrl-C again stops at once" if number == signal.SIGINT else signal.Signals(number).name
            say(f"stopping after this step with a checkpoint ({name})")

    def is_asked(self) -> bool:
        """Whether any process got a signal; to be called by all of them."""
        return self.world.any(bool(self.number))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """From now on there is something to keep."""
        self.is_training = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Remembers the checkpoint."""
        self.saved_step = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Asks for the end, and unless the epoch ends here too, for a checkpoint."""
        if self.is_asked():
            self.stop(control)
            control.should_save = control.should_save or bool((state.epoch or 0.0) % 1)

    def stop(self, control: TrainerControl) -> None:
        """Asks for the end."""
        self.is_stopping = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Undoes what the Trainer does at the end of an epoch where the epoch was only broken off.

        It would evaluate and save once more, in the middle of an epoch, and perhaps choose those weights as
        the best: the resumed run would end with others than an uninterrupted one.
        """
        if self.is_stopping:
            control.should_save = self.saved_step != state.global_step and not (state.epoch or 0.0) % 1
            control.should_evaluate = control.should_evaluate and control.should_save

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """What follows is not kept: a signal ends it at once, and one since the last step does now."""
        if self.is_asked() and self.saved_step == state.global_step:
            self.is_stopping = True
        self.is_training = False
