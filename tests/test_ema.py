"""The average of the weights: its values, when it stands in for them, and that runs with it are as exact as others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from conftest import TINY_VIT, tiny_recipe
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
from safetensors.torch import load_file

from vit_finetune.data.transforms import collate, normalize
from vit_finetune.model.loading import load_model
from vit_finetune.recipe import ModelConfig
from vit_finetune.training.ema import AVERAGED, WeightAverage
from vit_finetune.training.hardware import estimate_memory
from vit_finetune.training.trainer import ViTTrainer

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
