"""Two hosts train what one process trains; where one is lost, the other ends, and the run goes on with both or one."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import draw_image
from fork_server import PATIENCE, Child, ForkServer, wait_for
from two_hosts import Host, fork_on, two_hosts
from worlds import (
    IMAGES,
    Division,
    Place,
    Signal,
    Trained,
    check_same,
    draw_photos,
    finish,
    journalled,
    noted,
    said,
)

from vit_finetune.run import Run
from vit_finetune.training.checkpoints import find_damage, list_checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

TIMEOUT = 10
"""Seconds that a process waits for one that does not answer."""
WORDS = ["training.num_train_epochs=10", f"training.ddp_timeout={TIMEOUT}"]
"""Long enough for something to happen in the middle."""
ALONE, TWO, FOUR = Division(1, 2, 4), Division(2, 2, 2), Division(4, 2, 1)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with two_hosts() as both:
        yield both


@pytest.fixture(scope="module")
def place(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("hosts")
    return Place(forks, folder, draw_photos(folder / "photos"))


@pytest.fixture(scope="module")
def whole(place: Place) -> Trained:
    """Uninterrupted, by one process."""
    run, children = place.start("whole", ALONE, *WORDS, dropout=True)
    finish(children)
    return Trained(run, [children])


def start(
    place: Place, hosts: list[Host], name: str, signal: Signal | None = None
) -> tuple[Run, list[Child]]:
    """Begins, or resumes, a run on two hosts, in processes that are forked."""
    run = Run(place.folder / name)
    recipe = place.write_recipe(run, TWO, True, 4)
    told = ["train", recipe, *WORDS, *(["--resume"] if run.exists() else [])]
    folder = place.folder / f"{name}.hosts-{len(list(place.folder.glob(f'{name}.hosts-*')))}"
    return run, fork_on(place.forks, hosts, folder, *told, before=journalled(signal))


def check_intact(run: Run, least: int) -> None:
    """Makes sure that every checkpoint is whole, and the newest at least that of a step."""
    found = list_checkpoints(run.checkpoints)
    assert int(found[-1].name.rpartition("-")[2]) >= least
    assert [find_damage(path) for path in found] == [None] * len(found)
    assert not run.report_html.exists()


def check_says_why(told: str, run: Run) -> None:
    """Makes sure that who is left says what happened, what is kept, and how to go on."""
    assert told.count("error: another process of this run ended, or did not answer") == 1, told
    assert f"the last checkpoint is {list_checkpoints(run.checkpoints)[-1]}" in told, told
    assert "--resume" in told
    before, _, _ = told.partition("error: ")  # what follows is the launcher's own
    assert "Traceback" not in before and "frame #" not in before, told


def launch(
    place: Place, hosts: list[Host], name: str, folder: Path
) -> tuple[Run, list[subprocess.Popen[str]], list[Path]]:
    """`accelerate launch` on both hosts; the run, the launchers, and where they say what."""
    run = Run(place.folder / name)
    recipe = place.write_recipe(run, TWO, True, 4)
    told = ["train", recipe, *WORDS, *(["--resume"] if run.exists() else [])]
    launchers = [
        host.launch(
            hosts[0],
            folder / str(host.rank),
            *told,
            VIT_FINETUNE_CACHE=str(place.folder / "caches" / str(host.rank)),
        )
        for host in hosts
    ]
    return run, launchers, [folder / str(host.rank) / "stderr" for host in hosts]


def test_two_hosts_train_lose_one_and_resume(
    place: Place, whole: Trained, hosts: list[Host], tmp_path: Path
) -> None:
    """Really launched. The cable is pulled: no connection is closed, nobody is told, and yet both sides end."""
    run, launchers, words = launch(place, hosts, "launched", tmp_path / "first")
    try:
        wait_for(
            lambda: (run.checkpoints / "checkpoint-8").exists() or launchers[0].poll() is not None,
            pause=0.01,
        )
        hosts[1].pull_cable()
        assert launchers[0].wait(PATIENCE) == 1, words[0].read_text()
        check_intact(run, 8)
        check_says_why(words[0].read_text(), run)
        wait_for(lambda: "Go on with --resume" in words[1].read_text())
        check_says_why(words[1].read_text(), run)
    finally:
        for host in hosts:
            host.kill()  # what the launcher of the host that was cut off does is not ours to say
        for launcher in launchers:
            launcher.wait()
    hosts[1].plug_in()
    run, launchers, words = launch(place, hosts, "launched", tmp_path / "second")
    codes = [launcher.wait(PATIENCE) for launcher in launchers]
    assert codes == [0, 0], "\n---\n".join(file.read_text() for file in words)
    assert "resuming from" in words[0].read_text()
    assert "2 processes × 2 images × 2 accumulation = 8 images per step" in words[0].read_text()
    check_same(Trained(run, []), whole)


def test_two_hosts_train_what_one_process_trains(place: Place, whole: Trained, hosts: list[Host]) -> None:
    run, children = start(place, hosts, "two")
    finish(children)
    trained = Trained(run, [children])
    assert trained.steps() == whole.steps()
    check_same(trained, whole)


KEEPING = """
from vit_finetune.data import cache
plain_add = cache._Pack.add
def add(self, digest, *pixels):
    print(json.dumps({"kept": digest}), file=journal)
    return plain_add(self, digest, *pixels)
