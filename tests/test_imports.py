"""What answers at once stays light, and every public name is where it says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import vit_finetune

HEAVY = {"torch", "torchvision", "transformers", "datasets", "sklearn", "matplotlib", "pyarrow", "numpy"}


def loaded_by(code: str) -> tuple[set[str], subprocess.CompletedProcess[str]]:
    """The top-level modules that a piece of Python has imported at its end, and how it went."""
    report = (
        "import atexit, json, sys; atexit.register(lambda: print('\\n' + json.dumps(sorted(sys.modules))))\n"
    )
    done = subprocess.run([sys.executable, "-c", report + code], capture_output=True, text=True, check=False)
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}, done


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        ("--help", 0, "Usage: vit-finetune"),
        ("--version", 0, vit_finetune.__version__),
        ("recipes", 0, "digits"),
        ("train --help", 0, "--resume"),
        ("train digitz", 2, "no such recipe"),
        ("train digits training.learning_rat=1", 2, "training.learning_rate"),
        ("check digits data.path=3", 2, "expected text"),
        ("train", 2, "Missing argument"),
    ],
)
def test_quick_answers_load_nothing_heavy(words: str, code: int, shown: str) -> None:
    modules, done = loaded_by(f"sys.argv[1:] = {words.split()!r}\nfrom vit_finetune.cli import main\nmain()")
    assert done.returncode == code
    assert shown in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert modules.isdisjoint(HEAVY)
    assert code or "rich" not in modules, "plain help needs no rich"


def test_an_occupied_folder_is_refused_before_anything_heavy() -> None:
    code = (
        "from pathlib import Path\nPath('used').mkdir(); Path('used/recipe.yaml').touch()\n"
        "sys.argv[1:] = ['train', 'digits', 'training.output_dir=used']\nfrom vit_finetune.cli import main\nmain()"
    )
    modules, done = loaded_by(code)
    assert done.returncode == 1
    assert "already holds a run" in done.stderr
    assert modules.isdisjoint(HEAVY)


def test_importing_the_package_loads_nothing_at_all() -> None:
    modules, _ = loaded_by("import vit_finetune; dir(vit_finetune); vit_finetune.__version__")
    assert modules.isdisjoint(HEAVY | {"pydantic", "yaml", "rich", "typer"})


def test_recipes_and_runs_need_no_torch() -> None:
    modules, done = loaded_by(
        "from vit_finetune import Recipe, Report, Run, load_recipe; load_recipe('digits')"
    )
    assert done.returncode == 0
    assert modules.isdisjoint(HEAVY)


def test_splits_need_no_torch() -> None:
    modules, done = loaded_by(
        "from vit_finetune import load_splits\nfrom vit_finetune.recipe import DataConfig\n"
        "load_splits(DataConfig(path='digits'))"
    )
    assert done.returncode == 0, done.stderr
    assert modules.isdisjoint({"torch", "torchvision", "transformers"})


@pytest.mark.parametrize("module", ["publishing.card", "publishing.report", "publishing.hub"])
def test_papers_need_no_torch(module: str) -> None:
    modules, done = loaded_by(f"import vit_finetune.{module}")
    assert done.returncode == 0, done.stderr
    assert modules.isdisjoint({"torch", "torchvision", "transformers"})


def test_every_public_name_is_there() -> None:
    assert sorted(vit_finetune.__all__) == sorted(vit_finetune._HOMES)
    for name in vit_finetune.__all__:
        assert getattr(vit_finetune, name).__name__ == name
        assert name in dir(vit_finetune)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        vit_finetune.nonsense  # noqa: B018
