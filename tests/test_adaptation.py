"""Stochastic depth and the head's own learning rate: against plain PyTorch, and gone from what is published."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_VIT, tiny_recipe
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
from test_training import RESNET, build, rate_by_name
from torch import nn
from torch.utils.data import DataLoader
from torchvision.ops import StochasticDepth
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from vit_finetune.checking import check
from vit_finetune.data.augmentation import generator_of
from vit_finetune.data.batches import EpochSampler
from vit_finetune.data.transforms import collate, normalize
from vit_finetune.finetuning import finetune
from vit_finetune.model.adaptation import add_drop_path, find_encoder
from vit_finetune.model.head import is_in_head
from vit_finetune.model.loading import load_checkpoint, load_model
from vit_finetune.recipe import DROP_PATH_MODELS, ModelConfig, RecipeError, build_recipe
from vit_finetune.run import RunError
from vit_finetune.training.optim import build_parameter_groups

RATE = 0.6
LIKE_VIT = ("vit", "deit", "vit_msn", "ijepa")
FOUR_LAYERS = {**TINY_VIT, "num_hidden_layers": 4}
DEEP = {"config": {**DROPOUT["config"], "num_hidden_layers": 4}, "drop_path_rate": RATE}


def plain_layers(layers: nn.ModuleList, hidden: torch.Tensor, rate: float) -> torch.Tensor:
    """Encoder layers as the paper has them, in plain PyTorch: (B, tokens, D)."""
    for number, layer in enumerate(layers):
        keep = 1 - rate * number / (len(layers) - 1)
        for branch in (
            lambda x: layer.attention(layer.layernorm_before(x), None)[0],  # noqa: B023
            lambda x: layer.mlp(layer.layernorm_after(x)),  # noqa: B023
        ):
            out = branch(hidden)
            if number:
                kept = torch.empty(len(hidden), 1, 1).bernoulli_(keep)
                out = out * kept / keep
            hidden = hidden + out
    return hidden


def on_meta(model_type: str, **values: Any) -> PreTrainedModel:
    """An architecture at its default size, without weights in memory."""
    config = AutoConfig.for_model(model_type, **values)
    cls = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    with torch.device("meta"):
        return (cls[0] if isinstance(cls, tuple) else cls)(config)


def rates_of(model: PreTrainedModel) -> list[float]:
    return [module.p for module in model.modules() if isinstance(module, StochasticDepth)]


# --------------------------------------------------------------------------- stochastic depth


@pytest.mark.parametrize("model_type", LIKE_VIT)
def test_branches_are_dropped_as_in_plain_pytorch(model_type: str) -> None:
    """The same draws give the same outputs and gradients, to 1e-6, also through gradient checkpointing."""
    model = build({**FOUR_LAYERS, "model_type": model_type})
    _, layers = find_encoder(model, "key")
    images = torch.randn(16, 5, 16)

    def run(forward: Any) -> list[torch.Tensor]:
        hidden = images.clone().requires_grad_()
        torch.manual_seed(3)
        out = forward(hidden)
        out.square().mean().backward()
        gradients = [p.grad.clone() for p in layers.parameters() if p.grad is not None]
        assert len(gradients) == len(list(layers.parameters()))
        model.zero_grad()
        return [out.detach(), hidden.grad, *gradients]

    plain = run(lambda hidden: plain_layers(layers, hidden, RATE))
    never = run(lambda hidden: plain_layers(layers, hidden, 0.0))
    add_drop_path(model, RATE)

    def ours(hidden: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            hidden = layer(hidden, None)
        return hidden

    found = run(ours) if model.train() else []
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    model.activation_checkpointing_enable()
    assert all(one.equal(other) for one, other in zip(run(ours), found, strict=True))
    model.eval()
    torch.testing.assert_close(run(ours), never, atol=1e-6, rtol=0)
    assert not torch.allclose(found[0], never[0], atol=1e-2)


def test_each_image_is_dropped_for_itself_and_kept_ones_make_up_for_it() -> None:
    """Of 4,000 images, in the last layer: a share of `rate` keeps its input, and the mean is what it was."""
    model = build(FOUR_LAYERS).train()
    _, layers = find_encoder(model, "key")
    add_drop_path(model, RATE)
    assert rates_of(model) == pytest.approx(torch.linspace(0, RATE, 4).tolist())
    branch = torch.ones(4000, 5, 16)
    dropped = layers[-1].dropout(branch)
    assert all(len(image.unique()) == 1 for image in dropped[:100])
    values = dropped[:, 0, 0]
    torch.testing.assert_close(values.unique(), torch.tensor([0.0, 1 / (1 - RATE)]))
    assert abs(float((values == 0).float().mean()) - RATE) < 0.03
    assert abs(float(values.mean()) - 1) < 0.08


@pytest.mark.parametrize("model_type", [name for name in DROP_PATH_MODELS if name not in LIKE_VIT])
def test_architectures_with_a_place_of_their_own_have_the_rates_that_transformers_gives_them(
    model_type: str,
) -> None:
    model, theirs = on_meta(model_type), on_meta(model_type, drop_path_rate=RATE)
    config, names = model.config.to_dict(), list(model.state_dict())
    add_drop_path(model, RATE)
    found = [getattr(m.drop_path, "p", 0.0) for m in model.modules() if hasattr(m, "drop_path")]
    expected = [getattr(m.drop_path, "drop_prob", 0.0) for m in theirs.modules() if hasattr(m, "drop_path")]
    assert len(found) == len(expected) > 4
    if "dinov2" in model_type:  # they have the same rate in all layers
        assert set(expected) == {RATE}
        expected = torch.linspace(0, RATE, len(found)).tolist()
    assert found == pytest.approx(expected, abs=1e-6)
    assert model.config.to_dict() == config and list(model.state_dict()) == names
    add_drop_path(model, 0)
    assert set(rates_of(model)) == {0.0}


@pytest.mark.parametrize("model_type", LIKE_VIT)
@pytest.mark.parametrize("rate", [None, 0.0])
def test_off_changes_nothing(model_type: str, rate: float | None) -> None:
    model = build({**FOUR_LAYERS, "model_type": model_type})
    before = repr(model)
    add_drop_path(model, rate)
    assert repr(model) == before
    assert ModelConfig(config=TINY_VIT).drop_path_rate is None


def test_unset_an_architecture_keeps_its_own_rate() -> None:
    swin = on_meta("swin", drop_path_rate=0.1)
    before = repr(swin)
    add_drop_path(swin, None)
    assert repr(swin) == before and "SwinDropPath(p=0.1)" in before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"config": TINY_VIT, "drop_path_rate": 1}, "model.drop_path_rate: found 1, expected less than 1"),
        ({"path": "a/b", "drop_path_rate": 1.0}, "model.drop_path_rate: found 1.0, expected less than 1"),
        ({"path": "a/b", "drop_path_rate": -0.1}, "model.drop_path_rate: found -0.1, expected greater than"),
        ({"path": "a/b", "drop_path_rate": float("nan")}, "model.drop_path_rate: found nan, expected"),
        ({"path": "a/b", "drop_path_rate": "high"}, "model.drop_path_rate: found 'high', expected a number"),
        (
            {"config": RESNET, "drop_path_rate": 0.1},
            "model: drop_path_rate cannot drop layers of resnet models",
        ),
        (
            {"config": {"model_type": "swin", "drop_path_rate": 0.2}, "drop_path_rate": 0.1},
            "config.drop_path_rate say it twice: leave out one of them",
        ),
    ],
)
def test_rates_that_cannot_be_are_refused_with_the_recipe(model: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        build_recipe({"data": {"path": "photos"}, "model": model})
    assert message in str(refused.value)
    assert str(refused.value).count("\n") == 0


def test_a_checkpoint_whose_layers_cannot_be_dropped_is_refused(folder: Path, tmp_path: Path) -> None:
    model, processor = load_model(ModelConfig(config=RESNET), ["blue", "green", "red"])
    model.save_pretrained(tmp_path / "resnet")
    processor.save_pretrained(tmp_path / "resnet")
    told = {"config": None, "path": str(tmp_path / "resnet"), "image_size": 32, "drop_path_rate": 0.1}
    recipe = tiny_recipe(folder, tmp_path / "run", model=told)
    for verb in (check, finetune):
        with pytest.raises(RunError, match=r"model\.drop_path_rate cannot drop layers of resnet models.*vit"):
            verb(recipe)
    assert not (tmp_path / "run").exists()
    add_drop_path(model, 0)  # nothing to drop, and nothing dropped


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {**FOUR_LAYERS, "model_type": "vit"},
        {
            "model_type": "swin",
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 8,
            "depths": [1, 2],
            "num_heads": [1, 2],
            "window_size": 4,
        },
    ],
    ids=lambda config: config["model_type"],
)
def test_what_is_published_has_no_trace_of_it(folder: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    """The same config.json, class and names of tensors as without; other weights."""
    rates = {"without": None, "with": RATE}
    runs = {
        name: finetune(tiny_recipe(folder, tmp_path / name, model={"config": config, "drop_path_rate": rate}))
        for name, rate in rates.items()
    }
    plain, published = (AutoModelForImageClassification.from_pretrained(run.model) for run in runs.values())
    assert len({(run.model / "config.json").read_text() for run in runs.values()}) == 1
    assert type(published) is type(plain)
    assert published.state_dict().keys() == plain.state_dict().keys()
    assert not same(weights_of(published), weights_of(plain))
    assert not rates_of(published) and not rates_of(load_checkpoint(str(runs["with"].model))[0])
    assert "drop_path_rate: 0.6" in runs["with"].recipe.read_text()


# --------------------------------------------------------------------------- in the Trainer


@pytest.mark.slow
def test_training_equals_a_plain_loop(folder: Path, tmp_path: Path) -> None:
    """Drop path, layer decay and the head's multiplier together."""
    model_section = {"config": FOUR_LAYERS, "drop_path_rate": RATE}
    training = {"weight_decay": 0.1, "layer_decay": 0.7, "head_lr_multiplier": 5.0, "warmup_steps": 0,
                "load_best_model_at_end": False, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
                "adam_epsilon": EPSILON}  # fmt: skip
    recipe = tiny_recipe(folder, tmp_path, model=model_section, training=training)
    trainer = build_trainer(recipe, tmp_path / "ours")
    trainer.train()
    torch.manual_seed(recipe.training.seed)
    model, processor = load_model(recipe.model, ["blue", "green", "red"])
    groups = []
    for name, parameter in model.named_parameters():
        depth = 0 if "embeddings" in name else int(name.split(".")[2]) + 1 if ".layers." in name else 5
        rate = 3e-3 * 0.7 ** (5 - depth) * (5 if name.startswith("classifier") else 1)
        decay = 0.1 if parameter.ndim > 1 and "embeddings.cls" not in name and "position" not in name else 0.0
        groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, eps=EPSILON)
    images, step = trainer.train_dataset, 0
    sampler = EpochSampler(len(images), recipe.training.seed)
    model.train()
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for batch in DataLoader(images, batch_size=4, sampler=sampler, collate_fn=collate):
            torch.manual_seed(generator_of(recipe.training.seed, step, "batch 0").getrandbits(63))
            hidden = model.vit.embeddings(normalize(batch["pixel_values"], processor))
            hidden = model.vit.layernorm(plain_layers(model.vit.layers, hidden, RATE))
            nn.functional.cross_entropy(model.classifier(hidden[:, 0]), batch["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    assert step == trainer.state.max_steps
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, atol=2e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill_at", "more"), [(5, {}), (8, {}), (5, {"gradient_checkpointing": True, "bf16": True})]
)
def test_resumed_equals_uninterrupted(
    folder: Path, tmp_path: Path, kill_at: int, more: dict[str, Any]
) -> None:
    """With dropout, mixing, smoothing, layer decay and the head's multiplier; the best checkpoint is restored, too."""
    options = {
        **EVERY_SECOND,
        "num_train_epochs": 3,
        "layer_decay": 0.7,
        "head_lr_multiplier": 3.0,
        "label_smoothing_factor": 0.1,
        **more,
    }
    mixed = {**AUGMENTED, "mixup_alpha": 0.8, "cutmix_alpha": 1.0}
    recipe = tiny_recipe(folder, tmp_path, model=DEEP, augmentation=mixed, training=options)
    whole, resumed = with_and_without_a_break(partial(build_trainer, recipe), tmp_path, kill_at)
    assert resumed.state.global_step == whole.state.global_step == 15
    assert same(weights_of(resumed.model), weights_of(whole.model))


@pytest.mark.slow
def test_compiled_training_equals_eager(folder: Path, tmp_path: Path) -> None:
    """With a backend that needs no compiler; batches of two sizes, training and evaluation."""
    results = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        training = {"adam_epsilon": EPSILON, "layer_decay": 0.7, "head_lr_multiplier": 3.0, **compiled}
        recipe = tiny_recipe(folder, tmp_path, model={**DEEP, "config": FOUR_LAYERS}, training=training)
        torch._dynamo.reset()
        trainer = build_trainer(recipe, tmp_path / f"run{len(results)}")
        trainer.train()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (2 if compiled else 0)
        assert not torch._dynamo.utils.counters["graph_break"]
        results.append(weights_of(trainer.model))
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=2e-6, rtol=0)


