"""Every command of the docs: run here as a reader would type it, or named here with who runs it instead, or why nobody does."""

from __future__ import annotations

import json
import os
import re
import shutil
import socketserver
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import TINY_VIT, draw_folder, draw_image, tiny_recipe
from fork_server import ONLINE, QUICK, ForkServer
from labelled_shapes import draw_labels, write_images, write_rows
from loopback_hub import LoopbackHub
from shard_files import write_tars

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

BENCHMARK = "takes minutes, and measures; its tables say when and where it was run"
MACHINES = "needs GPUs, several machines or Slurm; tests/test_launching.py and tests/invariants/ start the same processes"
SYNOPSIS = "says how a command is put together, and is none"
SERVER = (
    "serves until Ctrl-C; tests/test_documentation.py asks what it would serve, tests/test_demo.py the server"
)
README_TEST = "run by tests/test_documentation.py"
SEEING_TEST = "run by tests/test_explaining.py"

LEFT = {
    "README.md": {
        "scripts/quickstart": "installs; run by a person on a new machine, its words by tests/test_documentation.py",
        "pip install .": README_TEST,
        "vit-finetune check imagefolder": README_TEST,
        "vit-finetune push": README_TEST,
    },
    "checkup.md": {"vit-finetune check RECIPE": SYNOPSIS},
    "choosing.md": {"vit-finetune train RECIPE": SYNOPSIS},
    "data.md": {"python scripts/bench_listing.py": BENCHMARK},
    "demo.md": {"vit-finetune demo": SERVER},
    "performance.md": {".venv/bin/python scripts/bench_": BENCHMARK},
    "processes.md": {
        "accelerate launch": MACHINES,
        "sbatch": MACHINES,
        "vit-finetune train recipe.yaml --resume": "resuming is what tests/test_resuming.py is about",
    },
    "seeing.md": {"vit-finetune explain": SEEING_TEST},
    "tutorial.md": {"vit-finetune demo": SERVER},
}
"""Blocks that are not run here: how they begin, and why."""

COMMAND = re.compile(r"^ *(?:vit-finetune|python|pip|accelerate|sbatch|scripts/|\.venv/)", re.MULTILINE)


def blocks(page: Path) -> list[str]:
    """The blocks of a page in which something is typed, whatever language they are said to be in."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for language, text in fenced if language == "bash" or (not language and COMMAND.match(text))]


def is_left(page: Path, block: str) -> bool:
    return any(block.startswith(start) for start in LEFT.get(page.name, {}))


# --------------------------------------------------------------------------- the reader

PROGRAM = """#!{python} -SE
import json, os, socket, sys
asked = socket.socket(socket.AF_UNIX)
asked.connect({path!r})
asked.sendall(json.dumps([os.getcwd(), sys.argv[1:]]).encode())
asked.shutdown(socket.SHUT_WR)
code, out, err = json.load(asked.makefile())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""
"""What a shell finds as `vit-finetune`: it asks the test to fork a process that has imported everything already."""


HASTE = f"""{ONLINE}{QUICK}
from vit_finetune.evaluation import speed
assert speed.ROUNDS and speed.SECONDS
speed.ROUNDS, speed.SECONDS = 1, 0.001
"""
"""Source to run before: a Hub is to be found, and nothing is timed for longer than it has to be."""


