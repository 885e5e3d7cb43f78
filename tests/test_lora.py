"""LoRA: against the paper's formula in plain PyTorch, PEFT's own loader, and gone from what is published."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet
import pytest
import torch
import yaml
from conftest import TINY_VIT, Say, tiny_recipe
from exactness import (
    same,
    weights_of,
)
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification, ViTForImageClassification, pipeline

from vit_finetune.evaluation.prediction import predict
from vit_finetune.finetuning import finetune
from vit_finetune.model.adaptation import adapt
from vit_finetune.model.loading import load_checkpoint, load_model
from vit_finetune.model.lora import (
    SETTINGS,
    WEIGHTS,
    has_lora,
    load_adapter,
    merge_lora,
    save_adapter,
)
from vit_finetune.recipe import ModelConfig, Recipe, build_recipe
from vit_finetune.run import Report, Run, RunError
from vit_finetune.training.optim import build_parameter_groups

if TYPE_CHECKING:
    from loopback_hub import LoopbackHub

PEFTS_OWN = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
"""PEFT 0.21 asks transformers 5.23 by an old name."""
PROJECTIONS = ("q_proj", "v_proj")
R, ALPHA = 4, 10.0
LABELS = ["blue", "green", "red"]


def lora_recipe(photos: Path, pretrained: Path, run: Path, **sections: Any) -> Recipe:
    model = {"path": str(pretrained), "method": "lora", "lora_r": R, "lora_alpha": ALPHA}
    model |= sections.pop("model", {})
    values = tiny_recipe(photos, run, **sections).model_dump(exclude_unset=True) | {"model": model}
    return build_recipe(values, name="tiny")


def load(pretrained: Path, **model: Any) -> Any:
    torch.manual_seed(0)
    config = ModelConfig(path=str(pretrained), method="lora", lora_r=R, lora_alpha=ALPHA, **model)
    found, _ = load_model(config, LABELS)
    adapt(found, config)
    return found


def drawn(model: nn.Module) -> None:
    """Gives B, which begins as zeros, values, so that its product counts."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)


