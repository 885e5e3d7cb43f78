"""learning_rate: auto — the range test's curve and choice, and that training is what it is with the number written."""

from __future__ import annotations

import bisect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_recipe
from exactness import AUGMENTED, EPSILON
from torch.utils.data import DataLoader

from vit_finetune.data.batches import EpochSampler
from vit_finetune.data.mixing import build_mixing
from vit_finetune.data.splits.carving import load_splits
from vit_finetune.data.transforms import TrainingImages, collate, normalize
from vit_finetune.model.adaptation import adapt
from vit_finetune.model.loading import load_model
from vit_finetune.recipe import Recipe
from vit_finetune.run import RunError
from vit_finetune.training import range_test
from vit_finetune.training.hardware import choose_hardware
from vit_finetune.training.loading import choose_loading
from vit_finetune.training.range_test import (
    HIGHEST,
    LOWEST,
    STEPS,
    Curve,
    choose_rate,
    run_range_test,
)

AUTO = {"learning_rate": "auto"}
MIXED = {**AUGMENTED, "mixup_alpha": 0.8, "cutmix_alpha": 1.0}
GRID = [LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1)) for step in range(STEPS)]


def curve_of(losses: Any) -> Curve:
    """The curve of a test that sees these losses."""
    curve = Curve()
    for rate, loss in zip(GRID, losses):
        if curve.add(rate, float(loss)):
            break
    return curve


def range_tested(
    recipe: Recipe, prepare: Any = None
) -> tuple[Curve, tuple[torch.nn.Module, Any, TrainingImages]]:
    """A range test as `finetune` makes it, and what it is given."""
    splits = load_splits(recipe.data)
    torch.manual_seed(recipe.training.seed)
    model, processor = load_model(recipe.model, splits["train"].features["label"].names)
    adapt(model, recipe.model)
    if prepare:
        prepare(model)
    hardware = choose_hardware(recipe.training, recipe.model, model)
    images = TrainingImages(splits["train"], processor, recipe.augmentation, recipe.training.seed)
    loading = choose_loading(recipe.training, "off", images, model, hardware)
    mixing = build_mixing(recipe.augmentation, model.config.num_labels)
    curve = run_range_test(
        model, processor, recipe.training, hardware, loading, images, mixing, None, lambda: None
    )
    return curve, (model, processor, images)


# --------------------------------------------------------------------------- the curve


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(4, 1), (2, 2)], ids=["4", "2x2"])
def test_it_is_a_plain_loop_at_growing_rates(folder: Path, tmp_path: Path, batch: tuple[int, int]) -> None:
    """18 images, 5 steps an epoch: it goes round them 20 times, each time augmented anew; layers in proportion."""
    training = {**AUTO, "weight_decay": 0.1, "layer_decay": 0.7, "head_lr_multiplier": 3.0, "label_smoothing_factor": 0.1,
                "per_device_train_batch_size": batch[0], "gradient_accumulation_steps": batch[1],
                "adam_epsilon": EPSILON}  # fmt: skip
    recipe = tiny_recipe(folder, tmp_path / "run", augmentation=AUGMENTED, training=training)
    curve, (model, processor, images) = range_tested(recipe)

    rates = {}
    for name, parameter in model.named_parameters():
        depth = 0 if "embeddings" in name else int(name.split(".")[2]) + 1 if ".layers." in name else 3
        factor = 0.7 ** (3 - depth) * (3.0 if name.startswith("classifier") else 1.0)
        rates[parameter] = (factor, 0.1 if parameter.ndim > 1 and "embeddings.cls" not in name and "position" not in name else 0.0)  # fmt: skip
    optimizer = torch.optim.AdamW(
        [{"params": [p], "lr": factor, "weight_decay": decay} for p, (factor, decay) in rates.items()],
        eps=EPSILON,
    )
    sampler, losses, epoch = EpochSampler(len(images), recipe.training.seed), [], 0
    model.train()
    while len(losses) < STEPS:
        sampler.set_epoch(epoch)
        for images_of_step in DataLoader(images, batch_size=4, sampler=sampler, collate_fn=collate):
            for group, (factor, _) in zip(optimizer.param_groups, rates.values()):
                group["lr"] = GRID[min(len(losses), STEPS - 1)] * factor
            logits = model(normalize(images_of_step["pixel_values"], processor)).logits
            loss = torch.nn.functional.cross_entropy(logits, images_of_step["labels"], label_smoothing=0.1)
            losses.append(loss.item())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        epoch += 1
    assert 60 < len(curve.losses) <= STEPS
    assert curve.rates == pytest.approx(GRID[: len(curve.rates)], rel=1e-9)
    # Where it diverges, rounding grows as the loss does.
    quiet = next(step for step, rate in enumerate(GRID) if rate > 1e-2)
    assert curve.losses[:quiet] == pytest.approx(losses[:quiet], abs=1e-6)


