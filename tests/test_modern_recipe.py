"""All of the modern recipe at once: it trains, resumes exactly after a kill, and leaves a stock model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from conftest import TINY_VIT, tiny_recipe
from exactness import EVERY_SECOND, build_trainer, same, weights_of, with_and_without_a_break
from transformers import ViTForImageClassification, pipeline

from vit_finetune.finetuning import finetune
from vit_finetune.recipe import Recipe

pytestmark = pytest.mark.slow


def modern(folder: Path, output_dir: Path, **training: Any) -> Recipe:
    """MixUp, CutMix, smoothing, EMA, layer decay, a faster head, drop path, 3-Augment and erasing together."""
    return tiny_recipe(
        folder,
        output_dir,
        augmentation={
            "policy": "threeaugment",
            "random_erasing": 0.25,
            "mixup_alpha": 0.8,
            "cutmix_alpha": 1.0,
        },
        model={"config": {**TINY_VIT, "num_hidden_layers": 3}, "drop_path_rate": 0.2},
        training={
            "num_train_epochs": 3,
            "label_smoothing_factor": 0.1,
            "ema_decay": 0.9,
            "layer_decay": 0.75,
            "head_lr_multiplier": 2.0,
            **training,
        },
    )


@pytest.mark.parametrize("kill_at", [5, 8])
def test_resumed_equals_uninterrupted(folder: Path, tmp_path: Path, kill_at: int) -> None:
    recipe = modern(folder, tmp_path, **EVERY_SECOND)
    whole, resumed = with_and_without_a_break(partial(build_trainer, recipe), tmp_path, kill_at)
    assert same(weights_of(resumed.model), weights_of(whole.model))
    losses = [
        [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        for trainer in (whole, resumed)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_what_is_published_is_a_stock_model(folder: Path, tmp_path: Path) -> None:
    run = finetune(modern(folder, tmp_path / "run"))
    plain = finetune(
        tiny_recipe(folder, tmp_path / "plain", model={"config": {**TINY_VIT, "num_hidden_layers": 3}})
    )
    config, expected = (json.loads((one.model / "config.json").read_text()) for one in (run, plain))
    assert config == expected and config["problem_type"] == "single_label_classification"
    model, info = ViTForImageClassification.from_pretrained(run.model, output_loading_info=True)
    assert type(model) is ViTForImageClassification and not any(info.values())
    classify = pipeline("image-classification", model=str(run.model), device="cpu")
    for row in pyarrow.parquet.read_table(run.predictions("test")).to_pylist():
        answer = {item["label"]: item["score"] for item in classify(str(folder / row["id"]), top_k=3)}
        names = [classify.model.config.id2label[number] for number in range(3)]
        assert [answer[name] for name in names] == pytest.approx(row["probabilities"], abs=1e-6)
