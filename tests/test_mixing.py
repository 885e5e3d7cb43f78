"""MixUp and CutMix: what is mixed, by how much, and that a run with them is as exact as one without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from exactness import (
    AUGMENTED,
    DROPOUT,
    EPSILON,
    EVERY_SECOND,
    build_trainer,
    same,
    weights_of,
    with_and_without_a_break,
)
from torch.utils.data import DataLoader

from vit_finetune.data.augmentation import generator_of
from vit_finetune.data.batches import EpochSampler
from vit_finetune.data.mixing import build_mixing, mix
from vit_finetune.data.transforms import NO_LABEL, collate, normalize
from vit_finetune.recipe import AugmentationConfig

BOTH = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}


def batch(size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of one value each, so that a mixed one shows its share, and their labels."""
    values = torch.arange(1.0, size + 1)
    return values[:, None, None, None].expand(size, 3, 16, 12).clone(), torch.arange(size) % 3


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_targets_are_mixed_as_the_images_are(kind: str) -> None:
    """For 200 draws: image i and the one before it, in the same shares as their targets."""
    mixing = build_mixing(AugmentationConfig(**{f"{kind}_alpha": 0.7}), 3)
    assert mixing is not None
    images, labels = batch()
    shares = []
    for seed in range(200):
        torch.manual_seed(seed)
        mixed, targets = mix(mixing, images, labels)
        assert targets.dtype == torch.float32 and targets.shape == (6, 3)
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        other = images.roll(1, 0)
        if kind == "mixup":
            share = (mixed[0, 0, 0, 0] - other[0, 0, 0, 0]) / (images[0, 0, 0, 0] - other[0, 0, 0, 0])
            torch.testing.assert_close(mixed, share * images + (1 - share) * other)
        else:
            assert ((mixed == images) | (mixed == other)).all()
            kept = mixed == images
            rows, columns = kept[0, 0].logical_not().nonzero(as_tuple=True)
            if len(rows):  # what is not kept is one rectangle, the same in every image
                box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
                assert len(rows) == box and all(one.equal(kept[0, 0]) for one in kept.flatten(0, 1))
            share = kept.float().mean()
        one_hot = torch.nn.functional.one_hot(labels, 3).float()
        torch.testing.assert_close(targets, share * one_hot + (1 - share) * one_hot.roll(1, 0))
        shares.append(float(share))
    drawn = torch.tensor(shares)
    if kind == "mixup":  # Beta(0.7, 0.7): mean 1/2, variance 1 / (4 (2α + 1))
        assert abs(float(drawn.mean()) - 0.5) < 0.08
        assert abs(float(drawn.var()) - 1 / (4 * 2.4)) < 0.03
        assert drawn.min() < 0.1
    assert drawn.max() > 0.9 and drawn.std() > 0.1


def test_with_both_half_of_the_batches_get_either() -> None:
    mixing = build_mixing(AugmentationConfig(**BOTH), 3)
    assert mixing is not None
    images, labels = batch()
    torch.manual_seed(0)
    pasted = sum(
        bool(((mixed == images) | (mixed == images.roll(1, 0))).all())
        for mixed in (mix(mixing, images, labels)[0] for _ in range(400))
    )
    assert 160 < pasted < 240


def test_off_is_no_mixing() -> None:
    assert build_mixing(AugmentationConfig(), 3) is None


def test_what_only_fills_a_place_is_mixed_with_nothing() -> None:
    mixing = build_mixing(AugmentationConfig(mixup_alpha=1), 3)
    assert mixing is not None
    images, labels = batch()
    filled = torch.cat([labels[:4], torch.full((2,), NO_LABEL)])
    torch.manual_seed(1)
    mixed, targets = mix(mixing, images, filled)
    torch.manual_seed(1)
    alone, same_targets = mix(mixing, images[:4], labels[:4])
    assert mixed.equal(alone) and targets.equal(same_targets)
    nothing = torch.full((6,), NO_LABEL)
    assert mix(mixing, images, nothing)[1].equal(nothing)


def trained_with(folder: Path, tmp_path: Path, name: str, callbacks: Any = None, **training: Any) -> Any:
    """A trainer of mixed batches with smoothed targets."""
    recipe = tiny_recipe(
        folder, tmp_path, model=DROPOUT, augmentation={**AUGMENTED, **BOTH},
        training={"label_smoothing_factor": 0.1, "num_train_epochs": 3, **training},
    )  # fmt: skip
    trainer = build_trainer(recipe, tmp_path / name, callbacks)
    return trainer


@pytest.mark.slow
def test_training_equals_a_plain_loop(folder: Path, tmp_path: Path) -> None:
    """With smoothing: the targets are mixed first, and each of them is smoothed, as timm has it."""
    trainer = trained_with(
        folder, tmp_path, "ours", weight_decay=0.0, warmup_steps=0, lr_scheduler_type="constant",
        load_best_model_at_end=False, max_grad_norm=0.0, adam_epsilon=EPSILON,
    )  # fmt: skip
    model = trained_with(folder, tmp_path, "plain").model
    mixing, images, seed = trainer.mixing, trainer.train_dataset, trainer.args.seed
    trainer.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=EPSILON, weight_decay=0.0)
    sampler, step = EpochSampler(len(images), seed), 0
    model.train()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for one in DataLoader(images, batch_size=4, sampler=sampler, collate_fn=collate):
            torch.manual_seed(generator_of(seed, step, "batch 0").getrandbits(63))
            pixels, targets = mixing(normalize(one["pixel_values"], trainer.image_processor), one["labels"])
            smoothed = targets * 0.9 + 0.1 / 3
            loss = -(smoothed * model(pixels).logits.log_softmax(-1)).sum(-1).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    assert step == trainer.state.max_steps
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, atol=2e-6, rtol=0)
    assert trainer.model.config.problem_type == "single_label_classification"


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [5, 8])
def test_resumed_equals_uninterrupted(folder: Path, tmp_path: Path, kill_at: int) -> None:
    whole, resumed = with_and_without_a_break(
        lambda name, callbacks=None: trained_with(folder, tmp_path, name, callbacks, **EVERY_SECOND),
        tmp_path,
        kill_at,
    )
    assert same(weights_of(resumed.model), weights_of(whole.model))


@pytest.mark.slow
def test_only_training_is_mixed(folder: Path, tmp_path: Path) -> None:
    """Validation sees every image as it is: its loss is that of a trainer that does not mix."""
    mixed, plain = trained_with(folder, tmp_path, "mixed"), trained_with(folder, tmp_path, "plain")
    plain.mixing = None
    assert mixed.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
