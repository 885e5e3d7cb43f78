"""`tune`: what is searched, that trials are judged by validation alone, and that the best one can be trained again."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_recipe
from fork_server import QUICK, ForkServer

from vit_finetune import tuning
from vit_finetune.finetuning import finetune
from vit_finetune.publishing.tuning_page import build_page
from vit_finetune.recipe import Recipe, RecipeError, build_recipe, load_recipe
from vit_finetune.run import RunError
from vit_finetune.search_space import build_search, with_settings
from vit_finetune.training import hardware, loading
from vit_finetune.training.trainer import ViTTrainer
from vit_finetune.training.trials import open_study
from vit_finetune.tuning import tune

LOSS = {"metric_for_best_model": "loss"}
WIDE = [
    "training.learning_rate=1e-4..1e-1",
    "training.ema_decay=[0, 0.8]",
    "augmentation.mixup_alpha=0.0..0.8",
    "augmentation.crop_scale=[null, [0.5, 1.0]]",
    "model.drop_path_rate=[0, 0.3]",
    "data.balanced_sampling=[false, true]",
    "training.num_train_epochs=1..3",
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "STEP_SECONDS", 0.01)
    monkeypatch.setattr(loading, "READING_SECONDS", 0.01)


def recipe_for(folder: Path, output: Path, **sections: Any) -> Recipe:
    sections["training"] = {**LOSS, "dataloader_num_workers": 0, **sections.get("training", {})}
    return tiny_recipe(folder, output, **sections)


def trials_in(folder: Path) -> list[dict[str, Any]]:
    """What was tried, without how long it took."""
    found = json.loads((folder / "trials.json").read_text())["trials"]
    return [{key: value for key, value in trial.items() if key != "seconds"} for trial in found]


# --------------------------------------------------------------------------- trials


@pytest.mark.slow
def test_the_best_recipe_reproduces_the_best_trial(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Over keys of every section. The test images are gone before the first trial, so that none can be read."""
    recipe = recipe_for(folder, tmp_path / "run")
    plain, hidden, prepared = tuning._train, tmp_path / "hidden", []
    plain_prepare = tuning.prepare_data
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def prepare(config: Any) -> Any:
        data = plain_prepare(config)
        prepared.append(list(data.splits["test"]["id"]))
        for name in prepared[0]:
            (hidden / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).rename(hidden / name)
        return data

    def train(search: Any, recipe: Recipe, trial: Any) -> float:
        assert set(search.data.splits) == {"train", "validation"}
        return plain(search, recipe, trial)

    monkeypatch.setattr(tuning, "prepare_data", prepare)
    monkeypatch.setattr(tuning, "_train", train)
    found = tune(recipe, build_search(recipe, WIDE), trials=8)
    assert found == tmp_path / "run-tune" and len(prepared) == 1 and len(prepared[0]) == 9
    assert sorted(path.name for path in found.iterdir()) == [
        "best.yaml",
        "journal.log",
        "trials.json",
        "tune.html",
    ]
    assert not (tmp_path / "run").exists() and not list(temporary.iterdir())

    document = json.loads((found / "trials.json").read_text())
    trials = document["trials"]
    assert [trial["number"] for trial in trials] == list(range(1, 9))
    assert all(len({str(t["settings"][word.partition("=")[0]]) for t in trials}) > 1 for word in WIDE)
    scored = {trial["number"]: trial["score"] for trial in trials if trial["outcome"] == "scored"}
    assert scored[document["best"]] == min(scored.values())
    best = trials[document["best"] - 1]
    assert best["score"] == min(best["evaluations"].values())
    told = capfd.readouterr().err
    assert f"next: vit-finetune train {found / 'best.yaml'}" in told and "flatters" in told

    for name in prepared[0]:
        (hidden / name).rename(folder / name)
    best_recipe = load_recipe(found / "best.yaml")
    assert best_recipe.output_dir == tmp_path / "run"
    assert best_recipe.training.learning_rate == best["settings"]["training.learning_rate"]
    run = finetune(best_recipe)
    assert run.read_provenance()["best_metric"] == {"name": "loss", "value": best["score"]}
    assert "<script" not in (found / "tune.html").read_text()


@pytest.mark.slow
def test_the_same_seed_makes_the_same_trials(folder: Path, tmp_path: Path) -> None:
    found = []
    for name, seed in (("one", 42), ("same", 42), ("other", 7)):
        recipe = recipe_for(folder, tmp_path / name, training={"seed": seed, "num_train_epochs": 1})
        found.append(trials_in(tune(recipe, build_search(recipe), trials=3)))
    assert found[0] == found[1]
    assert found[0][0]["settings"] != found[2][0]["settings"]
    assert len({trial["settings"]["training.learning_rate"] for trial in found[0]}) == 3


KILLING = """
import os
from vit_finetune.training import hardware, loading
from vit_finetune.training.trainer import ViTTrainer
hardware.STEP_SECONDS = loading.READING_SECONDS = 0.01
plain, steps = ViTTrainer.training_step, []
def step(self, *args, **kwargs):
    steps.append(1)
    if len(steps) == %d:
        os.kill(os.getpid(), %d)
    return plain(self, *args, **kwargs)
ViTTrainer.training_step = step
"""