@pytest.mark.slow
def test_only_training_drops(folder: Path, tmp_path: Path) -> None:
    dropping = build_trainer(tiny_recipe(folder, tmp_path, model=DEEP), tmp_path / "dropping")
    plain = build_trainer(
        tiny_recipe(folder, tmp_path, model={**DEEP, "drop_path_rate": None}), tmp_path / "plain"
    )
    assert same(weights_of(dropping.model), weights_of(plain.model))
    assert dropping.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


# --------------------------------------------------------------------------- the head's learning rate


def test_a_small_encoder_below_a_large_head_is_found() -> None:
    model = build(labels=2000)
    assert find_encoder(model, "key") == ("vit.layers", model.vit.layers)


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_the_head_learns_at_a_rate_of_its_own(layer_decay: float) -> None:
    model = build()
    rates = rate_by_name(
        model, learning_rate=1e-2, weight_decay=0.1, layer_decay=layer_decay, head_lr_multiplier=10.0
    )
    expected = {}
    for name, parameter in model.named_parameters():
        depth = 0 if "embeddings" in name else int(name.split(".")[2]) + 1 if ".layers." in name else 3
        rate = 0.1 if name in ("classifier.weight", "classifier.bias") else 1e-2 * layer_decay ** (3 - depth)
        spared = parameter.ndim < 2 or "cls_token" in name or "position_embeddings" in name
        expected[name] = pytest.approx((rate, 0.0 if spared else 0.1))
    assert rates == expected


