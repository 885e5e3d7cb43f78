"""LoRA in training: against a plain loop, killed and resumed, recomputed, by two processes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from exactness import (
    AUGMENTED,
    EPSILON,
    EVERY_SECOND,
    build_trainer,
    same,
    weights_of,
    with_and_without_a_break,
)
from fork_server import ForkServer
from test_lora import LABELS, PROJECTIONS, lora_recipe, plain_twin
from torch import nn
from torch.utils.data import DataLoader
from worlds import Division, Place, Trained, check_same, draw_photos, finish

from vit_finetune.data.batches import EpochSampler
from vit_finetune.data.splits.carving import load_splits
from vit_finetune.data.transforms import TrainingImages, collate, normalize
from vit_finetune.model.loading import load_model
from vit_finetune.model.lora import (
    WEIGHTS,
)


@pytest.mark.slow
def test_training_equals_a_plain_loop(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    """With layer decay and weight decay, which the matrices have and biases do not."""
    training = {"weight_decay": 0.1, "layer_decay": 0.5, "lr_scheduler_type": "constant", "warmup_steps": 0,
                "adam_epsilon": EPSILON, "load_best_model_at_end": False, "max_grad_norm": 0.0}  # fmt: skip
    recipe = lora_recipe(folder, pretrained, tmp_path, augmentation=AUGMENTED, training=training)
    trainer = build_trainer(recipe, tmp_path / "trainer")
    twin = plain_twin(trainer.model, pretrained)
    trainer.train()
    rates = []
    for number, layer in enumerate(twin.vit.layers):
        for name in PROJECTIONS:
            one = getattr(layer.attention, name)
            rates += [(one.a, 3e-3 * 0.5 ** (2 - number), 0.1), (one.b, 3e-3 * 0.5 ** (2 - number), 0.1)]
    rates += [(twin.classifier.weight, 3e-3, 0.1), (twin.classifier.bias, 3e-3, 0.0)]
    optimizer = torch.optim.AdamW(
        [{"params": [p], "lr": lr, "weight_decay": decay} for p, lr, decay in rates], eps=EPSILON
    )
    _, processor = load_model(recipe.model, LABELS)
    images = TrainingImages(load_splits(recipe.data)["train"], processor, recipe.augmentation, recipe.training.seed)  # fmt: skip
    sampler = EpochSampler(len(images), recipe.training.seed)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for batch in DataLoader(images, batch_size=4, sampler=sampler, collate_fn=collate):
            logits = twin(normalize(batch["pixel_values"], processor)).logits
            nn.functional.cross_entropy(logits, batch["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad()
    pixels = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(trainer.model.eval()(pixels).logits, twin(pixels).logits, atol=1e-5, rtol=0)
    for number, layer in enumerate(twin.vit.layers):
        found = trainer.model.vit.layers[number].attention.q_proj
        torch.testing.assert_close(
            found.lora_B["default"].weight, layer.attention.q_proj.b, atol=1e-5, rtol=0
        )
        assert layer.attention.q_proj.b.abs().max() > 1e-4


@pytest.mark.slow
def test_resumed_equals_uninterrupted(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    """With an average of the weights, drop path and mixed images; checkpoints hold the adapter alone."""
    recipe = lora_recipe(
        folder,
        pretrained,
        tmp_path,
        augmentation={**AUGMENTED, "mixup_alpha": 0.8},
        model={"drop_path_rate": 0.3},
        training={**EVERY_SECOND, "num_train_epochs": 3, "ema_decay": 0.9},
    )
    whole, resumed = with_and_without_a_break(partial(build_trainer, recipe), tmp_path, 7)
    checkpoint = tmp_path / "killed" / "checkpoint-15"
    assert (checkpoint / WEIGHTS).is_file() and not (checkpoint / "model.safetensors").exists()
    assert (checkpoint / "ema" / WEIGHTS).is_file()
    assert same(weights_of(resumed.model), weights_of(whole.model))
    losses = [[e["eval_loss"] for e in one.state.log_history if "eval_loss" in e] for one in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 8


@pytest.mark.slow
def test_recomputing_activations_changes_nothing(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    """The frozen embeddings give layers inputs without a gradient, through which it must still be passed on."""
    found = []
    for recomputed in (False, True):
        recipe = lora_recipe(
            folder, pretrained, tmp_path, training={"gradient_checkpointing": recomputed, "max_steps": 3}
        )
        trainer = build_trainer(recipe, tmp_path / str(recomputed))
        trainer.train()
        found.append(weights_of(trainer.model))
    assert same(*found)
    assert found[0]["vit.layers.0.attention.q_proj.lora_B.default.weight"].abs().max() > 0


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_as_one(forks: ForkServer, pretrained: Path, tmp_path: Path) -> None:
    place = Place(forks, tmp_path, draw_photos(tmp_path / "photos"))
    words = ["model.config=null", f"model.path={pretrained}", "model.method=lora"]
    found = []
    for name, division in {"one": Division(1, 8, 1), "two": Division(2, 2, 2)}.items():
        run, children = place.start(name, division, *words)
        finish(children)
        found.append(Trained(run, [children]))
    assert found[0].steps() == found[1].steps()
    check_same(found[1], found[0])