@pytest.mark.slow
def test_killed_and_gone_on_with_it_is_the_same_search(
    forks: ForkServer, folder: Path, tmp_path: Path
) -> None:
    """Killed in the third trial, stopped in the twelfth: the trials are those of a search that nothing stopped."""
    file = tmp_path / "tiny.yaml"
    file.write_text(recipe_for(folder, tmp_path / "run").to_yaml(resolved=False))

    def say(name: str, *words: str, before: str = QUICK) -> tuple[int, str]:
        child = forks.start(tmp_path / name, "tune", file, "--trials", "12", *words, before=before)
        return child.wait(), child.stderr

    assert say("a", f"training.output_dir={tmp_path}/whole")[0] == 0
    assert say("b", before=KILLING % (25, 9))[0] == -9
    half = trials_in(tmp_path / "run-tune")
    assert len(half) == 2 and (tmp_path / "run-tune" / "best.yaml").is_file()
    code, told = say("c")
    assert code == 1 and "go on with it with --resume" in told
    code, told = say("d", "--resume", "--search", "training.weight_decay=0.1..0.2")
    assert code == 1 and "cannot go on with another search: the search was" in told
    code, told = say("e", "--resume", "training.label_smoothing_factor=0.1")
    assert code == 1 and "training.label_smoothing_factor was 0.0, is 0.1" in told
    (folder / "red" / "0.png").rename(tmp_path / "0.png")
    code, told = say("h", "--resume")
    assert code == 1 and "cannot go on with another search: the images are others" in told
    (tmp_path / "0.png").rename(folder / "red" / "0.png")
    code, told = say("f", "--resume", before=KILLING % (60, 15))
    assert code == 75 and "with --resume" in told, told
    code, told = say("g", "--resume")
    assert code == 0, told
    trials = trials_in(tmp_path / "run-tune")
    assert trials[:2] == half and trials == trials_in(tmp_path / "whole-tune")
    assert "pruned" in {trial["outcome"] for trial in trials}  # by the Trainer, at an evaluation


