"""The average of the weights: its values, when it stands in for them, and that runs with it are as exact as others."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from conftest import TINY_VIT, draw_folder, tiny_recipe
from exactness import (
    AUGMENTED,
    DROPOUT,
    EVERY_SECOND,
    Diary,
    Killed,
    build_trainer,
    same,
    weights_of,
    with_and_without_a_break,
)
from fork_server import QUICK, ForkServer
from harmed_runs import Place, at, check_same_end, checkpoints, ended, flip, send
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from vit_finetune.data.transforms import collate, normalize
from vit_finetune.finetuning import finetune
from vit_finetune.model.adaptation import adapt
from vit_finetune.model.loading import load_model
from vit_finetune.publishing.card import build_card
from vit_finetune.publishing.report import build_report
from vit_finetune.recipe import ModelConfig, RecipeError, load_recipe
from vit_finetune.run import Run, RunError
from vit_finetune.training.ema import AVERAGED, WeightAverage
from vit_finetune.training.hardware import estimate_memory
from vit_finetune.training.trainer import ViTTrainer
from vit_finetune.training.world import check_undivided

MIXED = {**AUGMENTED, "mixup_alpha": 0.8, "cutmix_alpha": 1.0}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8],
    "depths": [1, 1],
    "image_size": 16,
}
WEIGHTS = "model.safetensors"


def averaged(
    start: dict[str, torch.Tensor], steps: list[dict[str, torch.Tensor]], decay: float
) -> dict[str, torch.Tensor]:
    """The average as its definition has it, in double precision."""
    average = {name: value.double() for name, value in start.items()}
    for number, weights in enumerate(steps, 1):
        share = min(decay, (1 + number) / (10 + number))
        average = {name: share * average[name] + (1 - share) * weights[name].double() for name in average}
    return average


def check_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), atol=1e-6, rtol=0)


def trainer_of(
    folder: Path, output: Path, callbacks: Any = None, model: Any = None, **training: Any
) -> ViTTrainer:
    """A trainer of images that are augmented and mixed, with dropout; nine tenths remain of the average."""
    recipe = tiny_recipe(
        folder, output, model=model or DROPOUT, augmentation=MIXED,
        training={"ema_decay": 0.9, "num_train_epochs": 3, **EVERY_SECOND, **training},
    )  # fmt: skip
    return build_trainer(recipe, output, callbacks)


# --------------------------------------------------------------------------- values


@pytest.mark.parametrize("config", [TINY_VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("decay", [0.25, 0.9])
def test_it_is_what_its_definition_says(config: dict[str, Any], decay: float) -> None:
    """Of parameters and running statistics, for as long as it warms up (72 steps to 0.9) and after."""
    torch.manual_seed(0)
    model, _ = load_model(ModelConfig(config=config), ["a", "b", "c"])
    floats = {name for name, value in model.state_dict().items() if value.is_floating_point()}
    average, start, steps = WeightAverage(decay), weights_of(model), []
    average.begin(model)
    for _ in range(100):
        for name, value in model.state_dict().items():
            value += torch.randn_like(value) if name in floats else 1
        average.update()
        steps.append(weights_of(model))
    assert average.last_decay == decay and average.updates == 100
    expected = averaged(
        {name: start[name] for name in floats},
        [{name: step[name] for name in floats} for step in steps],
        decay,
    )
    for name, value in expected.items():
        torch.testing.assert_close(average.averages[name].double(), value, atol=1e-5, rtol=1e-6)
    with average.swapped_in():
        counted = {name: value for name, value in model.state_dict().items() if name not in floats}
        assert all(value.equal(steps[-1][name]) for name, value in counted.items())
    assert bool(counted) == (config is RESNET)


def test_the_first_steps_are_soon_forgotten() -> None:
    """Step t leaves (1 + t) / (10 + t) of the average, or the recipe's decay."""
    average = WeightAverage(0.5)
    shares = []
    for updates in (1, 2, 7, 8, 9):
        average.updates = updates
        shares.append(average.last_decay)
    assert shares == pytest.approx([2 / 11, 3 / 12, 8 / 17, 0.5, 0.5])