class PlainLora(nn.Module):
    """The paper's layer: x Wᵀ + b + alpha / r · (x Aᵀ) Bᵀ."""

    def __init__(self, base: nn.Linear, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.base, self.a, self.b = (
            base,
            nn.Parameter(a.detach().clone()),
            nn.Parameter(b.detach().clone()),
        )
        base.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + ALPHA / R * (x @ self.a.T) @ self.b.T


def plain_twin(model: Any, pretrained: Path) -> ViTForImageClassification:
    """The same model with the paper's layers, its frozen weights out of the checkpoint."""
    twin = ViTForImageClassification.from_pretrained(pretrained, num_labels=3, ignore_mismatched_sizes=True)
    twin.requires_grad_(False)
    twin.classifier.load_state_dict(model.classifier.state_dict())
    twin.classifier.requires_grad_(True)
    for number, layer in enumerate(twin.vit.layers):
        for name in PROJECTIONS:
            theirs = getattr(model.vit.layers[number].attention, name)
            a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
            setattr(layer.attention, name, PlainLora(getattr(layer.attention, name), a, b))
    return twin


# --------------------------------------------------------------------------- the layers


def test_layers_and_gradients_are_the_papers(pretrained: Path) -> None:
    model = load(pretrained)
    images = torch.randn(5, 3, 16, 16)
    torch.manual_seed(0)
    plain, _ = load_model(ModelConfig(path=str(pretrained)), LABELS)
    assert model(images).logits.equal(plain(images).logits)  # B is zero: nothing has changed yet
    drawn(model)
    twin = plain_twin(model, pretrained)
    assert not torch.allclose(model(images).logits, plain(images).logits, atol=1e-2)
    for one in (model, twin):
        nn.functional.cross_entropy(one(images).logits, torch.tensor([0, 1, 2, 0, 1])).backward()
    torch.testing.assert_close(model(images).logits, twin(images).logits, atol=1e-6, rtol=0)
    learnt = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(learnt) == 2 * 2 * len(PROJECTIONS) + 2  # A and B of two layers' projections; the head's two
    for number, layer in enumerate(twin.vit.layers):
        for name in PROJECTIONS:
            at = f"vit.layers.{number}.attention.{name}"
            for half, expected in (("A", getattr(layer.attention, name).a), ("B", getattr(layer.attention, name).b)):  # fmt: skip
                found = learnt[f"{at}.lora_{half}.default.weight"]
                torch.testing.assert_close(found, expected.grad, atol=1e-6, rtol=0)
    torch.testing.assert_close(learnt["classifier.weight"], twin.classifier.weight.grad, atol=1e-6, rtol=0)


def test_merged_it_is_the_stock_model(pretrained: Path) -> None:
    model = load(pretrained)
    drawn(model)
    images = torch.randn(5, 3, 16, 16)
    expected, twin = model(images).logits, plain_twin(model, pretrained)
    merge_lora(model)
    stock = ViTForImageClassification(model.config)
    stock.load_state_dict(model.state_dict())  # strict: the very names of a stock model
    assert not has_lora(model) and type(model) is ViTForImageClassification
    torch.testing.assert_close(stock(images).logits, expected, atol=1e-5, rtol=0)
    plain = twin.vit.layers[1].attention.q_proj
    torch.testing.assert_close(
        stock.vit.layers[1].attention.q_proj.weight,
        plain.base.weight + ALPHA / R * plain.b @ plain.a,
        atol=1e-6,
        rtol=0,
    )


@PEFTS_OWN
def test_an_adapter_is_read_as_it_was_written_by_us_and_by_peft(pretrained: Path, tmp_path: Path) -> None:
    model = load(pretrained)
    drawn(model)
    images = torch.randn(5, 3, 16, 16)
    save_adapter(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix != ".md") == [SETTINGS, WEIGHTS]
    again = load(pretrained)
    load_adapter(again, tmp_path)
    assert again(images).logits.equal(model(images).logits)
    base = AutoModelForImageClassification.from_pretrained(
        pretrained, num_labels=3, ignore_mismatched_sizes=True
    )
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(theirs(images).logits, model.eval()(images).logits, atol=1e-6, rtol=0)
    merged = theirs.merge_and_unload()
    merge_lora(model)
    torch.testing.assert_close(merged(images).logits, model(images).logits, atol=1e-6, rtol=0)


def test_an_adapter_that_does_not_fit_is_refused(pretrained: Path, tmp_path: Path) -> None:
    model = load(pretrained)
    drawn(model)
    save_adapter(model, tmp_path / "a")
    wider = load(pretrained, lora_targets=["q_proj", "v_proj", "fc1"])
    with pytest.raises(RunError, match=r"do not fit ViTFor.*fc1\.lora_A"):
        load_adapter(wider, tmp_path / "a")
    other = shutil.copytree(pretrained, tmp_path / "other")
    changed = load_file(other / "model.safetensors")
    stock, _ = load_model(ModelConfig(config=TINY_VIT), ["x", "y"])
    stock.save_pretrained(other)
    assert changed.keys() == load_file(other / "model.safetensors").keys()
    with pytest.raises(RunError, match=r"trained beside other weights than .*other has now"):
        load_adapter(load(other), tmp_path / "a")
    from safetensors.torch import save_file

    save_file(load_file(tmp_path / "a" / WEIGHTS), tmp_path / "a" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(RunError, match="does not say which weights it was trained beside"):
        load_adapter(load(pretrained), tmp_path / "a")


def test_layer_decay_falls_through_the_matrices(pretrained: Path) -> None:
    """Groups by hand: layer k of n learns at rate × decay^(n + 1 − k), the head at the rate itself."""
    model = load(pretrained, lora_targets=["q_proj", "fc2"])
    groups = build_parameter_groups(model, 1e-2, 0.05, layer_decay=0.5, head_lr_multiplier=3.0)
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    found = {
        name: rate.pop(id(parameter)) for name, parameter in model.named_parameters() if id(parameter) in rate
    }
    assert not rate
    assert found == {
        **{
            f"vit.layers.{number}.{at}.lora_{half}.default.weight": 1e-2 * 0.5 ** (2 - number)
            for number in (0, 1)
            for at in ("attention.q_proj", "mlp.fc2")
            for half in "AB"
        },
        "classifier.weight": pytest.approx(3e-2),
        "classifier.bias": pytest.approx(3e-2),
    }


# --------------------------------------------------------------------------- whole runs


@pytest.mark.slow
@PEFTS_OWN
def test_what_is_published_is_a_stock_model(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    """With classes and resolution of its own; beside it the adapter, which PEFT loads to the same answers."""
    run = finetune(lora_recipe(folder, pretrained, tmp_path / "run", model={"image_size": 24}))
    assert sorted(file.name for file in run.model.iterdir()) == [
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json"),
    ]
    model, info = ViTForImageClassification.from_pretrained(run.model, output_loading_info=True)
    assert not any(info.values()) and model.config.problem_type == "single_label_classification"
    before = ViTForImageClassification.from_pretrained(pretrained).state_dict()
    after = model.state_dict()
    changed = {name for name in after if not (before[name].shape == after[name].shape and after[name].equal(before[name]))}  # fmt: skip
    assert changed == {
        "classifier.weight",
        "classifier.bias",
        "vit.embeddings.position_embeddings",
        *(f"vit.layers.{number}.attention.{name}.weight" for number in (0, 1) for name in PROJECTIONS),
    }
    classify = pipeline("image-classification", model=str(run.model), device="cpu")
    for row in pyarrow.parquet.read_table(run.predictions("test")).to_pylist():
        answer = {item["label"]: item["score"] for item in classify(str(folder / row["id"]), top_k=3)}
        names = [model.config.id2label[number] for number in range(3)]
        assert [answer[name] for name in names] == pytest.approx(row["probabilities"], abs=1e-6)
    torch.manual_seed(5)
    base, _ = load_model(ModelConfig(path=str(pretrained), image_size=24), LABELS)
    theirs = PeftModel.from_pretrained(base, run.adapter).merge_and_unload()
    images = torch.randn(4, 3, 24, 24)
    torch.testing.assert_close(theirs.eval()(images).logits, model(images).logits, atol=1e-6, rtol=0)
    facts = run.read_provenance()["model"]
    assert facts["method"] == "lora" and facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert "LoRA's matrices and the head" in run.report_html.read_text().replace("&#39;", "'")
    assert "fine-tuned with LoRA from " in (run.model / "README.md").read_text()


@pytest.mark.slow
def test_asked_for_the_adapter_alone_is_published(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    merged = finetune(lora_recipe(folder, pretrained, tmp_path / "merged"))
    run = finetune(lora_recipe(folder, pretrained, tmp_path / "run", model={"lora_merge": False}))
    assert sorted(file.name for file in run.model.iterdir()) == [
        *("README.md", SETTINGS, WEIGHTS, "config.json", "preprocessor_config.json"),
    ]
    assert not run.adapter.exists()
    assert same(load_file(run.model / WEIGHTS), load_file(merged.adapter / WEIGHTS))
    assert Report.load(run.report("test")) == Report.load(merged.report("test"))
    ours, _ = load_checkpoint(str(run.model))
    expected, _ = load_checkpoint(str(merged.model))
    assert same(weights_of(ours), weights_of(expected))
    image = next((folder / "red").iterdir())
    assert predict(run.path, [image]) == predict(merged.path, [image])


@pytest.mark.slow
@pytest.mark.hub
@PEFTS_OWN
def test_an_adapter_goes_round_through_the_hub(
    hub: LoopbackHub, say: Say, run: Run, folder: Path, tmp_path: Path
) -> None:
    """Its base by id and commit; verified after pushing, scored by id, and loaded as its card says."""
    assert say("push", run.path, "--repo", "ann/base", "--license", "mit")[0] == 0
    recipe = tmp_path / "adapter.yaml"
    model = {"path": "ann/base", "method": "lora", "lora_merge": False}
    values = tiny_recipe(folder, tmp_path / "adapter", hub={"push": True, "model_id": "ann/adapter"})
    recipe.write_text(yaml.safe_dump(values.model_dump(mode="json", exclude_unset=True) | {"model": model}))
    code, _, told = say("train", recipe)
    assert code == 0 and "test images as reported" in told, told
    settings = json.loads((tmp_path / "adapter" / "model" / SETTINGS).read_text())
    assert settings["base_model_name_or_path"] == "ann/base" and len(settings["revision"]) == 40
    scored = Report.load(tmp_path / "adapter" / "reports" / "test.json")
    code, out, told = say("evaluate", tmp_path / "adapter", "--json")
    assert code == 0 and json.loads(out)["log_loss"] == pytest.approx(scored.log_loss, abs=1e-6), told
    code, out, told = say("predict", "ann/adapter", folder / "red", "--json")
    assert code == 0, told
    card = (tmp_path / "adapter" / "model" / "README.md").read_text()
    assert "library_name: peft" in card and "base_model: ann/base" in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]  # type: ignore[index]
    image = next((folder / "red").iterdir())
    source = snippet.replace('"photo.jpg"', repr(str(image))).replace("print(", "import json; answer = (")
    source += f"\nopen({str(tmp_path / 'answer.json')!r}, 'w').write(json.dumps(answer))"
    done = subprocess.run(
        [sys.executable, "-c", source],
        env=os.environ | hub.environment(hub.token("ann"), tmp_path / "home-ann") | {"HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {one["label"]: one["score"] for one in json.loads((tmp_path / "answer.json").read_text())}
    (expected,) = [one["predictions"] for one in json.loads(out) if one["path"] == str(image)]
    for one in expected:
        assert found[one["label"]] == pytest.approx(one["probability"], abs=1e-6)
