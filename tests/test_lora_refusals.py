"""What LoRA refuses, by name and before any data is read; and switched off, nothing of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from test_lora import LABELS, load, lora_recipe

from vit_finetune.checking import check
from vit_finetune.finetuning import finetune
from vit_finetune.model.adaptation import adapt
from vit_finetune.model.loading import load_model
from vit_finetune.model.lora import (
    has_lora,
)
from vit_finetune.recipe import ModelConfig, RecipeError, load_recipe
from vit_finetune.run import RunError

if TYPE_CHECKING:
    pass


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model.method=lora"], "method lora keeps the encoder as it is"),
        (
            [
                "model.config=null",
                "model.path=x/y",
                "model.method=lora",
                "model.lora_merge=false",
                "model.image_size=32",
            ],
            "others have at its own size",
        ),
        (["model.lora_r=4"], "lora_r belongs to method lora, and method is full"),
        (["model.config=null", "model.path=x/y", "model.method=lora", "model.lora_targets=[]"], "at least 1"),
        (["model.config=null", "model.path=x/y", "model.method=lora", "training.fsdp=full_shard"], "fsdp"),
    ],
)
def test_what_a_recipe_cannot_ask_for(words: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe("digits", words)


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (
            ["query"],
            "'query' matches no layer of ViTForImageClassification; expected some of projection, q_proj",
        ),
        (["q_proj", "q_pro"], "'q_pro' matches no layer"),
        (["classifier"], "'classifier' is the head"),
    ],
)
def test_targets_that_match_nothing_are_refused_before_the_data(
    pretrained: Path, tmp_path: Path, targets: list[str], told: str
) -> None:
    recipe = lora_recipe(tmp_path / "nowhere", pretrained, tmp_path / "run", model={"lora_targets": targets})
    for verb in (finetune, check):
        with pytest.raises(RunError) as caught:
            verb(recipe)
        assert f"model.lora_targets: {told}" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_running_statistics_are_refused(tmp_path: Path) -> None:
    config = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "image_size": 16}  # fmt: skip
    model, processor = load_model(ModelConfig(config=config), LABELS)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(RunError, match="ResNetForImageClassification has running statistics"):
        load(tmp_path, lora_targets=["convolution"])


def test_a_divided_model_is_refused(
    folder: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RunError, match=r"model\.method: lora needs the whole model .*\(FSDP\)"):
        finetune(lora_recipe(folder, pretrained, tmp_path / "run"))


def test_an_adapter_to_a_folder_of_this_machine_is_not_published(
    folder: Path, pretrained: Path, tmp_path: Path
) -> None:
    recipe = lora_recipe(
        folder,
        pretrained,
        tmp_path / "run",
        model={"lora_merge": False},
        hub={"push": True, "model_id": "a/b"},
    )
    with pytest.raises(RunError, match="is a folder of this machine"):
        finetune(recipe)
    assert not (tmp_path / "run").exists()


def test_the_library_is_named_where_it_is_missing(
    folder: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RunError, match=r"pip install 'vit-finetune\[lora\]'"):
        finetune(lora_recipe(folder, pretrained, tmp_path / "run"))


def test_switched_off_nothing_is_built(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    """Neither drawn: the next random number is the one that it is without."""
    numbers = []
    for config in (ModelConfig(path=str(pretrained)), None):
        torch.manual_seed(1)
        model, _ = load_model(ModelConfig(path=str(pretrained)), LABELS)
        if config:
            adapt(model, config)
        assert not has_lora(model) and all(p.requires_grad for p in model.parameters())
        numbers.append(torch.rand(1))
    assert numbers[0].equal(numbers[1])
