"""Models: strict about weights, exact about resolution, stock when saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY_VIT
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from vit_finetune.model.loading import (
    describe_model,
    load_checkpoint,
    load_model,
    restore_weights,
)
from vit_finetune.model.resolution import interpolate_positions
from vit_finetune.recipe import ModelConfig
from vit_finetune.run import RunError

SIZES = {k: v for k, v in TINY_VIT.items() if k != "image_size"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A saved classifier of three classes at 16 pixels."""
    torch.manual_seed(0)
    model, processor = load_model(ModelConfig(config=TINY_VIT), ["a", "b", "c"])
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_weights(folder: Path, edit: object) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)  # type: ignore[operator]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_only_the_head_is_new_and_the_rest_is_the_checkpoints(checkpoint: Path) -> None:
    old = ViTForImageClassification.from_pretrained(checkpoint).state_dict()
    model, _ = load_model(ModelConfig(path=str(checkpoint)), ["x", "y"])
    new = model.state_dict()
    assert [n for n in new if not (n in old and new[n].equal(old[n]))] == [
        "classifier.weight",
        "classifier.bias",
    ]
    assert model.config.id2label == {0: "x", 1: "y"}
    assert model.config.problem_type == "single_label_classification"


@pytest.mark.parametrize("labels", [["x", "y", "z"], ["c", "b", "a"]])
def test_as_many_other_classes_get_a_new_head(checkpoint: Path, labels: list[str]) -> None:
    old = ViTForImageClassification.from_pretrained(checkpoint).state_dict()
    model, _ = load_model(ModelConfig(path=str(checkpoint)), labels)
    new = model.state_dict()
    changed = [name for name in new if not new[name].equal(old[name])]
    assert changed == ["classifier.weight"]  # the bias is 0 in both
    assert 0.01 < new["classifier.weight"].std() < 0.03  # ViTConfig's initializer_range is 0.02


def test_the_same_classes_keep_the_head(checkpoint: Path) -> None:
    old = ViTForImageClassification.from_pretrained(checkpoint).state_dict()
    model, _ = load_model(ModelConfig(path=str(checkpoint)), ["a", "b", "c"])
    assert all(new.equal(old[name]) for name, new in model.state_dict().items())


def test_a_base_model_with_pooler_gives_its_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = ViTModel(ViTConfig(**TINY_VIT))
    base.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    model, _ = load_model(ModelConfig(path=str(tmp_path)), ["x", "y"])
    expected = {n: p for n, p in base.state_dict().items() if not n.startswith("pooler")}
    assert all(model.vit.state_dict()[name].equal(value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("vit.encoder.layer.1.layernorm_after.bias"), r"1 missing \(vit\.layers\.1\.layernorm_after\.bias"),
        (lambda s: s.update({"vit.encoder.layer.9.extra": torch.zeros(2)}), r"1 unexpected \(vit\.layers\.9\.extra"),
        (
            lambda s: s.update({"vit.embeddings.cls_token": torch.zeros(1, 1, 5)}),
            r"1 of another shape \(vit\.embeddings\.cls_token",
        ),
    ],
)  # fmt: skip
def test_anything_else_is_an_error_that_names_it(checkpoint: Path, edit: object, message: str) -> None:
    edit_weights(checkpoint, edit)
    with pytest.raises(RunError, match=message):
        load_model(ModelConfig(path=str(checkpoint)), ["x", "y"])
    with pytest.raises(RunError, match=message):
        load_checkpoint(str(checkpoint))


def test_a_saved_model_needs_its_head(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda s: s.pop("classifier.bias"))
    with pytest.raises(RunError, match=r"classifier\.bias"):
        load_checkpoint(str(checkpoint))


def test_restoring_gives_every_tensor(checkpoint: Path) -> None:
    saved, _ = load_checkpoint(str(checkpoint))
    torch.manual_seed(1)
    live, _ = load_model(ModelConfig(config=TINY_VIT), ["a", "b", "c"])
    assert not live.classifier.weight.equal(saved.classifier.weight)
    restore_weights(live, checkpoint)
    assert all(value.equal(saved.state_dict()[name]) for name, value in live.state_dict().items())


def test_pickles_and_empty_folders_are_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(RunError, match="no weights"):
        load_checkpoint(str(checkpoint))
    torch.save({}, checkpoint / "pytorch_model.bin")
    with pytest.raises(RunError, match=r"pickles \(pytorch_model\.bin\)"):
        load_model(ModelConfig(path=str(checkpoint)), ["x", "y"])


def test_a_damaged_file_is_named(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"\x10" * 100)
    with pytest.raises(RunError, match=r"model.*damaged"):
        load_checkpoint(str(checkpoint))


