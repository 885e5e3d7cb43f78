"""A run goes on with another number of processes as if it had always had them, and ends the same."""

from __future__ import annotations

import signal

import pytest
from fork_server import ForkServer
from worlds import PER_STEP, Division, Place, Signal, Trained, check_same, draw_photos, finish, said

from vit_finetune.training.checkpoints import list_checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

ALONE, TWO, FOUR = Division(1, 2, 4), Division(2, 2, 2), Division(4, 2, 1)
"""Batches are equal, so dropout is too."""


@pytest.fixture(scope="module")
def place(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("elastic")
    return Place(forks, folder, draw_photos(folder / "photos"))


@pytest.fixture(scope="module")
def whole(place: Place) -> Trained:
    """Uninterrupted, by one process."""
    run, children = place.start("whole", ALONE, dropout=True)
    finish(children)
    return Trained(run, [children])


@pytest.mark.parametrize(
    ("divisions", "signals", "resumed_at"),
    [
        # Steps are counted from 0, and an epoch has 4: all stop in the middle of one.
        ([TWO, ALONE], [Signal(signal.SIGTERM, 4, 1)], [5]),
        ([ALONE, TWO], [Signal(signal.SIGUSR1, 4, 0)], [5]),
        ([TWO, FOUR], [Signal(signal.SIGKILL, 7, 1)], [6]),
        ([TWO, FOUR, ALONE], [Signal(signal.SIGKILL, 1, 0), Signal(signal.SIGTERM, 8, 3)], [0, 9]),
    ],
    ids=["2-1", "1-2", "2-4", "2-4-1"],
)
def test_another_number_of_processes_goes_on(
    place: Place, whole: Trained, divisions: list[Division], signals: list[Signal], resumed_at: list[int]
) -> None:
    name = "-".join(str(division.processes) for division in divisions)
    sessions = []
    # The words stay those that the run was begun with: how a step is divided is for the program to find.
    words = divisions[0]
    for number, division in enumerate(divisions):
        stopped = signals[number] if number < len(signals) else None
        run, children = place.start(
            name, words._replace(processes=division.processes), dropout=True, signal=stopped
        )
        sessions.append(children)
        codes = [child.wait() for child in children]
        told = children[0].stderr
        if stopped is None:
            finish(children)
        elif stopped.number == signal.SIGKILL:
            assert codes == [-9 if rank == stopped.rank else 1 for rank in range(len(codes))], said(children)
        else:
            assert codes == [75] * len(codes), said(children)
            assert f"stopped at step {stopped.step + 1} of 12, checkpoint kept" in told
            assert list_checkpoints(run.checkpoints)[-1].name == f"checkpoint-{stopped.step + 1}"
        if number:
            step = resumed_at[number - 1]
            assert (f"checkpoint-{step}\n" in told) if step else ("starting from the beginning" in told), told
            kept = f"keeps the {PER_STEP} images per step"
            assert f"accumulation: {division.accumulation} ({kept}" in told
            assert (
                f"× {division.batch} images × {division.accumulation} accumulation = {PER_STEP} images"
                in told
            )
    trained = Trained(run, sessions)
    assert trained.steps() == whole.steps()
    check_same(trained, whole)


def test_a_batch_may_change_where_the_step_stays(place: Place, whole: Trained) -> None:
    """The order of images does not depend on it, and without dropout nothing else does."""
    run, children = place.start("other", TWO, signal=Signal(signal.SIGTERM, 5, 0))
    assert [child.wait() for child in children] == [75, 75], said(children)
    run, more = place.start("other", Division(2, 4, 1))
    assert "2 processes × 4 images × 1 accumulation = 8 images per step" in finish(more)
    again, alone = place.start("other-alone", Division(1, 8, 1))
    finish(alone)
    trained = Trained(run, [children, more])
    assert trained.steps() == whole.steps()
    check_same(trained, Trained(again, [alone]))


def test_processes_that_cannot_share_a_step_are_refused(place: Place) -> None:
    run, children = place.start("refused", TWO, signal=Signal(signal.SIGTERM, 2, 0))
    assert [child.wait() for child in children] == [75, 75], said(children)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    _, children = place.start("refused", Division(3, 2, 2))
    assert [child.wait() for child in children] == [1, 1, 1], said(children)
    told = "".join(child.stderr for child in children)
    assert told.count("error: ") == 1, said(children)
    assert "8 images per step, which 3 processes cannot share evenly" in told
    assert "1, 2, 4, 8 processes" in told
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
