"""What a run was stopped or killed in the middle of, besides steps: resumed, all of it is made up for."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import draw_folder
from fork_server import ForkServer
from harmed_runs import SIGNALLED, Place, at, checkpoints, ended, send

from vit_finetune.run import Run

pytestmark = pytest.mark.slow

UNEVALUATED = ["training.eval_strategy=no", "training.load_best_model_at_end=false"]
KILLED_WHILE_LOGGING = f"""
import os
from vit_finetune.training.trainer import ViTTrainer
plain = ViTTrainer.log
def killed(self, *args, **kwargs):
    if self.state.global_step == 10:
        {send(signal.SIGKILL)}
    plain(self, *args, **kwargs)
ViTTrainer.log = killed
"""


@pytest.fixture(scope="module")
def place(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("resuming")
    return Place(forks, folder, draw_folder(folder / "photos"))


def history(run: Run) -> list[dict[str, Any]]:
    """All that was logged, the mean loss of all steps included, but for what depends on the clock."""
    return [
        {name: value for name, value in line.items() if not name.endswith(("runtime", "per_second"))}
        for line in json.loads(run.history.read_text())
    ]


@pytest.mark.parametrize(
    ("words", "fault", "code", "newest"),
    [
        pytest.param(
            ["training.logging_steps=3", "training.eval_on_start=true"],
            at(send(signal.SIGTERM), step=19),
            75,
            20,
            id="in the last step",
        ),
        pytest.param(
            [],
            at(send(signal.SIGTERM), step=20, method="_save_checkpoint"),
            75,
            20,
            id="while the last checkpoint is written",
        ),
        pytest.param(
            ["training.save_total_limit=1"],
            SIGNALLED.format(function="score_splits"),
            75,
            20,
            id="where the best and the last are all that is kept",
        ),
        pytest.param(
            ["training.eval_on_start=true"],
            at(send(signal.SIGTERM), step=0, method="prediction_step"),
            75,
            0,
            id="in an evaluation before the first step",
        ),
        pytest.param(
            ["training.max_steps=7", "training.eval_strategy=epoch", "training.save_strategy=epoch"],
            at(send(signal.SIGTERM), step=6),
            75,
            7,
            id="in the last step, of an epoch that is not whole",
        ),
        pytest.param(
            ["training.save_steps=5", "training.eval_strategy=epoch", UNEVALUATED[1]],
            at(send(signal.SIGKILL), step=10, method="evaluate"),
            -9,
            10,
            id="between an epoch's last step and its evaluation",
        ),
        pytest.param(
            ["training.save_steps=5", "training.logging_strategy=epoch", *UNEVALUATED],
            KILLED_WHILE_LOGGING,
            -9,
            10,
            id="between an epoch's last step and its log",
        ),
    ],
)
def test_what_was_still_to_be_done(
    words: list[str], fault: str, code: int, newest: int, place: Place, tmp_path: Path
) -> None:
    whole, run = Run(tmp_path / "whole"), Run(tmp_path / "run")
    ended(place.train(whole, *words), [0], errors=0)
    ended(place.train(run, *words, before=fault), [code], errors=0)
    assert max(checkpoints(run), default=0) == newest
    ended(place.train(run, *words), [0], errors=0)
    assert history(run) == history(whole)
    weights = "model.safetensors"
    assert (run.model / weights).read_bytes() == (whole.model / weights).read_bytes()
    assert set(checkpoints(run)) == set(checkpoints(whole))


def test_weights_that_are_no_numbers_where_nobody_looked(place: Place, tmp_path: Path) -> None:
    """Nothing is logged, evaluated or saved: no model comes of it all the same."""
    run = Run(tmp_path / "run")
    poison = "next(self.model.parameters()).data.fill_(float('nan'))"
    words = ["training.save_strategy=no", "training.logging_strategy=no", *UNEVALUATED]
    told = ended(place.train(run, *words, before=at(poison, step=18)), [1])
    assert "training diverged" in told
    assert not run.model.exists()


def test_killed_while_a_checkpoint_takes_the_place_of_another(place: Place, tmp_path: Path) -> None:
    """Of the same step, when an evaluation that was broken off is made up for: one of the two is always there."""
    run, words = Run(tmp_path / "run"), ["training.save_total_limit=1"]
    ended(
        place.train(run, *words, before=at(send(signal.SIGTERM), step=6, method="prediction_step")),
        [75],
        errors=0,
    )
    before = f"""
