"""README, recipes and scripts: every command and code block is run, every recipe is listed and loads."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY_VIT, draw_folder
from fork_server import ONLINE, ForkServer
from loopback_hub import LoopbackHub

from vit_finetune.recipe import build_recipe, bundled_recipes, load_recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def test_every_recipe_loads_and_is_in_the_table() -> None:
    files = [path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate"]
    assert len(files) == 14
    assert sorted(path.stem for path in files) == sorted(bundled_recipes())
    for path in files:
        assert load_recipe(path).name == path.stem
        lines = path.read_text(encoding="utf-8").splitlines()
        assert any(line.startswith(f"#   vit-finetune train {path.stem}") for line in lines), path
        assert len(lines) < 45  # one screen
    subprocess.run([sys.executable, ROOT / "scripts" / "recipe_table.py", "--check"], check=True)


def test_the_example_recipe_of_the_readme_is_one(tmp_path: Path) -> None:
    (example,) = blocks("yaml")
    (tmp_path / "example.yaml").write_text(example, encoding="utf-8")
    recipe = load_recipe(tmp_path / "example.yaml")
    assert recipe.model.image_size == 288 and recipe.training.learning_rate == 1e-4


@pytest.fixture
def readers_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader of the README has it: photographs, and a pretrained checkpoint of the bundled recipe's name.

    The checkpoint is tiny and local, because the Hub cannot be reached from a test; its path is the Hub's id.
    """
    from vit_finetune.model.loading import load_model
    from vit_finetune.recipe import ModelConfig

    draw_folder(tmp_path / "photos")
    draw_folder(tmp_path / "new-photos", per_class=2)
    model, processor = load_model(ModelConfig(config={**TINY_VIT, "image_size": 32}), ["x", "y"])
    pretrained = tmp_path / "google" / "vit-base-patch16-224-in21k"
    model.save_pretrained(pretrained)
    processor.save_pretrained(pretrained)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.hub
def test_the_readmes_commands_run(readers_place: Path, hub: LoopbackHub, forks: ForkServer) -> None:
    shell = "".join(blocks("bash"))
    commands = [line.split(" #")[0].strip() for line in shell.splitlines() if line.startswith("vit-finetune")]
    assert [shlex.split(command)[1] for command in commands] == [
        "check",
        "train",
        "predict",
        "check",
        "train",
        "push",
        "evaluate",
    ]
    reader = hub.environment(hub.token("you"), readers_place / "home")
    there = f"{ONLINE}\nimport os\nos.chdir({str(readers_place)!r})\n"
    for number, command in enumerate(commands):
        folder = readers_place / "said" / str(number)
        child = forks.start(folder, *shlex.split(command)[1:], before=there, **reader)
        assert child.wait() == 0, f"{command}\n{child.stderr}"
    assert (readers_place / "runs" / "photos" / "report.html").is_file()
    # Then the Python blocks: the pipeline of the run that is there, and the whole from Python in another folder.
    pipeline_block, whole_block = blocks("python")
    whole_block = whole_block.replace("runs/photos", "runs/again")
    for block in (pipeline_block, whole_block):
        result = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    tree = next(block for block in blocks("") if block.startswith("runs/photos/"))
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines()[1:]}
    assert listed == {path.name for path in (readers_place / "runs" / "photos").iterdir()}
    # The card and the resolved recipe name the checkpoint.
    resolved = yaml.safe_load((readers_place / "runs" / "photos" / "recipe.yaml").read_text())
    assert resolved["model"]["path"] == "google/vit-base-patch16-224-in21k"


def test_the_commands_about_data_are_valid() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").replace("$k", "1")
    commands = re.findall(r"^ *vit-finetune train (.*)$", page, re.MULTILINE)
    assert len(commands) == 13
    for command in commands:
        name, *overrides = shlex.split(command, comments=True)
        load_recipe(name, overrides)


def test_the_techniques_keys_are_recipes() -> None:
    page = (ROOT / "docs" / "techniques.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(examples) == 16
    for example in examples:
        values = yaml.safe_load(example)
        whole = {"data": {"path": "x"}, "model": {"path": "x/y"}}
        for section, keys in values.items():
            whole[section] = whole.get(section, {}) | keys
        build_recipe(whole, name="example")


def test_the_commands_about_the_page_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    from vit_finetune import cli, demonstrating

    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    commands = re.findall(r"^vit-finetune (demo .*)$", page, re.MULTILINE)
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(demonstrating, "serve_demo", lambda *words: asked.append(words))
    monkeypatch.setattr(demonstrating, "publish_space", lambda *words: asked.append(words))
    monkeypatch.setattr(cli, "listen", lambda: None)
    for command in commands:
        cli.app(shlex.split(command, comments=True), standalone_mode=False)
    assert asked == [
        ("runs/photos", "127.0.0.1", None),
        ("you/photos@v1", "127.0.0.1", 8000),
        ("runs/photos", "0.0.0.0", None),
        ("you/photos", "you/photos-page", None),
        ("you/photos", "you/photos-page", True),
    ]


def anchors(page: Path) -> set[str]:
    """The places of a page that a link can name, made of its headings as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "recipes" / "README.md"]
    count = 0
    for page in pages:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            other = (page.parent / path).resolve() if path else page
            assert other.exists(), f"{page.name}: there is no {target}"
            assert not anchor or anchor in anchors(other), f"{page.name}: {target}"
            count += 1
    assert count > 60
    listed = {path.name for path in (ROOT / "docs").glob("*.md") if f"(docs/{path.name})" in README}
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")}  # the README knows every page


def test_every_verb_of_the_readme_exists() -> None:
    listed = list(dict.fromkeys(re.findall(r"^\| `vit-finetune ([\w-]+)", README, re.MULTILINE)))
    from vit_finetune.cli import app

    assert listed == [command.name or command.callback.__name__ for command in app.registered_commands]


def test_recipes_and_templates_travel_in_the_wheel(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = (path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.yaml"))
    assert {f"vit_finetune/{path.as_posix()}" for path in recipes} <= names
    templates = (ROOT / "vit_finetune" / "templates").iterdir()
    assert {f"vit_finetune/templates/{path.name}" for path in templates} <= names
    assert not [name for name in names if name.startswith(("tests/", "runs/", "scripts/"))]


def test_the_scripts_are_readable_by_a_shell() -> None:
    for path in [ROOT / ".ci" / "run", *(ROOT / "scripts").iterdir()]:
        if path.suffix != ".py" and path.is_file():
            subprocess.run(["bash", "-n", path], check=True)


def test_quickstart_passes_its_words_on(tmp_path: Path) -> None:
    """To the training, and not to pip: both are stood in for by what writes down how it was called."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("python", "vit-finetune"):
        program = tmp_path / ".venv" / "bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text('#!/bin/sh\necho "$(basename "$0") $*" >> told\n')
        program.chmod(0o755)
    subprocess.run(["bash", "scripts/quickstart", "training.num_train_epochs=5"], cwd=tmp_path, check=True)
    installed, trained = (tmp_path / "told").read_text().splitlines()
    assert installed.startswith("python -m pip install") and " --editable . --constraint" in installed
    assert trained == "vit-finetune train digits training.num_train_epochs=5"