def test_it_takes_the_place_of_the_weights_and_gives_it_back() -> None:
    """In the very tensors that the optimizer and DDP know; also where what is done meanwhile fails."""
    model, _ = load_model(ModelConfig(config=TINY_VIT), ["a", "b", "c"])
    average, start = WeightAverage(0.9), weights_of(model)
    average.begin(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    moved, places = weights_of(model), [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(Killed), average.swapped_in():
        assert same(weights_of(model), start)
        assert [parameter.data_ptr() for parameter in model.parameters()] == places
        raise Killed
    assert same(weights_of(model), moved) and same(average.averages, start)
    average.end()
    assert same(weights_of(model), start) and not average.averages
    assert [parameter.data_ptr() for parameter in model.parameters()] == places


def test_a_step_that_loss_scaling_passes_over_is_none() -> None:
    """With torch's own scaler: an infinite gradient, and then a finite one."""
    model, _ = load_model(ModelConfig(config=TINY_VIT), ["a", "b", "c"])
    average = WeightAverage(0.9)
    average.begin(model)
    Accelerator(cpu=True)  # which the optimizer asks for the state of
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler)
    updates = []
    for factor in (float("inf"), 1.0):
        scaler.scale(factor * sum(parameter.sum() for parameter in model.parameters())).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.on_step_end(None, None, None, optimizer=optimizer)
        updates.append(average.updates)
    assert updates == [0, 1]


def test_the_memory_that_it_takes_is_planned() -> None:
    model, _ = load_model(ModelConfig(config=TINY_VIT), ["a", "b", "c"])
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert estimate_memory(model, averages=True)[0] == estimate_memory(model)[0] + weights


# --------------------------------------------------------------------------- training


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_trained_evaluated_and_left(folder: Path, tmp_path: Path, bf16: bool) -> None:
    """Training is what it is without; each evaluation scores the average, and so does what is left in the model."""
    diary, plain = Diary(), Diary()
    trainer = trainer_of(folder, tmp_path / "with", [diary], bf16=bf16, load_best_model_at_end=False)
    start = weights_of(trainer.model)
    trainer.train()
    trainer_of(folder, tmp_path / "without", [plain], bf16=bf16, ema_decay=0.0).train()
    steps = list(diary.steps.values())
    assert len(steps) == 15 and all(same(ours, theirs) for ours, theirs in zip(steps, plain.steps.values()))
    check_close(weights_of(trainer.model), averaged(start, steps, 0.9))
    assert all(value.dtype == torch.float32 for value in trainer.model.state_dict().values())

    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert list(losses) == [2, 4, 6, 8, 10, 12, 14, 15]
    images = trainer.eval_dataset
    batch = collate([images[row] for row in range(len(images))])
    pixels = normalize(batch["pixel_values"], trainer.image_processor)
    model = trainer.model.eval()
    for step, loss in losses.items():
        model.load_state_dict(averaged(start, steps[:step], 0.9))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(pixels).logits.double()
        expected = torch.nn.functional.cross_entropy(logits, batch["labels"])
        assert loss == pytest.approx(float(expected), abs=1e-2 if bf16 else 1e-5)


@pytest.mark.slow
def test_off_is_nothing(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path / "c", ema_decay=0.0, max_steps=2)
    assert trainer.average is None
    assert not any(isinstance(one, WeightAverage) for one in trainer.callback_handler.callbacks)
    trainer.train()
    assert not list((tmp_path / "c").rglob(AVERAGED))


@pytest.mark.slow
def test_the_best_average_is_what_training_ends_with(folder: Path, tmp_path: Path) -> None:
    diary = Diary()
    trainer = trainer_of(folder, tmp_path / "c", [diary], metric_for_best_model="loss", max_steps=8)
    start = weights_of(trainer.model)
    losses, original = iter([0.5, 0.1, 0.7, 0.9]), trainer.evaluate
    trainer.evaluate = lambda *a, **k: {**original(*a, **k), "eval_loss": next(losses)}  # type: ignore[method-assign]
    trainer.train()
    assert trainer.state.best_global_step == 4
    check_close(weights_of(trainer.model), averaged(start, [diary.steps[n] for n in range(1, 5)], 0.9))
    # Evaluated once more, it is what it is: there is no average to take its place.
    ended_with = weights_of(trainer.model)
    original()
    assert same(weights_of(trainer.model), ended_with)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill_at", "options"),
    [
        (5, {}),
        (8, {}),
        (11, {"bf16": True}),
        (8, {"model": {"config": RESNET}}),
        (5, {"load_best_model_at_end": False}),
    ],
    ids=["5", "8", "bf16", "resnet", "last"],
)
def test_resumed_equals_uninterrupted(
    folder: Path, tmp_path: Path, kill_at: int, options: dict[str, Any]
) -> None:
    whole, resumed = with_and_without_a_break(
        lambda output_dir, callbacks=None: trainer_of(folder, output_dir, callbacks, **options),
        tmp_path,
        kill_at,
    )
    newest = tmp_path / "killed" / "checkpoint-15"
    assert not same(load_file(newest / WEIGHTS), load_file(newest / AVERAGED / WEIGHTS))
    assert same(weights_of(resumed.model), weights_of(whole.model))
    for name in (WEIGHTS, f"{AVERAGED}/{WEIGHTS}"):
        last, other = (tmp_path / which / "checkpoint-15" / name for which in ("whole", "killed"))
        assert last.read_bytes() == other.read_bytes()
    assert resumed.average.updates == whole.average.updates == 15
    logs = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (whole, resumed)]
    assert logs[0] == logs[1]


# --------------------------------------------------------------------------- runs


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