def test_losses_are_smoothed_and_the_test_ends_where_they_diverge() -> None:
    """The average of Adam's moments, corrected for its beginning, as a sum; and the stop at four times the lowest."""
    chance = np.random.default_rng(0)
    losses = np.abs(chance.normal(2, 0.3, STEPS))
    losses[70:] *= np.exp(np.arange(30))
    curve = curve_of(losses)
    for step, smooth in enumerate(curve.smoothed):
        weights = 0.98 ** np.arange(step, -1, -1)
        assert smooth == pytest.approx((weights * losses[: step + 1]).sum() / weights.sum(), rel=1e-12)
    assert curve.smoothed[-1] > 4 * min(curve.smoothed)
    assert all(loss <= 4 * min(curve.smoothed[: step + 1]) for step, loss in enumerate(curve.smoothed[:-1]))
    assert 70 < len(curve.losses) < 80
    losses[40] = np.nan
    assert len(curve_of(losses).losses) == 40


@pytest.mark.slow
def test_the_trainer_stops_where_the_loss_diverges(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first rise, so that a model which hardly diverges in a hundred steps will do."""
    monkeypatch.setattr(range_test, "DIVERGED", 1.0)
    curve, _ = range_tested(tiny_recipe(folder, tmp_path / "run", training=AUTO))
    assert 1 < len(curve.losses) < STEPS // 2
    assert curve.smoothed[-1] > min(curve.smoothed)
    assert curve.smoothed[:-1] == sorted(curve.smoothed[:-1], reverse=True)


# --------------------------------------------------------------------------- the choice


def longest_descents(losses: list[float]) -> tuple[int, int]:
    """End and length of the longest falling subsequence, the first to end of the longest, by patience sorting."""
    tops: list[float] = []
    best = (0, 1)
    for place, loss in enumerate(losses):
        pile = bisect.bisect_left(tops, -loss)
        tops[pile : pile + 1] = [-loss]
        if pile + 1 > best[1]:
            best = (place, pile + 1)
    return best


@pytest.mark.parametrize("seed", range(8))
def test_the_rate_is_in_the_middle_of_the_longest_descent(seed: int) -> None:
    chance = np.random.default_rng(seed)
    steps = np.arange(STEPS)
    fall = 2 - 1.5 / (1 + np.exp(-(steps - 45 - 3 * seed) / 5)) + np.exp((steps - 75 - seed) / 3)
    curve = curve_of(fall + chance.normal(0, 0.05, STEPS))
    used = curve.smoothed[10:-5]
    end, length = longest_descents(used)
    start = end - length
    assert length > 20 and used[end] < used[max(start, 0)]
    expected = curve.rates[10 + start + length // 3 + int(length / 3 / 2)]
    assert choose_rate(curve) == float(f"{expected:.2g}")
    assert 0.3 * length <= 10 + start + length / 2 - 10 - start <= 0.7 * length


def test_a_linear_model_is_given_a_rate_that_converges() -> None:
    """Gradient descent on a quadratic diverges from 2 / λ_max on: the test ends beyond, the choice lies below."""
    chosen = []
    for largest in (1.0, 10.0, 100.0, 1000.0):
        curvatures, limit = largest * np.array([1.0, 0.3, 0.1]), 2 / largest
        weights, losses = np.ones(3), []
        for rate in GRID:
            losses.append(0.5 * float(curvatures @ weights**2) / largest + 1e-3)
            weights = (1 - rate * curvatures) * weights
        curve = curve_of(losses)
        assert curve.rates[-1] > limit
        chosen.append(choose_rate(curve))
        assert limit / 2000 < chosen[-1] < limit
    assert chosen == sorted(chosen, reverse=True) and len(set(chosen)) == len(chosen)


def test_noise_is_hardly_ever_taken_for_a_descent_and_descents_hardly_ever_for_noise() -> None:
    steps, found = np.arange(STEPS), {"nothing": 0, "a descent": 0}
    for seed in range(100):
        noise = 0.1 * np.random.default_rng(seed).standard_normal(STEPS)
        rise = np.exp(np.minimum((steps - 75) / 3, 6)) / 10
        for name, fall in (("nothing", 0.0), ("a descent", 0.25)):
            try:
                choose_rate(curve_of(1.1 - fall / (1 + np.exp(-(steps - 55) / 4)) + rise + noise))
                found[name] += 1
            except RunError:
                pass
    assert found["nothing"] <= 5 and found["a descent"] >= 95


@pytest.mark.parametrize(
    "losses",
    [
        np.full(STEPS, 1.1),
        1.1 + 0.1 * np.random.default_rng(3).standard_normal(STEPS),
        np.linspace(1.0, 2.0, STEPS),
        [1.0, 2.0, np.nan],
        [np.nan],
        0.02 + np.exp(np.arange(STEPS) / 5 - 15.0),
    ],
    ids=["flat", "noise", "rising", "diverges at once", "nothing", "learnt already"],
)
def test_no_descent_is_said(losses: Any) -> None:
    with pytest.raises(RunError, match=r"learning_rate=auto.*did not fall.*write a number"):
        choose_rate(curve_of(losses))
