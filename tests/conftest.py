"""What all tests share: drawn images, a tiny recipe, and a cache that is gone afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before any library reads them: tests never touch the network, and two threads never fight over two cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
from fork_server import ONLINE, QUICK, ForkServer, fork_server
from PIL import Image

from vit_finetune.recipe import Recipe, build_recipe
from vit_finetune.run import Run

if TYPE_CHECKING:
    from harmed_runs import Place
    from loopback_hub import LoopbackHub
    from playwright.sync_api import Browser

Say = Callable[..., tuple[int, str, str]]

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (210, 40, 50), "yellow": (220, 210, 40)}
"""Classes that a model of any size learns in a few steps, by the mean colour of their images."""


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a cache of its own, and works in a folder of its own."""
    monkeypatch.setenv("VIT_FINETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    """Starts command lines without the seconds that importing takes; one for all tests that kill processes."""
    with fork_server() as server:
        yield server


@pytest.fixture(scope="session")
def place(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Where runs that something happens to are started."""
    from harmed_runs import Place

    folder = tmp_path_factory.mktemp("harmed")
    return Place(forks, folder, draw_folder(folder / "photos"))


@pytest.fixture(scope="session")
def whole(place: Place) -> Run:
    """The run that nothing happens to."""
    run = Run(place.folder / "whole")
    assert place.train(run)[0].wait() == 0
    return run


@pytest.fixture(scope="session")
def whole_of_two(place: Place) -> Run:
    """The same of two processes."""
    run = Run(place.folder / "whole-of-two")
    assert [child.wait() for child in place.train(run, processes=2)] == [0, 0]
    return run


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A Hub on this machine; a test fails where it asks it what it does not know."""
    from loopback_hub import loopback_hub

    with loopback_hub() as hub:
        yield hub


@pytest.fixture
def say(hub: LoopbackHub, forks: ForkServer, tmp_path: Path) -> Say:
    """Says something to `vit-finetune` as a user of the Hub; answers exit code, stdout and stderr."""
    count = 0

    def run(*words: object, user: str | None = "ann", before: str = "", **told: str) -> tuple[int, str, str]:
        nonlocal count
        count += 1
        token = hub.token(user) if user else None
        environment = hub.environment(token, tmp_path / f"home-{user}") | told
        folder = tmp_path / f"said-{count}"
        child = forks.start(folder, *words, before=ONLINE + QUICK + before, **environment)
        code = child.wait()
        assert "Traceback" not in child.stderr, child.stderr
        return code, (folder / "stdout").read_text(), child.stderr

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of a tiny model; tests that change it change copies."""
    from vit_finetune.finetuning import finetune

    folder = tmp_path_factory.mktemp("trained")
    draw_folder(folder / "photos")
    return finetune(tiny_recipe(folder / "photos", folder / "run", hub={"license": "apache-2.0"}))


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose features tell colours apart: as good as any random ones do."""
    import torch

    from vit_finetune.model.loading import load_model
    from vit_finetune.recipe import ModelConfig

    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    model, processor = load_model(ModelConfig(config=TINY_VIT), ["x", "y"])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    """A copy of the finished run."""
    shutil.copytree(trained.path, tmp_path / "run")
    return Run(tmp_path / "run")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium that reaches nothing beyond this machine."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on this machine")
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=quiet)
        yield browser
        browser.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a disk with mount's options, such as `size=2m`, or gives it others, such as `ro`."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"remount,{options}" if mounted else options, "tmpfs", str(disk)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        mounted.append(disk)
        return disk

    if not shutil.which("mount"):
        pytest.skip("a small disk cannot be mounted here: there is no mount")
    yield mount
    while os.path.ismount(disk):
        subprocess.run(["umount", str(disk)], check=True)


def draw_image(colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A noisy image of one colour; size is (width, height)."""
    noise = np.random.default_rng(seed).normal(0, 25, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(colour) + noise, 0, 255).astype(np.uint8))


def draw_folder(root: Path, classes: int = 3, per_class: int = 12, suffix: str = ".png") -> Path:
    """A folder of class folders with drawn images of different sizes."""
    for number, (name, colour) in enumerate(list(COLOURS.items())[:classes]):
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            size = (20 + index % 5, 18 + index % 7)
            draw_image(colour, 1000 * number + index, size).save(root / name / f"{index}{suffix}")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three colours, twelve images each."""
    return draw_folder(tmp_path / "photos")


def draw_lopsided(root: Path, counts: dict[str, int]) -> Path:
    """The same with so many images of each of the first classes."""
    draw_folder(root, len(counts), max(counts.values()))
    for name, count in counts.items():
        for number in range(count, max(counts.values())):
            (root / name / f"{number}.png").unlink()
    return root


@pytest.fixture
def lopsided(tmp_path: Path) -> Path:
    """16 blue images, 8 green and 4 red; half of each are for training."""
    return draw_lopsided(tmp_path / "lopsided", {"blue": 16, "green": 8, "red": 4})


TINY_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 4,
    "image_size": 16,
}


def tiny_recipe(path: str | Path, output_dir: str | Path, **sections: dict[str, Any]) -> Recipe:
    """A recipe that trains a tiny ViT in seconds; sections are merged into it key by key."""
    values: dict[str, dict[str, Any]] = {
        # What measuring chooses may differ from run to run where models are tiny.
        "data": {"path": str(path), "validation_fraction": 0.25, "test_fraction": 0.25, "cache": "off"},
        "augmentation": {},
        "model": {"config": TINY_VIT},
        "training": {
            "output_dir": str(output_dir),
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "bf16": False,
            "use_cpu": True,
        },
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return build_recipe(values, name="tiny")
