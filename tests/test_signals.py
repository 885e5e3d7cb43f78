"""Signals: a checkpoint after the running step and an exit code of their own, or the end at once."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from fork_server import wait_for
from harmed_runs import SIGNALLED, Place, at, ended, intact, send

from vit_finetune.run import Run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)],
    ids=["TERM", "USR1", "INT"],
)
def test_a_signal_while_training(number: int, code: int, place: Place, whole: Run, tmp_path: Path) -> None:
    """In the seventh step, from outside: a checkpoint after that step, then the end."""
    run = Run(tmp_path / "run")
    waiting = "open('here', 'w')\n        while not os.path.exists('sent'): time.sleep(0.01)"
    children = place.train(run, before=at(waiting, step=6))
    wait_for((children[0].folder / "here").exists, children[0])
    children[0].signal(number)
    (children[0].folder / "sent").touch()
    told = ended(children, [code], errors=0)
    assert "stopped at step 7 of 20, checkpoint kept. Go on with: vit-finetune train" in told
    assert "--resume" in told
    intact(run, 7)
    place.finish(run, whole, said=f"resuming from {run.checkpoints / 'checkpoint-7'}")


def test_the_same_ctrl_c_handed_on_twice_is_one(place: Place, whole: Run, tmp_path: Path) -> None:
    """Terminals send it to launcher and process alike, and the launcher hands it on."""
    run = Run(tmp_path / "run")
    ended(
        place.train(run, before=at(f"{send(signal.SIGINT)}; {send(signal.SIGINT)}", step=6)), [130], errors=0
    )
    intact(run, 7)


def test_ctrl_c_twice_stops_at_once(place: Place, whole: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    children = place.train(run, before=at("open('here', 'w'); time.sleep(600)", step=7))
    wait_for((children[0].folder / "here").exists, children[0])
    children[0].signal(signal.SIGINT)
    wait_for(lambda: "Ctrl-C again stops at once" in children[0].stderr, children[0])
    assert not children[0].ended
    time.sleep(1.2)  # sooner, it is taken for the first one, handed on
    children[0].signal(signal.SIGINT)
    told = ended(children, [130], errors=0)
    assert "--resume" in told
    intact(run, 6)
    place.finish(run, whole)


@pytest.mark.parametrize("step", [6, 20])
def test_a_signal_while_evaluating(step: int, place: Place, whole: Run, tmp_path: Path) -> None:
    """The evaluation is broken off, not waited for; also the last one. The resumed run makes it."""
    run = Run(tmp_path / "run")
    counted = f"open('batches', 'a').write('x') if self.state.global_step == {step} else None"
    children = place.train(
        run, before=at(send(signal.SIGTERM), step=step, method="prediction_step", also=counted)
    )
    ended(children, [75], errors=0)
    assert len((children[0].folder / "batches").read_text()) <= 2, "of five"
    intact(run, step)
    assert not (run.model / "model.safetensors").exists()
    place.finish(run, whole)


@pytest.mark.parametrize(
    ("function", "begun"),
    [("prepare_data", False), ("ViTTrainer", True), ("score_splits", True), ("write_card", True)],
)
def test_a_signal_before_the_first_step_and_after_the_last(
    function: str, begun: bool, place: Place, whole: Run, tmp_path: Path
) -> None:
    """While there is nothing to keep, or all is kept already, it ends at once."""
    run = Run(tmp_path / "run")
    before = SIGNALLED.format(function=function)
    told = ended(place.train(run, before=before), [75], errors=0)
    assert "SIGTERM" in told
    assert "--resume" in told
    assert run.exists() == begun
    if not begun:
        assert not run.path.exists()
    place.finish(
        run, whole, said="" if not begun else "starting from" if function == "ViTTrainer" else "resuming"
    )


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["training_step", "prediction_step"])
def test_a_signal_to_one_of_two_processes(
    method: str, place: Place, whole_of_two: Run, tmp_path: Path
) -> None:
    """Both stop at the same step, whichever got it."""
    run = Run(tmp_path / "run")
    children = place.train(run, processes=2, before=at(send(signal.SIGUSR1), step=6, rank=1, method=method))
    told = ended(children, [75, 75], errors=0)
    stopped = 7 if method == "training_step" else 6
    assert f"stopped at step {stopped} of 20, checkpoint kept" in told
    intact(run, stopped)
    place.finish(run, whole_of_two, processes=2)
