"""What a search is over: words, checked against the recipe."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_recipe
from test_tuning import recipe_for
from typer.testing import CliRunner

from vit_finetune.cli import app
from vit_finetune.recipe import RecipeError, load_recipe
from vit_finetune.run import RunError
from vit_finetune.search_space import Dimension, build_search
from vit_finetune.tuning import tune


def test_the_words_of_a_search(folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(folder, tmp_path)
    rate, epochs, narrow, method, size, off, teacher = build_search(recipe, [
        "training.learning_rate=1e-5..1e-3", "training.num_train_epochs=1..20", "training.layer_decay=0.6..1.0",
        "model.method=[full, head]", "training.max_grad_norm=0..10.0", "training.weight_decay=0.1..1",
        "training.teacher=[../small, ../large]",
    ])  # fmt: skip
    assert (rate.low, rate.high, rate.is_logarithmic, rate.is_integer) == (1e-5, 1e-3, True, False)
    assert (epochs.low, epochs.high, epochs.is_logarithmic, epochs.is_integer) == (1, 20, False, True)
    assert not narrow.is_logarithmic and not size.is_logarithmic and off.is_logarithmic
    assert teacher.choices == ("../small", "../large")
    assert method.choices == ("full", "head") and not method.is_logarithmic
    assert str(rate) == "training.learning_rate=1e-05..0.001"


def test_the_default_search_is_about_the_recipes_own_rate(folder: Path, tmp_path: Path) -> None:
    assert build_search(tiny_recipe(folder, tmp_path)) == [
        Dimension("training.learning_rate", 3e-4, 3e-2),
        Dimension("training.weight_decay", 1e-3, 0.3),
    ]
    automatic = tiny_recipe(folder, tmp_path, training={"learning_rate": "auto"})
    assert build_search(automatic)[0] == Dimension("training.learning_rate", 1e-5, 1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.learning_rate"], "expected key=low..high or key="),
        (["training.learning_rat=1e-5..1e-3"], "did you mean training.learning_rate"),
        (["training.learning_rate=1e-3..1e-5"], "from the lower end to the higher"),
        (["training.learning_rate=a..b"], "the ends of a range are numbers"),
        (["training.learning_rate=1e-5...1e-3"], "stand two dots"),
        (["training.weight_decay=0..1"], r"write 0.0..1.0 for what lies between, or .*=\[0, 1\]"),
        (["training.learning_rate=-1.0..1.0"], "greater than 0"),
        (["training.label_smoothing_factor=0.0..1.0"], "less than 1"),
        (["model.method=[full, heads]"], "did you mean head"),
        (["model.method=[full]"], "expected key=low..high or key="),
        (["model.method=[full"], "not valid YAML"),
        (["training.layer_decay=[0.5, 1]", "training.layer_decay=0.5..1.0"], "is said twice"),
        (["data.validation_fraction=0.1..0.2"], "compared on the same images"),
        (["evaluation.batch_size=1..4"], "compared on the same images"),
        (["training.seed=1..9"], "the luckiest of several seeds"),
        (["training.metric_for_best_model=[loss, accuracy]"], "the trials are compared by it"),
        (["model.method=[full, linear_probe]"], "linear_probe|linear probe"),
    ],
)  # fmt: skip
def test_other_words_are_refused_before_anything_heavy(
    folder: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(tiny_recipe(folder, tmp_path / "run").to_yaml(resolved=False))
    with pytest.raises(RecipeError, match=message):
        build_search(load_recipe(file), words)
    said = [part for word in words for part in ("--search", word)]
    assert CliRunner().invoke(app, ["tune", str(file), *said]).exit_code == 2
    assert not (tmp_path / "run-tune").exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"training": {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}}, "eval_strategy: epoch"),
        ({"data": {"streaming": True}}, "no data.streaming"),
        ({"training": {"learning_rate": "auto"}}, "search it, or write a number"),
        ({"model": {"config": None, "path": "x", "method": "linear_probe"}}, "nothing to tune"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be_searched(folder: Path, tmp_path: Path, section: Any, message: str) -> None:
    if "model" in section:
        base = tiny_recipe(folder, tmp_path)
        recipe = base.model_copy(update={"model": base.model.model_copy(update=section["model"])})
    else:
        recipe = tiny_recipe(folder, tmp_path, **section)
    with pytest.raises(RecipeError, match=message):
        build_search(recipe, ["training.weight_decay=0.1..0.2"])


def test_nothing_heavy_is_imported_to_check_a_search() -> None:
    source = (
        "import sys, vit_finetune.cli; sys.exit(bool({'torch', 'optuna', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0


def test_what_is_missing_or_in_the_way(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(folder, tmp_path / "run")
    search = build_search(recipe)
    with pytest.raises(RunError, match="no search to go on with"):
        tune(recipe, search, resume=True)
    (tmp_path / "run-tune").mkdir()
    (tmp_path / "run-tune" / "mine.txt").touch()
    with pytest.raises(RunError, match=r"is there already: set another training\.output_dir"):
        tune(recipe, search)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="a launcher started 2"):
        tune(recipe, search)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"pip install 'vit-finetune\[tune\]'"):
        tune(recipe, search)