cache._Pack.add = add
os.chdir("..")
"""
"""Source to run after the journal's: notes what a process puts into the cache of its host."""


def test_a_cache_is_filled_once_on_each_host(place: Place, hosts: list[Host]) -> None:
    """By one of its two processes, while the other waits."""
    run = Run(place.folder / "cached")
    recipe = place.write_recipe(run, FOUR, True, 4)
    # The cache is below each host's own folder.
    words = ["train", recipe, "training.num_train_epochs=1", "data.cache=pixels"]
    folder, before = place.folder / "cached.hosts", journalled() + KEEPING
    children = fork_on(place.forks, hosts, folder, *words, before=before, each=2)
    finish(children)
    kept = [len([entry for entry in noted(child) if "kept" in entry]) for child in children]
    assert kept == [IMAGES, 0, IMAGES, 0]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_is_killed_and_the_other_goes_on_alone(
    place: Place, whole: Trained, hosts: list[Host], lost: int
) -> None:
    """Whichever: the one that writes and speaks is no exception."""
    name = f"lost-{lost}"
    run, children = start(place, hosts, name, Signal(signal.SIGKILL, 17, lost))
    survivor = children[1 - lost]
    assert children[lost].wait() == -signal.SIGKILL
    assert survivor.wait(TIMEOUT - 1) == 1, said(children)  # a closed connection is noticed at once
    check_says_why(survivor.stderr, run)
    check_intact(run, 16)
    _, alone = place.start(name, ALONE._replace(accumulation=2), *WORDS, dropout=True)
    told = finish(alone)
    assert f"resuming from {run.checkpoints / 'checkpoint-16'}" in told
    assert "1 process × 2 images × 4 accumulation = 8 images per step" in told
    check_same(Trained(run, []), whole)


def refused(
    place: Place, hosts: list[Host], name: str, photos: list[Path], output: Path
) -> tuple[list[Child], str]:
    """What two hosts say of a run that cannot be; each finds its photos at the same path."""
    recipe = place.write_recipe(Run(output), TWO, True, 4)
    find = "import os, pathlib; os.symlink((%r)[int(os.environ['RANK'])], 'photos')\n"
    before = find % [str(path) for path in photos] + journalled() + QUICKLY_SEEN
    children = fork_on(
        place.forks,
        hosts,
        place.folder / name,
        "train",
        recipe,
        *WORDS,
        "data.path=photos",
        before=before,
    )
    assert [child.wait() for child in children] == [1, 1], said(children)
    told = "".join(child.stderr for child in children)
    assert told.count("error: ") == 1, said(children)
    assert "Traceback" not in told
    return children, told


QUICKLY_SEEN = "from vit_finetune.training import world; world.SHARED_WITHIN = 1\n"
"""Source to run before: disks are slow elsewhere."""


def test_other_images_on_a_host_are_refused(place: Place, hosts: list[Host]) -> None:
    """One file of one host has another content; its name is the same."""
    other = shutil.copytree(place.photos, place.folder / "other-photos")
    draw_image((1, 2, 3), 5).save(sorted(other.rglob("*.png"))[0])
    output = place.folder / "other"
    children, told = refused(place, hosts, "other-images", [place.photos, other], output)
    assert "process 1 finds other images in" in told, said(children)
    assert "Put the same images on every machine" in told
    assert not list(output.rglob("checkpoint-*"))


def test_a_run_folder_that_is_not_shared_is_refused(place: Place, hosts: list[Host]) -> None:
    children, told = refused(place, hosts, "not-shared", [place.photos] * 2, Path("run"))
    assert "does not see what the main process wrote there" in told, said(children)
    assert "training.output_dir" in told
    assert not (children[1].folder / "run").exists()