def test_a_multiplier_of_one_makes_the_groups_that_there_were() -> None:
    model = build()
    for decay in (1.0, 0.5):
        with_, without = (
            build_parameter_groups(model, 1e-3, 0.1, decay, **more)
            for more in ({"head_lr_multiplier": 1.0}, {})
        )
        assert len(with_) == len(without)
        for one, other in zip(with_, without):
            assert [id(p) for p in one.pop("params")] == [id(p) for p in other.pop("params")]
            assert one == other
    assert tiny_recipe("x", "y").training.head_lr_multiplier == 1.0
    assert len(build_parameter_groups(model, 1e-3, 0.1)) == 2


@pytest.mark.parametrize(
    ("model_type", "head"),
    [
        *((name, "classifier") for name in ("vit", "deit", "swin", "resnet", "clip", "siglip", "poolformer")),
        ("textnet", "fc"),
        ("imagegpt", "score"),
    ],
)
def test_the_head_is_known_by_its_name(model_type: str, head: str) -> None:
    model = on_meta(model_type)
    found = {name.split(".")[0] for name, _ in model.named_parameters() if is_in_head(name)}
    assert found == {head}
    compiled = torch.compile(model, backend="eager")
    assert sum(is_in_head(name) for name, _ in compiled.named_parameters()) == len(
        list(getattr(model, head).parameters())
    )


def test_a_model_without_a_head_apart_is_named() -> None:
    with pytest.raises(RunError, match=r"training\.head_lr_multiplier.*PerceiverForImageClassification"):
        build_parameter_groups(on_meta("perceiver"), 1e-3, 0.1, head_lr_multiplier=2.0)


@pytest.mark.parametrize("value", [0, -1])
def test_multipliers_that_teach_nothing_are_refused(value: float) -> None:
    with pytest.raises(
        RecipeError, match=f"training.head_lr_multiplier: found {value}, expected greater than 0"
    ):
        tiny_recipe("x", "y", training={"head_lr_multiplier": value})