@pytest.mark.slow
def test_poor_trials_are_pruned_and_diverged_ones_passed_over(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.5, 0.4, 0.5, 0.4, 0.5, 0.4, 0.5, 0.4, 0.5, 0.4, 0.9])
    plain = ViTTrainer.evaluate

    def evaluate(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = plain(self, *args, **kwargs)
        self.state.log_history[-1]["eval_loss"] = metrics["eval_loss"] = next(scores)
        return metrics

    monkeypatch.setattr(ViTTrainer, "evaluate", evaluate)
    recipe = recipe_for(folder, tmp_path / "run")
    trials = trials_in(tune(recipe, build_search(recipe), trials=6))
    assert [trial["outcome"] for trial in trials] == ["scored"] * 5 + ["pruned"]
    assert [list(trial["evaluations"].values()) for trial in trials] == [[0.5, 0.4]] * 5 + [[0.9]]
    monkeypatch.undo()

    recipe = recipe_for(folder, tmp_path / "wild")
    search = build_search(recipe, ["training.learning_rate=[0.003, 1e30]"])
    outcomes = {
        trial["settings"]["training.learning_rate"]: trial["outcome"]
        for trial in trials_in(tune(recipe, search, trials=8))
    }
    assert outcomes == {0.003: "scored", 1e30: "diverged"}
    search = build_search(recipe_for(folder, tmp_path / "all"), ["training.learning_rate=[1e30, 2e30]"])
    with pytest.raises(RunError, match="no trial was scored"):
        tune(recipe_for(folder, tmp_path / "all"), search, trials=1)


@pytest.mark.slow
@pytest.mark.parametrize(("chooses", "score"), [(True, 0.1), (False, 0.7)])
def test_a_trial_is_judged_by_the_weights_that_would_be_published(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chooses: bool, score: float
) -> None:
    scores, plain = iter([0.5, 0.1, 0.7]), ViTTrainer.evaluate

    def evaluate(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = plain(self, *args, **kwargs)
        self.state.log_history[-1]["eval_loss"] = metrics["eval_loss"] = next(scores)
        return metrics

    monkeypatch.setattr(ViTTrainer, "evaluate", evaluate)
    training = {"load_best_model_at_end": chooses, "num_train_epochs": 3}
    recipe = recipe_for(folder, tmp_path / "run", training=training)
    (found,) = trials_in(tune(recipe, build_search(recipe), trials=1))
    assert list(found["evaluations"].values()) == [0.5, 0.1, 0.7] and found["score"] == score


@pytest.mark.slow
def test_what_was_chosen_for_the_machine_is_written_out(folder: Path, tmp_path: Path) -> None:
    """Else the best recipe might be trained in another precision, or in other steps, than the trial was."""
    training = {"bf16": "auto", "per_device_train_batch_size": "auto", "num_train_epochs": 1}
    recipe = recipe_for(folder, tmp_path / "run", data={"cache": "auto"}, training=training)
    found = tune(recipe, build_search(recipe), trials=1)
    best = load_recipe(found / "best.yaml")
    assert isinstance(best.training.bf16, bool) and best.training.per_device_train_batch_size == 128
    assert best.data.cache != "auto"


def test_values_that_do_not_go_together_are_a_trial_passed_over(folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(folder, tmp_path)
    build_search(recipe, ["data.balanced_sampling=[false, true]", "training.class_weights=[null, auto]"])
    with pytest.raises(RecipeError, match="together do it twice"):
        with_settings(recipe, {"data.balanced_sampling": True, "training.class_weights": "auto"})


# --------------------------------------------------------------------------- the page


def test_the_page_shows_every_trial_and_runs_nothing() -> None:
    hostile = "</text><script>alert(1)</script>"
    trials = [
        {"number": 1, "outcome": "scored", "score": 0.81, "evaluations": {"5": 0.7, "10": 0.81}, "seconds": 2.0,
         "settings": {"training.learning_rate": 1e-4, "model.path": hostile}},
        {"number": 2, "outcome": "pruned", "score": None, "evaluations": {"5": 0.4}, "seconds": 1.0,
         "settings": {"training.learning_rate": 1e-2, "model.path": "b"}},
        {"number": 3, "outcome": "diverged", "score": None, "evaluations": {}, "seconds": 1.0,
         "settings": {"training.learning_rate": 1e-1, "model.path": "b"}},
    ]  # fmt: skip
    document = {"recipe_name": hostile, "metric": "accuracy", "search": [hostile], "best": 1, "trials": trials,
                "logarithmic": ["training.learning_rate"]}  # fmt: skip
    page = build_page(document)
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert "mathdefault" not in page  # which is how matplotlib writes powers of ten
    assert page.count("<svg") == 3 and "0.8100" in page and "pruned" in page and "diverged" in page
    empty = build_page({**document, "trials": [], "best": None})
    assert "No trial was scored yet" in empty and "<svg" not in empty


@pytest.mark.slow
def test_what_a_killed_process_left_in_the_journal_is_no_obstacle(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """optuna's lock, for which it would wait, of a relative path for ever; and half of a line that it adds to."""
    monkeypatch.chdir(tmp_path)
    recipe = recipe_for(folder, Path("run"), training={"num_train_epochs": 1})
    search = build_search(recipe)
    journal = tune(recipe, search, trials=1) / "journal.log"
    Path(f"{journal}.lock").symlink_to(journal)
    with journal.open("ab") as file:
        file.write(b'{"op_code":8,"worker_id":"kill')
    trials = trials_in(tune(recipe, search, trials=2, resume=True))
    assert [trial["outcome"] for trial in trials] == ["scored", "scored"]
    assert trials_in(tune(recipe, search, trials=2, resume=True)) == trials  # it can still be read
    assert not Path(f"{journal}.lock").is_symlink()


@pytest.mark.slow
def test_killed_trials_are_forgotten(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is left that seems to run: for one, optuna would be another sampler, and a page would wait."""
    recipe = recipe_for(folder, tmp_path / "run", training={"num_train_epochs": 1})
    search = build_search(recipe)

    def stopped(*_: Any) -> float:
        raise KeyboardInterrupt

    plain = tuning._train
    monkeypatch.setattr(tuning, "_train", stopped)
    with pytest.raises(KeyboardInterrupt):
        tune(recipe, search, trials=1)
    monkeypatch.setattr(tuning, "_train", plain)
    tune(recipe, search, trials=1, resume=True)
    states = [trial.state.name for trial in open_study(recipe, tmp_path / "run-tune").trials]
    assert states == ["FAIL", "COMPLETE"]


@pytest.mark.slow
def test_values_that_no_model_can_have_are_said_before_the_first_trial(
    folder: Path, pretrained: Path, tmp_path: Path
) -> None:
    """Else a search would end at the trial that draws one, and again at the same one when it is gone on with."""
    values = recipe_for(folder, tmp_path / "run", training={"num_train_epochs": 1}).model_dump(
        exclude_unset=True
    )
    recipe = build_recipe(values | {"model": {"path": str(pretrained)}}, name="tiny")
    search = build_search(recipe, ["model.image_size=[16, 17]"])
    with pytest.raises(
        RunError, match=r"--search model\.image_size=\[16, 17\]: with 17: .*multiple of the patch"
    ):
        tune(recipe, search, trials=2)
    assert not (tmp_path / "run-tune").exists()
    search = build_search(recipe, ["model.image_size=16..24"])  # and what lies between is passed over
    for trials, resume in ((2, False), (4, True)):
        with pytest.raises(RunError, match="no trial was scored"):
            tune(recipe, search, trials=trials, resume=resume)
    tried = [
        (trial["settings"]["model.image_size"] % 4, trial["outcome"])
        for trial in trials_in(tmp_path / "run-tune")
    ]
    assert len(tried) == 4 and all(rest and outcome == "impossible" for rest, outcome in tried)