@dataclass
class Reader:
    """Somebody in a folder with photographs, a shell, a login on a Hub, and a pretrained model of the recipes' name."""

    folder: Path
    hub: LoopbackHub
    environment: dict[str, str]
    said: list[list[str]] = field(default_factory=list)

    def types(self, block: str) -> str:
        """Runs a block with `bash -e`, of five folds the first and the last; answers what was printed."""
        done = subprocess.run(
            ["bash", "-e", "-c", block.replace("in 1 2 3 4 5;", "in 1 5;")],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def hurried(words: list[str], number: int) -> list[str]:
    """The same words, made short: one epoch, two trials, nothing measured that would be chosen by measuring.

    Lines of a list that name no folder, and would all train in the same, have one of their own.
    """
    if words[0] not in ("train", "tune"):
        return words
    short = [*words, "training.num_train_epochs=1", "training.bf16=false", "model.attn_implementation=eager"]
    named = any(word.startswith("training.output_dir=") or word.endswith(".yaml") for word in words)
    if not named and "digits" not in words:  # the walkthrough goes on with runs/digits
        short.append(f"training.output_dir=runs/told-{number}")
    return [*short, "--trials", "2"] if words[0] == "tune" else short


@pytest.fixture
def reader(forks: ForkServer, hub: LoopbackHub, tmp_path: Path) -> Iterator[Reader]:
    programs, place = tmp_path / "programs", tmp_path / "place"
    programs.mkdir()
    draw_folder(place / "photos")
    draw_folder(place / "new-photos", per_class=1)
    write_pretrained(place / "google" / "vit-base-patch16-224-in21k")
    for name in ("scripts", "recipes"):
        (place / name).symlink_to(ROOT / name)
    paths = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment = hub.environment(hub.token("you"), tmp_path / "home") | paths
    reader = Reader(place, hub, environment)

    class Answer(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            cwd, words = json.load(self.rfile)
            number = len(reader.said)
            reader.said.append(words)
            before = f"{HASTE}\nimport os\nos.chdir({cwd!r})\n"
            folder = tmp_path / "said" / str(number)
            child = forks.start(folder, *hurried(words, number), before=before, **reader.environment)
            answer = [child.wait(), (folder / "stdout").read_text(), child.stderr]
            self.wfile.write(json.dumps(answer).encode())

    with socketserver.ThreadingUnixStreamServer(str(tmp_path / "asked"), Answer) as server:
        for name, text in {
            "vit-finetune": PROGRAM.format(python=sys.executable, path=str(tmp_path / "asked")),
            "python": f'#!/bin/sh\nexec "{sys.executable}" "$@"\n',
            "pip": f'#!/bin/sh\necho "$*" >> "{tmp_path}/installed"\n',
        }.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield reader
        server.shutdown()
    if (tmp_path / "installed").exists():  # nothing was, but what is said to be installed must exist
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for line in (tmp_path / "installed").read_text().splitlines():
            named = re.fullmatch(r"install vit-finetune\[([\w,]+)\]", line)
            assert named and set(named[1].split(",")) <= set(extras), line


def write_pretrained(folder: Path) -> None:
    """A tiny checkpoint, in the place of the Hub's, which a test cannot reach."""
    import torch

    from vit_finetune.model.loading import load_model
    from vit_finetune.recipe import ModelConfig

    torch.manual_seed(0)
    model, processor = load_model(ModelConfig(config={**TINY_VIT, "image_size": 32}), ["x", "y"])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


# --------------------------------------------------------------------------- what pages take for granted


def nothing(reader: Reader, block: str) -> None:
    """The place is as the page has it."""


def of_choosing(reader: Reader, block: str) -> None:
    if "you/other-checkpoint" in block:
        write_pretrained(reader.folder / "you" / "other-checkpoint")


def of_comparing(reader: Reader, block: str) -> None:
    """CIFAR-10's folders; two runs whose patches are large enough for the sizes that are asked for."""
    if "cifar10/" in block:
        for split, count in (("train", 12), ("test", 3)):
            for name, colour in (("cat", (200, 40, 50)), ("ship", (40, 60, 200))):
                folder = reader.folder / "cifar10" / split / name
                folder.mkdir(parents=True)
                for number in range(count):
                    seed = 100 * count + number + len(name) * 1000
                    draw_image(colour, seed, (32, 32)).save(folder / f"{number}.png")
    if "runs/one" in block and not (reader.folder / "runs" / "one").exists():
        config = {**TINY_VIT, "patch_size": 16, "image_size": 32}
        recipe = tiny_recipe("photos", "runs/one", model={"config": config})
        (reader.folder / "tiny.yaml").write_text(recipe.to_yaml(resolved=False))
        for name in ("one", "two"):
            reader.types(f"vit-finetune train tiny.yaml training.output_dir=runs/{name}")


def of_data(reader: Reader, block: str) -> None:
    """Tables, groups, shards and a dataset of the Hub, before the block that names them."""
    photos, scans = reader.folder / "photos", reader.folder / "scans"
    if "data.group" in block and not scans.exists():
        shutil.copytree(photos, scans)
        ids = [path.relative_to(scans).as_posix() for path in sorted(scans.rglob("*.png"))]
        rows = [{"file_name": id, "label": id.split("/")[0], "patient": n % 9} for n, id in enumerate(ids)]
        write_rows(scans / "metadata.csv", rows)
        for path in photos.rglob("*.png"):
            path.rename(path.with_name(f"session{int(path.stem) % 4}_{path.name}"))
    if "data.splits=runs/photos" in block:
        reader.types("vit-finetune train imagefolder data.path=photos/ training.output_dir=runs/photos")
    if "data.multi_label" in block:
        photos.rename(reader.folder / "photos-of-one-class")
        labels = [
            [{"disc": "beach", "frame": "people", "bar": "night"}[name] for name in names]
            for names in draw_labels(40)
        ]
        files = write_images(photos, draw_labels(40))
        write_rows(photos / "metadata.jsonl", [{"file_name": f, "labels": n} for f, n in zip(files, labels)])
        flags = [
            {"file_name": f} | {name: int(name in names) for name in ("beach", "people", "night")}
            for f, names in zip(files, labels)
        ]
        write_rows(photos / "metadata.csv", flags)
    if "owner/name data.revision" in block:
        shutil.rmtree(photos)
        (reader.folder / "photos-of-one-class").rename(photos)
        reader.types("vit-finetune upload-data photos/ owner/name")
        uploaded = reader.hub.repo("owner/name", "dataset")
        uploaded.tags["v1.0"] = uploaded.find("main")
    if "data.path=shards/" in block:
        write_tars(reader.folder / "shards", [6] * 11, name="photos")


def of_export(reader: Reader, block: str) -> None:
    reader.types("vit-finetune train imagefolder data.path=photos/ training.output_dir=runs/photos")


PLACES: dict[str, Callable[[Reader, str], None]] = {
    "tutorial.md": nothing,
    "choosing.md": of_choosing,
    "comparing.md": of_comparing,
    "data.md": of_data,
    "export.md": of_export,
    "hub.md": nothing,
    "techniques.md": nothing,
    "walkthrough.md": nothing,
}
"""Pages that are run here, and what makes the place ready for a block of them."""


def test_every_block_is_run_or_left_with_a_reason() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert page.name in PLACES or is_left(page, block), f"{page.name}: nobody runs\n{block}"
    for name, starts in LEFT.items():
        (page,) = [page for page in PAGES if page.name == name]
        for start in starts:
            assert any(block.startswith(start) for block in blocks(page)), f"{name} has no {start}"
    for name in PLACES:
        assert any(not is_left(page, block) for page in PAGES if page.name == name for block in blocks(page))


def test_every_table_has_a_head() -> None:
    """Rows after an empty line are no table for whoever reads the page: they run together into one line."""
    for page in PAGES:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for table in re.findall(r"(?:^\|.*\n)+", prose, re.MULTILINE):
            assert re.match(r"\|.*\n\|[-| :]+\|\n", table), f"{page.name}:\n{table}"


@pytest.mark.slow
@pytest.mark.hub
@pytest.mark.parametrize("name", PLACES)
def test_the_commands_of_a_page_run(name: str, reader: Reader, hub: LoopbackHub) -> None:
    if name == "data.md":
        reader.environment["HF_TOKEN"] = hub.token("owner")
    page = ROOT / "docs" / name
    printed, typed = "", 0
    for block in blocks(page):
        if not is_left(page, block):
            PLACES[name](reader, block)
            before = len(reader.said)
            printed += reader.types(block)
            typed += len(reader.said) - before
    lines = [line for block in blocks(page) if not is_left(page, block) for line in block.splitlines()]
    assert typed >= sum(line.lstrip().startswith("vit-finetune ") for line in lines) > 0
    if name == "walkthrough.md":
        assert steps(printed) == steps(page.read_text(encoding="utf-8"))
        drawn = {path.name for path in (reader.folder / "docs" / "figures").iterdir()}
        assert drawn == {path.name for path in (ROOT / "docs" / "figures").iterdir()}


def steps(text: str) -> list[tuple[str, str]]:
    """Steps of the walk and the shapes of what comes out; the values are another training's."""
    rows = re.findall(r"^\| (.+?) \| (`\(.+?\)`) \|", text, re.MULTILINE)
    assert len(rows) == 12
    return rows
