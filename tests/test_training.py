"""Optimizer groups, losses and hardware choices against plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_VIT, tiny_recipe
from transformers import PreTrainedModel

from vit_finetune.model.loading import load_model
from vit_finetune.recipe import ModelConfig, build_recipe
from vit_finetune.run import RunError
from vit_finetune.training import hardware
from vit_finetune.training.hardware import choose_hardware, estimate_memory
from vit_finetune.training.loss import cross_entropy
from vit_finetune.training.optim import build_parameter_groups, layer_numbers


def build(config: dict[str, object] | None = None, labels: int = 3) -> PreTrainedModel:
    torch.manual_seed(0)
    return load_model(ModelConfig(config=config or TINY_VIT), [str(n) for n in range(labels)])[0]


RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
    "image_size": 16,
}


def rate_by_name(model: PreTrainedModel, **options: float) -> dict[str, tuple[float, float]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_parameter_groups(model, **options)  # type: ignore[arg-type]
    return {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_every_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    model = build()
    groups = build_parameter_groups(model, 1e-3, 0.1)
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters())
    rates = rate_by_name(model, learning_rate=1e-3, weight_decay=0.1)
    undecayed = {name for name, (_, decay) in rates.items() if decay == 0}
    assert {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"} <= undecayed
    assert undecayed == {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 or "cls_token" in name or "position_embeddings" in name
    }


def test_layer_decay_falls_from_the_head_to_the_embeddings() -> None:
    rates = rate_by_name(build(), learning_rate=1.0, weight_decay=0.0, layer_decay=0.5)
    lr = {name: rate for name, (rate, _) in rates.items()}
    # Two layers: embeddings 0, layers 1 and 2, the final norm and the head 3.
    assert lr["classifier.weight"] == lr["vit.layernorm.weight"] == 1.0
    assert lr["vit.layers.1.mlp.fc1.weight"] == 0.5
    assert lr["vit.layers.0.mlp.fc1.weight"] == 0.25
    assert lr["vit.embeddings.cls_token"] == lr["vit.embeddings.position_embeddings"] == 0.125


@pytest.mark.parametrize("model_type", ["deit", "dinov2", "beit"])
def test_layer_decay_knows_the_vit_family(model_type: str) -> None:
    config = {
        key: value for key, value in TINY_VIT.items() if model_type != "dinov2" or key != "intermediate_size"
    }
    numbers = layer_numbers(build({**config, "model_type": model_type}))
    assert set(numbers.values()) == {0, 1, 2, 3}


def test_layer_decay_is_refused_for_a_cnn_and_frozen_parameters_are_left_out() -> None:
    model = build(RESNET)
    with pytest.raises(RunError, match=r"layer_decay.*ResNet"):
        build_parameter_groups(model, 1e-3, 0.1, layer_decay=0.9)
    for parameter in model.resnet.parameters():
        parameter.requires_grad = False
    groups = build_parameter_groups(model, 1e-3, 0.1)
    assert sum(p.numel() for group in groups for p in group["params"]) == 16 * 3 + 3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_parts_adds_up_and_soft_targets_equal_hard_ones(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 5), torch.randint(0, 5, (8,))
    soft = torch.nn.functional.one_hot(labels, 5).float()
    whole = cross_entropy(logits, labels, smoothing)
    parts = sum(cross_entropy(logits[i : i + 2], labels[i : i + 2], smoothing, 8) for i in range(0, 8, 2))
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(cross_entropy(logits, soft, smoothing, 8), whole)
    # Against the formula: targets (1 - s) one-hot + s / classes.
    targets = soft * (1 - smoothing) + smoothing / 5
    torch.testing.assert_close(whole, -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean())


def test_memory_estimate_counts_weights_and_grows_with_the_image() -> None:
    small, large = build(), build({**TINY_VIT, "image_size": 32})
    fixed, each = estimate_memory(small)
    assert fixed == 16 * sum(p.numel() for p in small.parameters())
    assert estimate_memory(large)[1] > 3 * each  # 65 tokens for 17


def test_hardware_says_why_and_does_what_the_recipe_says() -> None:
    model = build()
    before = torch.get_rng_state()
    recipe = build_recipe(
        {
            "data": {"path": "x"},
            "model": {"config": TINY_VIT},
            "training": {"per_device_train_batch_size": "auto", "use_cpu": True},
        }
    )
    chosen = choose_hardware(recipe.training, recipe.model, model)
    assert torch.equal(before, torch.get_rng_state())  # asking the machine leaves training's randomness alone
    assert [choice.name for choice in chosen.choices] == [
        "precision",
        "attention",
        "batch",
    ]
    assert all(choice.reason for choice in chosen.choices)
    assert 1 <= chosen.batch_size <= 128 and chosen.use_cpu
    set_ = recipe.training.model_copy(update={"bf16": True})
    told = choose_hardware(set_, recipe.model.model_copy(update={"attn_implementation": "eager"}), model)
    assert (told.bf16, told.attn_implementation) == (True, "eager")
    # A resumed run computes as it did before, whatever this machine would choose now.
    resumed = choose_hardware(
        recipe.training,
        recipe.model,
        model,
        {"choices": [{"name": n, "value": v} for n, v in
                     [("precision", "bf16"), ("attention", "eager"), ("batch", "6")]], "images_per_step": 12},
    )  # fmt: skip
    assert (resumed.bf16, resumed.attn_implementation, resumed.batch_size) == (True, "eager", 6)
    assert resumed.accumulation == 2  # a step has as many images as it had
    with pytest.raises(RunError, match="both"):
        choose_hardware(set_.model_copy(update={"fp16": True}), recipe.model, model)


def test_the_precision_is_the_one_whose_step_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, times = [], {"bf16": 0.0}

    def measure(model: Any, device: Any, autocast: Any, batch_size: int) -> float:
        measured.append((model.config._attn_implementation, autocast, batch_size))
        return 1.0 if autocast is None else times["bf16"]

    monkeypatch.setattr(hardware, "measure_step", measure)
    recipe = build_recipe(
        {"data": {"path": "x"}, "model": {"config": TINY_VIT}, "training": {"use_cpu": True}}
    )
    for times["bf16"], expected in ((0.5, (True, "eager")), (1.0, (False, "sdpa")), (2.0, (False, "sdpa"))):
        chosen = choose_hardware(recipe.training, recipe.model, build())
        assert (chosen.bf16, chosen.attn_implementation) == expected
    # Each with the attention that it would have.
    assert set(measured) == {("sdpa", None, 32), ("eager", torch.bfloat16, 32)}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_shared_casts_change_no_answer_and_gradients_by_rounding_only(attention: str) -> None:
    pixels, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    logits, plain, gradients = [], [], []
    for shared in (False, True):
        model = build()
        model.set_attn_implementation(attention)
        if shared:
            hardware.share_casts(model)
            norms = [m for n, m in model.named_modules() if m._forward_hooks]
            assert len(norms) == 2 * TINY_VIT["num_hidden_layers"]
        plain.append(model(pixel_values=pixels).logits)
        with torch.autocast("cpu", torch.bfloat16):
            logits.append(model(pixel_values=pixels).logits)
        cross_entropy(logits[-1].float(), labels).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(*plain)  # without autocast nothing is cast
    assert torch.equal(*logits)
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.9999
    assert not torch.equal(*gradients)  # the casts are shared indeed


def test_norms_of_other_architectures_are_left_alone() -> None:
    model = build(RESNET)
    hardware.share_casts(model)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_processes_are_started_as_the_recipe_says(folder: Path, tmp_path: Path, workers: int) -> None:
    from exactness import build_trainer

    words = {
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": False,
        "dataloader_multiprocessing_context": "spawn",
    }
    trainer = build_trainer(tiny_recipe(folder, tmp_path, training=words), tmp_path / "c")
    assert not trainer.args.dataloader_persistent_workers
    assert len(next(iter(trainer.get_eval_dataloader()))["labels"]) > 0
    told = tiny_recipe(folder, tmp_path, training={"dataloader_num_workers": workers})
    assert build_trainer(told, tmp_path / "d").args.dataloader_persistent_workers == (workers > 0)


def test_a_tracker_that_is_not_installed_is_named(folder: Path, tmp_path: Path) -> None:
    from exactness import build_trainer

    with pytest.raises(RunError, match="report_to: wandb is not installed"):
        build_trainer(tiny_recipe(folder, tmp_path, training={"report_to": "wandb"}), tmp_path / "c")


@pytest.mark.parametrize("bf16", [False, True])
def test_the_trainer_shares_casts_where_a_cpu_computes_in_bf16(
    folder: Path, tmp_path: Path, bf16: bool
) -> None:
    from exactness import build_trainer

    trainer = build_trainer(tiny_recipe(folder, tmp_path, training={"bf16": bf16}), tmp_path / "run")
    assert any(module._forward_hooks for module in trainer.model.modules()) == bf16
