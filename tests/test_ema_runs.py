"""Runs with an average of the weights: what is published, resumed, refused, and kept by several processes."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path

import pytest
import torch
import worlds
from conftest import draw_folder, tiny_recipe
from exactness import (
    same,
)
from fork_server import QUICK, ForkServer
from harmed_runs import Place, at, check_same_end, checkpoints, ended, flip, send
from safetensors.torch import load_file
from test_ema import RESNET, WEIGHTS
from transformers import AutoModelForImageClassification

from vit_finetune.finetuning import finetune
from vit_finetune.model.adaptation import adapt
from vit_finetune.model.loading import load_model
from vit_finetune.publishing.card import build_card
from vit_finetune.publishing.report import build_report
from vit_finetune.recipe import ModelConfig, RecipeError, load_recipe
from vit_finetune.run import Run, RunError
from vit_finetune.training.ema import AVERAGED, WeightAverage
from vit_finetune.training.hardware import estimate_memory
from vit_finetune.training.world import check_undivided


@pytest.fixture(scope="module")
def whole_average(place: Place) -> Run:
    """A run with an average that nothing happens to."""
    run = Run(place.folder / "whole-average")
    ended(place.train(run, "training.ema_decay=0.9"), [0], errors=0)
    return run


@pytest.mark.slow
def test_the_average_is_published_and_said_to_be_one(whole_average: Run) -> None:
    run, provenance = whole_average, whole_average.read_provenance()
    published = load_file(run.model / WEIGHTS)
    best = run.checkpoints / f"checkpoint-{provenance['best_step']}"
    assert same(published, load_file(best / AVERAGED / WEIGHTS))
    assert not same(published, load_file(best / WEIGHTS))
    history = {e["step"]: e["eval_loss"] for e in json.loads(run.history.read_text()) if "eval_loss" in e}
    report = json.loads(run.report("validation").read_text())
    assert report["log_loss"] == pytest.approx(history[provenance["best_step"]], abs=1e-6)
    steps = provenance["steps"]
    last = (1 + steps) / (10 + steps)
    assert provenance["ema"] == {"decay": 0.9, "last_decay": pytest.approx(last)}
    told = f"exponential moving average over the steps, with decay 0.9, {last:.4g} in the last step"
    assert told in build_card(run)
    assert told in build_report(run)
    assert {file.name for file in run.model.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json"
    }  # fmt: skip
    assert type(AutoModelForImageClassification.from_pretrained(run.model)).__name__.startswith("ViT")


@pytest.mark.slow
def test_without_a_choice_the_last_average_is_published(folder: Path, tmp_path: Path) -> None:
    run = finetune(
        tiny_recipe(folder, tmp_path / "run", training={"ema_decay": 0.99, "load_best_model_at_end": False})
    )
    last = max(checkpoints(run).items())[1]
    assert same(load_file(run.model / WEIGHTS), load_file(last / AVERAGED / WEIGHTS))
    assert run.read_provenance()["best_step"] is None


def test_runs_without_one_say_nothing_of_it(run: Run) -> None:
    assert "moving average" not in build_card(run) + run.report_html.read_text()
    assert run.read_provenance()["ema"] is None


def check_same_averages(run: Run, whole: Run) -> None:
    check_same_end(run, whole)
    last, other = (max(checkpoints(one).items())[1] / AVERAGED / WEIGHTS for one in (run, whole))
    assert last.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_an_evaluation_that_a_signal_breaks_off(place: Place, whole_average: Run, tmp_path: Path) -> None:
    """The checkpoint that is then written has the weights in their place, and the average in its own."""
    run, words = Run(tmp_path / "run"), "training.ema_decay=0.9"
    second = "self.batches = getattr(self, 'batches', 0) + 1"
    fault = at(f"{send(signal.SIGTERM)}", step=8, method="prediction_step", also=second)
    ended(place.train(run, words, before=fault), [75], errors=0)
    stopped = checkpoints(run)[8]
    state = json.loads((stopped / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["TrainerControl"]["args"]["should_evaluate"]
    assert state["stateful_callbacks"]["average"] == {"updates": 8}
    weights, average = (load_file(stopped / name) for name in (WEIGHTS, f"{AVERAGED}/{WEIGHTS}"))
    assert not same(weights, average)
    ended(place.train(run, words), [0], errors=0)
    check_same_averages(run, whole_average)


@pytest.mark.slow
def test_a_damaged_average(place: Place, whole_average: Run, tmp_path: Path) -> None:
    """Its checkpoint is passed over for the one before, as with any other damage."""
    run, words = Run(tmp_path / "run"), "training.ema_decay=0.9"
    ended(place.train(run, words, before=at(send(signal.SIGTERM), step=11)), [75], errors=0)
    flip(run.checkpoints / "checkpoint-12" / AVERAGED / WEIGHTS)
    told = ended(place.train(run, words), [0], errors=0)
    assert f"checkpoint-12: {AVERAGED}/{WEIGHTS} is not what was written" in told
    assert f"resuming from {run.checkpoints / 'checkpoint-10'}" in told
    check_same_averages(run, whole_average)


@pytest.mark.slow
def test_a_run_is_not_resumed_with_another_average(whole_average: Run, place: Place) -> None:
    before = hashlib.sha256(whole_average.recipe.read_bytes())
    told = ended(place.train(whole_average, "training.ema_decay=0.8"), [1])
    assert "training.ema_decay was 0.9, is 0.8" in told
    assert hashlib.sha256(whole_average.recipe.read_bytes()).digest() == before.digest()


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["training.ema_decay=1"], "training.ema_decay: found 1, expected less than 1"),
        (["training.ema_decay=-0.1"], "training.ema_decay: found -0.1, expected greater than or equal to 0"),
        (["training.ema_decay=0.9", "training.optim=schedule_free_adamw"], "averages the weights itself"),
        (["training.ema_decay=0.9", "training.fsdp=full_shard"], "leave it out, or fsdp"),
        (["training.ema_decay=0.9", "training.deepspeed=zero.json"], "leave it out, or deepspeed"),
    ],
)
def test_what_a_recipe_cannot_ask_for(words: list[str], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("digits", words)
    assert told in str(caught.value)


def test_a_divided_model_is_refused() -> None:
    check_undivided("training.ema_decay", {})
    for name, said in (("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed")):
        with pytest.raises(RunError, match=rf"training\.ema_decay .*\({said}\)"):
            check_undivided("training.ema_decay", {f"ACCELERATE_USE_{name}": "true"})


def test_a_divided_model_is_refused_before_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RunError, match=r"training\.ema_decay"):
        finetune(tiny_recipe(tmp_path / "nowhere", tmp_path / "run", training={"ema_decay": 0.9}))


# --------------------------------------------------------------------------- several processes


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_keep_the_average_of_one(forks: ForkServer, tmp_path: Path) -> None:
    """Two processes, stopped and gone on with, end with the weights, averages and scores of one alone."""
    world = worlds.Place(forks, tmp_path, worlds.draw_photos(tmp_path / "photos"))
    runs, word = [], "training.ema_decay=0.9"
    for name, division, stop in (
        ("alone", worlds.Division(1, 8, 1), None),
        ("two", worlds.Division(2, 4, 1), None),
        ("stopped", worlds.Division(2, 4, 1), worlds.Signal(signal.SIGTERM, 7, 1)),
    ):
        run, children = world.start(name, division, word, signal=stop)
        if stop:
            ended(children, [75, 75], errors=0)
            run, children = world.start(name, division, word)
        worlds.finish(children)
        runs.append(run)
    alone, two, stopped = runs
    worlds.check_same_results(two, alone)
    check_same_averages(stopped, two)
    for name in (WEIGHTS, f"{AVERAGED}/{WEIGHTS}"):
        last, other = (load_file(max(checkpoints(run).items())[1] / name) for run in (alone, two))
        for key, value in last.items():
            if not key.endswith("key.bias"):  # see worlds.weights
                torch.testing.assert_close(other[key], value, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.distributed
def test_running_statistics_are_those_of_the_first_process(forks: ForkServer, tmp_path: Path) -> None:
    """Each process has statistics of its own images: all evaluate the average that is saved."""
    recipe = tiny_recipe(
        draw_folder(tmp_path / "photos"), tmp_path / "run", model={"config": RESNET},
        training={"ema_decay": 0.9}, evaluation={"batch_size": 2},
    )  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(recipe.to_yaml(resolved=False))
    words = ("train", tmp_path / "tiny.yaml")
    worlds.finish(forks.start_world(tmp_path / "world", 2, *words, before=QUICK))
    run = Run(tmp_path / "run")
    history = {e["step"]: e["eval_loss"] for e in json.loads(run.history.read_text()) if "eval_loss" in e}
    published = json.loads(run.report("validation").read_text())["log_loss"]
    assert published == pytest.approx(history[run.read_provenance()["best_step"]], abs=1e-6)


def test_what_is_frozen_is_not_kept_twice(pretrained: Path) -> None:
    """Of LoRA the matrices and the head: it would be the memory of the whole model for nothing."""
    config = ModelConfig(path=str(pretrained), method="lora")
    model, _ = load_model(config, ["a", "b", "c"])
    adapt(model, config)
    average = WeightAverage(0.9)
    average.begin(model)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert average.averages.keys() == learning.keys() and len(learning) == 10
    more = estimate_memory(model, averages=True)[0] - estimate_memory(model)[0]
    assert more == 4 * sum(parameter.numel() for parameter in learning.values())