def test_positions_interpolate_the_grid_alone() -> None:
    torch.manual_seed(0)
    positions = torch.randn(1, 2 + 3 * 4, 8)
    assert interpolate_positions(positions, (3, 4), (3, 4)).equal(positions)
    larger = interpolate_positions(positions, (3, 4), (6, 4))
    assert larger.shape == (1, 2 + 6 * 4, 8) and larger[:, :2].equal(positions[:, :2])
    # Rows and columns must not be exchanged: a grid that only varies along rows stays so.
    rows = torch.arange(3.0).reshape(3, 1, 1).expand(3, 4, 8).reshape(1, 12, 8)
    grid = interpolate_positions(rows, (3, 4), (6, 8)).reshape(6, 8, 8)
    torch.testing.assert_close(grid, grid[:, :1].expand(6, 8, 8))
    assert (grid[1:, 0, 0] > grid[:-1, 0, 0] - 1e-6).all()
    with pytest.raises(RunError, match="do not fit"):
        interpolate_positions(positions, (9, 9), (3, 3))


def test_upsampling_equals_transformers_own_interpolation() -> None:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**TINY_VIT))
    embeddings = model.vit.embeddings
    theirs = embeddings.interpolate_pos_encoding(torch.zeros(1, 65, 16), 32, 32)
    ours = interpolate_positions(embeddings.position_embeddings, (4, 4), (8, 8))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("size", [(24, 24), (16, 32), (8, 8)])
def test_another_size_needs_no_flag(checkpoint: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    model, processor = load_model(ModelConfig(path=str(checkpoint), image_size=size), ["x", "y"])
    model.save_pretrained(tmp_path / "resized")
    processor.save_pretrained(tmp_path / "resized")
    stock = AutoModelForImageClassification.from_pretrained(tmp_path / "resized")
    image = torch.zeros(3, 40, 30, dtype=torch.uint8)
    inputs = AutoImageProcessor.from_pretrained(tmp_path / "resized")(image, return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == size
    torch.testing.assert_close(stock(**inputs).logits, model.eval()(**inputs).logits)
    patches = size[0] * size[1] // 16
    assert describe_model(stock)["tokens"] == patches + 1


def test_sizes_that_the_patch_does_not_divide_are_refused(checkpoint: Path) -> None:
    with pytest.raises(RunError, match="write 28 or 32"):
        load_model(ModelConfig(path=str(checkpoint), image_size=30), ["x", "y"])
    with pytest.raises(RunError, match=r"width of 18.*write 16 or 20"):
        load_model(ModelConfig(config=SIZES, image_size=(16, 18)), ["x", "y"])


def test_unknown_and_misplaced_config_keys() -> None:
    for extra, message in (
        ({"hiden_size": 3}, "did you mean hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size.*expected int"),
        ({"num_labels": 3}, "classes come from the data"),
        ({"model_type": "vitt"}, "knows no 'vitt'"),
        ({"model_type": "bert"}, "bert"),
    ):
        with pytest.raises(RunError, match=message):
            load_model(ModelConfig(config={**TINY_VIT, **extra}), ["x", "y"])


def test_cropping_is_recorded_in_a_stock_processor(checkpoint: Path, tmp_path: Path) -> None:
    _, processor = load_model(ModelConfig(path=str(checkpoint), resize="crop", crop_fraction=0.8), ["x", "y"])
    processor.save_pretrained(tmp_path / "p")
    saved = json.loads((tmp_path / "p" / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "BitImageProcessor"
    assert saved["size"] == {"shortest_edge": 20} and saved["crop_size"] == {"height": 16, "width": 16}
    # A checkpoint that crops goes on cropping, at its own fraction, unless the recipe says otherwise.
    processor.save_pretrained(checkpoint)
    _, kept = load_model(ModelConfig(path=str(checkpoint), image_size=32), ["x", "y"])
    assert dict(kept.size)["shortest_edge"] == 40
    _, squashed = load_model(ModelConfig(path=str(checkpoint), resize="squash"), ["x", "y"])
    assert (squashed.size["height"], squashed.size["width"]) == (16, 16)


@pytest.mark.parametrize(
    "config",
    [
        {
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "layer_type": "basic",
        },
        {
            "model_type": "dinov2",
            **{key: value for key, value in SIZES.items() if key != "intermediate_size"},
        },
        {"model_type": "deit", **SIZES},
        {
            "model_type": "swin",
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [1, 1],
            "window_size": 2,
            "patch_size": 4,
        },
    ],
    ids=lambda config: str(config["model_type"]),
)
def test_other_architectures_stand_beside_the_vit(config: dict[str, object], tmp_path: Path) -> None:
    model, processor = load_model(ModelConfig(config=config, image_size=32), ["x", "y"])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = load_checkpoint(str(tmp_path))
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(again(pixels).logits, model.eval()(pixels).logits)
    resized, _ = load_model(ModelConfig(path=str(tmp_path), image_size=64), ["x", "y", "z"])
    assert resized(torch.rand(1, 3, 64, 64)).logits.shape == (1, 3)


def test_a_pretrained_resnet_takes_the_size_of_its_processor(tmp_path: Path) -> None:
    """Its config says none; what plans the training asks the model for it."""
    from vit_finetune.training.hardware import image_size_of

    resnet = {
        "model_type": "resnet",
        "layer_type": "basic",
        "embedding_size": 8,
        "hidden_sizes": [8],
        "depths": [1],
    }
    model, processor = load_model(ModelConfig(config=resnet, image_size=32), ["a", "b"])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["image_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = load_model(ModelConfig(path=str(tmp_path)), ["a", "b", "c"])
    assert image_size_of(model) == (32, 32)