import os
from vit_finetune.training.checkpoints import Path
plain = Path.rename
def killed(self, target):
    if self.suffix == ".partial":
        {send(signal.SIGKILL)}
    return plain(self, target)
Path.rename = killed
"""
    ended(place.train(run, *words, before=before), [-9], errors=0)
    told = ended(place.train(run, *words), [0], errors=0)
    assert "resuming from" in told
    assert "checkpoint-6" in told


def test_killed_before_the_folder_had_its_recipe(place: Place, tmp_path: Path) -> None:
    """There is nothing to resume yet: the same words begin anew."""
    run = Run(tmp_path / "run")
    kill = (
        f"import os\nfrom vit_finetune import opening\nopening.write_text = lambda *_: {send(signal.SIGKILL)}"
    )
    ended(place.train(run, before=kill), [-9], errors=0)
    assert not run.exists()
    ended(place.train(run), [0], errors=0)


def test_two_runs_that_begin_in_one_folder_at_once(place: Place, tmp_path: Path) -> None:
    """The one that is slower with its data finds the run of the other, and lets it be."""
    run = Run(tmp_path / "run")
    # Both find the folder free; the second goes on when the first has written all that it begins with.
    mark = tmp_path / "second-began"
    wait = (
        "import pathlib, time\nfrom vit_finetune import finetuning\n"
        + """
def after(path, function, also=None):
    def waits(*args, **kwargs):
        if also:
            pathlib.Path(also).touch()
        while not pathlib.Path(path).exists():
            time.sleep(0.01)
        return function(*args, **kwargs)
    return waits
"""
    )
    first = place.train(
        run, before=f"{wait}finetuning.prepare_data = after({str(mark)!r}, finetuning.prepare_data)"
    )
    second = place.train(
        run,
        before=f"{wait}finetuning.load_model = after({str(run.provenance)!r}, finetuning.load_model, {str(mark)!r})",
    )
    assert "another process has just begun a run there" in ended(second, [1])
    ended(first, [0], errors=0)


LATE = """
import atexit, os, time
atexit.register(lambda: (os.kill(os.getpid(), 15), time.sleep(0.1)))
"""


def test_a_signal_after_all_is_done_changes_nothing(place: Place, tmp_path: Path) -> None:
    """A process of its own: what matters is how the interpreter ends."""
    code = f"{LATE}\nimport sys\nsys.argv = ['vit-finetune', 'train', '--help']\nfrom vit_finetune.cli import main\nfrom vit_finetune.guarding import listen\nlisten()\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_second_signal_while_the_first_is_answered(place: Place, tmp_path: Path) -> None:
    before = f"""
import os
from vit_finetune import finetuning, guarding
plain = guarding.say
def say(message):
    {send(signal.SIGTERM)}
    plain(message)
guarding.say = say
def prepare_data(*_):
    {send(signal.SIGTERM)}
finetuning.prepare_data = prepare_data
"""
    ended(place.train(Run(tmp_path / "run"), before=before), [75], errors=0)


def test_a_signal_that_a_destructor_swallows(place: Place, tmp_path: Path) -> None:
    """Python ignores what is raised there: training ends all the same, after its first step."""
    run = Run(tmp_path / "run")
    before = f"""
import os, sys
from vit_finetune import finetuning
plain = finetuning.load_model
class Last:
    def __del__(self):
        {send(signal.SIGTERM)}
def load_model(*args, **kwargs):
    Last()
    return plain(*args, **kwargs)
finetuning.load_model = load_model
sys.unraisablehook = lambda _: None
"""
    ended(place.train(run, before=before), [75], errors=0)
    assert set(checkpoints(run)) == {1}
